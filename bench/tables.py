"""Tables as Markdown has them: the first column to the left, numbers to the right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["table"]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"
