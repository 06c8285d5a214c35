"""What loops know of a tensor's element type, by its name."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["NAMES", "real_of", "record_of"]

NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def real_of(element: str) -> str:
    """Return the name of the accumulation dtype."""
    return "float64" if element == "float64" else "float32"


def record_of(plan: Any) -> Any:
    """Return what `record` takes for a plan, a named tuple of integers."""
    import numba
    import numpy as np

    return numba.from_dtype(np.dtype([(field, "i8") for field in plan._fields]))
