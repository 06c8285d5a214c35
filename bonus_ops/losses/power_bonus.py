"""Cross-entropy plus a power of p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .bonus import Bonus

__all__ = ["PowerBonus"]


@dataclass(frozen=True)
class PowerBonus(Bonus):
    """Cross-entropy plus the power bonus ``b(p) = -p^gamma``.

    ``A = (1 - p) (1 + strength gamma p^gamma)``. ``gamma=1`` is Poly-1 up to a constant.

    Args:
        gamma: exponent > 0, the paper's bonus_gamma. Default 1.
        strength, start, abrupt: as in `LogBonus`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, the power form of the encouraging loss.
    """

    kernel: ClassVar[Any] = "power_bonus"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(gamma="(0, inf)")

    def bonus(self, gap: Tensor) -> Tensor:
        return -torch.exp(self.gamma * logsigmoid(gap))

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        return self.gamma * torch.exp(self.gamma * logsigmoid(gap)) * rest

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        return -(p**self.gamma)

    def bonus_parameters(self) -> tuple[float, ...]:
        return (self.gamma,)
