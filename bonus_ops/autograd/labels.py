"""Autograd over the two operators for class indices: rows, reduced rows, and every derivative of them.

First derivatives run the operators. Derivatives that are differentiated again, forward-mode ones and those of
`torch.func` follow the closed form of `reference.gradient`, from the input: plain torch, hence right at any depth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import reference
from ..kernels.results import LabelResult
from ..losses import GapLoss, decode, encode
from ..operators import labels as operators
from ..operators.implementation import gpu
from ..torch_path import labels as torch_labels
from ..watchers import is_deeply_transformed, is_plain_eager

__all__ = ["MeanByKernels", "made_gradient", "reduced", "reduced_rows", "rows"]


class _Rows(torch.autograd.Function):
    """Loss of each row; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(logits, target, fields, ignore_index, loss, scores, softmax, implementation):  # type: ignore[no-untyped-def]
        return operators.forward(logits, target, fields, ignore_index, loss, scores, softmax, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, target, fields, ctx.ignore_index, ctx.loss, _, _, ctx.implementation = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # or a softmax would cost zeros of its size in backward
        ctx.save_for_backward(logits, target, fields, output[3])
        ctx.save_for_forward(logits, target, fields)

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None:
            return (None,) * 8
        logits, target, fields, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the closed form in torch, from the input, is differentiable again
            grad = _gradient(logits, target, grad_loss, ctx.ignore_index, decode(ctx.loss, fields))
        else:
            options = (ctx.ignore_index, ctx.loss, ctx.implementation)
            grad = operators.backward(logits, target, fields, saved, grad_loss, *options)
        return grad, *(None,) * 7

    @staticmethod
    def vmap(info, in_dims, logits, target, fields, ignore_index, loss, scores, softmax, implementation):  # type: ignore[no-untyped-def]
        size = info.batch_size
        logits, target = operators.fold(logits, in_dims[0], size), operators.fold(target, in_dims[1], size)
        out = _apply(logits, target, fields, ignore_index, loss, scores, softmax, implementation)
        dims = (0, 1 if scores else None, 0 if scores else None, 1, 0 if softmax else None)
        return tuple(x if d is None else operators.unfold(x, d, size) for x, d in zip(out, dims, strict=True)), dims


class _ForwardModeRows(_Rows):
    """`_Rows` with a forward-mode derivative, which torch.compile refuses to see."""

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        logits, target, fields = ctx.saved_tensors
        dtype = reference.accumulation_dtype(logits.dtype)
        one = torch.ones_like(target, dtype=dtype)
        # torch turns it off here: an outer jvp would see zeros, and under the compiler a primal keeps its tangent
        with forward_ad._set_fwd_grad_enabled(True):
            logits = forward_ad.unpack_dual(logits).primal  # type: ignore[no-untyped-call]
            grad = _gradient(logits.to(dtype), target, one, ctx.ignore_index, decode(ctx.loss, fields))
            return (grad * tangent).sum(-1).reshape(-1), *(None,) * 4


def _apply(*args: Any) -> LabelResult:
    function = _Rows if torch.compiler.is_compiling() else _ForwardModeRows
    return LabelResult._make(function.apply(*args))  # type: ignore[no-untyped-call]


def _gradient(logits: Tensor, target: Tensor, grad_loss: Tensor, ignore_index: int, loss: GapLoss) -> Tensor:
    return reference.gradient(logits, target, ignore_index, loss, grad_loss.reshape(target.shape))


class _Visit(torch.autograd.Function):
    """Reduced loss with the gradient made in the forward visit: the torch path, eager, on a CPU."""

    @staticmethod
    def forward(ctx, logits, target, row_weight, divisor, ignore_index, loss, scores):  # type: ignore[no-untyped-def]
        if row_weight is None and divisor is None:
            scale = logits.new_ones(1, dtype=reference.accumulation_dtype(logits.dtype))
        elif row_weight is None:
            scale = divisor.reciprocal().view(1)
        else:
            scale = row_weight if divisor is None else row_weight / divisor
        out, grad = torch_labels.visit(logits, target, ignore_index, loss, scores, scale)
        ctx.save_for_backward(logits, target, scale, out.saved)
        ctx.ignore_index, ctx.loss, ctx.grad = ignore_index, loss, grad
        if not scores:
            return reduced(out.loss, row_weight, divisor)
        ctx.mark_non_differentiable(out.scores, out.runner_up)
        return reduced(out.loss, row_weight, divisor), out.scores, out.runner_up

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        logits, target, scale, saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            upstream = _upstream(grad_loss, scale, target)
            return _gradient(logits, target, upstream, ctx.ignore_index, ctx.loss), *(None,) * 6
        grad = made_gradient(ctx, grad_loss)
        if grad is None:
            upstream = _upstream(grad_loss.to(scale.dtype), scale, target)
            grad = torch_labels.backward(logits, target, saved, upstream, ctx.ignore_index, ctx.loss)
        return grad, *(None,) * 6


class MeanByKernels(torch.autograd.Function):
    """Mean over the rows not ignored, launched from here: eager, and only the tape watches.

    Takes the input [N, C] or [N, C, d1, ...] itself, so that its view as rows is no node of the tape, and returns the
    mean in ``dtype``, with ``scores`` also scores [5, N] and runner-up [N].
    """

    @staticmethod
    def forward(ctx, input, target, ignore_index, loss, scores, dtype):  # type: ignore[no-untyped-def]
        kernels = gpu("labels")
        logits = _rows(input)
        mean, columns, runner_up, saved = kernels.forward_mean(logits, target, ignore_index, loss, scores)
        ctx.save_for_backward(input, target, *saved)
        ctx.ignore_index, ctx.loss = ignore_index, loss
        ctx.set_materialize_grads(False)
        if mean.dtype != dtype:
            mean = mean.to(dtype)
        if not scores:
            return mean
        ctx.mark_non_differentiable(columns, runner_up)
        return mean, columns, runner_up

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None:
            return (None,) * 6
        input, target, *saved = ctx.saved_tensors
        logits = _rows(input)
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            upstream = (grad_loss / saved[-1]).expand(target.numel())
            grad = _gradient(logits, target.reshape(logits.shape[:2]), upstream, ctx.ignore_index, ctx.loss)
        else:
            grad = gpu("labels").backward_mean(logits, target, saved, grad_loss, ctx.ignore_index, ctx.loss)
        grad = grad.squeeze(1) if input.dim() == 2 else grad.transpose(1, 2).view(input.shape)
        return grad, None, None, None, None, None


def _rows(input: Tensor) -> Tensor:
    """Return [N, C] or [N, C, d1, ...] as rows [outer, inner, C]."""
    return input.unsqueeze(1) if input.dim() == 2 else input.flatten(2).transpose(1, 2)


def made_gradient(ctx: Any, grad_loss: Tensor) -> Tensor | None:
    """Return the gradient ``ctx.grad`` of a forward visit times the upstream scalar, None where it must be made again.

    It is given away once: whoever gets it may write it. A half is rounded after it is scaled, or a gradient scaler
    would find what has underflowed.
    """
    grad, ctx.grad = ctx.grad, None
    factor = grad_loss.item()  # a CPU scalar: nothing waits
    if grad is None or factor == 1:
        return grad  # type: ignore[no-any-return]
    return grad.mul_(factor) if math.isfinite(factor) and grad.dtype.itemsize > 2 else None


def _upstream(grad_loss: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Return the upstream gradient of every row [N] from that of the reduced loss."""
    return (grad_loss * scale).expand(target.numel())


def reduced(loss: Tensor, row_weight: Tensor | None, divisor: Tensor | None) -> Tensor:
    """Return the (weighted) sum of the losses, over ``divisor`` where there is one: over 0 it is NaN, as in torch."""
    total = loss.sum() if row_weight is None else (loss.reshape(-1) * row_weight).sum()
    return total if divisor is None else total / divisor


def rows(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, softmax: bool, implementation: str
) -> LabelResult:
    """Return each row's results; ``loss`` [N] carries the gradient."""
    if torch.compiler.is_compiling() and is_deeply_transformed():  # where the compiler cannot follow `_Rows`
        return _plain_rows(logits, target, ignore_index, loss, scores, softmax)
    name, fields = encode(loss)
    return _apply(logits, target, fields, ignore_index, name, scores, softmax, implementation)


def _plain_rows(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, softmax: bool
) -> LabelResult:
    value = reference.rows(logits, target, ignore_index, loss).reshape(-1)
    columns = runner_up = probabilities = logits.new_empty(0)
    if scores:
        *five, runner_up = reference.scores(logits, target, ignore_index)
        columns, runner_up = torch.stack(five).reshape(5, -1), runner_up.reshape(-1)
    if softmax:
        probabilities = reference.softmax(logits.detach(), target, ignore_index)
    return LabelResult(value, columns, runner_up, logits.new_empty(0), probabilities)


def reduced_rows(
    logits: Tensor, target: Tensor, row_weight: Tensor | None, divisor: Tensor | None, ignore_index: int,
    loss: GapLoss, scores: bool, softmax: bool, implementation: str,
) -> LabelResult:  # fmt: skip
    """As `rows` with ``loss`` reduced by `reduced`."""
    on_cpu = implementation == "torch" and logits.device.type == "cpu" and not is_traceable_wrapper_subclass(logits)
    if on_cpu and not softmax and logits.requires_grad and torch.is_grad_enabled() and is_plain_eager(logits):
        visited = _Visit.apply(logits, target, row_weight, divisor, ignore_index, loss.current, scores)  # type: ignore[no-untyped-call]
        nothing = target.new_empty(0)
        loss_sum, columns, runner_up = visited if scores else (visited, nothing, nothing)
        return LabelResult(loss_sum, columns, runner_up, nothing, nothing)
    out = rows(logits, target, ignore_index, loss, scores, softmax, implementation)
    return out._replace(loss=reduced(out.loss, row_weight, divisor))
