"""Reduced losses on a CPU, eager: the gradient is made in the forward visit, for an upstream gradient of 1."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ..watchers import is_plain_eager

__all__ = ["Kind", "MadeInForward", "Tensors"]

Tensors = tuple[Tensor | None, ...]


class Kind(Protocol):
    """The options of a call, without a tensor that autograd should see; ``kept`` and ``scale`` are what `keep` got."""

    def again(self, input: Tensor, operands: Tensors, kept: Tensors, scale: Any, factor: Tensor) -> Tensor:
        """Return the gradient for another upstream gradient than 1."""

    def formula(self, input: Tensor, operands: Tensors, kept: Tensors, scale: Any, factor: Tensor) -> Tensor:
        """Return the gradient as a differentiable function of input and upstream gradient."""


class MadeInForward(torch.autograd.Function):
    """``apply(input, kind, *operands)``; a file of this folder gives the forward visit, which ends with `keep`."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Skip what `Function.apply` looks for first: `is_plain_eager` has ruled it out."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @staticmethod
    def keep(
        ctx: Any, input: Tensor, kind: Kind, operands: Tensors, grad: Tensor, kept: Tensors, scale: Any,
        others: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        """Save the gradient and what another one is made of; ``others`` are outputs without a gradient."""
        # all of it saved, also the gradient: what checkpoints and offloading know nothing of would never be freed
        ctx.save_for_backward(input, grad, *kept, *operands)
        ctx.kind, ctx.n_operands, ctx.scale = kind, len(operands), scale
        if others:
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*others)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        nothing = (None,) * (1 + ctx.n_operands)
        if grad_loss is None:
            return None, *nothing
        input, grad, *rest = ctx.saved_tensors
        kept, operands = rest[: len(rest) - ctx.n_operands], rest[len(rest) - ctx.n_operands :]
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            return ctx.kind.formula(input, operands, kept, ctx.scale, grad_loss), *nothing
        factor = grad_loss.item()  # of a CPU: nothing waits
        # a half is rounded after it is scaled, or a gradient scaler would find what has underflowed
        if factor != 1 and (grad.dtype.itemsize == 2 or not math.isfinite(factor)):
            return ctx.kind.again(input, operands, kept, ctx.scale, grad_loss), *nothing
        if torch._C._autograd._get_current_graph_task_keep_graph():  # there may be another backward
            return grad * factor if factor != 1 else grad.clone(), *nothing
        return grad.mul_(factor) if factor != 1 else grad, *nothing
