"""The two operators for targets that are shares of classes, see `labels` for those of class indices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..losses import LogBonus, Loss, PowerBonus, decode
from ..shares import Shares
from ..torch_path import shares as torch_shares
from ..watchers import constant_when_compiled
from . import launching

__all__ = ["DenseResult", "backward", "forward", "has_terms"]


class DenseResult(NamedTuple):
    """Per-row tensors; ``scores`` is empty where it was not asked for, ``saved`` is zeros where the torch path ran."""

    loss: Tensor  # [N]
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    saved: Tensor  # [5, N] max of the rest, scale of exp(z - max), mass, gradient at label and at runner-up


def has_terms(loss: Loss) -> bool:
    """Return whether kernels know what a class adds under this loss."""
    kernel = _as_power(loss).kernel
    return isinstance(kernel, str) and _is_known(kernel)


@constant_when_compiled
def _is_known(kernel: str) -> bool:
    return hasattr(launching.kernel_modules()["class_terms"], f"{kernel}_terms")


def _as_power(loss: Loss) -> Loss:
    """Return the loss as a power bonus where it is one: then one sweep does."""
    if loss.is_cross_entropy():
        return PowerBonus(strength=0.0)
    if isinstance(loss, LogBonus) and loss.log_end == 0:  # min(p, 0) leaves the tangent -p
        return PowerBonus(strength=loss.strength, start=loss.start, abrupt=loss.abrupt)
    return loss


def _terms(loss: Loss) -> tuple[Any, Any, Any]:
    """Return the jit functions of a class, of one with p <= 1/2, and of the sums over these."""
    module, few = launching.kernel_modules()["class_terms"], loss.kernel
    if isinstance(loss, LogBonus) and loss.is_logarithm_below_half():
        few = "log_bonus_below_half"
    names = f"{loss.kernel}_terms", f"{few}_terms"
    sums = launching.kernel_modules()["class_sums"]
    return *(getattr(module, name) for name in names), getattr(sums, f"{few}_sums", sums.sums_of_terms)


def _common(logits: Tensor, label: Tensor, loss: Loss, shares: Shares, ignore_index: int) -> dict[str, Any]:
    """Return the arguments both kernels take."""
    n_outer, n_inner, n_classes = logits.shape
    given = shares.probabilities
    t, v = shares.of_cross_entropy(n_classes), shares.of_bonus(n_classes)
    of_t = (t.keep, t.off) if loss.adds_to_cross_entropy else (0.0, 0.0)
    weights = (None if w is None else w.contiguous() for w in (t.weight, v.weight))
    strides = logits.stride() if given is None else given.stride()
    numbers = launching.halved((*of_t, v.keep, v.off))
    return dict(
        logits_ptr=logits, targets=(label.reshape(-1).contiguous(), given, *weights, strides, numbers),
        shape=(n_outer * n_inner, n_classes, n_inner), strides=logits.stride(), ignore_index=ignore_index,
        loss_params=launching.loss_params(loss),
    )  # fmt: skip


def _vector(shares: Shares, *tensors: Tensor) -> int:
    """Return elements in 16 bytes if all tensors can be walked by such vectors from one common head, else 1."""
    given = shares.probabilities
    if given is not None and given.dtype != tensors[0].dtype:
        return 1
    return launching.vector(*tensors) if given is None else launching.vector(*tensors, given)


def _launch_forward(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, shares: Shares, scores: bool
) -> DenseResult:
    out = _empty_result(logits, scores)
    n_rows, n_classes = out.loss.numel(), logits.shape[2]
    if n_rows == 0:
        return out
    loss = _as_power(loss)
    terms, _, sums = _terms(loss)
    one_sweep = isinstance(loss, PowerBonus) and not loss.has_window()
    how = launching.kernel_modules()["launch"].soft_forward(n_classes, launching.WARP_SIZE)
    with launching.device_guard(logits):
        launching.kernel_modules()["soft"].soft_forward_kernel[(-(-n_rows // how.rows),)](
            **_common(logits, label, loss, shares, ignore_index),
            outputs=(out.loss, out.scores if scores else None, out.runner_up, out.saved), TERMS=terms, SUMS=sums,
            POWER=one_sweep, ROWS=how.rows, LANES=how.lanes, VECTOR=_vector(shares, logits), num_warps=how.num_warps,
        )  # fmt: skip
    return out


def _launch_backward(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, shares: Shares, result: tuple[Tensor, Tensor],
    grad_loss: Tensor,
) -> Tensor:  # fmt: skip
    grad = torch.empty_like(logits)
    n_rows, n_classes = result[1].numel(), logits.shape[2]
    if n_rows == 0:
        return grad
    loss = _as_power(loss)
    how = launching.kernel_modules()["launch"].soft_backward(n_classes, launching.WARP_SIZE)
    with launching.device_guard(logits):
        launching.kernel_modules()["soft"].soft_backward_kernel[(-(-n_rows // how.rows), how.parts)](
            **_common(logits, label, loss, shares, ignore_index), saved=(*result, grad_loss.contiguous()),
            grad_ptr=grad, grad_strides=grad.stride(), TERMS=_terms(loss)[1], ROWS=how.rows, LANES=how.lanes,
            VECTOR=_vector(shares, logits, grad), num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _empty_result(logits: Tensor, scores: bool) -> DenseResult:
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = reference.accumulation_dtype(logits.dtype)
    return DenseResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows, dtype=torch.int32),
        logits.new_empty((5, n_rows), dtype=dtype),
    )


@torch.library.custom_op("bonus_ops::dense_forward", mutates_args=())
def forward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, smoothing: float, bonus_smoothing: float, ignore_index: int, loss: str, scores: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to (loss, scores, runner_up, saved), see `DenseResult`: kernels, or a CPU's torch path."""
    decoded = decode(loss, fields)
    shares = Shares(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    if logits.device.type == "cpu" and probabilities is None:
        reference.check_target(label, logits.shape[2], ignore_index)
    if implementation == "triton":
        return tuple(_launch_forward(logits, label, ignore_index, decoded, shares, scores))  # type: ignore[return-value]
    out = _empty_result(logits, scores)
    rows, _ = torch_shares.visit(logits, label, ignore_index, decoded, shares, scores, None)
    columns = out.scores if rows.scores is None else rows.scores
    return (
        rows.loss,
        columns,
        out.runner_up.zero_() if rows.runner_up is None else rows.runner_up,
        out.saved.zero_(),
    )


@forward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, label, probabilities, weight, bonus_weight, fields, smoothing, bonus_smoothing, ignore_index, loss, scores,
    implementation,
):  # fmt: skip
    return tuple(_empty_result(logits, scores))


@torch.library.custom_op("bonus_ops::dense_backward", mutates_args=())
def backward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, saved: Tensor, runner_up: Tensor, grad_loss: Tensor, smoothing: float, bonus_smoothing: float,
    ignore_index: int, loss: str, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradient [N] of each row's loss."""
    decoded = decode(loss, fields)
    shares = Shares(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    if implementation == "triton":
        return _launch_backward(logits, label, ignore_index, decoded, shares, (saved, runner_up), grad_loss)
    # the sweep is made again: a second visit costs no more than a second sweep
    upstream = grad_loss.to(reference.accumulation_dtype(logits.dtype))
    grad = torch_shares.visit(logits, label, ignore_index, decoded, shares, False, upstream)[1]
    return torch.empty_like(logits) if grad is None else grad


@backward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, label, probabilities, weight, bonus_weight, fields, saved, runner_up, grad_loss, smoothing,
    bonus_smoothing, ignore_index, loss, implementation,
):  # fmt: skip
    return torch.empty_like(logits)
