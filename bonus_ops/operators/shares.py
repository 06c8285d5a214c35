"""The two operators for targets that are shares of classes, see `labels` for those of class indices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..kernels.results import empty_soft
from ..losses import Loss, decode
from ..shares import Shares
from ..torch_path import shares as torch_shares
from ..watchers import constant_when_compiled
from .implementation import gpu

__all__ = ["backward", "forward", "has_terms"]


def has_terms(loss: Loss) -> bool:
    """Return whether kernels know what a class adds under this loss."""
    return loss.is_cross_entropy() or isinstance(loss.kernel, str) and _is_known(loss.kernel)


@constant_when_compiled
def _is_known(kernel: str) -> bool:
    from ..kernels.formulas import class_terms

    return hasattr(class_terms, f"{kernel}_terms")


@torch.library.custom_op("bonus_ops::dense_forward", mutates_args=())
def forward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, smoothing: float, bonus_smoothing: float, ignore_index: int, loss: str, scores: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to (loss, scores, runner_up, saved), see `SoftResult`: kernels, or a CPU's torch path."""
    decoded = decode(loss, fields)
    shares = Shares(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    if logits.device.type == "cpu" and probabilities is None:
        reference.check_target(label, logits.shape[2], ignore_index)
    if implementation == "triton":
        return tuple(gpu("soft").forward(logits, label, shares, ignore_index, decoded, scores))
    out = empty_soft(logits, scores)
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
    return tuple(empty_soft(logits, scores))


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
        options = (grad_loss, ignore_index, decoded)
        gradient: Tensor = gpu("soft").backward(logits, label, shares, saved, runner_up, *options)
        return gradient
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
