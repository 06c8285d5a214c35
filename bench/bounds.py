"""What is required of a measurement, whether it is met, and the tables that say so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .tables import number, table

__all__ = ["MET", "Bounds", "bound", "bounds_of", "by_bound", "missed", "opening", "span", "verdict", "verdicts"]

Bounds = list[dict[str, Any]]
MET, MISSED, NOT_TIMED = "met", "**missed**", "not timed"


def bound(
    of: str, value: float | None, *, at_most: float | None = None, at_least: float | None = None, **where: str
) -> dict[str, Any]:
    """Return a bound with its verdict; ``where`` is its case and dtype. What was not timed, None, is met by nobody."""
    sign, limit = ("<=", at_most) if at_least is None else (">=", at_least)
    passed = None if value is None else value <= limit if at_least is None else value >= limit
    return {"bound": f"{of} {sign} {limit:g}", **where, "value": value, "passed": passed}


def bounds_of(results: dict[str, Any]) -> Bounds:
    return [each for section in results.values() for each in section.get("bounds", [])]


def by_bound(bounds: Bounds) -> Iterator[tuple[str, Bounds, Bounds]]:
    """Yield each bound with its verdicts everywhere, and with those that say missed."""
    for what in dict.fromkeys(each["bound"] for each in bounds):
        same = [each for each in bounds if each["bound"] == what]
        yield what, same, [each for each in same if each["passed"] is False]


def verdict(same: Bounds) -> str:
    """Return the verdict of a bound from where it was looked at."""
    timed = [each["passed"] for each in same if each["passed"] is not None]
    return NOT_TIMED if not timed else MET if all(timed) else MISSED


def verdicts(bounds: Bounds) -> str:
    """Return one line per bound: met with all values, or missed with where."""
    if not bounds:
        return ""
    rows = ([what, verdict(same), _values(failed or same)] for what, same, failed in by_bound(bounds))
    return table(["bound", "verdict", "values"], rows)


def missed(results: dict[str, Any]) -> list[str]:
    """Return a line per bound that was not met, in any section."""
    return [f"- missed: {what}: {_values(failed)}\n" for what, _, failed in by_bound(bounds_of(results)) if failed]


def opening(results: dict[str, Any]) -> str:
    """Return what was wanted and won, what was wanted and missed, and what nobody timed, in any section."""
    if not (bounds := bounds_of(results)):
        return ""
    rows: dict[str, list[list[str]]] = {MET: [], MISSED: [], NOT_TIMED: []}
    for what, same, failed in by_bound(bounds):
        rows[verdict(same)].append([what, _range(same), *([_values(failed)] if failed else [])])
    parts = [
        f"## What was won\n\n{len(rows[MET])} of {sum(map(len, rows.values()))} bounds are met.\n",
        table(["wanted", "measured"], rows[MET]),
        "## What was missed\n",
        table(["wanted", "measured", "where missed"], rows[MISSED]) if rows[MISSED] else "Nothing.\n",
    ]
    if rows[NOT_TIMED]:
        parts += ["## What was not timed\n", table(["wanted", "measured"], rows[NOT_TIMED])]
    return "\n".join(parts)


def span(bounds: Bounds) -> str:
    """Return least and largest value."""
    values = sorted(each["value"] for each in bounds if each["value"] is not None)
    return " to ".join(dict.fromkeys(number(values[i]) for i in (0, -1))) if values else NOT_TIMED


def _range(bounds: Bounds) -> str:
    """Return least and largest value and where they were measured, and where they were not."""
    timed = [each for each in bounds if each["passed"] is not None]
    dtypes = dict.fromkeys(each["dtype"] for each in timed if "dtype" in each)
    where = [*dict.fromkeys(each["case"] for each in timed if "case" in each), *(dtypes if len(dtypes) == 1 else ())]
    left_out = dict.fromkeys(each["case"] for each in bounds if each["passed"] is None and "case" in each)
    return ", ".join([span(bounds), *where, *(f"{case} {NOT_TIMED}" for case in left_out if timed)])


def _values(bounds: Bounds) -> str:
    return ", ".join(" ".join(filter(None, (_value(b), b.get("case"), b.get("dtype")))) for b in bounds)


def _value(each: dict[str, Any]) -> str:
    return NOT_TIMED if each["passed"] is None else number(each["value"])
