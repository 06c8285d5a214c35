"""Every loss, forward and backward, on tensors that hold no values, launches mocked: who waits for a GPU raises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

import bonus_ops
from bench import host

N_CLASSES = 1003
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {  # of logits, labels, shares, a number a class
    "labels": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y),
    "labels, rows": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y, reduction="none"),
    "labels, weight": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y, w),
    "labels, z_loss": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y, z_loss=1e-4, softcap=30.0),
    "labels, scores": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_scores(z, y, ignore_index=3),
    "labels, softmax": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_softmax(z, y),
    "smoothing": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_scores(z, y, w, label_smoothing=0.1),
    "probabilities": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_scores(z, t),
    "two labels": lambda z, y, t, w: bonus_ops.mixup_cross_entropy(z, y, y.flip(0), 0.3),
    "sigmoid": lambda z, y, t, w: bonus_ops.bonus_binary_cross_entropy_with_logits(z, t, w),
    "last layer": lambda z, y, t, w: bonus_ops.linear_bonus_cross_entropy_with_scores(z, t, y),
}


class Inside(TorchDispatchMode):
    """Runs our operators' own code, where torch would ask for the shapes alone; refuses copies between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "bonus_ops":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        places = {x.device.type for x in (*args, out) if isinstance(x, Tensor) and x.dim() > 0}
        if len(places) > 1:
            raise RuntimeError(f"{func} copies between {places}")
        return out


def launches(loss: Callable[[Tensor, Tensor, Tensor, Tensor], Any]) -> int:
    z = torch.empty(8, N_CLASSES, device="meta", requires_grad=True)
    y, w = torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(N_CLASSES, device="meta")
    host.Mocked.launches = 0
    out = loss(z, y, torch.empty_like(z), w)
    value, scores = out[:2] if isinstance(out, tuple) else (out, None)
    if isinstance(scores, bonus_ops.Scores):
        scores.difficulty("el2n")
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert grad.shape == z.shape and grad.device == z.device
    return host.Mocked.launches


def made(make: Callable[..., Tensor], data: Any, device: Any = None, **options: Any) -> Tensor:
    if str(device) == "meta":
        raise RuntimeError("numbers of the host are copied to the device")
    return make(data, device=device, **options)


def both_ways() -> dict[str, list[int]]:
    """Return launches of each loss on its short way and through its operator, for good without numbers of the host."""
    host.mock_launches()
    for name in ("tensor", "as_tensor"):  # no mode sees them everywhere
        setattr(torch, name, functools.partial(made, getattr(torch, name)))
    plain = {name: launches(loss) for name, loss in LOSSES.items()}
    with Inside():
        return {name: [plain[name], launches(loss)] for name, loss in LOSSES.items()}
