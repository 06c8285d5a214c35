"""Autograd over the two operators: rows, reduced rows, and their derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import fallback, ops, reference
from .losses import GapLoss, decode, encode

__all__ = ["reduced", "reduced_rows", "rows"]


class _Rows(torch.autograd.Function):
    """Loss of each row; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(logits, target, ignore_index, loss, fields, scores, softmax, implementation):  # type: ignore[no-untyped-def]
        return ops.forward(logits, target, ignore_index, loss, fields, scores, softmax, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, target, ctx.ignore_index, ctx.loss, ctx.fields, _, _, ctx.implementation = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(logits, target, output[3])

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        logits, target, saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the closed form in torch, from the input, is differentiable again
            grad = _differentiable(logits, target, grad_loss, ctx.ignore_index, decode(ctx.loss, ctx.fields))
        else:
            grad = ops.backward(
                logits, target, saved, grad_loss, ctx.ignore_index, ctx.loss, ctx.fields, ctx.implementation
            )
        return grad, *(None,) * 7


def _differentiable(logits: Tensor, target: Tensor, grad_loss: Tensor, ignore_index: int, loss: GapLoss) -> Tensor:
    return reference.gradient(logits, target, ignore_index, loss, grad_loss.reshape(target.shape))


class _Visit(torch.autograd.Function):
    """Reduced loss with the gradient made in the forward visit: the torch path, eager, on a CPU."""

    @staticmethod
    def forward(ctx, logits, target, row_weight, divisor, ignore_index, loss, scores):  # type: ignore[no-untyped-def]
        scale = (
            logits.new_ones(1, dtype=reference.accumulation_dtype(logits.dtype)) if row_weight is None else row_weight
        )
        if divisor is not None:
            scale = scale / divisor
        out, grad = fallback.visit(logits, target, ignore_index, loss, scores, scale)
        ctx.save_for_backward(logits, target, scale, out.saved)
        ctx.ignore_index, ctx.loss, ctx.grad = ignore_index, loss, grad
        rest = tuple(logits.new_empty(0) if x is None else x for x in (out.scores, out.runner_up, out.saved))
        ctx.mark_non_differentiable(*rest)
        return reduced(out.loss, row_weight, divisor), *rest

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        logits, target, scale, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            upstream = _upstream(grad_loss, scale, target)
            return _differentiable(logits, target, upstream, ctx.ignore_index, ctx.loss), *(None,) * 6
        grad, ctx.grad = ctx.grad, None  # given away once: whoever gets it may write it
        factor = grad_loss.item()  # a CPU scalar: nothing waits
        if grad is not None and factor != 1:
            # a half is rounded after it is scaled, or a gradient scaler would find what has underflowed
            grad = grad.mul_(factor) if math.isfinite(factor) and grad.dtype.itemsize > 2 else None
        if grad is None:
            upstream = _upstream(grad_loss.to(scale.dtype), scale, target)
            grad = fallback.backward(logits, target, saved, upstream, ctx.ignore_index, ctx.loss)
        return grad, *(None,) * 6


def _upstream(grad_loss: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Return the upstream gradient of every row [N] from that of the reduced loss."""
    return (grad_loss * scale).expand(target.numel())


def reduced(loss: Tensor, row_weight: Tensor | None, divisor: Tensor | None) -> Tensor:
    """Return the (weighted) sum of the losses, over ``divisor`` where there is one: over 0 it is NaN, as in torch."""
    total = loss.sum() if row_weight is None else (loss.reshape(-1) * row_weight).sum()
    return total if divisor is None else total / divisor


def rows(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, softmax: bool, implementation: str
) -> ops.RowResult:
    """Return each row's results; ``loss`` [N] carries the gradient."""
    name, fields = encode(loss)
    args = (logits, target, ignore_index, name, fields, scores, softmax, implementation)
    return ops.RowResult(*_Rows.apply(*args))  # type: ignore[no-untyped-call]


def reduced_rows(
    logits: Tensor, target: Tensor, row_weight: Tensor | None, divisor: Tensor | None, ignore_index: int,
    loss: GapLoss, scores: bool, softmax: bool, implementation: str,
) -> ops.RowResult:  # fmt: skip
    """As `rows` with ``loss`` reduced by `reduced`."""
    eager = implementation == "torch" and logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and logits.requires_grad and torch.is_grad_enabled() and not softmax:
        visited = _Visit.apply(logits, target, row_weight, divisor, ignore_index, loss, scores)  # type: ignore[no-untyped-call]
        return ops.RowResult._make((*visited, logits.new_empty(0)))
    out = rows(logits, target, ignore_index, loss, scores, softmax, implementation)
    return out._replace(loss=reduced(out.loss, row_weight, divisor))
