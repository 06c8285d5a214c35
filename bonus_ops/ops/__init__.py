"""The way from a checked call to kernels and loops: for each kind of target operators and their autograd Functions.

`labels` serves class indices, `soft` soft targets, `sigmoid` the sigmoid family, `made` what they share where the
gradient is made in the forward visit.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

__all__ = ["room"]

ROOMS = {"triton": "gpu", "numba": "cpu"}


@functools.cache
def room(implementation: str, kind: str) -> Any:
    """Return the file that does a kind of target for an implementation, imported when it is first asked for."""
    return importlib.import_module(f"bonus_ops.kernels.{ROOMS[implementation]}.{kind}")
