"""timm's BinaryCrossEntropy with a bonus, or any other loss of the gap."""

from __future__ import annotations

from typing import Any

from timm.data.mixup import one_hot
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from ..functional import _DEFAULT_BONUS
from ..losses import GapLoss
from ..sigmoid import bonus_binary_cross_entropy_with_logits

__all__ = ["BonusBinaryCrossEntropy"]


class BonusBinaryCrossEntropy(BinaryCrossEntropy):
    """timm's loss for ``--bce-loss``, mixup and CutMix included, with a bonus for well-classified elements.

        BonusBinaryCrossEntropy(target_threshold=0.2, sum_classes=True, bonus=LogBonus(0.5))

    Args:
        options: of `timm.loss.BinaryCrossEntropy`: ``smoothing``, ``target_threshold``, ``sum_classes``, ...
        bonus: as in `bonus_binary_cross_entropy_with_logits`; None is timm's loss.
        implementation: likewise.

    Raises:
        TypeError, ValueError, RuntimeError: as that function, when called.
    """

    def __init__(
        self, *options: Any, bonus: GapLoss | None = _DEFAULT_BONUS, implementation: str | None = None, **named: Any
    ) -> None:
        super().__init__(*options, **named)
        self.bonus, self.implementation = bonus, implementation

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits [N, C] against class indices [N] or probabilities [N, C]."""
        if target.shape != x.shape:
            off = self.smoothing / x.shape[-1]
            target = one_hot(target, x.shape[-1], 1 - self.smoothing + off, off).to(x.dtype)
        elif self.smooth_dense:
            target = target * (1 - self.smoothing) + self.smoothing / 2
        if self.target_threshold is not None:
            target = (target > self.target_threshold).to(target.dtype)
        loss = bonus_binary_cross_entropy_with_logits(
            x, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight, bonus=self.bonus,
            implementation=self.implementation,
        )  # fmt: skip
        return loss.sum(-1).mean() if self.sum_classes else loss
