"""A ring of the last values seen, on the device: their distribution without a host sync."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_integer, check_number, checked_difficulty

__all__ = ["History"]


class History(NamedTuple):
    """The last ``len(values)`` numbers pushed, oldest overwritten first.

    Immutable: `push` returns the next history, so the state is the caller's to keep, save and restore.

    Attributes:
        values: float32 [size]; +inf where nothing was written yet.
        written: int64 scalar on the same device, how many numbers were ever pushed.

    Example:
        >>> import torch
        >>> from bonus_ops.policies import History
        >>> history = History.empty(4).push(torch.tensor([1.0, 3.0, float("nan")]))
        >>> history.cdf(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.0000, 0.2500, 0.5000])
    """

    values: Tensor
    written: Tensor

    @classmethod
    def empty(cls, size: int = 1024, device: torch.device | str | None = None) -> History:
        """Return a history of nothing; ``size`` 1024 is that of Selective-Backprop."""
        check_integer("History.empty", "size", size, 1)
        return cls(
            torch.full((size,), math.inf, dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def filled(self) -> Tensor:
        """How many values are held, an int64 scalar in [0, size]."""
        return self.written.clamp(max=len(self.values))

    def push(self, x: Tensor) -> History:
        """Return the history after ``x`` [N], in order; NaN and -inf (taken out) take no part."""
        x = checked_difficulty("History.push", "x", x)
        size = len(self.values)
        valid = ~x.isnan()
        rank = valid.cumsum(0)
        # of more than `size` new values only the last fit; what does not go in lands in a slot that is cut off
        fits = valid & (rank > valid.sum() - size)
        slot = torch.where(fits, (self.written + rank - 1) % size, size)
        values = torch.cat([self.values, self.values.new_zeros(1)]).scatter(0, slot, x.to(self.values.dtype))
        return History(values[:size], self.written + valid.sum())

    def cdf(self, x: Tensor) -> Tensor:
        """Return the share of held values below ``x`` [N], ties half; NaN for NaN, -inf and an empty history."""
        x = checked_difficulty("History.cdf", "x", x)
        ordered = self.values.sort().values
        x = x.to(ordered.dtype)
        below = torch.searchsorted(ordered, x)
        not_above = torch.minimum(torch.searchsorted(ordered, x, right=True), self.filled)
        return torch.where(x.isnan(), math.nan, (below + not_above).to(ordered.dtype) / (2 * self.filled))

    def quantile(self, q: float) -> Tensor:
        """Return the ``q`` quantile of the held values, a scalar (the lower of two neighbours); +inf if empty."""
        check_number("History.quantile", "q", q, "[0, 1]")
        at = (q * (self.filled - 1).clamp(min=0)).floor().long()
        return self.values.sort().values.gather(0, at[None])[0]
