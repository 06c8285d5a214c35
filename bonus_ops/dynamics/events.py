"""Learning events: what follows from whether each observation's prediction was its label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..number_checks import check_integer
from .field import Batch, Column, Field, State, Statistic, seen_only

__all__ = ["Correctness", "FirstLearned", "Forgetting", "LearnedFor", "LearnedForever", "SecondSplit"]

NEVER = torch.iinfo(torch.int16).max  # of an epoch still to come; epochs are int16
NEVER_LEARNED, FORGOTTEN, KNOWN = 0, 1, 2


@dataclass(frozen=True)
class Correctness(Field):
    """Share of an example's observations whose prediction was its label. Memory: 4 bytes an example."""

    name = "correctness"
    columns = (Column("correct_count", torch.int32, 0, "sum"),)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(self.name, "correct / observed", "1", "[0, 1]", -1, "arXiv 2009.10795", self._read),)

    def update(self, state: State, batch: Batch) -> None:
        state["correct_count"].index_add_(0, batch.labelled, batch.correct.to(torch.int32))

    def _read(self, state: State) -> Tensor:
        return state["correct_count"].to(torch.float32) / state["label_count"]  # of ints: of the default dtype


@dataclass(frozen=True)
class Forgetting(Field):
    """Forgetting events: observations that are wrong where the one before was right. Memory: 5 bytes an example.

    ``forgetting`` counts an example that was never right as T, the most observations any example has, as Toneva et al.
    do; ``forgetting_events`` counts it as 0, its plain number of events. Others use infinity: mask by
    ``first_learned``. The plain number does not find mislabelled examples, of which many are never learned at all.
    """

    name = "forgetting"
    columns = (
        Column("forgetting_count", torch.int32, 0, "sum"),
        Column("memory", torch.uint8, NEVER_LEARNED, "last"),
    )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        paper = "arXiv 1812.05159"
        return (
            Statistic("forgetting", "events; T if never right", "events", "[0, T]", +1, paper, self._forgetting),
            Statistic("forgetting_events", "events", "events", "[0, T / 2]", +1, paper, self._events),
        )

    def update(self, state: State, batch: Batch) -> None:
        before = state["memory"].index_select(0, batch.labelled)
        forgets = (before == KNOWN) & ~batch.correct
        state["forgetting_count"].index_add_(0, batch.labelled, forgets.to(torch.int32))
        now = torch.where(batch.correct, KNOWN, before.clamp(max=FORGOTTEN))
        state["memory"].scatter_(0, batch.labelled, now.to(torch.uint8))

    def _forgetting(self, state: State) -> Tensor:
        count = state["label_count"]
        most = count.max() if count.numel() else count.sum()
        events = torch.where(state["memory"] == NEVER_LEARNED, most, state["forgetting_count"])
        return seen_only(events, count)

    def _events(self, state: State) -> Tensor:
        return seen_only(state["forgetting_count"], state["label_count"])


@dataclass(frozen=True)
class FirstLearned(Field):
    """First epoch with a right prediction, infinity if there was none. Memory: 2 bytes an example."""

    name = "first_learned"
    columns = (Column("first_correct", torch.int16, NEVER, "min"),)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        formula, paper = "first epoch right; inf if never", "arXiv 1812.05159"
        return (Statistic("first_learned", formula, "epochs", "[1, inf]", +1, paper, self._read),)

    def update(self, state: State, batch: Batch) -> None:
        epoch = torch.where(batch.correct, batch.epoch, NEVER).to(torch.int16)
        state["first_correct"].scatter_reduce_(0, batch.labelled, epoch, "amin")

    def _read(self, state: State) -> Tensor:
        return seen_only(_or_never(state["first_correct"]), state["label_count"])


class _LastEpoch(Field):
    """Last epoch with a right, or with a wrong, prediction, + 1. Memory: 2 bytes an example."""

    right: bool
    about: tuple[str, str, str, int, str]  # of the `Statistic`

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic(self.name, *self.about, self._read),)

    def update(self, state: State, batch: Batch) -> None:
        epoch = torch.where(batch.correct == self.right, batch.epoch, 0).to(torch.int16)
        state[self.columns[0].name].scatter_reduce_(0, batch.labelled, epoch, "amax")

    def _read(self, state: State) -> Tensor:
        return seen_only(state[self.columns[0].name] + 1, state["label_count"])


@dataclass(frozen=True)
class LearnedForever(_LastEpoch):
    """First epoch from which on no prediction was wrong: last wrong epoch + 1. Memory: 2 bytes an example."""

    name = "learned_forever"
    columns = (Column("last_wrong", torch.int16, 0, "max"),)
    right = False
    about = "last epoch wrong + 1", "epochs", "[1, T + 1]", +1, "arXiv 2210.15031"


@dataclass(frozen=True)
class LearnedFor(Field):
    """First epoch at which the last k observations were all right, infinity if none yet: Late Stopping's FkL.

    Args:
        k: observations in a row, 1 to 255. Late Stopping uses 1 to 3; k = 3 separates label noise best here.

    Raises:
        TypeError, ValueError: ``k`` is no int, or out of range.

    Memory: 3 bytes an example.
    """

    k: int = 3

    def __post_init__(self) -> None:
        check_integer("LearnedFor", "k", self.k, 1, 255)

    @property
    def name(self) -> str:
        return f"learned_for_{self.k}"

    @property
    def columns(self) -> tuple[Column, ...]:
        return (
            Column(f"streak_{self.k}", torch.uint8, 0, "last"),
            Column(f"first_streak_{self.k}", torch.int16, NEVER, "min"),
        )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        formula = f"first epoch with the last {self.k} right; inf if none"
        return (Statistic(self.name, formula, "epochs", "[1, inf]", +1, "arXiv 2308.13862", self._read),)

    def update(self, state: State, batch: Batch) -> None:
        streak = state[f"streak_{self.k}"].index_select(0, batch.labelled).clamp(max=self.k - 1) + 1
        streak = streak * batch.correct
        state[f"streak_{self.k}"].scatter_(0, batch.labelled, streak)
        epoch = torch.where(streak == self.k, batch.epoch, NEVER).to(torch.int16)
        state[f"first_streak_{self.k}"].scatter_reduce_(0, batch.labelled, epoch, "amin")

    def _read(self, state: State) -> Tensor:
        return seen_only(_or_never(state[f"first_streak_{self.k}"]), state["label_count"])


@dataclass(frozen=True)
class SecondSplit(_LastEpoch):
    """Second-split forgetting time: last epoch of training on other data at which the example was still right, + 1.

    Train on one half of the data, then give the first half a tracker of its own, train on the second half, and after
    each epoch of that update the tracker with the scores of the first half. 1 means forgotten at once, which points to
    a mislabelled example; T + 1 means not forgotten in T epochs. Memory: 2 bytes an example.
    """

    name = "second_split_forgetting"
    columns = (Column("last_correct", torch.int16, 0, "max"),)
    right = True
    about = "last epoch right + 1", "epochs", "[1, T + 1]", -1, "SSFT, arXiv 2210.15031"


def _or_never(epoch: Tensor) -> Tensor:
    return torch.where(epoch == NEVER, torch.inf, epoch.to(torch.float32))
