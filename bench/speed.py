"""Time, bytes and peak memory of forward and backward, beside torch, its compiled form and eager formulas.

Also what a second thread brings and what the first call of a process costs.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import measure
from .bounds import bound
from .command import Tell, counted
from .intervals import ratio, summary
from .measure import Effort
from .providers import CASES, DTYPES, PROVIDERS, TOLERANCE, Outcome, Provider, WrongResult, call, check, inputs, truth

COMPILED = "F.cross_entropy, compiled"
SLOW = ("paper's formula", "eager loss and scores")  # timed apart, beside "ours", so that the others get more rounds
COMPILE_BUDGET_S = 40.0
COMPILED_CASES = ("ten-classes", "imagenet-1k", "llama2-vocab")  # a compilation takes 3 to 6 s
RATIOS = {
    "ours / F.cross_entropy": ("ours", "F.cross_entropy"),
    "ours, upstream 1/2 / F.cross_entropy": ("ours, upstream 1/2", "F.cross_entropy"),
    "ours, loss only / F.cross_entropy": ("ours, loss only", "F.cross_entropy"),
    "ours / F.cross_entropy, compiled": ("ours", COMPILED),
    "difficulty_scores / F.cross_entropy, forward": ("difficulty_scores", "F.cross_entropy, forward"),
    "paper's formula / ours": ("paper's formula", "ours"),
    "eager loss and scores / ours": ("eager loss and scores", "ours"),
}


class Wanted(NamedTuple):
    """What is required of a ratio, or of the peak memory of "ours", on one CPU thread."""

    of: str
    at_most: bool
    float32: float
    bfloat16: float
    cases: tuple[str, ...]


FROM_1000 = ("imagenet-1k", "llama2-vocab", "llama3-vocab")
COST, ALONE = "ours / F.cross_entropy", "ours, loss only / F.cross_entropy"
BOUNDS = (
    Wanted(COST, True, 0.75, 0.85, ("imagenet-1k",)),
    Wanted(COST, True, 0.6, 0.7, ("llama2-vocab", "llama3-vocab")),
    Wanted(COST, True, 0.8, 0.6, ("ten-classes",)),
    Wanted(COST, True, 0.95, 1.1, ("street-scenes",)),
    Wanted(COST, True, 1.4, 1.6, ("foreground",)),
    Wanted(COST, True, 2.5, 2.5, ("one-batch",)),
    Wanted(COST, True, 1.3, 1.3, ("small-batch",)),
    Wanted(ALONE, True, 2.0, 2.0, ("one-batch",)),
    Wanted(ALONE, True, 1.2, 1.2, ("small-batch",)),
    Wanted("paper's formula / ours", False, 5.0, 5.0, FROM_1000),
    Wanted("eager loss and scores / ours", False, 7.0, 7.0, FROM_1000),
    Wanted("peak memory of ours in gradients", True, 1.2, 1.2, FROM_1000),
    Wanted("peak memory of ours in gradients", True, 2.5, 3.5, ("ten-classes",)),
)
THREADS, TWO_THREADS = "one thread / two threads", 1.6  # times as fast, at 1024x32000
FIRST_CALLS = {"machine code on disk": 0.6, "nothing on disk": 3.0}  # s at most


OUT_OF_CACHE = 1 << 26  # bytes: a step that moves fewer is not compared with a copy


def bytes_moved(n_rows: int, n_classes: int, itemsize: int, reads: int, writes: int) -> int:
    """Return bytes of a step: logits read ``reads`` times, gradient written ``writes`` times, and columns.

    Columns a row: target 8, loss 4, five float32 scores and an int32 24. Every provider is charged the least possible,
    1 read forward, 1 read and 1 write forward and backward, whatever it does; so GB/s compare.
    """
    return n_rows * (n_classes * itemsize * (reads + writes) + 8 + 4 + 24)


def cases() -> list[tuple[str, str]]:
    return list(itertools.product(DTYPES, CASES))


def names(*_: str) -> list[str]:
    return list(PROVIDERS)


def steps(dtype: str, case: str, effort: Effort) -> dict[str, measure.Step]:
    """Return a step of every provider, each checked first."""
    made = _Case(CASES[case].shape(effort is Effort.QUICK), DTYPES[dtype])
    return {name: made.step(made.checked(name)) for name in PROVIDERS}


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    quick = effort is Effort.QUICK
    compiler = _Compiler(COMPILE_BUDGET_S if effort is Effort.FULL else 0.0)
    copy = measure.copy_gb_per_s(1 << (22 if quick else 28))
    first_calls = _first_calls(tell) if effort is Effort.FULL else dict.fromkeys(FIRST_CALLS)
    found = []
    for dtype, name in counted(cases(), tell):
        shape = CASES[name].shape(quick)
        providers = [*PROVIDERS, COMPILED] if name in COMPILED_CASES else [*PROVIDERS]
        measured = _Case(shape, DTYPES[dtype]).measure(providers, effort, compiler, copy)
        n_rows = math.prod(shape) // shape[1]
        about = {"case": name, "dtype": dtype, "shape": shape, "n_rows": n_rows, "n_classes": shape[1]}
        found.append(about | measured)
    tell("two threads")
    threads = _two_threads(effort)
    bounds = [*_verdicts(found), *_verdicts_of_process(threads, first_calls)]
    return {
        "copy_gb_per_s": copy, "cases": found, "two_threads": threads, "first_call_s": first_calls,
        "bounds": [] if quick else bounds,  # required at full size
    }  # fmt: skip


def _two_threads(effort: Effort) -> dict[str, Any]:
    """Return times of "ours" on one thread and on two, in turn, at a large vocabulary."""
    logits, target = inputs(CASES["llama2-vocab"].shape(effort is Effort.QUICK), torch.float32)

    def on(n_threads: int) -> measure.Step:
        def prepare() -> None:
            logits.grad = None
            torch.set_num_threads(n_threads)

        return measure.Step(prepare, lambda: call(PROVIDERS["ours"], logits, target))

    steps = {"one thread": on(1), "two threads": on(2)}
    try:
        times = measure.interleave(steps, *effort.rounds(3.0, (7, 31)))
    finally:
        torch.set_num_threads(1)
    summaries = {name: summary(values) for name, values in times.items()}
    return {"time_ms": summaries, "ratios": {THREADS: ratio(*times.values())}}


FIRST_CALL = """
import time, torch, bonus_ops
logits, target = torch.randn(64, 10, requires_grad=True), torch.zeros(64, dtype=torch.int64)
start = time.perf_counter()
bonus_ops.bonus_cross_entropy(logits, target).backward()
print(time.perf_counter() - start)
"""


def _first_calls(tell: Tell) -> dict[str, float]:
    """Return the seconds of a process's first call, from a copy of the package that has compiled nothing yet."""
    import bonus_ops

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        package = Path(bonus_ops.__file__).parent
        shutil.copytree(package, f"{folder}/bonus_ops", ignore=shutil.ignore_patterns("__pycache__"))
        environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        for name in reversed(FIRST_CALLS):  # what the first one compiles the second one finds
            tell(f"first call, {name}")
            command = [sys.executable, "-c", FIRST_CALL]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            found[name] = float(done.stdout)
    return found


class _Compiler:
    """`torch.compile` of F.cross_entropy for one shape at a time, as long as the budget lasts."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.spent_s = budget_s, 0.0

    def provider(self, logits: Tensor, target: Tensor) -> Provider:
        """Return a compiled provider for this shape, or raise RuntimeError: why not."""
        if self.spent_s >= self.budget_s:
            spent = f"the {self.budget_s:.0f} s for compiling are spent"
            raise RuntimeError(spent if self.budget_s else "compiled in a full run only")
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

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        few = (2, shape[1], 3, 4) if len(shape) > 2 else (16 if shape[1] < 10000 else 4, shape[1])
        self.few = inputs(few, dtype, seed=1)
        self.exact = truth(*self.few)
        self.batch = inputs(shape, dtype)

    def measure(self, providers: list[str], effort: Effort, compiler: _Compiler, copy: float) -> dict[str, Any]:
        results: dict[str, dict[str, Any]] = {}
        steps: dict[str, measure.Step] = {}
        for name in providers:
            if name in SLOW and effort.leaves_out(math.prod(self.shape)):
                results[name] = {"skipped": "not timed in a short run", "timed": False}
                continue
            try:
                provider = compiler.provider(*self.batch) if name == COMPILED else self.checked(name)
                steps[name] = self.step(provider)
                results[name] = {"peak_gradients": self._warm_up(steps[name])}
            except Exception as error:  # out of memory, no C++ compiler, a wrong result: that provider is out
                steps.pop(name, None)
                results[name] = {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        fast = {name: step for name, step in steps.items() if name not in SLOW}
        slow = {name: step for name, step in steps.items() if name in (*SLOW, "ours")}
        times = measure.interleave(fast, *effort.rounds(2.0, (5, 31)))
        slow_times = measure.interleave(slow, *effort.rounds(2.0, (3, 31))) if len(slow) > 1 else {}
        for name in steps:
            results[name] |= self._report(name, summary((slow_times if name in SLOW else times)[name]), copy)
        ratios = {}
        for label, (over, under) in RATIOS.items():
            source = slow_times if over in SLOW else times
            if over in source and under in source:
                ratios[label] = ratio(source[over], source[under])
        return {"providers": results, "ratios": ratios}

    def checked(self, name: str) -> Provider:
        check(PROVIDERS[name], *self.few, self.exact)
        return PROVIDERS[name]

    def step(self, provider: Provider) -> measure.Step:
        def prepare() -> None:
            self.batch[0].grad = None

        return measure.Step(prepare, lambda: call(provider, *self.batch))

    def _warm_up(self, step: measure.Step) -> float:
        """Run twice, once if that is slow; return peak memory as a multiple of one gradient."""
        start = time.perf_counter()
        peak = measure.peak_bytes(step)
        if time.perf_counter() - start < 0.5:
            measure.time_ms(step)
        return peak / (math.prod(self.shape) * self.dtype.itemsize)

    def _report(self, name: str, times: dict[str, float], copy: float) -> dict[str, Any]:
        """Add rates; share_of_copy counts what ours moves: 1 read, with backward 1 write."""
        trains = PROVIDERS[name].trains if name in PROVIDERS else True
        n_rows, n_classes, itemsize = math.prod(self.shape) // self.shape[1], self.shape[1], self.dtype.itemsize
        least = bytes_moved(n_rows, n_classes, itemsize, 1, int(trains))
        report: dict[str, Any] = {"time_ms": times, "gb_per_s": least / times["median"] / 1e6}
        if name in ("ours", "difficulty_scores") and least >= OUT_OF_CACHE:
            report["share_of_copy"] = report["gb_per_s"] / copy
        return report


def _verdicts(cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Judge every bound; what time left out, or what others get wrong, is judged by nobody (None)."""
    for wanted, case in itertools.product(BOUNDS, cases):
        if case["case"] not in wanted.cases:
            continue
        limit = wanted.float32 if case["dtype"] == "float32" else wanted.bfloat16
        judged = True
        if wanted.of in RATIOS:
            value = case["ratios"].get(wanted.of, {}).get("median")
            judged = all(_judged(name, case["providers"][name]) for name in RATIOS[wanted.of])
        else:
            value = case["providers"]["ours"].get("peak_gradients")
        side = {"at_most" if wanted.at_most else "at_least": limit}
        held = bound(wanted.of, value, **side, case=case["case"], dtype=case["dtype"])
        yield held | {"passed": False} if judged and value is None else held


def _judged(name: str, provider: dict[str, Any]) -> bool:
    """Return whether a missing figure is ours to answer for: not where time ran out or another result is wrong."""
    return provider.get("timed", True) and ("skipped" not in provider or name.startswith("ours"))


def _verdicts_of_process(threads: dict[str, Any], first_calls: dict[str, float | None]) -> Iterator[dict[str, Any]]:
    if threads:
        value = threads["ratios"][THREADS]["median"]
        yield bound(THREADS, value, at_least=TWO_THREADS, case="llama2-vocab", dtype="float32")
    for name, value in first_calls.items():
        yield bound(f"first call with {name}, s", value, at_most=FIRST_CALLS[name])
