"""The two operators of the sigmoid family and their launches, as `labels` has them for rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..losses import decode
from ..torch_path import elementwise as torch_elementwise
from ..torch_path.elementwise import Elements, common_axes
from . import launching

__all__ = ["backward", "elements", "forward"]


# --- launches ---------------------------------------------------------------------------------------------------------


def _layout(of: Elements, *others: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a kernel that say where elements lie."""
    expanded = [None if x is None else x.expand(of.input.shape) for x in (*of[:4], *others)]
    strides = [x.stride() for x in expanded if x is not None]
    shape, merged = common_axes(of.input.shape, strides)
    in_order = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    extents = [sum((n - 1) * s for n, s in zip(shape, m, strict=True)) for m in merged]
    no_strides = (None,) * len(shape)
    known = iter(no_strides if m == in_order else m for m in merged)
    n = of.input.numel()
    return {
        "operands": of[:4], "n": n, "shape": tuple(shape),
        "strides": tuple(s for x in expanded for s in (no_strides if x is None else next(known))),
        "loss_params": launching.loss_params(of.loss), "scales": launching.halved(of.scales),
        "WIDE": max(n, *extents) >= 2**31 - 2**16,
    }  # fmt: skip


def _launch_forward(of: Elements, reduce: bool, out: Tensor) -> Tensor:
    n = of.input.numel()
    if n == 0:
        return out.zero_()
    kernels, launch = launching.kernel_modules()["sigmoid"], launching.kernel_modules()["launch"]
    value, _ = launching.kernel_pair(of.loss)
    how = (launch.sigmoid_sum if reduce else launch.sigmoid)(n, launching.WARP_SIZE)
    n_tiles = -(-n // how.block)
    with launching.device_guard(of.input):
        if not reduce:
            kernels.sigmoid_kernel[(n_tiles,)](
                out_ptr=out, **_layout(of, out), VALUE=value, BLOCK=how.block, num_warps=how.num_warps
            )
            return out
        sums = out.new_empty(-(-n_tiles // how.tiles))
        kernels.sigmoid_sum_kernel[(len(sums),)](
            sums_ptr=sums, **_layout(of), VALUE=value, BLOCK=how.block, TILES=how.tiles, num_warps=how.num_warps
        )
    return sums.sum()


def _launch_backward(of: Elements, grad_loss: Tensor) -> Tensor:
    grad = torch.empty_like(of.input)
    n = of.input.numel()
    if n == 0:
        return grad
    kernels, launch = launching.kernel_modules()["sigmoid"], launching.kernel_modules()["launch"]
    _, slope = launching.kernel_pair(of.loss)
    how = launch.sigmoid(n, launching.WARP_SIZE)
    one = grad_loss.dim() == 0
    with launching.device_guard(of.input):
        kernels.sigmoid_backward_kernel[(-(-n // how.block),)](
            upstream_ptr=grad_loss, grad_ptr=grad, **_layout(of, grad, None if one else grad_loss), SLOPE=slope,
            BLOCK=how.block, ONE_UPSTREAM=one, num_warps=how.num_warps,
        )  # fmt: skip
    return grad


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
    if implementation == "triton":
        return _launch_forward(of, reduce, _empty(input, target, reduce, dtype))
    if input.device.type == "cpu":
        if reduce:
            return torch_elementwise.visit(of, None)[0].to(dtype)
        return torch_elementwise.forward(of, _empty(input, target, reduce, dtype))
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
    of = elements(input, target, weight, pos_weight, loss, numbers)
    if implementation == "triton":
        return _launch_backward(of, grad_loss)
    if input.device.type == "cpu":
        return torch_elementwise.backward(of, grad_loss)
    return torch.empty_like(input).copy_(reference.elements_gradient(*of, grad_loss))


@backward.register_fake
def _(input, target, weight, pos_weight, grad_loss, loss, numbers, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)
