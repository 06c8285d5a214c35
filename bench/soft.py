"""Soft targets, and a loss of all classes: beside F.cross_entropy and the paper's formulas."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import Scores, SoftmaxSquaredError, bonus_cross_entropy, bonus_cross_entropy_with_scores

from . import measure
from .bounds import bound
from .command import Tell, counted
from .intervals import ratio, summary
from .measure import Effort
from .providers import (
    BONUS,
    CASES,
    DTYPES,
    SCORE_NAMES,
    TOLERANCE,
    check_runner_up,
    close,
    inputs,
    paper_terms,
    truth,
)

SMOOTHING = 0.1
SHAPES = ("imagenet-1k", "llama2-vocab")
OURS, ALONE, TORCH, PAPER = "ours", "ours, loss only", "F.cross_entropy", "paper's formula"
RATIOS = {f"{over} / {under}": (over, under) for over, under in ((OURS, TORCH), (ALONE, TORCH), (PAPER, OURS))}
AT_LEAST = 5.0  # of the last of the ratios


# --- what users write -------------------------------------------------------------------------------------------------


def paper_smoothed(z: Tensor, target: Tensor) -> Tensor:
    """Smooth cross-entropy and bonus alike, as image classifiers do."""

    def smoothed(log_x: Tensor) -> Tensor:
        return (1 - SMOOTHING) * F.nll_loss(log_x, target) - SMOOTHING * log_x.mean(-1).mean()

    log_p, bonus = paper_terms(z)
    return smoothed(log_p) - smoothed(bonus)


def paper_probabilities(z: Tensor, target: Tensor) -> Tensor:
    log_p, bonus = paper_terms(z)
    return (target * (bonus - log_p)).sum(-1).mean()


def paper_squared_error(z: Tensor, target: Tensor) -> Tensor:
    """Mean squared error with the mirror bonus, exponent 2."""
    p = z.softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
    hard = F.one_hot(target, z.shape[-1]).to(p.dtype)
    return F.mse_loss(p, hard) - (hard * p**2 + (1 - hard) * (1 - p) ** 2).mean()


class Kind(NamedTuple):
    """What is asked of every provider alike."""

    paper: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any]  # of ours
    torch: dict[str, Any] | None  # of F.cross_entropy, which has nothing like some
    at_most: float = math.inf  # of the first of the ratios
    probabilities: bool = False


KINDS = {
    f"label smoothing {SMOOTHING:g}": Kind(
        paper_smoothed, {"bonus": BONUS, "label_smoothing": SMOOTHING}, {"label_smoothing": SMOOTHING}, 0.8
    ),
    "probabilities": Kind(paper_probabilities, {"bonus": BONUS}, {}, 0.9, probabilities=True),
    "squared error + mirror": Kind(paper_squared_error, {"bonus": SoftmaxSquaredError(strength=1.0)}, None),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def cases() -> list[tuple[str, str, str]]:
    return list(itertools.product(DTYPES, SHAPES, KINDS))


def names(dtype: str, shape: str, target: str) -> list[str]:
    return [OURS, PAPER] if KINDS[target].torch is None else [OURS, PAPER, ALONE, TORCH]


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    """Measure every kind at every shape and dtype."""
    found = [_measure(*case, effort) for case in counted(cases(), tell)]
    return {"cases": found, "bounds": [] if effort is Effort.QUICK else list(verdicts(found))}


class Batch(NamedTuple):
    logits: Tensor
    label: Tensor
    probabilities: Tensor

    def of(self, kind: Kind) -> tuple[Tensor, Tensor]:
        return self.logits, self.probabilities if kind.probabilities else self.label


@functools.lru_cache(2)  # of a shape and dtype, few rows and all
def batch(n_rows: int, n_classes: int, dtype: torch.dtype) -> Batch:
    """Return logits, labels, and a teacher's probabilities: 0.9 for the label, the rest for all classes."""
    z, label = inputs((n_rows, n_classes), dtype)
    noise = torch.randn(n_rows, n_classes, generator=torch.Generator().manual_seed(1))
    teacher = noise.mul_(2).softmax(1).mul_(0.1)
    return Batch(z, label, teacher.scatter_add_(1, label[:, None], torch.full_like(teacher[:, :1], 0.9)).to(dtype))


def ours(z: Tensor, target: Tensor, kind: Kind) -> tuple[Tensor, Scores]:
    return bonus_cross_entropy_with_scores(z, target, **kind.options)


def steps(dtype: str, shape: str, target: str, effort: Effort) -> dict[str, measure.Step]:
    """Return a step of every provider, checked first."""
    kind, n_classes = KINDS[target], CASES[shape].n_classes
    n_rows, _ = CASES[shape].shape(effort is Effort.QUICK)
    check(kind, *batch(16 if n_classes < 10000 else 4, n_classes, DTYPES[dtype]).of(kind))
    z, y = batch(n_rows, n_classes, DTYPES[dtype]).of(kind)
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours(z, y, kind)[0],
        PAPER: lambda: kind.paper(z, y),
        ALONE: lambda: bonus_cross_entropy(z, y, **kind.options),
        TORCH: lambda: F.cross_entropy(z, y, **kind.torch),
    }

    def prepare() -> None:
        z.grad = None

    made = {name: measure.Step(prepare, lambda loss=losses[name]: loss().backward())
            for name in names(dtype, shape, target)}  # fmt: skip
    if effort.leaves_out(z.numel()):
        del made[PAPER]
    return made


def _measure(dtype: str, shape: str, target: str, effort: Effort) -> dict[str, Any]:
    made = steps(dtype, shape, target, effort)
    n_rows, n_classes = CASES[shape].shape(effort is Effort.QUICK)
    gradient = n_rows * n_classes * DTYPES[dtype].itemsize
    results = {name: {"peak_gradients": measure.peak_bytes(step) / gradient} for name, step in made.items()}
    # the slow formula apart, beside "ours", so that the others get more rounds
    fast = {name: step for name, step in made.items() if name != PAPER}
    times = measure.interleave(fast, *effort.rounds(1.5, (5, 31)))
    slow = {name: made[name] for name in (OURS, PAPER)} if PAPER in made else {}
    slow_times = measure.interleave(slow, *effort.rounds(1.5, (3, 15)))
    for name in made:
        results[name]["time_ms"] = summary((slow_times if name == PAPER else times)[name])
    ratios = {}
    for label, (over, under) in RATIOS.items():
        source = slow_times if over == PAPER else times
        if over in source and under in source:
            ratios[label] = ratio(source[over], source[under])
    about = {"case": shape, "dtype": dtype, "n_rows": n_rows, "n_classes": n_classes, "target": target}
    return about | {"providers": results, "ratios": ratios}


def check(kind: Kind, z: Tensor, target: Tensor) -> None:
    """Raise `WrongResult` where loss, gradient or scores of ours or of the paper's formula miss the float64 truth."""
    exact = z.detach().double().requires_grad_()
    loss = kind.paper(exact, target.double() if kind.probabilities else target)
    (grad,) = torch.autograd.grad(loss, exact)
    label = target.argmax(1) if kind.probabilities else target
    largest = len(z) if isinstance(kind.options["bonus"], type(BONUS)) else len(z) * z.shape[1]
    for run in (lambda: ours(z, target, kind), lambda: (kind.paper(z, target), None)):
        found, scores = run()
        (found_grad,) = torch.autograd.grad(found, z)
        close("loss", found, loss.detach(), TOLERANCE[z.dtype])
        close("gradient", found_grad.double() * largest, grad * largest, TOLERANCE[z.dtype])
        if scores is None:
            continue
        true = truth(z, label).scores
        for name in SCORE_NAMES:
            close(name, getattr(scores, name), true[name], 1e-4)
        check_runner_up(z, label, scores.runner_up, true["margin"])


def verdicts(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return what is required wherever F.cross_entropy has the same options: on one CPU thread."""
    for case in cases:
        kind = KINDS[case["target"]]
        if kind.torch is None:
            continue
        where = {"case": case["case"], "dtype": case["dtype"]}
        cost, gain = (case["ratios"].get(f"{a} / {b}", {}).get("median") for a, b in ((OURS, TORCH), (PAPER, OURS)))
        yield bound(f"{case['target']}: {OURS} / {TORCH}", cost, at_most=kind.at_most, **where)
        yield bound(f"{case['target']}: {PAPER} / {OURS}", gain, at_least=AT_LEAST, **where)
