"""Generalized cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import GapLoss

__all__ = ["GeneralizedCrossEntropy"]


@dataclass(frozen=True)
class GeneralizedCrossEntropy(GapLoss):
    """Generalized cross-entropy (GCE): ``L = (1 - p^q) / q``, robust to label noise.

    ``A = (1 - p) p^q``; ``q -> 0`` is cross-entropy, ``q=1`` is half the absolute error.

    Args:
        q: exponent in (0, 1]. Default .7, the paper's.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels,
        NeurIPS 2018, https://arxiv.org/abs/1805.07836, eq. 6.
    """

    kernel: ClassVar[Any] = "generalized_cross_entropy"
    q: float = 0.7

    def __post_init__(self) -> None:
        self.check_fields(q="(0, 1]")

    def value(self, gap: Tensor) -> Tensor:
        return -torch.expm1(self.q * logsigmoid(gap)) / self.q

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-gap) * torch.exp(self.q * logsigmoid(gap))
