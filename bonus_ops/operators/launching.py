"""What launches of kernels have in common. This module is the only importer of ``kernels``, and only when one runs."""

from __future__ import annotations

import functools
import math
import struct
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..losses import GapLoss, Loss

__all__ = ["WARP_SIZE", "device_guard", "halved", "kernel_modules", "kernel_pair", "loss_params", "vector"]

WARP_SIZE = 64 if torch.version.hip else 32


@functools.cache
def kernel_modules() -> dict[str, ModuleType]:
    """Return the files of ``kernels`` by name, imported when the first kernel is asked for."""
    from ..kernels.formulas import class_terms, gap_losses
    from ..kernels.gpu import class_sums, labels, launch, sigmoid, soft

    modules = (class_sums, class_terms, gap_losses, labels, launch, sigmoid, soft)
    return {module.__name__.rpartition(".")[2]: module for module in modules}


def kernel_pair(loss: GapLoss) -> tuple[Any, Any]:
    """Return the (value, slope) jit functions of a loss."""
    kernel = loss.kernel
    if isinstance(kernel, str):
        module = kernel_modules()["gap_losses"]
        return getattr(module, f"{kernel}_value"), getattr(module, f"{kernel}_slope")
    if kernel is None:
        raise NotImplementedError(
            f"{type(loss).__name__} has no kernel.\nExpected a class attribute kernel = (value, slope) of two "
            "@triton.jit functions for implementation='triton'; implementation='torch' runs its formulas."
        )
    return kernel[0], kernel[1]


def _halves(x: float) -> tuple[float, float]:
    """Split a float64 into two float32, which is what a kernel takes."""
    if not math.isfinite(x) or abs(x) > 3e38:
        return x, 0.0
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


def halved(numbers: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return numbers as a kernel takes them: rounded to float32, and what that left."""
    halves = [_halves(x) for x in numbers]
    return tuple(h for h, _ in halves), tuple(low for _, low in halves)


def loss_params(loss: Loss) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the numbers of a loss as a kernel takes them."""
    return halved(loss.parameters())


def vector(*tensors: Tensor) -> int:
    """Return elements in 16 bytes if all tensors can be walked by such vectors from one common head, else 1."""
    first = tensors[0]
    size = first.element_size()
    starts = {t.data_ptr() % 16 for t in tensors}
    if any(t.stride(2) != 1 for t in tensors) or len(starts) > 1 or first.data_ptr() % size:
        return 1
    # rows must leave a 16-byte boundary alike
    axes = [d for d in (0, 1) if first.shape[d] > 1]
    if any((t.stride(d) - first.stride(d)) * size % 16 for t in tensors for d in axes):
        return 1
    return 16 // size


def device_guard(tensor: Tensor) -> Any:
    """Return a context that launches on the device of the tensor."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
