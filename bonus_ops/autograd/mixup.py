"""Autograd for two labels a row, see `labels` for one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..losses import GapLoss, decode, encode
from ..operators import mixup as operators
from ..watchers import is_transformed

__all__ = ["two_losses"]


class _Mixup(torch.autograd.Function):
    """The two losses of each row; derivatives beyond the first follow the closed form."""

    @staticmethod
    def forward(logits, targets, fields, ignore_index, loss, implementation):  # type: ignore[no-untyped-def]
        return operators.forward(logits, targets, fields, ignore_index, loss, implementation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, targets, fields, *ctx.rest = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, targets, fields, output[1])

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        logits, targets, fields, saved = ctx.saved_tensors
        ignore_index, loss, implementation = ctx.rest
        if torch.is_grad_enabled():
            parts = [
                reference.gradient(logits, t, ignore_index, decode(loss, fields), g.reshape(t.shape))
                for t, g in zip(targets, grad_loss, strict=True)
            ]
            grad = parts[0] + parts[1]
        else:
            grad = operators.backward(logits, targets, fields, saved, grad_loss, ignore_index, loss, implementation)
        return grad, *(None,) * 5


def two_losses(logits: Tensor, targets: Tensor, ignore_index: int, loss: GapLoss, implementation: str) -> Tensor:
    """Return the losses [2, N] of rows [outer, inner, C] under each of their labels [2, outer, inner]."""
    if implementation == "reference" or is_transformed():
        if logits.device.type == "cpu":
            reference.check_target(targets, logits.shape[2], ignore_index)
        return torch.stack([reference.rows(logits, t, ignore_index, loss).reshape(-1) for t in targets])
    name, fields = encode(loss)
    values: Tensor = _Mixup.apply(logits, targets, fields, ignore_index, name, implementation)[0]  # type: ignore[no-untyped-call]
    return values
