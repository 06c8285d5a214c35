"""The two operators for class indices.

`forward` and `backward` are registered with torch.library, so that torch.compile sees them whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..kernels.results import LabelResult, empty_labels
from ..losses import GapLoss, decode
from ..torch_path import labels as torch_labels
from .implementation import gpu

__all__ = ["backward", "fold", "forward", "unfold"]


@torch.library.custom_op("bonus_ops::forward", mutates_args=())
def forward(
    logits: Tensor, target: Tensor, fields: Tensor, ignore_index: int, loss: str, scores: bool, softmax: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to (loss, scores, runner_up, saved, softmax), see `LabelResult`.

    ``loss`` and ``fields`` are what `losses.encode` returns.
    """
    gap_loss = decode(loss, fields)
    if implementation == "triton":
        if logits.device.type == "cpu":
            reference.check_target(target, logits.shape[2], ignore_index)
        result: LabelResult = gpu("labels").forward(logits, target, ignore_index, gap_loss, scores, softmax)
        return tuple(result)  # type: ignore[return-value]
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
    out = empty_labels(logits, scores, softmax)
    if scores:
        *columns, runner_up = reference.scores(logits, target, ignore_index)
        out = out._replace(scores=torch.stack(columns).reshape(5, -1), runner_up=runner_up.reshape(-1))
    if softmax:
        out.softmax.copy_(reference.softmax(logits, target, ignore_index))
    value = reference.rows(logits, target, ignore_index, loss).reshape(-1)
    return value, out.scores, out.runner_up, torch.zeros_like(out.saved), out.softmax


@forward.register_fake
def _(logits, target, fields, ignore_index, loss, scores, softmax, implementation):  # type: ignore[no-untyped-def]
    return tuple(empty_labels(logits, scores, softmax))


@torch.library.custom_op("bonus_ops::backward", mutates_args=())
def backward(
    logits: Tensor, target: Tensor, fields: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: str,
    implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradient [N] of each row's loss."""
    gap_loss = decode(loss, fields)
    if implementation == "triton":
        gradient: Tensor = gpu("labels").backward(logits, target, saved, grad_loss, ignore_index, gap_loss)
        return gradient
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
