"""Two labels a row: the loss of mixup and CutMix, from one sweep of the logits."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import check_bonus, check_call, checked_ignore_index
from .functional import _DEFAULT_BONUS, _rows
from .losses import CrossEntropy, GapLoss, decode, encode
from .operators import launching
from .operators.implementation import chosen
from .torch_path import labels as torch_labels
from .watchers import is_plain_eager, is_transformed

__all__ = ["mixup_cross_entropy"]

SAVED = 7  # columns: two gaps, max of the rest, that max below either rest, each label below the other's rest


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
    lam = _checked_lam(lam, target_a)
    implementation = chosen(implementation, input.device, loss.kernel is not None)
    logits = _rows(input)
    n_classes = logits.shape[2]
    targets = torch.stack([t.reshape(logits.shape[:2]).to(torch.int64) for t in (target_a, target_b)])
    value = _values(logits, targets, ignore_index, loss, implementation)
    dtype = value.dtype
    counts = targets.reshape(2, -1) != ignore_index
    factor = counts.to(dtype)
    if weight is not None:
        inside = counts & (targets.reshape(2, -1) >= 0) & (targets.reshape(2, -1) < n_classes)
        factor = torch.where(inside, weight.to(dtype)[torch.where(inside, targets.reshape(2, -1), 0)], 0.0)
        value = value * factor
    if reduction == "mean":
        value = value / factor.sum(1, keepdim=True)
    if isinstance(lam, Tensor):
        lam = lam.reshape(-1).to(dtype)
    total = lam * value[0] + (1 - lam) * value[1]
    half = input.dtype in (torch.float16, torch.bfloat16)
    total = total.view(target_a.shape) if reduction == "none" else total.sum()
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


def _values(logits: Tensor, targets: Tensor, ignore_index: int, loss: GapLoss, implementation: str) -> Tensor:
    """Return the losses [2, N] of rows [outer, inner, C] under each of their labels [2, outer, inner]."""
    if implementation == "reference" or is_transformed():
        if logits.device.type == "cpu":
            reference.check_target(targets, logits.shape[2], ignore_index)
        return torch.stack([reference.rows(logits, t, ignore_index, loss).reshape(-1) for t in targets])
    name, fields = encode(loss)
    values: Tensor = _Mixup.apply(logits, targets, fields, ignore_index, name, implementation)[0]  # type: ignore[no-untyped-call]
    return values


class _Mixup(torch.autograd.Function):
    """The two losses of each row; derivatives beyond the first follow the closed form."""

    @staticmethod
    def forward(logits, targets, fields, ignore_index, loss, implementation):  # type: ignore[no-untyped-def]
        return forward(logits, targets, fields, ignore_index, loss, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, targets, fields, *ctx.rest = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, targets, fields, output[1])

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        logits, targets, fields, saved = ctx.saved_tensors
        ignore_index, loss, implementation = ctx.rest
        if torch.is_grad_enabled():
            parts = [
                reference.gradient(logits, t, ignore_index, decode(loss, fields), g.reshape(t.shape))
                for t, g in zip(targets, grad_loss, strict=True)
            ]
            grad = parts[0] + parts[1]
        else:
            grad = backward(logits, targets, fields, saved, grad_loss, ignore_index, loss, implementation)
        return grad, *(None,) * 5


@torch.library.custom_op("bonus_ops::mixup_forward", mutates_args=())
def forward(
    logits: Tensor, targets: Tensor, fields: Tensor, ignore_index: int, loss: str, implementation: str
) -> tuple[Tensor, Tensor]:
    """Return losses [2, N] and what `backward` needs [7, N]."""
    gap_loss = decode(loss, fields)
    values, saved = _empty(logits)
    if logits.device.type == "cpu":
        reference.check_target(targets, logits.shape[2], ignore_index)
    if values.numel() == 0:
        return values, saved
    if implementation == "triton":
        n_outer, n_inner, n_classes = logits.shape
        value, _ = launching.kernel_pair(gap_loss)
        how = launching.kernel_modules()["launch"].dense_forward(n_classes, launching.WARP_SIZE)
        with launching.device_guard(logits):
            launching.kernel_modules()["mixup"].mixup_forward_kernel[(-(-n_outer * n_inner // how.rows),)](
                logits_ptr=logits, targets_ptr=targets.contiguous(), outputs=(values, saved),
                shape=(n_outer * n_inner, n_classes, n_inner), strides=logits.stride(), ignore_index=ignore_index,
                loss_params=launching.loss_params(gap_loss), VALUE=value, ROWS=how.rows, LANES=how.lanes,
                VECTOR=launching.vector(logits), num_warps=how.num_warps,
            )  # fmt: skip
        return values, saved
    if logits.device.type == "cpu":
        return _sweep(logits, targets, ignore_index, gap_loss, values, saved)
    for i, t in enumerate(targets):
        values[i] = reference.rows(logits, t, ignore_index, gap_loss).reshape(-1)
    return values, saved.zero_()


@forward.register_fake
def _(logits, targets, fields, ignore_index, loss, implementation):  # type: ignore[no-untyped-def]
    return _empty(logits)


def _empty(logits: Tensor) -> tuple[Tensor, Tensor]:
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = reference.accumulation_dtype(logits.dtype)
    return logits.new_empty((2, n_rows), dtype=dtype), logits.new_empty((SAVED, n_rows), dtype=dtype)


@torch.library.custom_op("bonus_ops::mixup_backward", mutates_args=())
def backward(
    logits: Tensor, targets: Tensor, fields: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: str,
    implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradients [2, N]."""
    gap_loss = decode(loss, fields)
    grad = torch.empty_like(logits)
    if grad.numel() == 0:
        return grad
    if implementation == "triton":
        n_outer, n_inner, n_classes = logits.shape
        _, slope = launching.kernel_pair(gap_loss)
        how = launching.kernel_modules()["launch"].dense_backward(n_classes, launching.WARP_SIZE)
        with launching.device_guard(logits):
            launching.kernel_modules()["mixup"].mixup_backward_kernel[(-(-n_outer * n_inner // how.rows), how.parts)](
                logits_ptr=logits, targets_ptr=targets.contiguous(), saved_ptr=saved,
                grad_loss_ptr=grad_loss.contiguous(), grad_ptr=grad, shape=(n_outer * n_inner, n_classes, n_inner),
                strides=logits.stride(), grad_strides=grad.stride(), ignore_index=ignore_index,
                loss_params=launching.loss_params(gap_loss), SLOPE=slope, ROWS=how.rows, LANES=how.lanes,
                VECTOR=launching.vector(logits, grad), num_warps=how.num_warps,
            )  # fmt: skip
        return grad
    if logits.device.type == "cpu":
        return _second_sweep(logits, targets, ignore_index, gap_loss, saved, grad_loss, grad)
    for i, (t, g) in enumerate(zip(targets, grad_loss, strict=True)):
        part = reference.gradient(logits, t, ignore_index, gap_loss, g.reshape(t.shape))
        grad.copy_(part) if i == 0 else grad.add_(part)
    return grad


@backward.register_fake
def _(logits, targets, fields, saved, grad_loss, ignore_index, loss, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


# --- the torch path: blocks of rows as in `torch_path.labels` ---------------------------------------------------------


def _labels(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return gatherable labels [2, N, 1] and which of them count [2, N]."""
    counts = (targets != ignore_index).reshape(2, -1)
    return torch.where(counts, targets.reshape(2, -1), 0)[:, :, None], counts


def _sweep(
    logits: Tensor, targets: Tensor, ignore_index: int, loss: GapLoss, values: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill losses and saved columns: one read of the logits."""
    labels, counts = _labels(targets, ignore_index)
    z_a, z_b = (torch_labels._target_logits(logits, label)[:, 0].masked_fill(~c, -torch.inf) for label, c in
                zip(labels, counts, strict=True))  # fmt: skip
    plan = torch_labels._Plan(logits, 1)
    found = []
    row = 0
    for i, source in enumerate(plan.pieces(logits)):
        n_rows = plan.sizes[i]
        z = plan.buffer(0, i)[:n_rows]
        torch_labels._as_rows(source, z).copy_(source)
        for label, c in zip(labels, counts, strict=True):
            here = label[row : row + n_rows]
            z.scatter_(1, here, z.gather(1, here).masked_fill_(c[row : row + n_rows, None], -torch.inf))
        maximum = z.amax(1, keepdim=True)
        z.sub_(torch_labels._origin(maximum))
        found.append(torch.cat([maximum, z.mul_(torch_labels.LOG2_E).exp2_().sum(1, keepdim=True)], 1))
        row += n_rows
    maximum, sum_exp = torch.cat(found).unbind(1)
    same = (labels[0, :, 0] == labels[1, :, 0]) & counts[0] & counts[1]
    others = z_b.masked_fill(same, -torch.inf), z_a.masked_fill(same, -torch.inf)
    saved[2] = maximum
    for i, (z_label, other) in enumerate(zip((z_a, z_b), others, strict=True)):
        highest = torch.maximum(maximum, other)
        origin = torch_labels._origin(highest)
        total = sum_exp * torch.exp(maximum - origin) + torch.exp(other - origin)
        empty = total == 0
        log_total = torch.where(empty, 1.0, total).log()
        gap = torch.where(empty, torch.inf, (z_label - origin) - log_total)
        gap = gap + torch.where(z_label.isnan() | (empty & (z_label == -torch.inf) & counts[i]), torch.nan, 0.0)
        saved[i], values[i] = gap, loss.value(gap).masked_fill_(~counts[i], 0.0)
        saved[3 + i] = torch.where(empty, -torch.inf, (maximum - origin) - log_total)
        saved[6 - i] = torch.where(empty, -torch.inf, (other - origin) - log_total)
    return values, saved


def _second_sweep(
    logits: Tensor, targets: Tensor, ignore_index: int, loss: GapLoss, saved: Tensor, grad_loss: Tensor, grad: Tensor
) -> Tensor:
    """Fill the gradient: one read of the logits, one write."""
    labels, counts = _labels(targets, ignore_index)
    slopes = loss.slope(saved[:2]) * grad_loss.to(saved.dtype)
    slopes = slopes.masked_fill_(~counts | (saved[:2] == torch.inf), 0.0)
    a, b = slopes
    scale = a * torch.exp(saved[3]) + b * torch.exp(saved[4])
    same = (labels[0, :, 0] == labels[1, :, 0]) & counts[0] & counts[1]
    at_a = torch.where(same, -b, b * torch.exp(saved[5])) - a
    at_b = torch.where(same, -a, a * torch.exp(saved[6])) - b
    plan = torch_labels._Plan(logits, 1, grad)
    row = 0
    for i, (source, out) in enumerate(zip(plan.pieces(logits), plan.pieces(grad), strict=True)):
        rows = slice(row, row + plan.sizes[i])
        row = rows.stop
        e = plan.buffer(0, i)[: plan.sizes[i]]
        torch_labels._as_rows(source, e).copy_(source)
        e.sub_(torch_labels._origin(saved[2, rows, None])).mul_(torch_labels.LOG2_E).exp2_().mul_(scale[rows, None])
        for label, c, at in ((labels[0], counts[0], at_a), (labels[1], counts[1], at_b)):
            here = label[rows]
            e.scatter_(1, here, torch.where(c[rows, None], at[rows, None], e.gather(1, here)))
        e.masked_fill_(~(counts[0] | counts[1])[rows, None], 0.0)
        out.copy_(torch_labels._as_rows(out, e))
    return grad
