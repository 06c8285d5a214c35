"""Soft targets, shares of the classes: smoothed labels, probabilities, class weights.

Cross-entropy is paid by shares ``t`` and what a loss adds to it by shares ``v``, both [..., C]:

    t_k = weight_k       ((1 - smoothing) h_k + smoothing / C)
    v_k = bonus_weight_k ((1 - bonus_smoothing) h_k + bonus_smoothing / C)

with ``h`` the one-hot label or the given probabilities. Every row has a label: of probabilities, their argmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Share", "SoftTargets"]


class Share(NamedTuple):
    """``weight_k (keep h_k + off)``."""

    keep: float
    off: float
    weight: Tensor | None

    def of(self, hard: Tensor) -> Tensor:
        """Return the shares [..., C] for ``h``."""
        share = hard * self.keep + self.off
        return share if self.weight is None else share * self.weight


class SoftTargets(NamedTuple):
    """What turns the labels of a batch into shares."""

    probabilities: Tensor | None  # [outer, inner, C]; None for class indices
    weight: Tensor | None  # [C]
    bonus_weight: Tensor | None  # [C]; None is as weight
    smoothing: float
    bonus_smoothing: float

    def hard(self, label: Tensor, n_classes: int, dtype: torch.dtype) -> Tensor:
        """Return ``h`` [..., C]."""
        if self.probabilities is not None:
            return self.probabilities.to(torch.promote_types(dtype, self.probabilities.dtype))
        return (torch.arange(n_classes, device=label.device) == label[..., None]).to(dtype)

    def of_cross_entropy(self, n_classes: int) -> Share:
        """Return t."""
        return Share(1 - self.smoothing, self.smoothing / max(n_classes, 1), self.weight)

    def of_bonus(self, n_classes: int) -> Share:
        """Return v."""
        weight = self.weight if self.bonus_weight is None else self.bonus_weight
        return Share(1 - self.bonus_smoothing, self.bonus_smoothing / max(n_classes, 1), weight)
