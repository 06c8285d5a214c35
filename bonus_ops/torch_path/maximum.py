"""The largest logit of every row and where it is, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import numpy
except ImportError:  # an optional extra
    numpy = None  # type: ignore[assignment]

__all__ = ["origin", "row_max"]

CHUNK = 32  # classes that `row_max` reduces together: amax gets cheaper as it grows, argmax dearer
NUMPY_THREADS = 4  # up to here numpy's argmax on one of them is faster than chunks on all


def row_max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the max of each row and its first index, [N, 1] each.

    torch's indexed max reads one element at a time. numpy's reads vectors, on one thread; without it or with many
    threads a long row is first reduced by chunks, whose last one reaches back into its neighbour.
    """
    n_rows, n_classes = z.shape
    if z.stride(1) != 1 or n_classes < 4 * CHUNK:
        return z.max(1, keepdim=True)
    if numpy is not None and torch.get_num_threads() <= NUMPY_THREADS:
        index = torch.from_numpy(z.numpy().argmax(1, keepdims=True))
        return z.gather(1, index), index
    whole = n_classes // CHUNK
    maxima = z.as_strided((n_rows, whole, CHUNK), (n_classes, CHUNK, 1)).amax(2)
    if whole * CHUNK < n_classes:
        last = z.as_strided((n_rows, CHUNK), (n_classes, 1), z.storage_offset() + n_classes - CHUNK)
        maxima = torch.cat([maxima, last.amax(1, keepdim=True)], 1)
    maximum, chunk = maxima.max(1, keepdim=True)
    first = chunk.mul_(CHUNK)
    if whole * CHUNK < n_classes:
        first.clamp_(max=n_classes - CHUNK)
    return maximum, first + z.gather(1, first + torch.arange(CHUNK, device=z.device)).argmax(1, keepdim=True)


def origin(maximum: Tensor) -> Tensor:
    """Return the point to subtract: the max, but finite where it is -inf, since -inf - -inf is NaN."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)
