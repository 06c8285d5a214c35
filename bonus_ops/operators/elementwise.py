"""The two operators of the sigmoid family, as `labels` has them for rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..kernels.elements import Elements
from ..losses import decode
from ..torch_path import elementwise as torch_elementwise
from .implementation import gpu

__all__ = ["backward", "elements", "forward"]


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
        losses: Tensor = gpu("sigmoid").forward(of, reduce, _empty(input, target, reduce, dtype))
        return losses
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
        gradient: Tensor = gpu("sigmoid").backward(of, grad_loss)
        return gradient
    if input.device.type == "cpu":
        return torch_elementwise.backward(of, grad_loss)
    return torch.empty_like(input).copy_(reference.elements_gradient(*of, grad_loss))


@backward.register_fake
def _(input, target, weight, pos_weight, grad_loss, loss, numbers, implementation):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)
