"""Thin `torch.nn.Module` twins of the functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from .checks import (
    by_keyword,
    check_bonus,
    check_implementation,
    check_reduction,
    check_validate,
    checked_bonus_smoothing,
    checked_ignore_index,
    checked_label_smoothing,
)
from .functional import _DEFAULT_BONUS, bonus_cross_entropy
from .logit_options import checked_options
from .losses import ClassLoss, GapLoss
from .schedules import KeepsEpoch
from .signatures import options_of

__all__ = ["BonusCrossEntropyLoss"]

_KEPT = options_of(bonus_cross_entropy, without=("size_average", "reduce"))


class BonusCrossEntropyLoss(KeepsEpoch, _WeightedLoss):
    """Cross-entropy with a bonus for well-classified examples; a drop-in for `torch.nn.CrossEntropyLoss`.

    Args: as in `bonus_cross_entropy`, without input and target. ``weight`` and ``bonus_weight`` are buffers, so
    ``.to()`` moves them.
    The epoch of a `Scheduled` bonus is in the ``state_dict``; see there.

    Raises:
        TypeError, ValueError, RuntimeError: an option of a wrong type or out of range, at once; the rest as
            `bonus_cross_entropy`, when called.

    Shape:
        input [C], [N, C] or [N, C, d1, ...]; target as in `bonus_cross_entropy`; output a scalar, or the shape of the
        target for ``reduction="none"``.

    Example:
        >>> import torch
        >>> from bonus_ops import BonusCrossEntropyLoss
        >>> BonusCrossEntropyLoss()(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(-1.3278)
    """

    __constants__ = ["ignore_index", "reduction", "label_smoothing"]

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
        bonus_smoothing: float | None = None,
        bonus_weight: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        implementation: str | None = None,
        validate: bool = False,
    ) -> None:
        try:
            super().__init__(weight, size_average, reduce, reduction)
        except TypeError as error:
            came = f"Expected weight to be a Tensor or None, got {type(weight).__name__}."
            raise TypeError(f"{error}\n{came}{by_keyword(weight)}") from None
        check_reduction(self.reduction)
        self.ignore_index = checked_ignore_index(ignore_index)
        self.label_smoothing = checked_label_smoothing(label_smoothing)
        checked_bonus_smoothing(bonus_smoothing, self.label_smoothing)
        check_bonus(bonus)
        check_implementation(implementation)
        check_validate(validate)
        checked_options(logit_scale, softcap, z_loss)
        self.bonus, self.bonus_smoothing = bonus, bonus_smoothing
        self.register_buffer("bonus_weight", bonus_weight)
        self.logit_scale, self.softcap, self.z_loss = logit_scale, softcap, z_loss
        self.implementation, self.validate = implementation, validate

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        options: dict[str, Any] = {name: getattr(self, name) for name in _KEPT}
        return bonus_cross_entropy(input, target, **options)

    def extra_repr(self) -> str:
        """Return the options that differ between instances."""
        options = f"bonus={self.bonus}, reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        own = {"bonus_smoothing": None, "logit_scale": 1.0, "softcap": None, "z_loss": 0.0, "implementation": None}
        given = "".join(f", {name}={x!r}" for name, usual in own.items() if (x := getattr(self, name)) != usual)
        return f"{options}, label_smoothing={self.label_smoothing}{given}{', validate=True' * self.validate}"
