"""Autograd for targets that are shares of classes, see `labels` for class indices.

First derivatives run the operators. All others, and those for the probabilities, follow from the formula.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..losses import GapLoss, Loss, decode, encode
from ..operators import shares as operators
from ..shares import Shares
from ..torch_path import shares as torch_shares
from ..watchers import is_plain_eager, is_transformed
from .labels import made_gradient, reduced

__all__ = ["ShareResult", "share_rows"]


class ShareResult(NamedTuple):
    """``loss`` [N] or reduced carries the gradient; scores [5, N] and runner_up [N] are None where not made."""

    loss: Tensor
    scores: Tensor | None
    runner_up: Tensor | None


class _Rows(torch.autograd.Function):
    """Loss of each row; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        logits, label, probabilities, weight, bonus_weight, fields, smoothings, ignore_index, loss, scores,
        implementation,
    ):  # fmt: skip
        return operators.forward(logits, label, probabilities, weight, bonus_weight, fields, *smoothings, ignore_index,
                                 loss, scores, implementation)  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.smoothings, ctx.ignore_index, ctx.loss, _, ctx.implementation = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[3], output[2])

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None:
            return (None,) * 11
        logits, label, *shares, fields, saved, runner_up = ctx.saved_tensors
        if torch.is_grad_enabled():
            loss = decode(ctx.loss, fields)
            grad = _gradient(logits, label, ctx.ignore_index, loss, Shares(*shares, *ctx.smoothings), grad_loss)
        else:
            grad = operators.backward(logits, label, *shares, fields, saved, runner_up, grad_loss, *ctx.smoothings,
                                      ctx.ignore_index, ctx.loss, ctx.implementation)  # fmt: skip
        return grad, *(None,) * 10


def _gradient(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, shares: Shares, grad_loss: Tensor
) -> Tensor:
    """Return the gradient, where grad mode is on a differentiable function of logits and upstream gradient [N]."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x = logits if again else logits.detach().requires_grad_()
        value = reference.dense_rows(x, label, ignore_index, loss, shares).reshape(-1)
    grad: Tensor = torch.autograd.grad(value, x, grad_loss.to(value.dtype), create_graph=again)[0]
    return grad


class _Visit(torch.autograd.Function):
    """Reduced loss with the gradient made in the forward visit: the torch path, eager, on a CPU."""

    @staticmethod
    def forward(ctx, logits, label, target, divisor, ignore_index, loss, shares, scores):  # type: ignore[no-untyped-def]
        scale = logits.new_ones(1, dtype=reference.accumulation_dtype(logits.dtype))
        if divisor is not None:
            scale = scale / divisor
        out, grad = torch_shares.visit(logits, label, ignore_index, loss, shares, scores, scale)
        # the target too, so that a change in place is noticed
        ctx.save_for_backward(logits, label, target, scale, shares.weight, shares.bonus_weight)
        ctx.ignore_index, ctx.loss, ctx.shares, ctx.grad = ignore_index, loss, shares, grad
        total = reduced(out.loss, None, divisor)
        if not scores:
            return total
        ctx.mark_non_differentiable(out.scores, out.runner_up)
        return total, out.scores, out.runner_up

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        logits, label, _target, scale, weight, bonus_weight = ctx.saved_tensors
        shares = ctx.shares._replace(weight=weight, bonus_weight=bonus_weight)
        plain = not torch.is_grad_enabled() and is_plain_eager(grad_loss)
        grad = made_gradient(ctx, grad_loss) if plain else None
        upstream = (grad_loss.to(scale.dtype) * scale).expand(label.numel())
        if not plain:
            grad = _gradient(logits, label, ctx.ignore_index, ctx.loss, shares, upstream)
        elif grad is None:
            _, grad = torch_shares.visit(logits, label, ctx.ignore_index, ctx.loss, shares, False, upstream)
        return grad, *(None,) * 7


def share_rows(
    logits: Tensor, label: Tensor | None, ignore_index: int, loss: Loss, shares: Shares, scores: bool,
    divisor: Tensor | None, reduce: bool, implementation: str,
) -> ShareResult:  # fmt: skip
    """Return the losses of rows [outer, inner, C], their sum over ``divisor`` with ``reduce``, and scores.

    ``label`` [outer, inner] is None for probabilities, which have their argmax.
    """
    given = shares.probabilities
    by_formula = implementation == "reference" or _needs_formula(logits, loss, shares, implementation)
    on_cpu = implementation == "torch" and not by_formula
    target = label if given is None else given
    if label is None and given is not None:
        # the torch path finds labels while a block is in cache
        label = torch.zeros(given.shape[:2], dtype=torch.int64, device=given.device) if on_cpu else given.argmax(-1)
    assert label is not None and target is not None
    if by_formula:
        if given is None and logits.device.type == "cpu":
            reference.check_target(label, logits.shape[2], ignore_index)
        value = reference.dense_rows(logits, label, ignore_index, loss, shares).reshape(-1)
        columns, runner_up = None, None
        if scores:
            *five, runner_up = reference.scores(logits, label, ignore_index)
            columns, runner_up = torch.stack(five).reshape(5, -1), runner_up.reshape(-1)
    elif on_cpu and reduce and logits.requires_grad and torch.is_grad_enabled() and is_plain_eager(logits):
        visited: Any = _Visit.apply(logits, label, target, divisor, ignore_index, loss.current, shares, scores)  # type: ignore[no-untyped-call]
        return ShareResult(*visited) if scores else ShareResult(visited, None, None)
    else:
        name, fields = encode(loss)
        tensors = (logits, label, *shares[:3], fields)
        value, columns, runner_up, _ = _Rows.apply(*tensors, shares[3:], ignore_index, name, scores, implementation)  # type: ignore[no-untyped-call]
    return ShareResult(reduced(value, None, divisor) if reduce else value, columns, runner_up)


def _needs_formula(logits: Tensor, loss: Loss, shares: Shares, implementation: str) -> bool:
    """Return whether only the formula serves: transforms, gradients of shares, what the path lacks."""
    tensors = [x for x in shares[:3] if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    dtype = reference.accumulation_dtype(logits.dtype)
    if any(torch.promote_types(x.dtype, dtype) != dtype for x in tensors):
        return True  # a float64 share makes a float64 loss
    lacks = logits.device.type != "cpu" or isinstance(loss, GapLoss) and not loss.adds_to_cross_entropy
    return is_transformed() or implementation == "torch" and lacks
