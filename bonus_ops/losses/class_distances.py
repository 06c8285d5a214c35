"""Losses on all classes of a softmax: every class pays for the distance of its probability to its share.

``L = sum_k c(p_k, share_k) / C`` with the share 1 at the label and 0 elsewhere, or what smoothing and probabilities
make of them. With ``pull_k = -p_k dc_k/dp_k`` the gradient is ``dL/dz_j = (p_j sum_k pull_k - pull_j) / C``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Loss

__all__ = ["ClassLoss", "SoftmaxAbsoluteError", "SoftmaxSquaredError"]


@dataclass(frozen=True)
class ClassLoss(Loss):
    """A loss that is a mean over the classes of a function of their probabilities.

    Subclasses give `error`; ``strength`` times the mirror bonus
    ``-(share p^gamma + (1 - share) (1 - p)^gamma)`` is added to both.

    Args:
        strength: factor on the mirror bonus, the paper's bonus_rho. Default 0, off.
        gamma: exponent of the mirror bonus, >= 1. Default 2, the paper's.

    Raises:
        ValueError: a parameter is outside its range.
        TypeError: a parameter is not a number.
    """

    strength: float = 0.0
    gamma: float = 2.0

    def __post_init__(self) -> None:
        self.check_fields(strength="(-inf, inf)", gamma="[1, inf)")

    def error(self, distance: Tensor) -> Tensor:
        """Return the error of a class from ``distance = p - share``."""
        raise NotImplementedError(f"{type(self).__name__} does not define error(distance)")

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        mirror = share * p**self.gamma + (1 - share) * rest**self.gamma
        return self.error((1 - share) * p - share * rest) - self.strength * mirror


@dataclass(frozen=True)
class SoftmaxSquaredError(ClassLoss):
    """Mean squared error of the softmax, optionally with the paper's mirror bonus.

    ``L = (1/C) sum_k ((p_k - share_k)^2 - strength (share_k p_k^gamma + (1 - share_k) (1 - p_k)^gamma))``: the Brier
    score over C where ``strength=0``; with ``strength=1, gamma=2`` and a hard label it is twice the absolute error - 1.
    Range of the error [0, 2/C].

    Args, Raises: as in `ClassLoss`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, MSE with the mirror bonus.
    """

    kernel: ClassVar[Any] = "softmax_squared_error"

    def error(self, distance: Tensor) -> Tensor:
        return distance * distance


@dataclass(frozen=True)
class SoftmaxAbsoluteError(ClassLoss):
    """Mean absolute error of the softmax, optionally with the paper's mirror bonus.

    ``L = (1/C) sum_k (|p_k - share_k| - strength (share_k p_k^gamma + (1 - share_k) (1 - p_k)^gamma))``; with a hard
    label the error is ``2 (1 - p) / C``.

    Args, Raises: as in `ClassLoss`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, MAE with the mirror bonus.
    """

    kernel: ClassVar[Any] = "softmax_absolute_error"

    def error(self, distance: Tensor) -> Tensor:
        return distance.abs()
