"""Two labels a row: the loss of mixup and CutMix, from one sweep of the logits."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .autograd import mixup as autograd
from .checks import check_bonus, check_call, checked_ignore_index
from .functional import _DEFAULT_BONUS, _rows
from .losses import CrossEntropy, GapLoss
from .operators.implementation import chosen
from .watchers import is_plain_eager

__all__ = ["mixup_cross_entropy"]


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
    implementation: str | None = None,
) -> Tensor:
    """Compute the loss of examples mixed from two.

    ``lam * bonus_cross_entropy(input, target_a) + (1 - lam) * bonus_cross_entropy(input, target_b)``, with both losses
    from one read of the logits and one more for the gradient.

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...], as in `bonus_cross_entropy`.
        target_a: class indices of the one example, as in `bonus_cross_entropy`.
        target_b: class indices of the other.
        lam: share of ``target_a`` in [0, 1], a number, or a tensor of one share a row shaped like the targets.
        weight: factor of each class, [C]; ``mean`` divides either loss by its own weights.
        ignore_index: a label that costs 0; the other label of the row still counts.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        bonus: the loss of the gap, a `GapLoss`; None is plain cross-entropy. Default ``LogBonus(log_end=0.75)``.
        implementation: as in `bonus_cross_entropy`.

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
    check_bonus(bonus)
    if bonus is not None and not isinstance(bonus, GapLoss):
        raise TypeError(f"bonus must be a GapLoss such as LogBonus(log_end=0.75), or None, not {type(bonus).__name__}")
    loss = CrossEntropy() if bonus is None else bonus
    ignore_index = checked_ignore_index(ignore_index)
    autocast = isinstance(input, Tensor) and input.device.type != "meta"
    autocast = autocast and torch.is_autocast_enabled(input.device.type)
    if autocast and isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.to(torch.float32)
    for target in (target_a, target_b):
        check_call(input, target, weight, ignore_index, reduction, 0.0, autocast)
        if isinstance(target, Tensor) and target.shape == input.shape and target.is_floating_point():
            raise RuntimeError(f"expected class indices as targets of mixup, got probabilities of {target.dtype}")
    reduction = "mean" if reduction == "elementwise_mean" else reduction
    lam = _checked_lam(lam, target_a)
    implementation = chosen(implementation, input.device, loss.kernel is not None)
    logits = _rows(input)
    n_classes = logits.shape[2]
    targets = torch.stack([t.reshape(logits.shape[:2]).to(torch.int64) for t in (target_a, target_b)])
    value = autograd.two_losses(logits, targets, ignore_index, loss, implementation)
    dtype = value.dtype
    counts = targets.reshape(2, -1) != ignore_index
    factor = counts.to(dtype)
    if weight is not None:
        inside = counts & (targets.reshape(2, -1) >= 0) & (targets.reshape(2, -1) < n_classes)
        factor = torch.where(inside, weight.to(dtype)[torch.where(inside, targets.reshape(2, -1), 0)], 0.0)
        value = value * factor
    if isinstance(lam, Tensor):
        lam = lam.reshape(-1).to(dtype)
    value = torch.stack([lam * value[0], (1 - lam) * value[1]])
    if reduction == "none":
        total = value.sum(0).view(target_a.shape)
    else:
        total = value.sum() if reduction == "sum" else (value.sum(1) / factor.sum(1)).sum()
    half = input.dtype in (torch.float16, torch.bfloat16)
    return total.to(torch.float32 if half and autocast else input.dtype)


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
    if isinstance(lam, bool) or not isinstance(lam, Real):
        raise TypeError(f"lam must be a number or a Tensor, got {type(lam).__name__}")
    if not 0 <= float(lam) <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam!r}")
    return float(lam)
