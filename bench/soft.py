"""Soft targets, and a loss of all classes: beside F.cross_entropy and the paper's formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import Scores, SoftmaxSquaredError, bonus_cross_entropy, bonus_cross_entropy_with_scores

from . import measure
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


def run(quick: bool, device: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every kind at every shape and dtype."""
    on_gpu = device == "cuda"
    kept = on_gpu or measure.keep_memory()
    if not on_gpu:
        torch.set_num_threads(1)
    cases = []
    for dtype, name in itertools.product(DTYPES, SHAPES):
        case = CASES[name]
        n_rows, _ = case.shape(on_gpu, quick)
        shape = {"case": name, "dtype": dtype, "n_rows": n_rows, "n_classes": case.n_classes}
        few, full = (batch(n, case.n_classes, DTYPES[dtype], device) for n in (16, n_rows))
        for name, kind in KINDS.items():
            progress(f"soft: {dtype} {n_rows}x{case.n_classes} {name}")
            check(kind, *few.of(kind))
            cases.append(shape | {"target": name, **_measure(kind, *full.of(kind), quick, on_gpu)})
    return {
        "memory_kept": kept, "threads": None if on_gpu else 1, "cases": cases,
        "bounds": [] if on_gpu or quick else list(verdicts(cases)),
    }  # fmt: skip


class Batch(NamedTuple):
    logits: Tensor
    label: Tensor
    probabilities: Tensor

    def of(self, kind: Kind) -> tuple[Tensor, Tensor]:
        return self.logits, self.probabilities if kind.probabilities else self.label


def batch(n_rows: int, n_classes: int, dtype: torch.dtype, device: str) -> Batch:
    """Return logits, labels, and a teacher's probabilities: 0.9 for the label, the rest for all classes."""
    z, label = inputs((n_rows, n_classes), dtype, device)
    noise = torch.randn(n_rows, n_classes, generator=torch.Generator().manual_seed(1)).to(device)
    teacher = noise.mul_(2).softmax(1).mul_(0.1)
    return Batch(z, label, teacher.scatter_add_(1, label[:, None], torch.full_like(teacher[:, :1], 0.9)).to(dtype))


def ours(z: Tensor, target: Tensor, kind: Kind) -> tuple[Tensor, Scores]:
    return bonus_cross_entropy_with_scores(z, target, **kind.options)


def _measure(kind: Kind, z: Tensor, target: Tensor, quick: bool, on_gpu: bool) -> dict[str, Any]:
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours(z, target, kind)[0],
        PAPER: lambda: kind.paper(z, target),
    }
    if kind.torch is not None:
        losses[ALONE] = lambda: bonus_cross_entropy(z, target, **kind.options)
        losses[TORCH] = lambda: F.cross_entropy(z, target, **kind.torch)

    def prepare() -> None:
        z.grad = None

    steps = {name: measure.Step(prepare, lambda loss=loss: loss().backward()) for name, loss in losses.items()}
    gradient = z.numel() * z.element_size()
    results = {name: {"peak_gradients": measure.peak_bytes(step, on_gpu) / gradient} for name, step in steps.items()}
    # the slow formula apart, beside "ours", so that the others get more rounds
    fast = {name: step for name, step in steps.items() if name != PAPER and kind.torch is not None}
    times = measure.interleave(fast, on_gpu, 0.0 if quick else 1.5, (2, 2) if quick else (5, 31))
    slow = {name: steps[name] for name in (OURS, PAPER)}
    slow_times = measure.interleave(slow, on_gpu, 0.0 if quick else 1.5, (2, 2) if quick else (3, 15))
    for name in steps:
        results[name]["time_ms"] = measure.summary((times if name in times else slow_times)[name])
    ratios = {}
    for label, (over, under) in RATIOS.items():
        source = slow_times if over == PAPER else times
        if over in source and under in source:
            ratios[label] = measure.ratio(source[over], source[under])
    return {"providers": results, "ratios": ratios}


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
        close("loss", found, loss.detach().cpu(), TOLERANCE[z.dtype])
        close("gradient", found_grad.cpu().double() * largest, grad.cpu() * largest, TOLERANCE[z.dtype])
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
        cost, gain = (case["ratios"][f"{a} / {b}"]["median"] for a, b in ((OURS, TORCH), (PAPER, OURS)))
        what = f"{case['target']}: "
        at_most = kind.at_most
        yield {"bound": f"{what}{OURS} / {TORCH} <= {at_most:g}", **where, "value": cost, "passed": cost <= at_most}
        yield {"bound": f"{what}{PAPER} / {OURS} >= {AT_LEAST:g}", **where, "value": gain, "passed": gain >= AT_LEAST}
