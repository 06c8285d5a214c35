"""What a number must be, of whatever ``owner`` (a function or a class) takes it: the class of error, and what came."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

__all__ = ["check_integer", "check_number"]


def check_number(owner: str, name: str, value: Any, expected: str) -> None:
    """Raise unless ``value`` is a number (of Python or numpy) in the interval ``expected``, written as in "[0, 1)".

    What else is taken is named behind it, as in "[0, 1) or None": None passes; other things the caller has dealt with.
    """
    interval, _, other = expected.partition(" or ")
    if value is None and "None" in other:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{owner}: {name} must be a number{other and f' or {other}'}, got {type(value).__name__}")
    number = float(value)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):  # NaN is neither
        raise ValueError(f"{owner}: {name} must be in {expected}, got {value!r}")


def check_integer(owner: str, name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise unless ``value`` is an int (of Python or numpy) of at least ``low`` and, if given, at most ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{owner}: {name} must be an int, got {type(value).__name__}")
    if high is not None and int(value) > high:
        raise ValueError(f"{owner}: {name} must be in {low} .. {high}, got {value}")
    if int(value) < low:
        raise ValueError(f"{owner}: {name} must be at least {low}, got {value}")
