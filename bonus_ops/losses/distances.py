"""Distances of the label's probability from 1, with their mirror bonus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import GapLoss

__all__ = ["AbsoluteError", "SquaredError"]


@dataclass(frozen=True, kw_only=True)
class _Error(GapLoss):
    """An error in p plus the mirror bonus ``-strength p^gamma``. Subclasses give the error and its slope."""

    strength: float = 0.0
    gamma: float = 2.0

    def __post_init__(self) -> None:
        self.check_fields(strength="(-inf, inf)", gamma="(0, inf)")

    def _error(self, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not define _error(p, rest)")

    def value(self, gap: Tensor) -> Tensor:
        error, _ = self._error(torch.sigmoid(gap), torch.sigmoid(-gap))
        return error - self.strength * torch.exp(self.gamma * logsigmoid(gap))

    def slope(self, gap: Tensor) -> Tensor:
        rest = torch.sigmoid(-gap)
        _, slope = self._error(torch.sigmoid(gap), rest)
        return slope + self.strength * self.gamma * torch.exp(self.gamma * logsigmoid(gap)) * rest


@dataclass(frozen=True)
class SquaredError(_Error):
    """The squared error with its mirror bonus: ``L = (1 - p)^2 - strength p^gamma``.

    ``A = 2 p (1 - p)^2 + strength gamma p^gamma (1 - p)``. On a sigmoid this is ``(sigmoid(x) - t)^2``, and
    at ``strength=1, gamma=2`` twice the absolute error less 1. On softmax rows it is of the label's probability
    alone, not of the distance to the one-hot row.

    Args:
        strength: factor on the mirror bonus. Default 0, the plain squared error; the paper uses 1. Keyword only.
        gamma: exponent > 0 of the mirror bonus. Default 2, the paper's. Keyword only.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, mirror bonus.
    """

    kernel: ClassVar[Any] = "squared_error"

    def _error(self, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        square = rest * rest
        return square, 2 * p * square


@dataclass(frozen=True)
class AbsoluteError(_Error):
    """The absolute error with its mirror bonus: ``L = (1 - p) - strength p^gamma``.

    ``A = p (1 - p) (1 + strength gamma p^(gamma - 1))``. On a sigmoid this is ``|sigmoid(x) - t|``. On softmax rows it
    is of the label's probability alone, half the distance to the one-hot row.

    Args:
        strength, gamma: as in `SquaredError`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, mirror bonus.
    """

    kernel: ClassVar[Any] = "absolute_error"

    def _error(self, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        return rest, p * rest
