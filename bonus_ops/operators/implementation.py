"""Which implementation runs: kernels, the torch path, or the reference."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from ..watchers import constant_when_compiled

__all__ = ["chosen", "default_implementation", "gpu", "why_not_triton"]


@functools.cache
def gpu(name: str) -> ModuleType:
    """Return a file of ``kernels/gpu``, imported when its first kernel is asked for."""
    return importlib.import_module(f"..kernels.gpu.{name}", __package__)


@functools.cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return type(gpu("labels").forward_kernel).__name__ == "InterpretedFunction"


@constant_when_compiled
def why_not_triton(device_type: str) -> str | None:
    """Return why kernels cannot run on this type of device, or None if they can."""
    if not _triton_found():
        return "triton is not installed"
    if device_type in ("cuda", "xpu"):
        return None
    if device_type == "cpu":
        return None if _interpreted() else "tensors are on the CPU and TRITON_INTERPRET is not set"
    return f"there are no kernels for device type {device_type}"


def default_implementation(device_type: str) -> str:
    """Return what ``implementation=None`` means: interpreted kernels are for tests and run only when asked for."""
    return "torch" if device_type == "cpu" or why_not_triton(device_type) else "triton"


def chosen(requested: str | None, device: torch.device, has_kernel: bool) -> str:
    """Return the implementation to run; None chooses, formulas where the loss has no kernel."""
    if requested is None:
        default = default_implementation(device.type)
        return default if has_kernel else "torch"
    if requested not in ("triton", "torch", "reference"):
        raise ValueError(f"implementation must be None, 'triton', 'torch' or 'reference', got {requested!r}")
    why = why_not_triton(device.type) if requested == "triton" else None
    if why is not None:
        raise RuntimeError(f"implementation='triton' cannot run: {why}")
    return requested
