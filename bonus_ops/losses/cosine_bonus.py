"""Cross-entropy plus a cosine of p."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .bonus import Bonus

__all__ = ["CosineBonus"]


@dataclass(frozen=True)
class CosineBonus(Bonus):
    """Cross-entropy plus the cosine bonus ``b(p) = cos(pi p) - 1``.

    ``A = (1 - p) (1 + strength pi p sin(pi p))``.

    Args:
        strength, start, abrupt: as in `LogBonus`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537; the form is bonus_gamma=-2 of the paper's code.
    """

    kernel: ClassVar[Any] = "cosine_bonus"

    def bonus(self, gap: Tensor) -> Tensor:
        return -2 * torch.sin(math.pi / 2 * torch.sigmoid(gap)) ** 2

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        return math.pi * torch.sin(math.pi * torch.minimum(p, rest)) * p * rest  # sin(pi p) = sin(pi (1 - p))

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        return -2 * torch.sin(math.pi / 2 * p) ** 2
