"""The papers' claims, measured: each with its numbers over seeds and a verdict from them.

    python -m bench claims [encouraging] [prioritisation] [separation] [suspects] [calibration] [--quick] [--out folder]

All five without a name. Writes claims.json, claims.md and the pictures into bench/results: one record whatever the CPU,
since another one's rounding moves a figure by less than another seed does, and no time is taken.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import sys
import time
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from types import ModuleType
from typing import Any

import torch

from .claims_verdict import ABOVE_ZERO
from .command import Book, Picture, Section, Tell
from .intervals import mean
from .measure import Effort
from .tables import table

NAMES = ("encouraging", "prioritisation", "separation", "suspects", "calibration")
SIZES = {"separation": (14, 10), "calibration": (15, 9)}  # of the pictures, in inches; else 15 x 5
PROCESSES = 2
INTRO = """Mean ± half the 95 % confidence interval over seeds (Student's t; differences are taken seed by seed).
*Reproduced*: the whole interval meets the bar.
"""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.claims_{name}")


def _measure(name: str, effort: Effort, tell: Tell) -> dict[str, Any]:
    if not importlib.util.find_spec("sklearn"):
        sys.exit("scikit-learn is not installed: no digits (pip install scikit-learn)")
    module = _module(name)
    jobs = module.jobs(effort)
    if effort is Effort.QUICK:
        return module.conclude({job: module.work(*job) for job in jobs}, effort) | {"processes": 1}
    found, start = {}, time.perf_counter()
    with _pool() as pool:
        # long jobs are alike, so that two processes end together
        waiting = {pool.submit(_work, name, job): job for job in jobs}
        for done in as_completed(waiting):
            found[waiting[done]] = done.result()
            left = (time.perf_counter() - start) / len(found) * (len(jobs) - len(found))
            tell(f"run {len(found)} of {len(jobs)}, about {left:.0f} s left")
    return module.conclude({job: found[job] for job in jobs}, effort) | {"processes": PROCESSES}


def _pool() -> Executor:
    return ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))


def _work(name: str, job: tuple[Any, ...]) -> Any:
    return _module(name).work(*job)


# --- report -----------------------------------------------------------------------------------------------------------


def _markdown(name: str, section: dict[str, Any]) -> str:
    return f"Processes: {section['processes']}.\n\n{_verdicts(section)}\n{_module(name).markdown(section)}"


def _section(name: str) -> Section:
    module, size = _module(name), SIZES.get(name, (15, 5))
    return Section(
        module.TITLE, functools.partial(_measure, name), functools.partial(_markdown, name),
        {"": Picture(module.draw, *size), **getattr(module, "MORE_PICTURES", {})},
    )  # fmt: skip


def _verdicts(section: dict[str, Any]) -> str:
    rows = ([v["claim"], mean(v, 3), _bar(v), v["verdict"]] for v in section["verdicts"])
    return table(["claim", "measured", "bar", "verdict"], rows) if section["verdicts"] else ""


def _bar(v: dict[str, Any]) -> str:
    low, high = v.get("at_least"), v.get("at_most")
    if low is None or high is None:
        return f"<= {high:g}" if low is None else "> 0" if low == ABOVE_ZERO else f">= {low:g}"
    return f"{low:g} to {high:g}"


BOOK = Book(
    "python -m bench claims", "Measure what the papers claim.", "Claims", {name: _section(name) for name in NAMES},
    lambda: "claims", lambda results: INTRO,
)  # fmt: skip
