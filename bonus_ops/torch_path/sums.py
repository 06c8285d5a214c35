"""Sums over the classes of rows on a CPU whose bits do not depend on the rows around them."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import numpy
except ImportError:  # an optional extra
    numpy = None  # type: ignore[assignment]

__all__ = ["dot", "log2", "row_sum", "threads"]

GRAIN = 1 << 15  # elements below which torch uses one thread
DOT_CLASSES = 4096  # classes that numpy adds up at a time: it sums less carefully than torch


def threads(n: int) -> int:
    """Return how many threads torch shares ``n`` elements among."""
    return 1 if n <= GRAIN else min(torch.get_num_threads(), -(-n // GRAIN))


def row_sum(x: Tensor) -> Tensor:
    """Return the sum of each row [N, 1]; torch would split a single long row over threads, but not one of two."""
    if len(x) == 1 and threads(x.numel()) > 1:
        return x.expand(2, -1).sum(1, keepdim=True)[:1]
    return x.sum(1, keepdim=True)


def dot(x: Tensor, y: Tensor, out: Tensor | None) -> Tensor:
    """Return the sum of x y of each row [N, 1], in one pass by numpy where it can; ``out`` may be overwritten."""
    if numpy is None or not hasattr(numpy, "vecdot") or not x.stride(1) == y.stride(1) == 1:
        return row_sum(torch.mul(x, y, out=out))
    a, b = x.numpy(), y.numpy()
    with numpy.errstate(all="ignore"):
        parts = [
            torch.from_numpy(numpy.vecdot(a[:, i : i + DOT_CLASSES], b[:, i : i + DOT_CLASSES]))
            for i in range(0, x.shape[1], DOT_CLASSES)
        ]
    return parts[0][:, None] if len(parts) == 1 else torch.stack(parts, 1).sum(1, keepdim=True)


def log2(x: Tensor, out: Tensor | None) -> Tensor:
    """Return the base-2 logarithm, by numpy where there is one: several times faster than torch's."""
    if numpy is None:
        return torch.log2(x, out=out)
    out = torch.empty_like(x) if out is None else out
    with numpy.errstate(all="ignore"):
        numpy.log2(x.numpy(), out=out.numpy())
    return out
