"""Compile every distinct launch once, in worker processes, and read its machine code."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from . import machine_code
from .launches import BYTES, Case, compile_case, launches


def build(cases: list[Case], progress: Callable[[str], None]) -> dict[str, Any]:
    """Return {"builds": one a specialisation, "cases": the launches of every case, by number of their build}."""
    torch.set_num_threads(1)  # a forked worker would wait for ever for threads that only its parent had
    start = time.perf_counter()
    number: dict[str, int] = {}
    work: dict[Case, list[str]] = collections.defaultdict(list)
    planned = []
    for case in cases:
        made = launches(case)
        for key in dict.fromkeys(launch.key for launch in made):
            if key not in number:
                number[key] = len(number)
                work[case].append(key)
        rows = [{**launch._asdict(), "build": number[launch.key]} for launch in made]
        planned.append(case._asdict() | {"launches": [{k: x for k, x in row.items() if k != "key"} for row in rows]})
    found: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_inspect, case, keys) for case, keys in work.items()]
        for job in concurrent.futures.as_completed(jobs):
            found |= job.result()
            progress(f"codegen: {len(found)} of {len(number)} kernels compiled, {time.perf_counter() - start:.0f} s")
    return {"triton": triton.__version__, "builds": [found[key] for key in number], "cases": planned}


def _inspect(case: Case, keys: list[str]) -> dict[str, dict[str, Any]]:
    # call, dtype and classes: of the first case that needs it
    of_case = {"call": case.call, "dtype": case.dtype, "n_classes": case.n_classes, "target": case.target,
               "misaligned": bool(case.offset)}  # fmt: skip
    planned, built = {launch.key: launch for launch in launches(case)}, compile_case(case, set(keys))
    return {
        key: {"kernel": planned[key].kernel, "threads": planned[key].threads, "constants": planned[key].constants}
        | of_case | machine_code.inspect(built[key], case.target, BYTES[case.dtype])
        for key in keys
    }  # fmt: skip
