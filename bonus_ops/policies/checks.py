"""What a policy's arguments must look like: the class of error, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..number_checks import check_integer, check_number

__all__ = [
    "TAKEN_OUT",
    "check_generator",
    "check_index",
    "check_integer",
    "check_number",
    "check_shape",
    "check_threshold",
    "check_vector",
    "checked_difficulty",
]

TAKEN_OUT = -math.inf  # the difficulty of what `guarded` takes out: known, and not wanted


def check_vector(function: str, name: str, x: Any) -> None:
    """Raise unless ``x`` is a floating point tensor with one axis."""
    _check_tensor(function, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{function}: {name} must be a floating point tensor, got {x.dtype}")
    if x.dim() != 1:
        raise RuntimeError(f"{function}: {name} must have shape [N], got {list(x.shape)}")


def checked_difficulty(function: str, name: str, x: Any) -> Tensor:
    """Return ``x`` detached, NaN where it takes no part; raise as `check_vector`."""
    check_vector(function, name, x)
    difficulty: Tensor = x.detach()
    return difficulty.masked_fill(difficulty == TAKEN_OUT, math.nan)


def check_shape(function: str, name: str, x: Any, like: Tensor, integer: bool = False) -> None:
    """Raise unless ``x`` is a tensor shaped as ``like``, and of an integer type where ``integer``."""
    _check_tensor(function, name, x)
    if integer and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise TypeError(f"{function}: {name} must be an integer tensor, got {x.dtype}")
    if x.shape != like.shape:
        raise RuntimeError(f"{function}: {name} must have shape {list(like.shape)}, got {list(x.shape)}")


def check_index(function: str, name: str, index: Any, like: Tensor, size: int) -> None:
    """Raise unless ``index`` holds integers shaped as ``like``, and on the CPU (without a wait) in [0, size)."""
    check_shape(function, name, index, like, integer=True)
    if index.device.type != "cpu" or len(index) == 0 or torch.compiler.is_compiling():
        return
    for extreme in (int(index.min()), int(index.max())):
        if not 0 <= extreme < size:
            raise IndexError(f"{function}: {name} must be in [0, {size}), got {extreme}")


def check_threshold(function: str, name: str, value: Any, interval: str, compared: Tensor | None) -> None:
    """Raise unless ``value`` is a number in ``interval`` or a tensor of one: another shape would broadcast.

    Raise also, where that needs no wait, if it is a NaN that something is ``compared`` with: nothing is above it.
    """
    if not isinstance(value, Tensor):
        return check_number(function, name, value, interval)
    if value.dim() > 0:
        raise RuntimeError(f"{function}: {name} must be a number or a scalar tensor, got shape {list(value.shape)}")
    if compared is None or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_batchedtensor(value) or not value.isnan():
        return
    if compared.device.type != "cpu" or not compared.isnan().all():
        raise ValueError(f"{function}: {name} must be known, got nan: the quantile or mean it is saw no losses")


def check_generator(function: str, generator: Any) -> None:
    """Raise unless ``generator`` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{function}: generator must be a torch.Generator or None, got {type(generator).__name__}")


def _check_tensor(function: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor, got {type(x).__name__}")
