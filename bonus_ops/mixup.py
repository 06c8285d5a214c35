"""Two labels a row: the loss of mixup and CutMix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_gap_loss, check_reduction, checked_ignore_index
from .functional import _DEFAULT_BONUS, bonus_cross_entropy, bonus_cross_entropy_with_scores
from .losses import GapLoss
from .number_checks import check_number
from .scores import Scores
from .signatures import takes_what
from .watchers import is_plain_eager

__all__ = ["MixupWithScores", "mixup_cross_entropy", "mixup_cross_entropy_with_scores"]


class MixupWithScores(NamedTuple):
    """What `mixup_cross_entropy_with_scores` returns.

    Attributes:
        loss: in nats, as `mixup_cross_entropy` returns it.
        scores_a: `Scores` of ``target_a`` against the logits of the mixed rows, detached.
        scores_b: `Scores` of ``target_b``. ``lam * scores_a.loss + (1 - lam) * scores_b.loss`` is the plain
            cross-entropy of the mix; entropy and energy, which need no label, are the same in both.
    """

    loss: Tensor
    scores_a: Scores
    scores_b: Scores


def mixup_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: float | Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    bonus: GapLoss | None = _DEFAULT_BONUS,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    implementation: str | None = None,
) -> Tensor:
    """Compute the loss of examples mixed from two.

    ``lam * bonus_cross_entropy(input, target_a) + (1 - lam) * bonus_cross_entropy(input, target_b)``, each of them from
    its own read of the logits.

    Args: as in `bonus_cross_entropy`, but for
        target_a: class indices of the one example.
        target_b: class indices of the other.
        lam: share of ``target_a`` in [0, 1], a number, or a tensor of one share a row shaped like the targets.
        weight: factor of each class, [C]; ``mean`` divides either loss by its own weights.
        ignore_index: a label that costs 0; the other label of the row still counts.
        bonus: the loss of the gap, a `GapLoss`; None is plain cross-entropy.
        z_loss: of either loss by its share.

    Returns:
        Loss in nats in the dtype of ``input``: a scalar, or shaped like the targets for ``"none"``.

    Raises:
        As `bonus_cross_entropy`; TypeError, ValueError or RuntimeError where ``lam`` is no number, out of [0, 1], or
            misshapen.

    Example:
        >>> import torch
        >>> from bonus_ops import mixup_cross_entropy
        >>> mixup_cross_entropy(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]), torch.tensor([1]), 0.7, bonus=None)
        tensor(0.8395)

    References:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412.
    """
    return _mixed(
        bonus_cross_entropy, input, target_a, target_b, lam, weight, ignore_index=ignore_index, reduction=reduction,
        bonus=bonus, logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, implementation=implementation,
    )[0]  # fmt: skip


@takes_what(mixup_cross_entropy)
def mixup_cross_entropy_with_scores(*inputs: Any, **options: Any) -> MixupWithScores:
    """Compute `mixup_cross_entropy` and the difficulty scores of either label from the same two reads.

    Args and errors: as in `mixup_cross_entropy`.

    Returns:
        `MixupWithScores`. Scores are of mixed rows: an example is harder in them the less of it is in the mix, so
        compare at like ``lam``, or score the unmixed rows.

    Example:
        >>> import torch
        >>> from bonus_ops import mixup_cross_entropy_with_scores
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]])
        >>> out = mixup_cross_entropy_with_scores(logits, torch.tensor([0]), torch.tensor([1]), 0.7)
        >>> out.scores_a.margin, out.scores_b.margin
        (tensor([2.]), tensor([-2.]))
    """
    loss, scores = _mixed(bonus_cross_entropy_with_scores, *inputs, **options)
    return MixupWithScores(loss, *scores)


def _mixed(
    function: Callable[..., Any], input: Tensor, target_a: Tensor, target_b: Tensor, lam: float | Tensor,
    weight: Tensor | None = None, *, ignore_index: int = -100, reduction: str = "mean",
    bonus: GapLoss | None = _DEFAULT_BONUS, logit_scale: float = 1.0, softcap: float | None = None,
    z_loss: float = 0.0, implementation: str | None = None,
) -> tuple[Tensor, list[Scores]]:  # fmt: skip
    """Return the mixed loss and, where ``function`` returns a pair, the scores of either label."""
    ignore_index = checked_ignore_index(ignore_index)
    check_reduction(reduction)
    check_gap_loss(bonus)
    for target in (target_a, target_b):
        if (
            isinstance(target, Tensor)
            and isinstance(input, Tensor)
            and target.shape == input.shape
            and target.is_floating_point()
        ):
            raise RuntimeError(f"expected class indices as targets of mixup, got probabilities of {target.dtype}")
    lam = _checked_lam(lam, target_a)
    by_row = isinstance(lam, Tensor) and lam.dim() > 0 and reduction != "none"
    out = [
        function(
            input, target, weight, ignore_index=ignore_index, reduction="none" if by_row else reduction, bonus=bonus,
            logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, implementation=implementation,
        )
        for target in (target_a, target_b)
    ]  # fmt: skip
    scores = [] if isinstance(out[0], Tensor) else [each[1] for each in out]
    a, b = (each if isinstance(each, Tensor) else each[0] for each in out)
    if not by_row:
        # of one axis more: the tangent of a 0-d tensor times a number has the dtype of the number
        return (lam * a[None] + (1 - lam) * b[None])[0].to(a.dtype), scores
    # a share for each row: the rows of either loss, halves included, are added in float32
    parts = []
    for target, share, losses in ((target_a, lam, a), (target_b, 1 - lam, b)):
        part = (share * losses).sum(dtype=torch.promote_types(losses.dtype, torch.float32))
        if reduction != "sum":
            part = part / _divisor(target, weight, input, ignore_index)
        parts.append(part)
    return (parts[0] + parts[1]).to(a.dtype), scores


def _divisor(target: Tensor, weight: Tensor | None, input: Tensor, ignore_index: int) -> Tensor:
    """Return what the mean divides by: the number of rows not ignored, or the sum of their weights."""
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    inside = counts & (target >= 0) & (target < weight.shape[0])
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.where(inside, wide[target.long() * inside], 0.0).sum()


def _checked_lam(lam: Any, target: Tensor) -> float | Tensor:
    """Return ``lam``; the range of a tensor on a GPU is not looked at: that would wait."""
    if isinstance(lam, Tensor):
        if lam.dim() > 0 and lam.shape != target.shape:
            raise RuntimeError(
                f"lam must be a number or shaped like the targets, {list(target.shape)}, got {list(lam.shape)}"
            )
        if not lam.is_floating_point():
            raise RuntimeError(f"lam must have a floating point type, got {lam.dtype}")
        if lam.device != target.device and lam.dim() > 0:
            raise RuntimeError(f"lam must be on the device of the targets, {target.device}, got {lam.device}")
        if lam.device.type == "cpu" and is_plain_eager(lam) and not ((lam >= 0) & (lam <= 1)).all():
            raise ValueError(f"lam must be in [0, 1], got {lam.min().item()} to {lam.max().item()}")
        return lam
    check_number("mixup_cross_entropy", "lam", lam, "[0, 1] or a Tensor")
    return float(lam)
