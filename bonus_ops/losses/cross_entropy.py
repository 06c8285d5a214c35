"""Plain cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import GapLoss

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy(GapLoss):
    """Plain cross-entropy, what ``bonus=None`` means.

    ``L = -log p = softplus(-gap)``, ``A = 1 - p``. Range [0, inf) nats.
    """

    kernel: ClassVar[Any] = "cross_entropy"
    adds_to_cross_entropy: ClassVar[bool] = True

    def is_cross_entropy(self) -> bool:
        return True

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(gap)

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-gap)

    def excess(self, gap: Tensor) -> Tensor:
        return torch.zeros_like(gap)

    def excess_slope(self, gap: Tensor) -> Tensor:
        return torch.zeros_like(gap)

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return torch.zeros_like(p)
