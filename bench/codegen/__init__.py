"""What the compiler makes of the kernels, for GPUs that are not here, and the times that this allows.

Exits with an error where a bound of `gates.py` is missed. TRITON_INTERPRET must be unset when triton is imported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from ..record import progress
from . import gates, launches, machine_code, report
from .launches import BYTES, Case


def main(arguments: list[str], results_folder: Path, commit: Callable[[], str]) -> None:
    """Compile, and print or write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench codegen", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each path once on four targets")
    parser.add_argument("--json", action="store_true", help="print all as JSON and write nothing")
    parser.add_argument("--out", type=Path, default=results_folder, help="where codegen.md goes")
    options = parser.parse_args(arguments)
    results = build(launches.quick_cases() if options.quick else launches.cases())
    wrong = list(gates.failures(results["builds"].values()))
    results |= {"date": datetime.date.today().isoformat(), "commit": commit(), "failures": wrong}
    if options.json:
        print(json.dumps(results))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "codegen.md"
    path.write_text(report.markdown(results, results_folder))
    print(f"written: {path}; {len(results['builds'])} kernels, {len(wrong)} bounds missed", *wrong, sep="\n")
    sys.exit(bool(wrong))


def build(cases: list[Case]) -> dict[str, Any]:
    """Compile every distinct launch once, in worker processes; return what it became, and every case's launches."""
    torch.set_num_threads(1)  # a forked worker would wait for ever for threads that only its parent had
    planned = {case: [launch for launch, _ in launches.of(case)] for case in cases}
    first: dict[str, Case] = {}  # that needs a kernel, and compiles it
    for case, made in planned.items():
        for launch in made:
            first.setdefault(launch.key, case)
    found: dict[str, dict[str, Any]] = {}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_inspect, case, {key for key in first if first[key] == case})
                for case in dict.fromkeys(first.values())]  # fmt: skip
        for job in concurrent.futures.as_completed(jobs):
            found |= job.result()
            progress(f"codegen: {len(found)} of {len(first)} kernels compiled")
    progress("")
    of_cases = [case._asdict() | {"launches": [launch._asdict() for launch in made]} for case, made in planned.items()]
    return {"triton": triton.__version__, "builds": {key: found[key] for key in first}, "cases": of_cases}


def _inspect(case: Case, keys: set[str]) -> dict[str, dict[str, Any]]:
    return {
        launch.key: case._asdict() | launch._asdict() | machine_code.inspect(built, case.target, BYTES[case.dtype])
        for launch, built in launches.of(case, keys)
        if built is not None
    }
