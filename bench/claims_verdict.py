"""What the seeds say of a claim: whether its whole confidence interval meets the bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .intervals import interval

REPRODUCED = "reproduced"
ON_AVERAGE = "on average only: the interval crosses the bar"
NOT_REPRODUCED = "not reproduced"
ABOVE_ZERO = 1e-9  # a bar that a difference of nothing does not meet


def verdict(
    claim: str, values: Sequence[float], *, at_least: float = -math.inf, at_most: float = math.inf
) -> dict[str, Any]:
    """Return the claim with its verdict: reproduced where the whole interval is within the bars.

    ``values`` holds one number a seed; where two methods are compared, their difference on the same seed.
    """
    found = interval(values)
    low, high = found["mean"] - found["half"], found["mean"] + found["half"]
    if not at_least <= found["mean"] <= at_most:
        word = NOT_REPRODUCED
    else:
        word = REPRODUCED if at_least <= low and high <= at_most else ON_AVERAGE
    bars = {"at_least": at_least, "at_most": at_most}
    return {"claim": claim, "verdict": word, **found, **{k: v for k, v in bars.items() if math.isfinite(v)}}


def paired(by_name: dict[str, dict[int, float]], name: str, base: str) -> list[float]:
    """Return ``name - base`` for every seed."""
    return [value - by_name[base][seed] for seed, value in sorted(by_name[name].items())]
