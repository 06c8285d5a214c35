"""What a number must be, of whatever ``owner`` (a function or a class) takes it: the class of error, and what came."""

from __future__ import annotations

from typing import Any

__all__ = ["check_integer", "check_number"]


def check_number(owner: str, name: str, value: Any, interval: str) -> None:
    """Raise unless ``value`` is a number in ``interval``, written as in "[0, 1)"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {type(value).__name__}")
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):  # NaN is neither
        raise ValueError(f"{owner}: {name} must be in {interval}, got {value!r}")


def check_integer(owner: str, name: str, value: Any, low: int) -> None:
    """Raise unless ``value`` is an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value}")
