"""The gap of a probability."""

from __future__ import annotations

import math

__all__ = ["logit"]


def logit(p: float) -> float:
    """Return the gap at which the target probability is ``p``."""
    return math.inf if p >= 1 else -math.inf if p <= 0 else math.log(p) - math.log1p(-p)
