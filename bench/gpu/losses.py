"""Ours and others' losses under names, imported where they are asked for; what is not there is skipped with the reason.

Each gives a mean loss; before one is timed its loss and gradients must agree with float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import (
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    linear_bonus_cross_entropy_with_scores,
)

from .cases import BONUS

OURS, LOSS_ONLY, EAGER, COMPILED = "ours", "ours, loss only", "F.cross_entropy", "F.cross_entropy, compiled"
HELD = "ours, row held in registers"
BARE = "three bare products"
BUDGET = 1 << 30  # bytes, of our last layer
Loss = Callable[..., Tensor]


TRAIN = ("train",)
REFERENCE = functools.partial(bonus_cross_entropy, bonus=BONUS, implementation="reference")
SIGMOID = functools.partial(bonus_binary_cross_entropy_with_logits, bonus=BONUS)
PLAIN_SIGMOID = F.binary_cross_entropy_with_logits
SMOOTH = {"label_smoothing": 0.1}


class Named(NamedTuple):
    """A loss of (logits, target), or of (hidden, weight, target)."""

    loss: Loss | str  # by name it is imported where it is asked for
    truth: Loss = F.cross_entropy  # of logits: what it must agree with, in float64
    options: dict[str, Any] = {}
    modes: tuple[str, ...] = ("forward", "train")
    compiled: bool = False
    slow_start: bool = False  # compiles for each shape
    waits: bool = False  # for the GPU, so that no graph can hold it
    upstream: float = 0.5  # what backward starts from; not 1: a peer may do nothing then

    def load(self) -> Loss:
        loss = resolve_name(self.loss) if isinstance(self.loss, str) else self.loss
        return torch.compile(loss, dynamic=False) if self.compiled else functools.partial(loss, **self.options)


def _ours(z: Tensor, y: Tensor, **options: float) -> Tensor:
    return bonus_cross_entropy_with_scores(z, y, bonus=BONUS, **options)[0]


def _our_layer(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return linear_bonus_cross_entropy_with_scores(x, w, y, bonus=BONUS, budget=BUDGET)[0]


def _eager_layer(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.t(), y)


IN_FORWARD = {HELD: Named("bench.gpu.experiments:InForward.apply", REFERENCE, modes=TRAIN, upstream=1.0)}
LIGER = "liger_kernel.transformers.functional"
OF_LOGITS = {
    OURS: Named(_ours, REFERENCE),
    LOSS_ONLY: Named(bonus_cross_entropy, REFERENCE, {"bonus": BONUS}),
    EAGER: Named(F.cross_entropy),
    "Liger-Kernel": Named(f"{LIGER}:liger_cross_entropy", modes=TRAIN, waits=True),
    "QuACK": Named("quack.cross_entropy:cross_entropy", options={"reduction": "mean"}, slow_start=True),
    COMPILED: Named(F.cross_entropy, modes=TRAIN, compiled=True, slow_start=True),
}
OF_SMOOTHED = {
    f"{OURS}, label smoothing": Named(_ours, functools.partial(REFERENCE, **SMOOTH), SMOOTH, TRAIN),
    f"{EAGER}, label smoothing": Named(F.cross_entropy, functools.partial(F.cross_entropy, **SMOOTH), SMOOTH, TRAIN),
}
OF_SHARES = {  # of targets like the logits
    OURS: Named(_ours, REFERENCE, modes=TRAIN),
    EAGER: Named(F.cross_entropy, modes=TRAIN),
    f"{OURS}, sigmoid": Named(SIGMOID, functools.partial(SIGMOID, implementation="reference"), modes=TRAIN),
    "F.binary_cross_entropy_with_logits": Named(PLAIN_SIGMOID, PLAIN_SIGMOID, modes=TRAIN),
}
OF_LAYERS = {
    OURS: Named(_our_layer, REFERENCE),
    EAGER: Named(_eager_layer),
    "F.linear_cross_entropy": Named("torch.nn.functional:linear_cross_entropy"),
    "Liger-Kernel": Named(f"{LIGER}:liger_fused_linear_cross_entropy"),
    "Cut Cross-Entropy": Named("cut_cross_entropy:linear_cross_entropy"),
    # tuning takes minutes
    "QuACK": Named("quack.linear_cross_entropy:chunked_linear_cross_entropy", options={"tuned": False}),
    COMPILED: Named(_eager_layer, compiled=True),
}


def check(it: Named, loss: Loss, inputs: tuple[Tensor, ...]) -> None:
    """Raise where a loss or its gradients differ from float64; a NaN is wrong too."""
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
    if not all(error < most for error in errors):
        raise ValueError(f"wrong result: off by {', '.join(f'{e:.1e}' for e in errors)}")


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
