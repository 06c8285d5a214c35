"""Elementwise functions on a CPU whose bits do not depend on the place of an element.

torch computes the last few elements of a loop by other functions than whole vectors. Here every element is of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .sums import threads

__all__ = ["LOG2_E", "LOWEST", "VECTOR", "by_vectors", "exp_", "first", "padded"]

LOG2_E = math.log2(math.e)
LOWEST = -1000.0  # exp of this is 0 in any dtype, and 0 * LOWEST is not NaN
VECTOR = 64  # elements that torch's loops take whole: a multiple of their step in any dtype and on any CPU


def exp_(shifted: Tensor, out: Tensor) -> Tensor:
    """Return e^shifted by exp2: on CPUs several times faster than exp, as accurate once the max is subtracted."""
    torch.mul(shifted, LOG2_E, out=out)
    n = out.numel()
    whole = _whole(n)
    if whole == n:
        return out.exp2_()
    flat = out.as_strided((n,), (1,), out.storage_offset())
    flat[:whole].exp2_()
    last = flat[whole:]
    last.copy_(by_vectors(torch.exp2, last))
    return out


def by_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the elementwise ``function`` of ``x`` [N] or [N, 1], by whole vectors: no bits tell a place."""
    return first(function(padded(x)), x.shape[0])


def padded(x: Tensor) -> Tensor:
    """Return ``x`` [N] or [N, 1] with zeros up to whole vectors for every thread."""
    missing = -x.numel() % (VECTOR * threads(x.numel()))
    return torch.constant_pad_nd(x, (0, missing) if x.dim() == 1 else (0, 0, 0, missing)) if missing else x


def first(x: Tensor, n_rows: int) -> Tensor:
    """Return ``x`` [N, ...] without padding."""
    return x if x.shape[0] == n_rows else x[:n_rows]


def _whole(n: int) -> int:
    """Return how many of ``n`` elements make whole vectors for every thread."""
    n_threads = threads(n)
    whole = n - n % (VECTOR * n_threads)
    return whole if threads(whole) == n_threads else _whole(whole)
