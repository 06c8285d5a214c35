"""Targets as shares of the classes: smoothed labels, probabilities, class weights.

Cross-entropy is paid by shares ``t`` and what a loss adds to it by shares ``v``, both [..., C]:

    t_k = weight_k       ((1 - smoothing) h_k + smoothing / C)
    v_k = bonus_weight_k ((1 - bonus_smoothing) h_k + bonus_smoothing / C)

with ``h`` the one-hot label or the given probabilities. Every row has a label: of probabilities, their argmax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .torch_path.sums import dot, log2

__all__ = ["BlockShare", "Share", "Shares"]


class Share(NamedTuple):
    """``weight_k (keep h_k + off)``."""

    keep: float
    off: float
    weight: Tensor | None

    def of(self, hard: Tensor) -> Tensor:
        """Return the shares [..., C] for ``h``."""
        share = hard * self.keep + self.off
        return share if self.weight is None else share * self.weight

    def is_as(self, other: Share) -> bool:
        """Return whether both give the same shares."""
        return self.weight is other.weight and (self.keep, self.off) == (other.keep, other.off)

    def in_block(self, label: Tensor, hard: Tensor | None, scratch: Tensor | None, dtype: torch.dtype) -> BlockShare:
        """Return the shares of rows with ``label`` [n, 1]; ``hard`` [n, C], if given, becomes them."""
        weight = None if self.weight is None else self.weight.to(dtype)
        if hard is None:
            if weight is None:
                return BlockShare(self.keep + self.off, self.off, None)
            return BlockShare(weight[label] * (self.keep + self.off), weight * self.off, None)
        if self.keep != 1 or self.off != 0:
            hard.mul_(self.keep).add_(self.off)
        if weight is not None:
            hard.mul_(weight)
        return BlockShare(hard.gather(1, label), hard.scatter_(1, label, 0.0), scratch)


class BlockShare(NamedTuple):
    """Shares of a block of rows on a CPU."""

    label: Tensor | float  # of the label, [n, 1]
    off: Tensor | float  # of the others: a number, [C], or [n, C] with 0 at the label
    scratch: Tensor | None  # [n, C]

    def at(self, index: Tensor) -> Tensor | float:
        """Return the share [n, 1] of a class other than the label."""
        if isinstance(self.off, float):
            return self.off
        return self.off[index] if self.off.dim() == 1 else self.off.gather(1, index)

    def total(self, n_classes: int, label: Tensor) -> Tensor | float:
        """Return the sum [n, 1] over all classes but the label."""
        if isinstance(self.off, float):
            return self.off * (n_classes - 1)
        if self.off.dim() == 2:
            return self.off.sum(1, keepdim=True)
        return (self.off.sum() - self.off)[label]

    def dot(self, x: Tensor) -> Tensor:
        """Return the sum [n, 1] of share times ``x`` [n, C], which is 0 at the label."""
        if isinstance(self.off, float):
            return x.sum(1, keepdim=True).mul_(self.off)
        if self.off.dim() == 1:
            return torch.mv(x, self.off)[:, None]
        return dot(x, self.off, self.scratch)

    def dot_log(self, x: Tensor) -> Tensor:
        """Return the sum [n, 1] of share times log x, for x [n, C] of which no row's product is below 1/4."""
        if isinstance(self.off, float):
            return x.prod(1, keepdim=True).log_().mul_(self.off)
        return self.dot(log2(x, out=self.scratch)).mul_(math.log(2))


class Shares(NamedTuple):
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
        return Share(1 - self.smoothing, self.smoothing / n_classes, self.weight)

    def of_bonus(self, n_classes: int) -> Share:
        """Return v."""
        weight = self.weight if self.bonus_weight is None else self.bonus_weight
        return Share(1 - self.bonus_smoothing, self.bonus_smoothing / n_classes, weight)
