"""What the seeds say of a claim: mean, 95 % confidence interval, and whether the claim holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

# two-sided 95 % points of Student's t by degrees of freedom; beyond 30 the normal's
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
REPRODUCED = "reproduced"
ON_AVERAGE = "on average only: the interval crosses the bar"
NOT_REPRODUCED = "not reproduced"
ABOVE_ZERO = 1e-9  # a bar that a difference of nothing does not meet


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds, half the width of its 95 % confidence interval, and the number of seeds."""
    n = len(values)
    half = math.nan
    if n > 1:
        t = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
        half = t * statistics.stdev(values) / math.sqrt(n)
    return {"mean": statistics.fmean(values), "half": half, "seeds": n}


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
