"""Time, peak memory and bandwidth of steps that run interleaved, and how much of it is measured."""

from __future__ import annotations

import ctypes
import enum
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .intervals import ratio, summary

__all__ = [
    "Effort", "Step", "copy_gb_per_s", "interleave", "keep_memory", "peak_bytes", "ratio", "summary",
    "time_ms",
]  # fmt: skip

LARGE = 1 << 23  # logits: from here on an eager formula takes a good part of a second

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


class Effort(enum.Enum):
    """How much is measured."""

    QUICK = "quick"  # once, on a few rows: the figures mean nothing
    SHORT = "short"  # what fits two minutes
    FULL = "full"

    @property
    def suffix(self) -> str:
        """What its record is called beside the full one."""
        return "" if self is Effort.FULL else f"-{self.value}"

    def rounds(self, budget_s: float, reps: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        """Return what `interleave` may spend where a full measurement spends these."""
        if self is Effort.QUICK:
            return 0.0, (2, 2)
        return (budget_s, reps) if self is Effort.FULL else (budget_s / 6, (min(reps[0], 3), reps[1]))

    def leaves_out(self, n_logits: int) -> bool:
        """Return whether slow formulas of so many logits are left out."""
        return self is Effort.SHORT and n_logits > LARGE


class Step(NamedTuple):
    prepare: Callable[[], None]  # not timed
    run: Callable[[], None]


def keep_memory() -> bool:
    """Let malloc keep freed memory, as torch's GPU allocator does; return whether it agreed.

    By default glibc returns every large tensor to the system and the next one is paid for in page faults: most of the
    time of an eager formula on 128 MB tensors, and most of the noise. Keeping it favours the eager formulas.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def time_ms(step: Step) -> float:
    step.prepare()
    start = time.perf_counter()
    step.run()
    return (time.perf_counter() - start) * 1e3


def interleave(steps: dict[str, Step], budget_s: float, reps: tuple[int, int]) -> dict[str, list[float]]:
    """Return times in ms of each step, one of each per round, until the budget is spent, within ``reps`` rounds."""
    names, times = list(steps), {name: [] for name in steps}
    fewest, most = reps
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for rep in range(most):
            if rep >= fewest and time.perf_counter() - start > budget_s:
                break
            for i in range(len(names)):
                name = names[(i + rep) % len(names)]  # nobody always follows the same one
                times[name].append(time_ms(steps[name]))
    finally:
        gc.enable()
    return times


def peak_bytes(step: Step) -> int:
    """Return the most memory that a step holds at once beyond what was there before."""
    step.prepare()
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        step.run()
    events: Any = profile.kineto_results
    held = most = 0
    for event in sorted((e for e in events.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def copy_gb_per_s(bytes_each: int, reps: int = 6) -> float:
    """Return the copy bandwidth, bytes read plus written, between two buffers far larger than caches."""
    there, back = (torch.ones(bytes_each // 4) for _ in range(2))
    times = interleave({"copy": Step(lambda: None, lambda: there.copy_(back))}, math.inf, (reps, reps))["copy"][2:]
    return 2 * bytes_each / statistics.median(times) / 1e6
