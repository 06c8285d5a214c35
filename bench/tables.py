"""Tables as Markdown has them: the first column to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["number", "table"]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def number(x: float | None, form: str = "{:.3g}") -> str:
    return "not finite" if x is None else form.format(x)
