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
        for launch in made:
            if launch.key not in number:
                number[launch.key] = len(number)
                work[case].append(launch.key)
        planned.append(
            case._asdict()
            | {"launches": [launch._asdict() | {"key": None, "build": number[launch.key]} for launch in made]}
        )
    found: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_inspect, case, keys) for case, keys in work.items()]
        for job in concurrent.futures.as_completed(jobs):
            found |= job.result()
            progress(f"codegen: {len(found)} of {len(number)} kernels compiled, {time.perf_counter() - start:.0f} s")
    for case in planned:
        for launch in case["launches"]:
            del launch["key"]
    return {"triton": triton.__version__, "builds": [found[key] for key in number], "cases": planned}


def _inspect(case: Case, keys: list[str]) -> dict[str, dict[str, Any]]:
    constants = {launch.key: launch.constants for launch in launches(case)}
    threads = {launch.key: launch.threads for launch in launches(case)}
    return {
        key: {
            "kernel": built.metadata.name,
            "call": case.call,  # this, dtype and classes: of the first case that needs it
            "dtype": case.dtype,
            "n_classes": case.n_classes,
            "target": case.target,
            "misaligned": bool(case.offset),
            "threads": threads[key],
            "constants": constants[key],
        }
        | machine_code.inspect(built, case.target, BYTES[case.dtype])
        for key, built in compile_case(case, set(keys)).items()
    }
