"""Ours and others' losses under names, imported where they are asked for; what is not there is skipped with the reason.

Each gives a mean loss; before one is timed its loss and gradients must agree with float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import (
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    difficulty_scores,
    linear_bonus_cross_entropy_with_scores,
)

from .cases import BONUS

OURS, LOSS_ONLY, SCORING, EAGER, COMPILED = (
    "ours", "ours, loss only", "ours, scores alone", "F.cross_entropy", "F.cross_entropy, compiled",
)  # fmt: skip
HELD, FROM_L2 = "ours, row held in registers", "ours, gradient in forward"
BARE = "three bare products"
BUDGET = 1 << 30  # bytes, of our last layer
Loss = Callable[..., Tensor]


class Named(NamedTuple):
    """A loss of (logits, target), or of (hidden, weight, target)."""

    load: Callable[[], Loss]  # imports; raises where it cannot
    bonus: bool = False  # the bonus loss, else plain cross-entropy
    modes: tuple[str, ...] = ("forward", "train")
    slow_start: bool = False  # compiles for each shape
    waits: bool = False  # for the GPU, so that no graph can hold it
    upstream: float = 0.5  # what backward starts from; not 1: a peer may do nothing then


def _in_forward(way: str, num_warps: int | None = None) -> Named:
    def load() -> Loss:
        from .experiments import InForward

        return lambda z, y: InForward.apply(z, y, way, num_warps)

    return Named(load, True, ("train",), upstream=1.0)


IN_FORWARD = {HELD: _in_forward("held"), FROM_L2: _in_forward("from L2")}
IN_FORWARD |= {f"{HELD}, {warps} warps": _in_forward("held", warps) for warps in (8, 32)}


def _liger() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda z, y: cross_entropy(z, y, reduction="mean")


OF_LOGITS = {
    OURS: Named(lambda: lambda z, y: bonus_cross_entropy_with_scores(z, y, bonus=BONUS)[0], True),
    LOSS_ONLY: Named(lambda: lambda z, y: bonus_cross_entropy(z, y, bonus=BONUS), True),
    SCORING: Named(lambda: lambda z, y: difficulty_scores(z, y).loss.mean(), modes=("forward",)),
    EAGER: Named(lambda: F.cross_entropy),
    "Liger-Kernel": Named(_liger, modes=("train",), waits=True),
    "QuACK": Named(_quack, slow_start=True),
    COMPILED: Named(lambda: torch.compile(F.cross_entropy, dynamic=False), modes=("train",), slow_start=True),
}


def _eager_layer(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.t(), y)


def _liger_layer() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, w, y: loss(w, x, y)


def _quack_layer() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, y: chunked_linear_cross_entropy(x, w, y, tuned=False)  # tuning takes minutes


def _cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


OF_LAYERS = {
    OURS: Named(lambda: lambda x, w, y: linear_bonus_cross_entropy_with_scores(x, w, y, bonus=BONUS, budget=BUDGET)[0],
                True),
    EAGER: Named(lambda: _eager_layer),
    "F.linear_cross_entropy": Named(lambda: F.linear_cross_entropy),
    "Liger-Kernel": Named(_liger_layer),
    "Cut Cross-Entropy": Named(_cut_cross_entropy),
    "QuACK": Named(_quack_layer),
    COMPILED: Named(lambda: torch.compile(_eager_layer, dynamic=False)),
}  # fmt: skip


def load(named: dict[str, Named], inputs: tuple[Tensor, ...]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the losses that are there and agree with float64 on ``inputs``, and why the others are left out."""
    losses, skipped = {}, {}
    for name, it in named.items():
        try:
            loss = it.load()
            if wrong := difference(it, loss, inputs):
                skipped[name] = wrong
            else:
                losses[name] = loss
        except Exception as error:  # not installed, or not for this device
            skipped[name] = reason(error)
    return losses, skipped


def difference(it: Named, loss: Loss, inputs: tuple[Tensor, ...]) -> str | None:
    """Return what is wrong with a loss or its gradients against float64, or None; a NaN is wrong too."""
    *leaves, target = inputs
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = bonus_cross_entropy(exact[0] if len(exact) == 1 else exact[0] @ exact[1].t(), target,
                                bonus=BONUS if it.bonus else None, implementation="reference")  # fmt: skip
    if "train" in it.modes:
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = loss(*leaves, target)
    errors = [float((value.detach().double() - truth.detach()).abs() / (1 + truth.detach().abs()))]
    if "train" in it.modes:
        start = torch.full_like(value, it.upstream)
        grads = torch.autograd.grad(value, leaves, start)
        for g, true in zip(grads, torch.autograd.grad(truth * it.upstream, exact), strict=True):
            errors.append(float((g.double() - true).norm() / true.norm()))
    most = 1e-3 if leaves[0].dtype == torch.float32 else 2e-2  # some peers filter or round their gradients
    return None if max(errors) < most else f"wrong result: off by {', '.join(f'{e:.1e}' for e in errors)}"


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
