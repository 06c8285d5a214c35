"""What is demanded of the fields of a loss."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real

from .base import Loss

__all__ = ["check", "check_numbers"]


def check(loss: Loss, name: str, ok: bool, expected: str) -> None:
    """Raise unless ``ok``, naming the field and what it should be."""
    if not ok:
        raise ValueError(f"{type(loss).__name__}: {name} must be {expected}, got {getattr(loss, name)!r}")


def check_numbers(loss: Loss, *optional: str) -> None:
    """Raise unless every field is a number, or None where that is ``optional``."""
    for field in fields(loss):  # type: ignore[arg-type]
        x = getattr(loss, field.name)
        if x is None and field.name in optional:
            continue
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{type(loss).__name__}: {field.name} must be a number, got {type(x).__name__}")
