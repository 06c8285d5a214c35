"""The fields by name, and every statistic they give: the tracker's counterpart of `bonus_ops.SCORES`."""

from __future__ import annotations

from collections.abc import Iterable

from .events import Correctness, FirstLearned, Forgetting, LearnedFor, LearnedForever, SecondSplit
from .field import Field, Statistic
from .means import Confidence, Mean
from .random_labels import RandomLabelLosses
from .recent import RecentLosses
from .suggested import SuggestedLabel
from .weights import ExponentiatedGradient

__all__ = ["DEFAULT_FIELDS", "FIELDS", "STATISTICS", "resolve"]

EARLY = (6, 6)  # of 60 epochs, where it was tried: after the first decline, before noise is memorised

FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Mean("loss"),
        Mean("margin"),
        Mean("el2n"),
        Mean("entropy"),
        Mean("el2n", EARLY),
        Mean("entropy", EARLY),
        Confidence(),
        Correctness(),
        Forgetting(),
        FirstLearned(),
        LearnedForever(),
        LearnedFor(3),
        SecondSplit(),
        RecentLosses(),
        SuggestedLabel(),
        RandomLabelLosses(),
        ExponentiatedGradient(),
    )
}

DEFAULT_FIELDS = ("mean_loss", "mean_margin", "mean_el2n", "mean_entropy", "early_entropy", "suggested_label")

STATISTICS: dict[str, Statistic] = {
    statistic.name: statistic for field in FIELDS.values() for statistic in field.statistics
}


def resolve(fields: str | Iterable[str | Field]) -> tuple[Field, ...]:
    """Return the fields meant, ``"all"`` or names of `FIELDS` and `Field` objects.

    Raises:
        ValueError: a name is unknown, or two fields share a name.
        TypeError: something is neither a name nor a field.
    """
    if isinstance(fields, (str, Field)):
        fields = tuple(FIELDS) if fields == "all" else (fields,)
    if not isinstance(fields, Iterable):
        raise TypeError(f"fields: expected 'all' or names and Field objects, got {type(fields).__name__}")
    resolved = []
    for field in fields:
        if isinstance(field, str):
            if field not in FIELDS:
                raise ValueError(f"fields: expected 'all' or names out of {', '.join(FIELDS)}, got {field!r}")
            field = FIELDS[field]
        if not isinstance(field, Field):
            raise TypeError(f"fields: expected names or Field objects, got {type(field).__name__}")
        resolved.append(field)
    names = [field.name for field in resolved]
    if len(set(names)) < len(names):
        raise ValueError(f"fields: each may be given once, got {', '.join(names)}")
    return tuple(resolved)
