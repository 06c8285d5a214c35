"""Reduced losses on a CPU, eager: the gradient is made in the forward visit, for an upstream gradient of 1."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..watchers import is_plain_eager

__all__ = ["MadeInForward", "Visit", "Visited"]

Tensors = tuple[Tensor | None, ...]


class Visited(NamedTuple):
    """What a visit leaves behind."""

    total: Tensor  # the reduced loss
    others: tuple[Tensor, ...]  # outputs without a gradient
    grad: Tensor
    kept: Tensors  # what `Visit.again` needs beside the operands
    scale: Any  # of the upstream gradient: numbers that no graph needs to see


class Visit(Protocol):
    """A kind of call: its options, without a tensor that autograd should see."""

    def visit(self, input: Tensor, operands: Tensors) -> Visited:
        """Return loss and gradient."""

    def again(self, input: Tensor, operands: Tensors, kept: Tensors, scale: Any, factor: Tensor) -> Tensor:
        """Return the gradient for another upstream gradient than 1."""

    def formula(self, input: Tensor, operands: Tensors, kept: Tensors, scale: Any, factor: Tensor) -> Tensor:
        """Return the gradient as a differentiable function of input and upstream gradient."""


class MadeInForward(torch.autograd.Function):
    """``apply(input, visit, *operands) -> (total, *others)``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, visit: Visit, *operands: Tensor | None) -> Any:
        visited = visit.visit(input, operands)
        # all of it saved, also the gradient: what checkpoints and offloading know nothing of would never be freed
        ctx.save_for_backward(input, visited.grad, *visited.kept, *operands)
        ctx.visit, ctx.n_operands, ctx.scale = visit, len(operands), visited.scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*visited.others)
        return visited.total, *visited.others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        nothing = (None,) * (1 + ctx.n_operands)
        if grad_loss is None:
            return None, *nothing
        input, grad, *rest = ctx.saved_tensors
        kept, operands = rest[: len(rest) - ctx.n_operands], rest[len(rest) - ctx.n_operands :]
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            return ctx.visit.formula(input, operands, kept, ctx.scale, grad_loss), *nothing
        factor = grad_loss.item()  # of a CPU: nothing waits
        # a half is rounded after it is scaled, or a gradient scaler would find what has underflowed
        if factor != 1 and (grad.dtype.itemsize == 2 or not math.isfinite(factor)):
            return ctx.visit.again(input, operands, kept, ctx.scale, grad_loss), *nothing
        if torch._C._autograd._get_current_graph_task_keep_graph():  # there may be another backward
            return grad * factor if factor != 1 else grad.clone(), *nothing
        return grad.mul_(factor) if factor != 1 else grad, *nothing
