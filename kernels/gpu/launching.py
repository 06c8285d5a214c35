"""What launches have in common: the kernel pair and numbers of a loss, the width of vectors, the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..formulas import gap_losses, logits
from .launch import CHUNK
from .params import halved
from .rows import Array

WARP_SIZE = 64 if torch.version.hip else 32

# Arguments by whose value kernels are not compiled anew: a last batch has fewer rows, a label lies anywhere.
FEW_VARIANTS = {
    "do_not_specialize": ["n_rows", "ignore_index"],
    "do_not_specialize_on_alignment": ["target_ptr"],
}

Halves = tuple[tuple[float, ...], tuple[float, ...]]
_Kernel = TypeVar("_Kernel")


class GapKernel(NamedTuple):
    """A loss of the gap as kernels take it."""

    value: Any  # jit functions
    slope: Any
    params: Halves


def once_a_loss(function: Callable[[Any], _Kernel]) -> Callable[[Any], _Kernel]:
    """Keep what ``function`` returns for a loss, unless it is one whose numbers may change."""
    kept = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def of(loss: Any) -> _Kernel:
        by_numbers = type(loss).__hash__ not in (None, object.__hash__)
        return kept(loss) if by_numbers else function(loss)

    return of


@once_a_loss
def gap_kernel(loss: Any) -> GapKernel:
    """Return the jit functions and numbers of a loss of the gap."""
    kernel = loss.kernel
    if isinstance(kernel, str):
        kernel = getattr(gap_losses, f"{kernel}_value"), getattr(gap_losses, f"{kernel}_slope")
    if kernel is None:
        raise NotImplementedError(
            f"{type(loss).__name__} has no kernel.\nExpected a class attribute kernel = (value, slope) of two "
            "@triton.jit functions for implementation='triton'; None computes it by its formulas."
        )
    return GapKernel(kernel[0], kernel[1], halved(loss.parameters()))


class LogitKernel(NamedTuple):
    """What becomes of a logit, as kernels take it."""

    value: Any  # jit functions
    slope: Any
    options: Halves


@functools.lru_cache(maxsize=256)
def logit_kernel(options: Any) -> LogitKernel:
    """Return the jit functions and numbers of logit options; None are none."""
    name, numbers = ("as_given", (1.0, 1.0)) if options is None else (options.kernel, options.numbers())
    return LogitKernel(getattr(logits, name), getattr(logits, f"{name}_slope"), halved(numbers))


def array(tensor: Tensor) -> Array:
    """Return a tensor [outer, inner, C] as a kernel takes it."""
    _, n_inner, n_classes = tensor.shape
    return Array(tensor, n_inner, n_classes, *tensor.stride())


def vector(*tensors: Tensor) -> int:
    """Return how chunks of [outer, inner, C] are read: see ``rows``.

    Elements in 16 bytes if all tensors can be walked by such vectors from one common head; 0 where all have their rows
    side by side and their classes apart; else 1.
    """
    first = tensors[0]
    return _vector(first.shape, first.itemsize, *[(t.stride(), t.data_ptr() % 16) for t in tensors])


@functools.lru_cache(maxsize=1024)
def _vector(shape: tuple[int, ...], size: int, *layouts: tuple[tuple[int, ...], int]) -> int:
    strides, phase = layouts[0]
    axes = [d for d in (0, 1) if shape[d] > 1]
    if axes and all(s[axes[-1]] == 1 != s[2] for s, _ in layouts) and shape[2] > 1:
        return 0
    if any(s[2] != 1 or start != phase for s, start in layouts) or phase % size:
        return 1
    # rows must leave a 16-byte boundary alike
    if any((s[d] - strides[d]) * size % 16 for s, _ in layouts for d in axes):
        return 1
    return 16 // size


def is_ragged(rows: Tensor, by: int) -> bool:
    """Return whether rows [outer, inner, C] that are read ``by`` a vector may have classes outside their chunks."""
    if rows.shape[2] % CHUNK != 0:
        return True
    starts = (
        rows.data_ptr() // rows.itemsize,
        *(s for s, n in zip(rows.stride()[:2], rows.shape, strict=False) if n > 1),
    )
    return by > 1 and any(start % by for start in starts)


_NO_GUARD = contextlib.nullcontext()


def device_guard(tensor: Tensor) -> Any:
    """Return a context that launches on the device of the tensor."""
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    return torch.xpu.device_of(tensor) if tensor.is_xpu else _NO_GUARD
