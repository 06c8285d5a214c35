"""The two operators for class indices and their launches.

`forward` and `backward` are registered with torch.library, so that torch.compile sees them whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..losses import GapLoss, decode
from ..torch_path import labels as torch_labels
from . import launching

__all__ = ["RowResult", "backward", "fold", "forward", "unfold"]


class RowResult(NamedTuple):
    """Per-row tensors; ``scores``, ``runner_up`` and ``softmax`` are empty where they were not asked for."""

    loss: Tensor  # [N]; in `autograd.labels.reduced_rows` the weighted sum
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    saved: Tensor  # [3, N] gap, max and sum_exp of the rest
    softmax: Tensor  # as the logits


def _launch_forward(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, softmax: bool
) -> RowResult:
    kernels, launch = launching.kernel_modules()["labels"], launching.kernel_modules()["launch"]
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    out = _empty_result(logits, scores, softmax)
    if n_rows == 0:
        return out
    value, _ = launching.kernel_pair(loss)
    how = launch.forward(n_rows, n_classes, launching.WARP_SIZE)
    target = target.reshape(-1).contiguous()
    outputs = (out.loss, out.scores if scores else None, out.runner_up if scores else None, out.saved)
    shape, strides = (n_rows, n_classes, n_inner), logits.stride()
    with launching.device_guard(logits):
        if softmax:
            kernels.forward_softmax_kernel[(-(-n_rows // how.rows),)](
                logits_ptr=logits, target_ptr=target, softmax_ptr=out.softmax, outputs=outputs, shape=shape,
                strides=strides, softmax_strides=out.softmax.stride(), ignore_index=ignore_index,
                loss_params=launching.loss_params(loss), VALUE=value, ROWS=how.rows, LANES=how.lanes,
                VECTOR=launching.vector(logits, out.softmax), num_warps=how.num_warps,
            )  # fmt: skip
        elif how.parts == 1:
            kernels.forward_kernel[(-(-n_rows // how.rows),)](
                logits_ptr=logits, target_ptr=target, outputs=outputs, shape=shape, strides=strides,
                ignore_index=ignore_index, loss_params=launching.loss_params(loss), VALUE=value, ROWS=how.rows,
                LANES=how.lanes, VECTOR=launching.vector(logits), num_warps=how.num_warps,
            )  # fmt: skip
        else:
            sums = out.saved.new_empty(4, n_rows, how.parts)
            argmax = out.runner_up.new_empty(n_rows, how.parts)
            kernels.partial_kernel[(n_rows, how.parts)](
                logits_ptr=logits, target_ptr=target, sums_ptr=sums, argmax_ptr=argmax, shape=shape, strides=strides,
                ignore_index=ignore_index, LANES=how.lanes, VECTOR=launching.vector(logits), num_warps=how.num_warps,
            )  # fmt: skip
            kernels.merge_kernel[(n_rows,)](
                logits_ptr=logits, target_ptr=target, sums_ptr=sums, argmax_ptr=argmax, outputs=outputs, shape=shape,
                strides=strides, ignore_index=ignore_index, loss_params=launching.loss_params(loss), VALUE=value,
                PARTS=how.parts, num_warps=1,
            )  # fmt: skip
    return out


def _launch_backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: GapLoss
) -> Tensor:
    grad = torch.empty_like(logits)
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    if n_rows == 0:
        return grad
    _, slope = launching.kernel_pair(loss)
    how = launching.kernel_modules()["launch"].backward(n_rows, n_classes, launching.WARP_SIZE)
    target = target.reshape(-1).contiguous()
    with launching.device_guard(logits):
        launching.kernel_modules()["labels"].backward_kernel[(-(-n_rows // how.rows), how.parts)](
            logits_ptr=logits, target_ptr=target, saved_ptr=saved, grad_loss_ptr=grad_loss, grad_ptr=grad,
            shape=(n_rows, n_classes, n_inner), strides=logits.stride(), grad_strides=grad.stride(),
            grad_loss_stride=grad_loss.stride(0), ignore_index=ignore_index, loss_params=launching.loss_params(loss),
            SLOPE=slope, ROWS=how.rows, LANES=how.lanes, VECTOR=launching.vector(logits, grad), num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _empty_result(logits: Tensor, scores: bool, softmax: bool) -> RowResult:
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = reference.accumulation_dtype(logits.dtype)
    return RowResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows if scores else 0, dtype=torch.int32),
        logits.new_empty((3, n_rows), dtype=dtype),
        torch.empty_like(logits) if softmax else logits.new_empty(0),
    )


@torch.library.custom_op("bonus_ops::forward", mutates_args=())
def forward(
    logits: Tensor, target: Tensor, fields: Tensor, ignore_index: int, loss: str, scores: bool, softmax: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to (loss, scores, runner_up, saved, softmax), see `RowResult`.

    ``loss`` and ``fields`` are what `losses.encode` returns.
    """
    gap_loss = decode(loss, fields)
    if implementation == "triton":
        if logits.device.type == "cpu":
            reference.check_target(target, logits.shape[2], ignore_index)
        result = _launch_forward(logits, target, ignore_index, gap_loss, scores, softmax)
        return result.loss, result.scores, result.runner_up, result.saved, result.softmax
    if logits.device.type != "cpu":
        return _plain_forward(logits, target, ignore_index, gap_loss, scores, softmax)
    out, _ = torch_labels.visit(logits, target, ignore_index, gap_loss, scores, None)
    return (
        out.loss,
        logits.new_empty(0, dtype=torch.float32) if out.scores is None else out.scores,
        logits.new_empty(0, dtype=torch.int32) if out.runner_up is None else out.runner_up,
        out.saved,
        torch_labels.softmax(logits, target, out.saved, ignore_index) if softmax else logits.new_empty(0),
    )


def _plain_forward(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the results by the reference's formulas: a GPU without Triton must not wait for the host."""
    out = _empty_result(logits, scores, softmax)
    if scores:
        *columns, runner_up = reference.scores(logits, target, ignore_index)
        out = out._replace(scores=torch.stack(columns).reshape(5, -1), runner_up=runner_up.reshape(-1))
    if softmax:
        out.softmax.copy_(reference.softmax(logits, target, ignore_index))
    value = reference.rows(logits, target, ignore_index, loss).reshape(-1)
    return value, out.scores, out.runner_up, torch.zeros_like(out.saved), out.softmax


@forward.register_fake
def _(logits, target, fields, ignore_index, loss, scores, softmax, implementation):  # type: ignore[no-untyped-def]
    return tuple(_empty_result(logits, scores, softmax))


@torch.library.custom_op("bonus_ops::backward", mutates_args=())
def backward(
    logits: Tensor, target: Tensor, fields: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: str,
    implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradient [N] of each row's loss."""
    gap_loss = decode(loss, fields)
    if implementation == "triton":
        return _launch_backward(logits, target, saved, grad_loss, ignore_index, gap_loss)
    if logits.device.type == "cpu":
        return torch_labels.backward(logits, target, saved, grad_loss, ignore_index, gap_loss)
    grad = reference.gradient(logits, target, ignore_index, gap_loss, grad_loss.reshape(target.shape))
    return torch.empty_like(logits).copy_(grad)


@backward.register_fake
def _(logits, target, fields, saved, grad_loss, ignore_index, loss, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


def fold(x: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """Return ``x`` with a mapped dimension (None: repeated ``size`` times) folded into dimension ``at``."""
    x = x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:]) if dim is None else x.movedim(dim, at)
    return x.flatten(at, at + 1)


def unfold(x: Tensor, at: int, size: int) -> Tensor:
    """Undo `fold`, leaving the mapped dimension in place ``at``."""
    return x.view(*x.shape[:at], size, x.shape[at] // size, *x.shape[at + 1 :])


@backward.register_vmap
def _(info, in_dims, logits, target, fields, saved, grad_loss, *options):  # type: ignore[no-untyped-def]
    size, dims = info.batch_size, in_dims
    logits, target = fold(logits, dims[0], size), fold(target, dims[1], size)
    saved, grad_loss = fold(saved, dims[3], size, at=1), fold(grad_loss, dims[4], size)
    return unfold(backward(logits, target, fields, saved, grad_loss, *options), 0, size), 0
