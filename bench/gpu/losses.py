"""Ours and others' losses under names, imported where they are asked for; what is not there is skipped with the reason.

Each gives a mean loss; before one is timed its loss and gradients must agree with float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pkgutil import resolve_name
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import (
    bonus_binary_cross_entropy_with_logits,
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
    truth: Loss = F.cross_entropy  # of logits: what it must agree with, in float64
    modes: tuple[str, ...] = ("forward", "train")
    slow_start: bool = False  # compiles for each shape
    waits: bool = False  # for the GPU, so that no graph can hold it
    upstream: float = 0.5  # what backward starts from; not 1: a peer may do nothing then


REFERENCE = functools.partial(bonus_cross_entropy, bonus=BONUS, implementation="reference")
SIGMOID = functools.partial(bonus_binary_cross_entropy_with_logits, bonus=BONUS)
SMOOTH = {"label_smoothing": 0.1}


def _ours(z: Tensor, y: Tensor, **options: float) -> Tensor:
    return bonus_cross_entropy_with_scores(z, y, bonus=BONUS, **options)[0]


def _in_forward(way: str, num_warps: int | None = None) -> Named:
    of = "bench.gpu.experiments:InForward.apply"
    return Named(lambda: lambda z, y: resolve_name(of)(z, y, way, num_warps), REFERENCE, ("train",), upstream=1.0)


IN_FORWARD = {HELD: _in_forward("held"), FROM_L2: _in_forward("from L2")}
IN_FORWARD |= {f"{HELD}, {warps} warps": _in_forward("held", warps) for warps in (8, 32)}
OF_LOGITS = {
    OURS: Named(lambda: _ours, REFERENCE),
    LOSS_ONLY: Named(lambda: functools.partial(bonus_cross_entropy, bonus=BONUS), REFERENCE),
    SCORING: Named(lambda: lambda z, y: difficulty_scores(z, y).loss.mean(), modes=("forward",)),
    EAGER: Named(lambda: F.cross_entropy),
    "Liger-Kernel": Named(lambda: resolve_name("liger_kernel.transformers:LigerCrossEntropyLoss")(), modes=("train",),
                          waits=True),
    "QuACK": Named(lambda: functools.partial(resolve_name("quack.cross_entropy:cross_entropy"), reduction="mean"),
                   slow_start=True),
    COMPILED: Named(lambda: torch.compile(F.cross_entropy, dynamic=False), modes=("train",), slow_start=True),
}  # fmt: skip
OF_SMOOTHED = {
    f"{OURS}, label smoothing": Named(lambda: functools.partial(_ours, **SMOOTH),
                                      functools.partial(REFERENCE, **SMOOTH), ("train",)),
    f"{EAGER}, label smoothing": Named(lambda: functools.partial(F.cross_entropy, **SMOOTH),
                                       functools.partial(F.cross_entropy, **SMOOTH), ("train",)),
}  # fmt: skip
OF_SHARES = {  # of targets like the logits
    OURS: Named(lambda: _ours, REFERENCE, ("train",)),
    EAGER: Named(lambda: F.cross_entropy, modes=("train",)),
    f"{OURS}, sigmoid": Named(lambda: SIGMOID, functools.partial(SIGMOID, implementation="reference"), ("train",)),
    "F.binary_cross_entropy_with_logits": Named(lambda: F.binary_cross_entropy_with_logits,
                                                F.binary_cross_entropy_with_logits, ("train",)),
}  # fmt: skip


def _eager_layer(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.t(), y)


def _liger_layer() -> Loss:
    loss = resolve_name("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")()
    return lambda x, w, y: loss(w, x, y)


OF_LAYERS = {
    OURS: Named(lambda: lambda x, w, y: linear_bonus_cross_entropy_with_scores(x, w, y, bonus=BONUS, budget=BUDGET)[0],
                REFERENCE),
    EAGER: Named(lambda: _eager_layer),
    "F.linear_cross_entropy": Named(lambda: F.linear_cross_entropy),
    "Liger-Kernel": Named(_liger_layer),
    "Cut Cross-Entropy": Named(lambda: resolve_name("cut_cross_entropy:linear_cross_entropy")),
    "QuACK": Named(lambda: functools.partial(
        resolve_name("quack.linear_cross_entropy:chunked_linear_cross_entropy"), tuned=False)),  # tuning takes minutes
    COMPILED: Named(lambda: torch.compile(_eager_layer, dynamic=False)),
}  # fmt: skip


def difference(it: Named, loss: Loss, inputs: tuple[Tensor, ...]) -> str | None:
    """Return what is wrong with a loss or its gradients against float64, or None; a NaN is wrong too."""
    *leaves, target = inputs
    exact = [x.detach().double().requires_grad_() for x in leaves]
    logits = exact[0] if len(exact) == 1 else exact[0] @ exact[1].t()
    truth = it.truth(logits, target.double() if target.is_floating_point() else target)
    leaves = [x.detach().clone().requires_grad_() for x in leaves]  # a peer may write into its own
    value = loss(*leaves, target)
    errors = [float((value.detach().double() - truth.detach()).abs() / (1 + truth.detach().abs()))]
    if "train" in it.modes:
        grads = torch.autograd.grad(value, leaves, torch.full_like(value, it.upstream))
        for g, true in zip(grads, torch.autograd.grad(truth * it.upstream, exact), strict=True):
            errors.append(float((g.double() - true).norm() / true.norm()))
    most = 1e-3 if leaves[0].dtype == torch.float32 else 2e-2  # some peers filter or round their gradients
    return None if max(errors) < most else f"wrong result: off by {', '.join(f'{e:.1e}' for e in errors)}"


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
