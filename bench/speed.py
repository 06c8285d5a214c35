"""Time, bytes and peak memory of forward and backward, beside torch, its compiled form and eager formulas."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import measure
from .providers import CASES, DTYPES, PROVIDERS, TOLERANCE, Outcome, Provider, WrongResult, call, check, inputs

COMPILED = "F.cross_entropy, compiled"
SLOW = ("paper's formula", "eager loss and scores")  # timed apart, beside "ours", so that the others get more rounds
COMPILE_BUDGET_S = 60.0
COMPILED_CASES = ("ten-classes", "imagenet-1k", "llama2-vocab")  # a compilation takes 3 to 6 s
RATIOS = {
    "ours / F.cross_entropy": ("ours", "F.cross_entropy"),
    "ours, upstream 1/2 / F.cross_entropy": ("ours, upstream 1/2", "F.cross_entropy"),
    "ours, loss only / F.cross_entropy": ("ours, loss only", "F.cross_entropy"),
    "ours / F.cross_entropy, compiled": ("ours", COMPILED),
    "ours / Liger-Kernel": ("ours", "Liger-Kernel"),
    "difficulty_scores / F.cross_entropy, forward": ("difficulty_scores", "F.cross_entropy, forward"),
    "paper's formula / ours": ("paper's formula", "ours"),
    "eager loss and scores / ours": ("eager loss and scores", "ours"),
}


class Bound(NamedTuple):
    """What is required of a ratio, or of the peak memory of "ours", on one CPU thread."""

    of: str
    at_most: bool
    limit: float
    cases: tuple[str, ...]


FROM_1000 = ("imagenet-1k", "llama2-vocab", "llama3-vocab")
BOUNDS = (
    Bound("ours / F.cross_entropy", True, 1.5, ("ten-classes",)),
    Bound("ours / F.cross_entropy", True, 1.25, FROM_1000),
    Bound("paper's formula / ours", False, 5.0, FROM_1000),
    Bound("eager loss and scores / ours", False, 7.0, FROM_1000),
    Bound("peak memory of ours in gradients", True, 1.2, ("ten-classes", *FROM_1000)),
)


def bytes_moved(n_rows: int, n_classes: int, itemsize: int, reads: int, writes: int) -> int:
    """Return bytes of a step: logits read ``reads`` times, gradient written ``writes`` times, and columns.

    Columns a row: target 8, loss 4, five float32 scores and an int32 24. Every provider is charged the least possible,
    1 read forward, 1 read and 1 write forward and backward, whatever it does; so GB/s compare.
    """
    return n_rows * (n_classes * itemsize * (reads + writes) + 8 + 4 + 24)


def run(quick: bool, device: str, progress: Callable[[str], None], fresh_memory: bool = False) -> dict[str, Any]:
    on_gpu = device == "cuda"
    kept = on_gpu or (not fresh_memory and measure.keep_memory())
    if not on_gpu:
        torch.set_num_threads(1)
    compiler = _Compiler(0.0 if quick else COMPILE_BUDGET_S)
    copy = measure.copy_gb_per_s() if on_gpu else None
    cases = []
    for dtype, (name, case) in itertools.product(DTYPES, CASES.items()):
        n_rows = case.gpu_rows if on_gpu else case.cpu_rows
        n_rows = max(n_rows // 64, 2) if quick else n_rows
        progress(f"speed: {dtype} {n_rows}x{case.n_classes}")
        providers = [*PROVIDERS, COMPILED] if name in COMPILED_CASES else [*PROVIDERS]
        measured = _Case(n_rows, case.n_classes, DTYPES[dtype], device).measure(providers, quick, compiler, copy)
        cases.append({"case": name, "dtype": dtype, "n_rows": n_rows, "n_classes": case.n_classes, **measured})
    return {
        "memory_kept": kept, "copy_gb_per_s": copy, "threads": None if on_gpu else 1, "cases": cases,
        "bounds": [] if on_gpu or quick else list(_verdicts(cases)),  # required of full-size CPU cases
    }  # fmt: skip


class _Compiler:
    """`torch.compile` of F.cross_entropy for one shape at a time, as long as the budget lasts."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.spent_s = budget_s, 0.0

    def provider(self, logits: Tensor, target: Tensor) -> Provider:
        """Return a compiled provider for this shape, or raise RuntimeError: why not."""
        if self.spent_s >= self.budget_s:
            raise RuntimeError(f"the {self.budget_s:.0f} s for compiling are spent" if self.budget_s else "--quick")
        start = time.perf_counter()
        torch._dynamo.reset()
        torch._inductor.config.compile_threads = 1  # idle workers would disturb the timing
        compiled = torch.compile(lambda logits, target: F.cross_entropy(logits, target), dynamic=False)
        provider = Provider(lambda logits, target: Outcome(compiled(logits, target)))
        grads = []
        for each in (PROVIDERS["F.cross_entropy"], provider):
            logits.grad = None
            call(each, logits, target)
            grads.append(logits.grad)
        self.spent_s += time.perf_counter() - start
        error = (grads[1] - grads[0]).abs().max() / grads[0].abs().max()  # a slice would be compiled again
        if not error <= TOLERANCE[logits.dtype]:
            raise WrongResult(f"gradient is off by {error:.1e}")
        return provider


class _Case:
    """One shape and dtype: its batches and steps."""

    def __init__(self, n_rows: int, n_classes: int, dtype: torch.dtype, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.shape, self.dtype, self.device = (n_rows, n_classes), dtype, device
        first = inputs(n_rows, n_classes, dtype, device)
        # on a GPU enough copies in turn that none is found in L2
        size = first[0].numel() * first[0].element_size()
        n_copies = min(1 + 4 * measure.cache_bytes(self.on_gpu) // size, 64)
        self.batches = [first] + [_copy(first) for _ in range(n_copies - 1)]
        self.turn = itertools.cycle(self.batches)

    def measure(self, providers: list[str], quick: bool, compiler: _Compiler, copy: float | None) -> dict[str, Any]:
        results: dict[str, dict[str, Any]] = {}
        steps: dict[str, measure.Step] = {}
        for name in providers:
            try:
                provider = compiler.provider(*self.batches[0]) if name == COMPILED else self._checked(name)
                steps[name] = self._step(provider)
                results[name] = {"peak_gradients": self._warm_up(steps[name])}
            except Exception as error:  # out of memory, no C++ compiler, a wrong result: that provider is out
                steps.pop(name, None)
                results[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        reps, budget_s = ((2, 2), 0.0) if quick else ((5, 31), 2.5)
        fast = {name: step for name, step in steps.items() if name not in SLOW}
        slow = {name: step for name, step in steps.items() if name in (*SLOW, "ours")}
        times = measure.interleave(fast, self.on_gpu, budget_s, reps)
        slow_times = measure.interleave(slow, self.on_gpu, budget_s, (min(reps[0], 3), reps[1]))
        for name in steps:
            results[name] |= self._report(name, measure.summary((times | _only(slow_times, SLOW))[name]), copy)
        ratios = {}
        for label, (over, under) in RATIOS.items():
            source = slow_times if over in SLOW else times
            if over in source and under in source:
                ratios[label] = measure.ratio(source[over], source[under])
        return {"providers": results, "ratios": ratios}

    def _checked(self, name: str) -> Provider:
        check(PROVIDERS[name], *inputs(16, self.shape[1], self.dtype, self.device, seed=1))
        return PROVIDERS[name]

    def _step(self, provider: Provider) -> measure.Step:
        turn, pristine = self.turn, None
        if provider.overwrites:  # batches of its own, restored one use later
            pristine = self.batches[0][0].detach().clone()
            turn = itertools.cycle([_copy(self.batches[0]) for _ in self.batches])
        now = [next(turn)]

        def prepare() -> None:
            logits = now[0][0]
            logits.grad = None
            if pristine is not None:
                logits.detach().copy_(pristine)
            now[0] = next(turn)
            now[0][0].grad = None

        def step() -> None:
            call(provider, *now[0])

        return measure.Step(prepare, step)

    def _warm_up(self, step: measure.Step) -> float:
        """Run twice, once if that is slow; return peak memory as a multiple of one gradient."""
        start = time.perf_counter()
        peak = measure.peak_bytes(step, self.on_gpu)
        if time.perf_counter() - start < 0.5:
            measure.time_ms(step, self.on_gpu)
        return peak / (self.shape[0] * self.shape[1] * self.dtype.itemsize)

    def _report(self, name: str, times: dict[str, float], copy: float | None) -> dict[str, Any]:
        """Add rates; share_of_copy counts what our kernels move: 1 read forward, 2 reads and 1 write with backward."""
        trains = PROVIDERS[name].trains if name in PROVIDERS else True
        least = bytes_moved(*self.shape, self.dtype.itemsize, 1, int(trains))
        report: dict[str, Any] = {"time_ms": times, "gb_per_s": least / times["median"] / 1e6}
        if copy is not None and name in ("ours", "difficulty_scores"):
            moved = bytes_moved(*self.shape, self.dtype.itemsize, 2 if trains else 1, int(trains))
            report["share_of_copy"] = moved / times["median"] / 1e6 / copy
        return report


def _copy(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].detach().clone().requires_grad_(), batch[1]


def _only(times: dict[str, list[float]], names: tuple[str, ...]) -> dict[str, list[float]]:
    return {name: values for name, values in times.items() if name in names}


def _verdicts(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for bound, case in itertools.product(BOUNDS, cases):
        if case["case"] not in bound.cases:
            continue
        if bound.of in RATIOS:
            value = case["ratios"].get(bound.of, {}).get("median")
        else:
            value = case["providers"]["ours"].get("peak_gradients")
        passed = value is not None and (value <= bound.limit if bound.at_most else value >= bound.limit)
        what = f"{bound.of} {'<=' if bound.at_most else '>='} {bound.limit:g}"
        yield {"bound": what, "case": case["case"], "dtype": case["dtype"], "value": value, "passed": passed}
