"""The operators of the sigmoid family and their autograd rules, as `labels` does for rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autograd import made_gradient
from ..losses import decode, encode
from ..torch_path import elementwise
from ..torch_path.elementwise import Elements, common_axes
from ..watchers import is_plain_eager
from . import launching

__all__ = ["element_losses", "element_sum"]


# --- launches ---------------------------------------------------------------------------------------------------------


def _layout(of: Elements, *others: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a kernel that say where elements lie."""
    expanded = [None if x is None else x.expand(of.input.shape) for x in (*of[:4], *others)]
    strides = [x.stride() for x in expanded if x is not None]
    shape, merged = common_axes(of.input.shape, strides)
    in_order = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    extents = [sum((n - 1) * s for n, s in zip(shape, m, strict=True)) for m in merged]
    known = iter(None if m == in_order else tuple(m) for m in merged)
    n = of.input.numel()
    return {
        "operands": of[:4], "n": n, "shape": tuple(shape),
        "strides": tuple(None if x is None else next(known) for x in expanded),
        "loss_params": launching.loss_params(of.loss), "scales": launching.halved(of.scales),
        "WIDE": max(n, *extents) >= 2**31 - 2**16,
    }  # fmt: skip


def _launch_forward(of: Elements, reduce: bool, out: Tensor) -> Tensor:
    n = of.input.numel()
    if n == 0:
        return out.zero_()
    kernels, launch = launching.kernel_modules()["elementwise"], launching.kernel_modules()["launch"]
    value, _ = launching.kernel_pair(of.loss)
    how = (launch.elementwise_sum if reduce else launch.elementwise)(n, launching.WARP_SIZE)
    n_tiles = -(-n // how.block)
    with launching.device_guard(of.input):
        if not reduce:
            kernels.elementwise_kernel[(n_tiles,)](
                out_ptr=out, **_layout(of, out), VALUE=value, BLOCK=how.block, num_warps=how.num_warps
            )
            return out
        sums = out.new_empty(-(-n_tiles // how.tiles))
        kernels.elementwise_sum_kernel[(len(sums),)](
            sums_ptr=sums, **_layout(of), VALUE=value, BLOCK=how.block, TILES=how.tiles, num_warps=how.num_warps
        )
    return sums.sum()


def _launch_backward(of: Elements, grad_loss: Tensor) -> Tensor:
    grad = torch.empty_like(of.input)
    n = of.input.numel()
    if n == 0:
        return grad
    kernels, launch = launching.kernel_modules()["elementwise"], launching.kernel_modules()["launch"]
    _, slope = launching.kernel_pair(of.loss)
    how = launch.elementwise(n, launching.WARP_SIZE)
    one = grad_loss.dim() == 0
    with launching.device_guard(of.input):
        kernels.elementwise_backward_kernel[(-(-n // how.block),)](
            upstream_ptr=grad_loss, grad_ptr=grad, **_layout(of, grad, None if one else grad_loss), SLOPE=slope,
            BLOCK=how.block, ONE_UPSTREAM=one, num_warps=how.num_warps,
        )  # fmt: skip
    return grad


# --- operators --------------------------------------------------------------------------------------------------------


def _elements(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: str, numbers: Tensor
) -> Elements:
    positive, negative = numbers[:2].tolist()  # on the CPU: nothing waits
    return Elements(input, target, weight, pos_weight, decode(loss, numbers[2:]), (positive, negative))


def _empty(input: Tensor, target: Tensor, reduce: bool, dtype: torch.dtype) -> Tensor:
    return input.new_empty((), dtype=dtype) if reduce else torch.empty_like(target, dtype=dtype)


@torch.library.custom_op("bonus_ops::sigmoid_forward", mutates_args=())
def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: str, numbers: Tensor,
    reduce: bool, dtype: torch.dtype, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the loss of each element like ``target``, or their sum, in ``dtype``; ``numbers``: `_numbers`."""
    of = _elements(input, target, weight, pos_weight, loss, numbers)
    if implementation == "triton":
        return _launch_forward(of, reduce, _empty(input, target, reduce, dtype))
    if input.device.type == "cpu":
        if reduce:
            return elementwise.visit(of, None)[0].to(dtype)
        return elementwise.forward(of, _empty(input, target, reduce, dtype))
    value = reference.elements(*of)
    return value.sum().to(dtype) if reduce else _empty(input, target, reduce, dtype).copy_(value)


@forward.register_fake
def _(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation):  # type: ignore[no-untyped-def]
    return _empty(input, target, reduce, dtype)


@torch.library.custom_op("bonus_ops::sigmoid_backward", mutates_args=())
def backward(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, grad_loss: Tensor, loss: str,
    numbers: Tensor, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of ``input`` from the upstream gradient of the sum (0-d) or of each element."""
    of = _elements(input, target, weight, pos_weight, loss, numbers)
    if implementation == "triton":
        return _launch_backward(of, grad_loss)
    if input.device.type == "cpu":
        return elementwise.backward(of, grad_loss)
    return torch.empty_like(input).copy_(reference.elements_gradient(*of, grad_loss))


@backward.register_fake
def _(input, target, weight, pos_weight, grad_loss, loss, numbers, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Operators(torch.autograd.Function):
    """Losses or their sum; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation):  # type: ignore[no-untyped-def]
        return forward(input, target, weight, pos_weight, loss, numbers, reduce, dtype, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.loss, numbers, _, _, ctx.implementation = inputs
        ctx.save_for_backward(*tensors, numbers)

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        input, target, weight, pos_weight, numbers = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the closed form in torch is differentiable again
            of = _elements(input, target, weight, pos_weight, ctx.loss, numbers)
            grad = reference.elements_gradient(*of, grad_loss)
        else:
            grad = backward(input, target, weight, pos_weight, grad_loss, ctx.loss, numbers, ctx.implementation)
        return grad, *(None,) * 8


class _Visit(torch.autograd.Function):
    """Sum over ``divisor`` with the gradient made in the forward visit: the torch path, eager, on a CPU."""

    @staticmethod
    def forward(ctx, input, target, weight, pos_weight, loss, scales, divisor):  # type: ignore[no-untyped-def]
        of = Elements(input, target, weight, pos_weight, loss, scales)
        total, ctx.grad = elementwise.visit(of, 1 / divisor)
        ctx.save_for_backward(input, target, weight, pos_weight)
        ctx.rest, ctx.divisor = (loss, scales), divisor
        return total / divisor

    @staticmethod
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        of = Elements(*ctx.saved_tensors, *ctx.rest)
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            return reference.elements_gradient(*of, grad_loss / ctx.divisor), *(None,) * 6
        if ctx.grad is None:
            _, ctx.grad = elementwise.visit(of, 1 / ctx.divisor)  # again: the bits of the first
        grad = made_gradient(ctx, grad_loss)
        if grad is None:
            grad = elementwise.backward(of, grad_loss.to(of.dtype) / ctx.divisor)
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
