"""Cross-entropy plus the logarithmic bonus of a share of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .bonus import Bonus

__all__ = ["SubDataBonus"]


@dataclass(frozen=True)
class SubDataBonus(Bonus):
    """Cross-entropy plus the logarithmic bonus of a share ``k`` of the data.

    ``b(p) = log max(1 - k p, clamp)``, ``A = (1 - p) (1 + strength k p / (1 - k p))``; ``k=1`` is `LogBonus` at
    ``log_end=1``.

    Args:
        k: in (0, 1], the paper's sub-data factor. Default 1.
        clamp: lower bound inside the logarithm, or None. Default 1e-5.
        strength, start, abrupt: as in `LogBonus`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537; the form is an option of the paper's code.
    """

    kernel: ClassVar[Any] = "sub_data_bonus"
    k: float = 1.0
    clamp: float | None = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(k="(0, 1]", clamp="(0, 1) or None")

    def _log_share(self, gap: Tensor) -> Tensor:
        """Return log(1 - k p), stable where p -> 1."""
        if self.k == 1:
            return logsigmoid(-gap)
        return torch.where(
            gap < 0, torch.log1p(-self.k * torch.sigmoid(gap)), torch.log((1 - self.k) + self.k * torch.sigmoid(-gap))
        )

    def bonus(self, gap: Tensor) -> Tensor:
        log_share = self._log_share(gap)
        return log_share if self.clamp is None else log_share.clamp(min=math.log(self.clamp))

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        # at k = 1 the quotient rest / (1 - k p) is 0 / 0 for a huge gap
        slope = p if self.k == 1 else self.k * p * rest / ((1 - self.k) + self.k * rest)
        return slope if self.clamp is None else torch.where(self._log_share(gap) >= math.log(self.clamp), slope, 0.0)

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        return torch.log(((1 - self.k) + self.k * rest).clamp(min=self._lowest_share()))

    def _lowest_share(self) -> float:
        return self.clamp or torch.finfo(torch.float32).tiny

    def bonus_parameters(self) -> tuple[float, ...]:
        return self.k, 1 - self.k, -math.inf if self.clamp is None else math.log(self.clamp)
