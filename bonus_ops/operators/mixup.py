"""The two operators for two labels a row and their launches, see `labels` for one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..losses import decode
from ..torch_path import mixup as torch_mixup
from . import launching

__all__ = ["backward", "forward"]

SAVED = 7  # columns: two gaps, max of the rest, that max below either rest, each label below the other's rest


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
        how = launching.kernel_modules()["launch"].soft_forward(n_classes, launching.WARP_SIZE)
        with launching.device_guard(logits):
            launching.kernel_modules()["mixup"].mixup_forward_kernel[(-(-n_outer * n_inner // how.rows),)](
                logits_ptr=logits, targets_ptr=targets.contiguous(), outputs=(values, saved),
                shape=(n_outer * n_inner, n_classes, n_inner), strides=logits.stride(), ignore_index=ignore_index,
                loss_params=launching.loss_params(gap_loss), VALUE=value, ROWS=how.rows, LANES=how.lanes,
                VECTOR=launching.vector(logits), num_warps=how.num_warps,
            )  # fmt: skip
        return values, saved
    if logits.device.type == "cpu":
        return torch_mixup.forward(logits, targets, ignore_index, gap_loss, values, saved)
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
        how = launching.kernel_modules()["launch"].soft_backward(n_classes, launching.WARP_SIZE)
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
        return torch_mixup.backward(logits, targets, ignore_index, gap_loss, saved, grad_loss, grad)
    for i, (t, g) in enumerate(zip(targets, grad_loss, strict=True)):
        part = reference.gradient(logits, t, ignore_index, gap_loss, g.reshape(t.shape))
        grad.copy_(part) if i == 0 else grad.add_(part)
    return grad


@backward.register_fake
def _(logits, targets, fields, saved, grad_loss, ignore_index, loss, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)
