"""The last layer without its logits: beside three bare products, torch's own, and a linear layer with its loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import linear_bonus_cross_entropy_with_scores, linear_difficulty_scores
from bonus_ops.ops import chunks

from . import measure
from .bounds import bound
from .command import Tell, counted
from .intervals import ratio, summary
from .measure import Effort
from .providers import BONUS, SCORE_NAMES, close, truth
from .record import instruction_set

# rows, hidden size, classes: what is required of ours over three bare products, by the widest vectors of the CPU
SHAPES = {
    "llama2-vocab": (1024, 512, 32000, {"avx2": 1.15, "avx512": 1.15}),
    "gpt2-vocab": (2048, 256, 50257, {"avx2": 1.15, "avx512": 1.15}),
    "llama3-vocab": (512, 768, 128256, {"avx2": 1.25, "avx512": 1.35}),
}
HALVES = ("llama2-vocab", 1.5)  # ours in bfloat16 over ours in float32
SCORING = 1.45  # over one bare product
MiB = 1 << 20
BEYOND = 16 * MiB  # of gradients and budget; of scoring, whatever the classes
OURS, OURS_BF16, BARE, ONE = "ours", "ours, bfloat16", "three bare products", "one bare product"
ALONE, TORCH, CHUNKED, EAGER = "scores alone", "F.linear_cross_entropy", "the same, chunked", "linear + F.cross_entropy"


class Case:
    """The tensors of a case, and what it costs to make them by hand."""

    def __init__(self, n_rows: int, size: int, n_classes: int, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n_rows, size, generator=draw).to(dtype).requires_grad_()
        self.weight = (torch.randn(n_classes, size, generator=draw) * (2.0 / size**0.5)).to(dtype).requires_grad_()
        self.target = torch.randint(0, n_classes, (n_rows,), generator=draw)

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> measure.Step:
        return measure.Step(self.forget, lambda: loss(self.hidden, self.weight, self.target).backward())


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return linear_bonus_cross_entropy_with_scores(hidden, weight, target, bonus=BONUS)[0]


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def cases() -> list[tuple[str]]:
    return [(name,) for name in SHAPES]


def names(case: str) -> list[str]:
    return [OURS, TORCH, EAGER, CHUNKED, BARE, ONE, ALONE, *([OURS_BF16] if case == HALVES[0] else [])]


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    """Measure every shape on one thread of a CPU, in a short run the smallest alone."""
    some = cases()[:1] if effort is Effort.SHORT else cases()
    found = [_measure(*case, effort) for case in counted(some, tell)]
    bounds = [] if effort is Effort.QUICK else list(verdicts(found, instruction_set()))
    return {"vectors": instruction_set(), "cases": found, "bounds": bounds}


def _sizes(case: str, effort: Effort) -> tuple[int, int, int]:
    n_rows, size, n_classes, _ = SHAPES[case]
    return (n_rows // 64, size // 16, n_classes // 16) if effort is Effort.QUICK else (n_rows, size, n_classes)


def steps(case: str, effort: Effort) -> dict[str, measure.Step]:
    """Return the steps of a shape, those of ours checked first."""
    n_rows, size, n_classes = _sizes(case, effort)
    check(Case(4, size, n_classes))
    of, logits = Case(n_rows, size, n_classes), torch.empty(n_rows, n_classes)
    grads = torch.empty_like(of.hidden), torch.empty_like(of.weight)

    def one() -> None:
        with torch.no_grad():
            torch.mm(of.hidden, of.weight.t(), out=logits)

    def bare() -> None:
        one()
        with torch.no_grad():
            torch.mm(logits, of.weight, out=grads[0])
            torch.mm(logits.t(), of.hidden, out=grads[1])

    def alone() -> None:
        linear_difficulty_scores(of.hidden, of.weight, of.target)

    made = {name: of.step(loss) for name, loss in ((OURS, ours), (TORCH, plain), (EAGER, eager), (CHUNKED, chunked))}
    made |= {name: measure.Step(of.forget, f) for name, f in ((BARE, bare), (ONE, one), (ALONE, alone))}
    if case == HALVES[0]:
        made[OURS_BF16] = Case(n_rows, size, n_classes, torch.bfloat16).step(ours)
    return made


def _measure(case: str, effort: Effort) -> dict[str, Any]:
    (n_rows, size, n_classes), made = _sizes(case, effort), steps(case, effort)
    slow = made.pop(CHUNKED)  # many times slower than all others
    peaks = {name: measure.peak_bytes(made[name]) for name in (OURS, TORCH, EAGER, ALONE)}
    if effort is Effort.SHORT:
        del made[EAGER]  # nothing is required beside it
    rounds = 2 if effort is not Effort.FULL else 5 if n_classes < 1 << 16 else 3
    times = measure.interleave(made, 0.0, (rounds, rounds))
    start = time.perf_counter()
    peaks[CHUNKED] = measure.peak_bytes(slow)
    times[CHUNKED] = [1e3 * (time.perf_counter() - start)]
    over = {OURS: BARE, TORCH: BARE, EAGER: BARE, ALONE: ONE, OURS_BF16: OURS}
    ratios = {f"{a} / {b}": ratio(times[a], times[b]) for a, b in over.items() if a in times}
    ratios[f"{CHUNKED} / {BARE}"] = ratio(times[CHUNKED], times[BARE][-1:])
    return {
        "case": case, "n_rows": n_rows, "hidden": size, "n_classes": n_classes, "dtype": "float32",
        "gradients": 4 * size * (n_rows + n_classes),
        "time_ms": {name: summary(values) for name, values in times.items()}, "peaks": peaks, "ratios": ratios,
    }  # fmt: skip


def check(case: Case) -> None:
    """Raise `WrongResult` where loss, gradients or scores of ours miss the float64 truth."""
    wide = [x.detach().double() for x in (case.hidden, case.weight)]
    logits = F.linear(*wide)
    true, n_rows = truth(logits, case.target), len(case.target)
    loss, scores = linear_bonus_cross_entropy_with_scores(case.hidden, case.weight, case.target, bonus=BONUS)
    close("loss", loss, true.bonus_loss.mean(), 1e-5)
    grad_logits = true.bonus_slope[:, None] / n_rows * true.direction
    expected = grad_logits @ wide[1], grad_logits.t() @ wide[0]
    for name, x, y in zip(("hidden", "weight"), torch.autograd.grad(loss, (case.hidden, case.weight)), expected,
                          strict=True):  # fmt: skip
        close(f"gradient of {name}", x / y.abs().max(), y / y.abs().max(), 1e-5)
    for name in SCORE_NAMES:
        close(name, getattr(scores, name), true.scores[name], 1e-4)


def verdicts(found: list[dict[str, Any]], vectors: str) -> Iterator[dict[str, Any]]:
    """Return what is required on one CPU thread of every shape, measured or not."""
    measured = {case["case"]: case for case in found}
    for name, (*_, at_most) in SHAPES.items():
        case = measured.get(name)
        ratios = {label: x["median"] for label, x in case["ratios"].items()} if case else {}
        cost = ratios.get(f"{OURS} / {BARE}")
        where = {"case": name, "dtype": "float32"}
        yield bound(f"{OURS} / {BARE}", cost, at_most=at_most.get(vectors, at_most["avx512"]), **where)
        for other in (TORCH, CHUNKED):
            value = cost / ratios[f"{other} / {BARE}"] if case else None
            yield bound(f"{OURS} / {other}", value, at_most=1.0, **where)
        beyond = (case["peaks"][OURS] - case["gradients"] - chunks.BUDGET["cpu"]) / MiB if case else None
        yield bound("memory beyond gradients and budget, MiB", beyond, at_most=BEYOND / MiB, **where)
        yield bound(f"{ALONE} / {ONE}", ratios.get(f"{ALONE} / {ONE}"), at_most=SCORING, **where)
        alone = case["peaks"][ALONE] / MiB if case else None
        yield bound("memory of scores alone, MiB", alone, at_most=BEYOND / MiB, **where)
        if name == HALVES[0]:
            yield bound(f"{OURS_BF16} / {OURS}", ratios.get(f"{OURS_BF16} / {OURS}"), at_most=HALVES[1], **where)
