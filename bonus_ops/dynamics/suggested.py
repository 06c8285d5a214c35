"""The label that training itself would give, by votes of its predictions, and how sure it is of that and the given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .field import Batch, Column, Field, State

__all__ = ["Labels", "SuggestedLabel", "labels"]

UNKNOWN = -1


class Labels(NamedTuple):
    """The label each example was given and the one that its predictions vote for; [num_examples] each.

    Attributes:
        given: int64, the label last given, -1 where none was known.
        suggested: int64, the class predicted most often, -1 likewise.
        given_confidence: float32 in [0, 1], mean probability of the given label over training; NaN where unknown.
        suggested_confidence: float32 in [0, 1], that of the suggested one, at least: an observation in which it was
            neither the label nor the runner-up, or before it took over, counts as 0.
    """

    given: Tensor
    suggested: Tensor
    given_confidence: Tensor
    suggested_confidence: Tensor


@dataclass(frozen=True)
class SuggestedLabel(Field):
    """The class predicted most often over an example's observations, next to the label it was given.

    A majority vote in constant memory (Boyer and Moore, 1991): one class is the candidate, each prediction of it adds
    to its lead, each other one takes from it, and at no lead the prediction of the day takes over. A class with more
    than half of the predictions is always found; where none has that, one of the frequent late ones is.

    It needs the labels: `ExampleTracker.update` with a target, or with scores that know theirs. `ExampleTracker.labels`
    reads it. What was seen under another label than the last does not count for the confidence in that.

    Memory: 18 bytes an example.
    """

    name = "suggested_label"
    columns = (
        Column("given", torch.int32, UNKNOWN, "last"),
        Column("suggested", torch.int32, UNKNOWN, "last"),
        Column("lead", torch.int16, 0, "last"),
        Column("given_prob", torch.float32, 0, "last"),
        Column("suggested_prob", torch.float32, 0, "last"),
    )
    statistics = ()

    def update(self, state: State, batch: Batch) -> None:
        if batch.target is None:
            return
        rows, scores = batch.labelled, batch.scores
        label, runner_up = batch.target.to(torch.int32), scores.runner_up.to(torch.int32)
        prediction = torch.where(batch.correct, label, runner_up)
        before, lead = state["suggested"].index_select(0, rows), state["lead"].index_select(0, rows)
        taken_over = (before != prediction) & (lead == 0)
        now = torch.where(taken_over, prediction, before)
        prob = torch.where(now == label, scores.target_prob, torch.where(now == runner_up, scores.other_prob, 0.0))
        kept = torch.where(taken_over, 0.0, state["suggested_prob"].index_select(0, rows))
        given = state["given"].index_select(0, rows)
        given_prob = torch.where((given == label) | (given == UNKNOWN), state["given_prob"].index_select(0, rows), 0.0)
        state["given"].scatter_(0, rows, label)
        state["given_prob"].scatter_(0, rows, given_prob + scores.target_prob)
        state["suggested"].scatter_(0, rows, now)
        state["suggested_prob"].scatter_(0, rows, kept + prob)
        state["lead"].scatter_(0, rows, torch.where(now == prediction, lead + 1, lead - 1).to(torch.int16))


def labels(state: State) -> Labels:
    """Read what the field keeps."""
    given, suggested = state["given"].to(torch.int64), state["suggested"].to(torch.int64)
    means = (state[f"{name}_prob"] / state["label_count"] for name in ("given", "suggested"))
    return Labels(given, suggested, *(torch.where(given == UNKNOWN, torch.nan, mean) for mean in means))
