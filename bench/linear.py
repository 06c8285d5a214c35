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
from .providers import BONUS, SCORE_NAMES, close, truth

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


def run(quick: bool, device: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every shape on one thread of a CPU."""
    if device == "cuda":
        return {"skipped": "measured on a CPU; `python -m bench gpu` has the linear form of a GPU"}
    kept = measure.keep_memory()
    torch.set_num_threads(1)
    cases = []
    for name, (n_rows, size, n_classes, _) in SHAPES.items():
        if quick:
            n_rows, size, n_classes = n_rows // 64, size // 16, n_classes // 16
        progress(f"linear: {n_rows}x{size}x{n_classes}")
        check(Case(16, size, n_classes))
        case = {"case": name, "n_rows": n_rows, "hidden": size, "n_classes": n_classes, "dtype": "float32"}
        cases.append(case | _measure(Case(n_rows, size, n_classes), name == HALVES[0], quick, progress))
    vectors = torch.backends.cpu.get_cpu_capability().lower()
    return {
        "memory_kept": kept, "threads": 1, "vectors": vectors, "cases": cases,
        "bounds": [] if quick else list(verdicts(cases, vectors)),
    }  # fmt: skip


def _measure(case: Case, halves: bool, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    (n_rows, _), (n_classes, _) = case.hidden.shape, case.weight.shape
    logits = torch.empty(n_rows, n_classes)
    grads = torch.empty_like(case.hidden), torch.empty_like(case.weight)

    def one() -> None:
        with torch.no_grad():
            torch.mm(case.hidden, case.weight.t(), out=logits)

    def bare() -> None:
        one()
        with torch.no_grad():
            torch.mm(logits, case.weight, out=grads[0])
            torch.mm(logits.t(), case.hidden, out=grads[1])

    def alone() -> None:
        linear_difficulty_scores(case.hidden, case.weight, case.target)

    losses = {OURS: ours, TORCH: plain, EAGER: eager, CHUNKED: chunked}
    steps = {name: case.step(loss) for name, loss in losses.items()}
    steps |= {name: measure.Step(case.forget, f) for name, f in ((BARE, bare), (ONE, one), (ALONE, alone))}
    if halves:
        half = Case(*case.hidden.shape, n_classes, torch.bfloat16)
        steps[OURS_BF16] = half.step(ours)
    slow = steps.pop(CHUNKED)  # many times slower than all others
    peaks = {name: measure.peak_bytes(steps[name], False) for name in (OURS, TORCH, EAGER, ALONE)}
    times = measure.interleave(steps, False, 0.0, (2, 2) if quick else (5, 5) if n_classes < 1 << 16 else (3, 3))
    progress(f"linear: {CHUNKED}")
    start = time.perf_counter()
    peaks[CHUNKED] = measure.peak_bytes(slow, False)
    times[CHUNKED] = [1e3 * (time.perf_counter() - start)]
    over = {OURS: BARE, TORCH: BARE, EAGER: BARE, ALONE: ONE, OURS_BF16: OURS}
    ratios = {f"{a} / {b}": measure.ratio(times[a], times[b]) for a, b in over.items() if a in times}
    ratios[f"{CHUNKED} / {BARE}"] = measure.ratio(times[CHUNKED], times[BARE][-1:])
    return {
        "gradients": sum(4 * x.numel() for x in (case.hidden, case.weight)),
        "time_ms": {name: measure.summary(values) for name, values in times.items()}, "peaks": peaks, "ratios": ratios,
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


def verdicts(cases: list[dict[str, Any]], vectors: str) -> Iterator[dict[str, Any]]:
    """Return what is required on one CPU thread."""
    for case in cases:
        where = {"case": case["case"], "dtype": case["dtype"]}

        def bound(what: str, value: float, at_most: float, where: Any = where) -> dict[str, Any]:
            return {"bound": f"{what} <= {at_most:.4g}", **where, "value": value, "passed": value <= at_most}

        ratio = {label: x["median"] for label, x in case["ratios"].items()}
        at_most = SHAPES[case["case"]][3]
        yield bound(f"{OURS} / {BARE}", ratio[f"{OURS} / {BARE}"], at_most.get(vectors, at_most["avx512"]))
        for other in (TORCH, CHUNKED):
            yield bound(f"{OURS} / {other}", ratio[f"{OURS} / {BARE}"] / ratio[f"{other} / {BARE}"], 1.0)
        beyond = case["peaks"][OURS] - case["gradients"] - chunks.BUDGET["cpu"]
        yield bound("memory beyond gradients and budget, MiB", beyond / MiB, BEYOND / MiB)
        yield bound(f"{ALONE} / {ONE}", ratio[f"{ALONE} / {ONE}"], SCORING)
        yield bound("memory of scores alone, MiB", case["peaks"][ALONE] / MiB, BEYOND / MiB)
        if f"{OURS_BF16} / {OURS}" in ratio:
            yield bound(f"{OURS_BF16} / {OURS}", ratio[f"{OURS_BF16} / {OURS}"], HALVES[1])
