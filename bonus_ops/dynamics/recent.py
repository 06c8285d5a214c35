"""The last losses of each example: their mean, and how much they still change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..number_checks import check_integer
from .field import Batch, Column, Field, State, Statistic

__all__ = ["RecentLosses"]

KEPT = 5  # three second differences take five losses
NAMES = tuple(f"loss_{age}" for age in range(1, KEPT + 1))  # loss_1 is the newest


@dataclass(frozen=True)
class RecentLosses(Field):
    """The last five losses, NaN where there were fewer.

    ``recent_loss`` is the mean of the last ``window``: on-the-fly denoising compares it with a quantile of
    `random_label_loss`. ``loss_change`` is the mean of the last three ``|L_j - 2 L_(j-1) + L_(j-2)|``:
    instance-dependent early stopping calls an example mastered where it is below 1e-3; infinite where a loss was
    infinite. A gap in the observations (a last partial batch dropped) is not seen: the differences then span it.

    Args:
        window: losses averaged by ``recent_loss``, 1 to 5.

    Raises:
        TypeError, ValueError: ``window`` is no int, or out of range.

    Memory: 20 bytes an example.
    """

    window: int = 2

    def __post_init__(self) -> None:
        check_integer("RecentLosses", "window", self.window, 1, KEPT)

    name = "recent_losses"
    columns = tuple(Column(name, torch.float32, torch.nan, "last") for name in NAMES)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        mean, change = f"mean of the last {self.window} losses", "mean of the last 3 |second difference of the loss|"
        return (
            Statistic("recent_loss", mean, "nats", "[0, inf]", +1, "ODD, arXiv 2003.10647", self._recent),
            Statistic("loss_change", change, "nats", "[0, inf]", +1, "IES, arXiv 2502.07547", self._change),
        )

    def update(self, state: State, batch: Batch) -> None:
        older = [state[name].index_select(0, batch.labelled) for name in NAMES[:-1]]
        for name, loss in zip(NAMES, (batch.scores.loss, *older), strict=True):
            state[name].scatter_(0, batch.labelled, loss)

    def _recent(self, state: State) -> Tensor:
        return torch.stack([state[name] for name in NAMES[: self.window]]).mean(0)

    def _change(self, state: State) -> Tensor:
        losses = torch.stack([state[name] for name in NAMES])
        change = (losses[:-2] - 2 * losses[1:-1] + losses[2:]).abs().mean(0)
        # inf - inf is NaN: an infinite loss is not mastered
        return torch.where(losses.isinf().any(0) & ~losses.isnan().any(0), torch.inf, change)
