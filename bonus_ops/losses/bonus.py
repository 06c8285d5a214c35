"""Cross-entropy plus a bonus: what all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import GapLoss
from .gap import logit

__all__ = ["Bonus"]


@dataclass(frozen=True, kw_only=True)
class Bonus(GapLoss):
    """Cross-entropy plus ``strength`` times a bonus ``b(p) <= 0``, with the paper's window on p.

    ``L = -log p + strength (b(p) - b(start)) [start <= p <= abrupt]``. Subclasses give ``b`` and ``-db/dgap``,
    and for targets that are shares of classes ``b`` and the odds ``-p db/dp`` as functions of p.
    """

    adds_to_cross_entropy: ClassVar[bool] = True
    strength: float = 1.0
    start: float = 0.0
    abrupt: float = 1.0

    def __post_init__(self) -> None:
        self.check_fields(strength="(-inf, inf)", start="[0, 1)", abrupt="(0, 1]")
        if self.start >= self.abrupt:
            name = type(self).__name__
            raise ValueError(f"{name}: start must be below abrupt={self.abrupt!r}, got {self.start!r}")

    def bonus(self, gap: Tensor) -> Tensor:
        """Return b as a function of the gap."""
        raise NotImplementedError(f"{type(self).__name__} does not define bonus(gap)")

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        """Return ``-db/dgap >= 0`` from the gap, p = sigmoid(gap) and rest = 1 - p = sigmoid(-gap)."""
        raise NotImplementedError(f"{type(self).__name__} does not define bonus_slope(gap, p, rest)")

    def is_cross_entropy(self) -> bool:
        return self.strength == 0

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        """Return b as a function of p = 1 - rest."""
        raise NotImplementedError(f"{type(self).__name__} does not define class_bonus(p, rest)")

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        bonus = self.class_bonus(p, rest) - self._bonus_at_start()
        return self.strength * share * self._in_class_window(p, rest, bonus)

    def _in_class_window(self, p: Tensor, rest: Tensor, x: Tensor) -> Tensor:
        if self.start > 0:
            x = torch.where(p >= self.start, x, 0.0)
        if self.abrupt < 1:
            x = torch.where(rest >= 1 - self.abrupt, x, 0.0)
        return x

    def bonus_parameters(self) -> tuple[float, ...]:
        """Return what the kernel pair needs beyond strength and window."""
        return ()

    def parameters(self) -> tuple[float, ...]:
        return self.strength, logit(self.start), self._bonus_at_start(), logit(self.abrupt), *self.bonus_parameters()

    def _bonus_at_start(self) -> float:
        if self.start == 0:
            return 0.0
        return float(self.bonus(torch.tensor(logit(self.start), dtype=torch.float64, device="cpu")))

    def _in_window(self, gap: Tensor, x: Tensor) -> Tensor:
        if self.start > 0:
            x = torch.where(gap >= logit(self.start), x, 0.0)
        if self.abrupt < 1:
            x = torch.where(gap <= logit(self.abrupt), x, 0.0)
        return x

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(gap) if self.strength == 0 else -logsigmoid(gap) + self.excess(gap)

    def excess(self, gap: Tensor) -> Tensor:
        if self.strength == 0:
            return torch.zeros_like(gap)  # of an infinite bonus too
        bonus = self.bonus(gap)
        if self.start > 0:
            bonus = bonus - self._bonus_at_start()
        return self.strength * self._in_window(gap, bonus)

    def slope(self, gap: Tensor) -> Tensor:
        p, rest = torch.sigmoid(gap), torch.sigmoid(-gap)
        return torch.add(rest, self._in_window(gap, self.bonus_slope(gap, p, rest)), alpha=self.strength)

    def excess_slope(self, gap: Tensor) -> Tensor:
        if self.strength == 0:
            return torch.zeros_like(gap)
        slope = self.bonus_slope(gap, torch.sigmoid(gap), torch.sigmoid(-gap))
        return self.strength * self._in_window(gap, slope)
