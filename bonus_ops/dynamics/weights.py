"""Log-weights of exponentiated-gradient reweighting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..number_checks import check_number
from .field import Batch, Column, Field, State, Statistic

__all__ = ["ExponentiatedGradient"]


@dataclass(frozen=True)
class ExponentiatedGradient(Field):
    """Log-weights ``log_w <- log_w - eta * min(loss, max_loss)``: an example loses weight by its accumulated loss.

    Only accumulated here; freeze and normalise them (softmax) at each epoch's start. Initially 0, also of examples not
    yet observed.

    Args:
        eta: step size, positive. eta times epochs of about 1.5 worked best here (0.05 for 30 epochs); the public code
            uses 0.01 for 200.
        max_loss: a single loss takes no more than this, in nats; keeps weights finite where a loss is infinite.

    Raises:
        TypeError, ValueError: a parameter is no number, or not positive and finite.

    Memory: 4 bytes an example.
    """

    eta: float = 0.05
    max_loss: float = 100.0

    def __post_init__(self) -> None:
        check_number("ExponentiatedGradient", "eta", self.eta, "(0, inf)")
        check_number("ExponentiatedGradient", "max_loss", self.max_loss, "(0, inf)")

    name = "log_weight"
    columns = (Column("log_weight", torch.float32, 0, "sum"),)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        formula = f"-{self.eta:g} sum of loss"
        return (Statistic("log_weight", formula, "nats", "(-inf, 0]", -1, "arXiv 2104.01493", self._read),)

    def update(self, state: State, batch: Batch) -> None:
        state["log_weight"].index_add_(0, batch.labelled, batch.scores.loss.clamp(max=self.max_loss), alpha=-self.eta)

    def _read(self, state: State) -> Tensor:
        return state["log_weight"].clone()
