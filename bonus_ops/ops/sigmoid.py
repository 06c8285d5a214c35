"""The sigmoid family: from checked elements to kernels or loops, as `labels` has it for class indices.

First derivatives run the operators. Derivatives that are differentiated again follow `reference.elements_gradient`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import reference
from ..kernels.elements import Elements
from ..losses import GapLoss, decode, encode
from ..watchers import is_plain_eager
from . import room
from .made import MadeInForward, Tensors

__all__ = ["losses", "total"]


def losses(of: Elements, dtype: torch.dtype, implementation: str) -> Tensor:
    """Return the loss of each element in ``dtype``, laid out like the target."""
    return _LOSSES[implementation](of, dtype, implementation)


def total(of: Elements, divisor: float | Tensor, implementation: str) -> Tensor:
    """Return the sum of the losses over ``divisor``, in the dtype they are computed in."""
    return _TOTALS[implementation](of, divisor, implementation)


def _losses_by_formula(of: Elements, dtype: torch.dtype, implementation: str) -> Tensor:
    return reference.elements(*of).to(dtype)


def _losses_by_operators(of: Elements, dtype: torch.dtype, implementation: str) -> Tensor:
    return _apply(of, False, dtype, implementation)


def _total_by_formula(of: Elements, divisor: float | Tensor, implementation: str) -> Tensor:
    value = reference.elements(*of)
    # by a number, torch would make the tangent a float64
    return value.sum() / torch.as_tensor(divisor, dtype=value.dtype, device=value.device)


def _total_by_operators(of: Elements, divisor: float | Tensor, implementation: str) -> Tensor:
    return _apply(of, True, of.dtype, implementation) / divisor


def _total_by_loops(of: Elements, divisor: float | Tensor, implementation: str) -> Tensor:
    known = not isinstance(divisor, Tensor) and divisor > 0  # 0 for a mean of nothing
    if not (known and of.input.requires_grad and torch.is_grad_enabled() and is_plain_eager(*of[:4])):
        return _total_by_operators(of, divisor, implementation)
    options = _Sum(of.loss.current, of.scales, float(divisor))
    out: Tensor = _SumByLoops.apply(of.input, options, *of[1:4])
    return out


_LOSSES = {"triton": _losses_by_operators, "numba": _losses_by_operators, "reference": _losses_by_formula}
_TOTALS = {"triton": _total_by_operators, "numba": _total_by_loops, "reference": _total_by_formula}


# --- eager on a CPU ---------------------------------------------------------------------------------------------------


class _Sum(NamedTuple):
    """The options of a sum over a divisor."""

    loss: GapLoss
    scales: tuple[float, float]
    divisor: float

    def again(self, input: Tensor, operands: Tensors, kept: Tensors, scale: float, factor: Tensor) -> Tensor:
        of = self.elements(input, operands)
        grad: Tensor = room("numba", "sigmoid").backward(of, factor.to(of.dtype) / self.divisor)
        return grad

    def formula(self, input: Tensor, operands: Tensors, kept: Tensors, scale: float, factor: Tensor) -> Tensor:
        return reference.elements_gradient(*self.elements(input, operands), factor / self.divisor)

    def elements(self, input: Tensor, operands: Tensors) -> Elements:
        target, weight, pos_weight = operands
        assert target is not None
        return Elements(input, target, weight, pos_weight, self.loss, self.scales)


class _SumByLoops(MadeInForward):
    """The sum; operands are target, weight and pos_weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, options: _Sum, *operands: Tensor | None) -> Tensor:
        of = options.elements(input, operands)
        upstream = torch.tensor(1 / options.divisor, dtype=of.dtype, device="cpu")
        value, grad = room("numba", "sigmoid").visit(of, upstream)
        _SumByLoops.keep(ctx, input, options, operands, grad, (), None)
        return cast(Tensor, value / options.divisor)


# --- operators --------------------------------------------------------------------------------------------------------


def elements(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: str, numbers: Tensor
) -> Elements:
    """Return what a loss is of; ``numbers``: the scale of either term, then the fields of the loss."""
    positive, negative = numbers[:2].tolist()  # on the CPU: nothing waits
    return Elements(input, target, weight, pos_weight, decode(loss, numbers[2:]), (positive, negative))


def _empty(input: Tensor, target: Tensor, reduce: bool, dtype: torch.dtype) -> Tensor:
    return input.new_empty((), dtype=dtype) if reduce else torch.empty_like(target, dtype=dtype)


@torch.library.custom_op("bonus_ops::sigmoid_forward", mutates_args=())
def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: str, numbers: Tensor,
    reduce: bool, dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the loss of each element like ``target``, or their sum, in ``dtype``; ``numbers``: see `elements`."""
    of = elements(input, target, weight, pos_weight, loss, numbers)
    out: Tensor = room(implementation, "sigmoid").forward(of, reduce, _empty(input, target, reduce, dtype))
    return out


@forward.register_fake
def _(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation):  # type: ignore[no-untyped-def]
    return _empty(input, target, reduce, dtype)


@torch.library.custom_op("bonus_ops::sigmoid_backward", mutates_args=())
def backward(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, grad_loss: Tensor, loss: str,
    numbers: Tensor, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of ``input`` from the upstream gradient of the sum (0-d) or of each element."""
    of = elements(input, target, weight, pos_weight, loss, numbers)
    grad: Tensor = room(implementation, "sigmoid").backward(of, grad_loss)
    return grad


@backward.register_fake
def _(input, target, weight, pos_weight, grad_loss, loss, numbers, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)


class _Operators(torch.autograd.Function):
    """Losses or their sum; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation):  # type: ignore[no-untyped-def]
        # the compiler counts the names: of `*args` it would take a context for the first
        return forward(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.loss, numbers, _, _, ctx.implementation = inputs
        ctx.save_for_backward(*tensors, numbers)

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        input, target, weight, pos_weight, numbers = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the closed form in torch is differentiable again
            of = elements(input, target, weight, pos_weight, ctx.loss, numbers)
            grad = reference.elements_gradient(*of, grad_loss)
        else:
            grad = backward(input, target, weight, pos_weight, grad_loss, ctx.loss, numbers, ctx.implementation)
        return grad, *(None,) * 8


def _apply(of: Elements, reduce: bool, dtype: torch.dtype, implementation: str) -> Tensor:
    name, fields = encode(of.loss)
    # a tensor, so that another strength is no other graph
    numbers = torch.cat([torch.tensor(of.scales, dtype=torch.float64, device="cpu"), fields])
    # a graph takes no tensor twice: a view for each that came before
    tensors: list[Any] = [
        x if x is None or not any(x is y for y in of[:i]) else x.view_as(x) for i, x in enumerate(of[:4])
    ]
    return _Operators.apply(*tensors, name, numbers, reduce, dtype, implementation)  # type: ignore[no-any-return,no-untyped-call]
