"""How sure a figure is: quartiles of times, which are skewed, and confidence intervals of means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["interval", "mean", "ratio", "spread", "summary"]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles."""
    low, _, high = statistics.quantiles(times, method="inclusive") if len(times) > 1 else [*times] * 3
    return {"median": statistics.median(times), "low": low, "high": high, "reps": len(times)}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratio, round by round."""
    return summary([a / b for a, b in zip(over, under, strict=True)])


def spread(times: dict[str, float]) -> str:
    """Return a median of `summary` and half its interquartile range."""
    return f"{times['median']:.3g} ±{50 * (times['high'] - times['low']) / times['median']:.0f}%"


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds, half the width of its 95 % confidence interval (Student's t), the number of seeds."""
    from scipy import stats  # comes with scikit-learn, which has the data; times need neither

    n = len(values)
    half = float(stats.sem(values) * stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan
    return {"mean": statistics.fmean(values), "half": half, "seeds": n}


def mean(found: dict[str, Any], digits: int = 2) -> str:
    """Return the mean of an `interval` ± half its width, which one seed has not."""
    half = "" if found["half"] is None else f" ± {found['half']:.{digits}f}"
    return f"{found['mean']:.{digits}f}{half}"
