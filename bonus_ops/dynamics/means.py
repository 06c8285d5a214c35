"""Means over training of any score, over all epochs or an early window; mean and spread of the label's probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..number_checks import check_integer
from ..scores import SCORES
from .field import Batch, Column, Field, State, Statistic, seen_only

__all__ = ["Confidence", "Mean"]

PAPERS = {
    "el2n": "arXiv 2107.07075, averaged",
    "margin": "AUM, arXiv 2001.10528",
}


@dataclass(frozen=True)
class Mean(Field):
    """Mean of a score over an example's observations: ``mean_margin`` is AUM; over a window it freezes afterwards.

    Args:
        score: a key of `SCORES` that orders examples, but ``"grad_norm"``, which needs to know the loss.
        epochs: first and last epoch of the window, both included and counted from 1, or None for all of training. The
            statistic is then called ``early_...`` and no later epoch changes it.

    Raises:
        TypeError: ``epochs`` is no pair of ints.
        ValueError: the score is none of these, or the window is empty or begins before epoch 1.

    Memory: 4 bytes an example, 6 with a window. Infinite scores (a label at logit -inf) make the mean infinite.
    """

    score: str
    epochs: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        allowed = [name for name, score in SCORES.items() if score.direction and name != "grad_norm"]
        if self.score not in allowed:
            raise ValueError(f"Mean: score must be one of {', '.join(allowed)}, got {self.score!r}")
        if self.epochs is not None:
            if not isinstance(self.epochs, (tuple, list)):
                raise TypeError(f"Mean: epochs must be (first, last) or None, got {type(self.epochs).__name__}")
            for epoch in self.epochs:
                check_integer("Mean", "each of epochs", epoch, 1)
            object.__setattr__(self, "epochs", tuple(self.epochs))
            if len(self.epochs) != 2 or self.epochs[0] > self.epochs[1]:
                raise ValueError(f"Mean: epochs must be (first, last) with 1 <= first <= last, got {self.epochs}")

    @property
    def name(self) -> str:
        return f"{'mean' if self.epochs is None else 'early'}_{self.score}"

    @property
    def _count(self) -> str:
        if self.epochs is not None:
            return f"{self.name}_count"
        return "label_count" if SCORES[self.score].needs_label else "count"

    @property
    def columns(self) -> tuple[Column, ...]:
        total = Column(f"{self.name}_sum", torch.float32, 0, "sum")
        return (total,) if self.epochs is None else (total, Column(self._count, torch.int16, 0, "sum"))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        score = SCORES[self.score]
        window = "" if self.epochs is None else f" in epochs {self.epochs[0]} to {self.epochs[1]}"
        paper = PAPERS.get(self.score, score.paper)
        formula = f"mean {self.score}{window}"
        return (Statistic(self.name, formula, score.unit, score.range, score.direction, paper, self._read),)

    def update(self, state: State, batch: Batch) -> None:
        if self.epochs is not None and not self.epochs[0] <= batch.epoch <= self.epochs[1]:
            return
        rows = batch.labelled if SCORES[self.score].needs_label else batch.rows
        state[f"{self.name}_sum"].index_add_(0, rows, getattr(batch.scores, self.score))
        if self.epochs is not None:
            state[self._count].index_add_(0, rows, torch.ones_like(rows, dtype=torch.int16))

    def _read(self, state: State) -> Tensor:
        return state[f"{self.name}_sum"] / state[self._count]  # 0 / 0 is NaN where nothing was observed


@dataclass(frozen=True)
class Confidence(Field):
    """Mean and population standard deviation of the label's probability over training: the axes of dataset cartography.

    Kept as mean and sum of squared deviations (Welford 1962): a sum of squares would lose the spread of easy examples.
    Memory: 8 bytes an example.
    """

    name = "confidence"
    columns = (
        Column("confidence_mean", torch.float32, 0, "own"),
        Column("confidence_deviation", torch.float32, 0, "own"),
    )

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        paper = "arXiv 2009.10795"
        return (
            Statistic("confidence", "mean target_prob", "1", "[0, 1]", -1, paper, self._confidence),
            Statistic("variability", "population std of target_prob", "1", "[0, 1/2]", +1, paper, self._variability),
        )

    def update(self, state: State, batch: Batch) -> None:
        rows, prob = batch.labelled, batch.scores.target_prob
        count = state["label_count"].index_select(0, rows) + 1
        mean = state["confidence_mean"].index_select(0, rows)
        new = mean + (prob - mean) / count
        state["confidence_mean"].scatter_(0, rows, new)
        state["confidence_deviation"].index_add_(0, rows, (prob - mean) * (prob - new))

    def summands(self, state: State, base: State) -> State:
        # moments about the mean at the last merge, which every process shares, simply add
        shift = state["confidence_mean"] - base["confidence_mean"]
        first = state["label_count"] * shift
        second = state["confidence_deviation"] + first * shift - base["confidence_deviation"]
        return {"first": first, "second": second}

    def absorb(self, state: State, base: State, total: State) -> None:
        shift = total["first"] / state["label_count"].clamp(min=1)
        deviation = base["confidence_deviation"] + total["second"] - total["first"] * shift
        state["confidence_mean"].copy_(base["confidence_mean"] + shift)
        state["confidence_deviation"].copy_(deviation.clamp(min=0))  # rounding may leave less

    def _confidence(self, state: State) -> Tensor:
        return seen_only(state["confidence_mean"], state["label_count"])

    def _variability(self, state: State) -> Tensor:
        return (state["confidence_deviation"].clamp(min=0) / state["label_count"]).sqrt()
