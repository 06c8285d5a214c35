"""What loops are told of a tensor: the name of its element type, and where it lies."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["NAMES", "address_of", "real_of", "record_of", "strided"]

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def real_of(element: str) -> str:
    """Return the name of the accumulation dtype."""
    return "float64" if element == "float64" else "float32"


def record_of(plan: Any) -> Any:
    """Return what `record` takes for a plan, a named tuple of integers."""
    import numba
    import numpy as np

    return numba.from_dtype(np.dtype([(field, "i8") for field in plan._fields]))


def address_of(x: torch.Tensor | None) -> int:
    """Return where a tensor lies, 0 of none."""
    return 0 if x is None else x.data_ptr()


def strided(x: torch.Tensor | None) -> tuple[int, int]:
    """Return where a tensor [N] or [1] lies, and the step from one row's number to the next."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0) if x.numel() > 1 else 0)
