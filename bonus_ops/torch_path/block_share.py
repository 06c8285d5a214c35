"""The shares of one block of rows on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..shares import Share
from .sums import dot, dot_log

__all__ = ["BlockShare"]


class BlockShare(NamedTuple):
    """What a block of ``n`` rows with labels [n, 1] has of a `Share`."""

    label: Tensor | float  # of the label, [n, 1]
    off: Tensor | float  # of the others: a number, [C], or [n, C] with 0 at the label

    @classmethod
    def of_labels(cls, share: Share, label: Tensor, dtype: torch.dtype) -> BlockShare:
        """Return the shares of rows whose target is a label."""
        if share.weight is None:
            return cls(share.keep + share.off, share.off)
        weight = share.weight.to(dtype)
        return cls(weight[label] * (share.keep + share.off), weight * share.off)

    @classmethod
    def of_probabilities(cls, share: Share, label: Tensor, hard: Tensor) -> BlockShare:
        """Return the shares of rows whose target is ``hard`` [n, C], which becomes them."""
        if share.keep != 1 or share.off != 0:
            hard.mul_(share.keep).add_(share.off)
        if share.weight is not None:
            hard.mul_(share.weight.to(hard.dtype))
        return cls(hard.gather(1, label), hard.scatter_(1, label, 0.0))

    def apart(self, runner_up: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the shares of label and runner-up, [2, n, 1]."""
        if not isinstance(self.off, Tensor):
            both = torch.tensor([self.label, self.off], dtype=dtype, device="cpu")
            return both.view(2, 1, 1).expand(2, *runner_up.shape)
        off = self.off[runner_up] if self.off.dim() == 1 else self.off.gather(1, runner_up)
        assert isinstance(self.label, Tensor)
        return torch.stack([self.label, off])

    def total(self, n_classes: int, label: Tensor) -> Tensor | float:
        """Return the sum [n, 1] over all classes but the label."""
        if not isinstance(self.off, Tensor):
            return self.off * (n_classes - 1)
        if self.off.dim() == 2:
            return self.off.sum(1, keepdim=True)
        wide = self.off.double()  # one heavy class would leave nothing of the others
        return (wide.sum() - wide[label]).to(self.off.dtype)

    def dot(self, x: Tensor) -> Tensor:
        """Return the sum [n, 1] of share times ``x`` [n, C], which is 0 at the label."""
        if not isinstance(self.off, Tensor):
            return x.sum(1, keepdim=True).mul_(self.off)
        if self.off.dim() == 1:
            return torch.mv(x, self.off)[:, None]
        return dot(x, self.off)

    def dot_log(self, x: Tensor) -> Tensor:
        """Return the sum [n, 1] of share times log x, for x [n, C] of which no row's product is below 1/4."""
        if not isinstance(self.off, Tensor):
            return x.prod(1, keepdim=True).log_().mul_(self.off)
        return dot_log(x, self.off.expand_as(x))
