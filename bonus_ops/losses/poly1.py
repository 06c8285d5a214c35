"""Poly-1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import GapLoss

__all__ = ["Poly1"]


@dataclass(frozen=True)
class Poly1(GapLoss):
    """Poly-1: ``L = -log p + epsilon (1 - p)``.

    ``A = (1 - p) (1 + epsilon p)``; ``epsilon=0`` is cross-entropy.

    Args:
        epsilon: first polynomial coefficient, >= -1. Default 1.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Leng et al., PolyLoss, ICLR 2022, https://arxiv.org/abs/2204.12511, the Poly-1 form.
    """

    kernel: ClassVar[Any] = "poly1"
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        self.check_fields(epsilon="[-1, inf)")

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(gap) + self.epsilon * torch.sigmoid(-gap)

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-gap) * (1 + self.epsilon * torch.sigmoid(gap))
