"""What formulas of the gap share."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import softplus

__all__ = ["PRODUCTS", "logit", "shared_terms"]

PRODUCTS = (1.0, 2.0, 3.0)  # powers that torch computes as products


def logit(p: float) -> float:
    """Return the gap at which the target probability is ``p``."""
    return math.inf if p >= 1 else -math.inf if p <= 0 else math.log(p) - math.log1p(-p)


def shared_terms(gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return (-log p, 1 - p) of finite gaps, the terms of most losses."""
    negative = -gap
    return softplus(negative, threshold=40.0), negative.sigmoid_()
