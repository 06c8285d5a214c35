"""Autograd over the operators of the sigmoid family: single losses, and their sum.

First derivatives run the operators. Derivatives that are differentiated again follow `reference.elements_gradient`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..kernels.elements import Elements
from ..losses import encode
from ..operators import elementwise as operators
from ..torch_path import elementwise as torch_elementwise
from ..watchers import is_plain_eager
from .labels import made_gradient

__all__ = ["element_losses", "element_sum"]


class _Operators(torch.autograd.Function):
    """Losses or their sum; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation):  # type: ignore[no-untyped-def]
        return operators.forward(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.loss, numbers, _, _, ctx.implementation = inputs
        ctx.save_for_backward(*tensors, numbers)

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        input, target, weight, pos_weight, numbers = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the closed form in torch is differentiable again
            of = operators.elements(input, target, weight, pos_weight, ctx.loss, numbers)
            grad = reference.elements_gradient(*of, grad_loss)
        else:
            grad = operators.backward(
                input, target, weight, pos_weight, grad_loss, ctx.loss, numbers, ctx.implementation
            )
        return grad, *(None,) * 8


class _Visit(torch.autograd.Function):
    """Sum over ``divisor`` with the gradient made in the forward visit: the torch path, eager, on a CPU."""

    @staticmethod
    def forward(ctx, input, target, weight, pos_weight, loss, scales, divisor):  # type: ignore[no-untyped-def]
        of = Elements(input, target, weight, pos_weight, loss, scales)
        total, ctx.grad = torch_elementwise.visit(of, 1 / divisor)
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.rest, ctx.divisor = (loss, scales), divisor
        return total / divisor

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        of = Elements(*ctx.saved_tensors, *ctx.rest)
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            return reference.elements_gradient(*of, grad_loss / ctx.divisor), *(None,) * 6
        if ctx.grad is None:
            _, ctx.grad = torch_elementwise.visit(of, 1 / ctx.divisor)  # again: the bits of the first
        grad = made_gradient(ctx, grad_loss)
        if grad is None:
            grad = torch_elementwise.backward(of, grad_loss.to(of.dtype) / ctx.divisor)
        return grad, *(None,) * 6


def element_losses(of: Elements, dtype: torch.dtype, implementation: str) -> Tensor:
    """Return the loss of each element in ``dtype``, laid out like the target."""
    return _apply(of, False, dtype, implementation)


def element_sum(of: Elements, divisor: float | Tensor, implementation: str) -> Tensor:
    """Return the sum of the losses over ``divisor``, in the dtype they are computed in."""
    eager = implementation == "torch" and of.input.device.type == "cpu" and is_plain_eager(of.input)
    known = not isinstance(divisor, Tensor) and divisor > 0  # 0 for a mean of nothing
    if eager and known and of.input.requires_grad and torch.is_grad_enabled():
        return _Visit.apply(*of._replace(loss=of.loss.current), divisor)  # type: ignore[no-any-return,no-untyped-call]
    return _apply(of, True, of.dtype, implementation) / divisor


def _apply(of: Elements, reduce: bool, dtype: torch.dtype, implementation: str) -> Tensor:
    name, fields = encode(of.loss)
    # a tensor, so that another strength is no other graph
    numbers = torch.cat([torch.tensor(of.scales, dtype=torch.float64, device="cpu"), fields])
    # a graph takes no tensor twice: a view for each that came before
    tensors = [x if x is None or not any(x is y for y in of[:i]) else x.view_as(x) for i, x in enumerate(of[:4])]
    return _Operators.apply(*tensors, name, numbers, reduce, dtype, implementation)  # type: ignore[no-any-return,no-untyped-call]
