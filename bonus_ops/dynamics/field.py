"""What a field is: the columns it keeps per example, how a batch changes them, the statistics read from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..scores import Scores

__all__ = ["Batch", "Column", "Field", "State", "Statistic"]

State = dict[str, Tensor]


class Column(NamedTuple):
    """One number an example.

    Attributes:
        name: key in the state.
        dtype: of the numbers.
        initial: value before the first observation.
        merge: how the values of several processes become one: ``"sum"`` adds what each has added since the last merge,
            ``"min"`` and ``"max"`` speak for themselves, ``"last"`` takes the value of the process that observed the
            example at the latest step (the highest rank of equals), ``"own"`` leaves it to `Field.summands`.
        length: None for one number an example; else the length of a table that is no example's own.
    """

    name: str
    dtype: torch.dtype
    initial: float
    merge: str
    length: int | None = None


class Statistic(NamedTuple):
    """What can be read of an example.

    ``direction`` is +1 where higher means harder, -1 where it means easier. ``read`` maps the state, cut to
    ``[num_examples]``, to float32 ``[num_examples]``, NaN where the example has not been observed.
    """

    name: str
    formula: str
    unit: str
    range: str
    direction: int
    paper: str
    read: Callable[[State], Tensor]


class Batch(NamedTuple):
    """One step's observations, at most one an example.

    Attributes:
        rows: int64 [batch]; where each observation goes. Rows to skip go to a spare row behind the last example, so a
            field may write whatever it likes for them.
        labelled: as ``rows``, with the rows whose label is unknown sent to the spare row too.
        spare: the spare row, ``num_examples``.
        scores: float32 [batch] each.
        correct: bool [batch].
        random_label_loss: float32 [batch], or None.
        epoch: the epoch now, from 1.
        target: int64 [batch], the labels, or None where they are not known.
    """

    rows: Tensor
    labelled: Tensor
    spare: int
    scores: Scores
    correct: Tensor
    random_label_loss: Tensor | None
    epoch: int
    target: Tensor | None = None


class Field:
    """Base of what a tracker can keep. Subclass as a frozen dataclass: its repr is compared when a state is loaded.

    ``count``, ``label_count`` and ``last_step`` are in every state; while `update` runs they do not yet hold the batch.
    """

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def columns(self) -> tuple[Column, ...]:
        raise NotImplementedError

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        raise NotImplementedError

    def update(self, state: State, batch: Batch) -> None:
        """Write a batch into the columns, on their device, with no choice that depends on data."""
        raise NotImplementedError

    def end_epoch(self, state: State) -> None:
        """Do what an epoch's end asks for: to the state, and to the copy of what is summed that the last merge left."""

    def summands(self, state: State, base: State) -> State:
        """Return what processes add up to merge the columns of merge ``"own"``, by any names."""
        return {}

    def absorb(self, state: State, base: State, total: State) -> None:
        """Write those columns from the sums over all processes; ``state`` already holds the merged counts."""


def seen_only(values: Tensor, count: Tensor) -> Tensor:
    """Return values as float32, NaN where nothing was observed."""
    return torch.where(count > 0, values.to(torch.float32), torch.nan)
