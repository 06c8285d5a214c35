"""Everything that needs a GPU, in one command of under eight minutes: times, goals, launch parameters, then tests.

    python -m bench gpu                         every step: bench/results/gpu-<name>.{json,md}, bench/README.md
    python -m bench gpu --steps speed parity    some of them; what the file holds of the others stays
    python -m bench gpu --report                Markdown and bench/README.md again, from the JSON: needs no GPU
    python -m bench gpu --dry-run               the same without a GPU, small, and nothing is timed

Each step is a process with a time limit; what it has written counts even if it is killed. Nothing is installed: torch,
triton and pytest suffice, peers are used if found.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..record import ROOT, environment

# seconds each; timings come first: tests can be had elsewhere
LIMITS = {"speed": 190, "linear": 70, "variants": 100, "parity": 100, "memcheck": 60}
BUDGET_S = 460.0  # for all of them
LEAST_S = 5.0  # with less a step is not started
KEPT = 80  # last lines of what a step said: nobody may see the terminal
TESTS = ("test_gpu", "test_kernels", "test_rest", "test_soft", "test_mixup", "test_sigmoid")


def main(arguments: list[str], results_folder: Path, commit: Callable[[], str]) -> None:
    options = _parser().parse_args(arguments)
    from . import report

    if options.dry_run and options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="bench-gpu-dry-run-"))
    folder = (options.out or results_folder).resolve()
    if options.dry_run and folder.is_relative_to(results_folder.resolve()):
        sys.exit(f"a dry run is no measurement: give --out another folder than {results_folder}")
    readme = results_folder.parent / "README.md" if folder == results_folder.resolve() else None
    if options.report:
        for path in folder.glob("gpu-*.json"):
            _write(json.loads(path.read_text()), path, readme)
        return
    import torch

    if not (options.dry_run or torch.cuda.is_available()):
        sys.exit("no CUDA device here; --dry-run shows that every path runs")
    device = "cpu" if options.dry_run else "cuda"
    known = environment(device)
    name = "dry-run" if options.dry_run else re.sub(r"\W+", "-", known["gpu"]).strip("-").lower()
    path = folder / f"gpu-{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    results |= {"dry": options.dry_run, "environment": known}
    end = time.monotonic() + options.budget
    for step in options.steps:
        limit = min(LIMITS[step], end - time.monotonic())
        print(f"=== {step} (at most {max(limit, 0):.0f} s)", flush=True)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        results["steps"][step] = run(step, device, limit) | {"date": date, "commit": commit()}
        print(*results["steps"][step]["said"][-3:], results["steps"][step]["status"], sep="\n", flush=True)
        _write(results, path, readme)
    for goal in report.Times(results).goals():
        print(f"{goal.verdict:>12}  {goal.what} at {goal.at}: {goal.outcome} (wanted {goal.wanted})")
    print(f"written: {path}, {path.with_suffix('.md')}")
    if any(results["steps"][step]["status"] not in ("done", "skipped") for step in options.steps):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = list(LIMITS)
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps, metavar="STEP", help=", ".join(steps))
    parser.add_argument("--out", type=Path, help="where to write; default bench/results")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all steps together")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no measurement: show that every path runs")
    parser.add_argument("--report", action="store_true", help="measure nothing, write again what is made from the JSON")
    return parser


def run(step: str, device: str, limit_s: float) -> dict[str, Any]:
    """Run a step in a process of its own; return how it ended, its last words, and the rows that it wrote."""
    environ = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if step == "memcheck" else dict(os.environ)
    if device == "cpu":
        environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "said", "w+") as said:
        rows, words, status = Path(folder) / "rows", command(step, device), "skipped"
        if words is None:
            said.write("compute-sanitizer is not installed\n")
        elif limit_s < LEAST_S:
            said.write("no time left\n")
        else:
            status = "timed out"
            with contextlib.suppress(subprocess.TimeoutExpired):
                words = [str(rows) if word == "ROWS" else word for word in words]
                done = subprocess.run(words, cwd=ROOT, env=environ, stdout=said, stderr=said, timeout=limit_s)
                status = "failed" if done.returncode else "done"
        said.seek(0)
        last = said.read().splitlines()[-KEPT if status != "done" else -1 :]
        found = rows.read_text().splitlines() if rows.exists() else []
    found = [json.loads(row) for row in found if row.endswith("}")]  # the last may be cut off
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "said": last, "rows": found}


def command(step: str, device: str) -> list[str] | None:
    """Return what a step runs; None where it cannot."""
    # the checkout's options ask for a plugin that may not be there
    pytest = ["-m", "pytest", "-o", "addopts=--import-mode=importlib", "-q", "--tb=short", "-p", "no:cacheprovider"]
    files = [str(path) for name in TESTS for path in sorted((ROOT / "tests").rglob(f"{name}.py"))]
    if step == "parity":
        workers = ["-n", str(min(os.cpu_count() or 1, 16))] if importlib.util.find_spec("xdist") else []
        more = ["--collect-only", files[0]] if device == "cpu" else [*workers, "-rf", *files]
        return [sys.executable, *pytest, *more]
    if step == "memcheck":
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        checked = [sys.executable, *pytest, files[0], "-k", "any_address or rounded_once"]
        return tool and [tool, "--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5", *checked]  # type: ignore[return-value]
    return [sys.executable, "-m", "bench.gpu.steps", step, "ROWS", device]


def _write(results: dict[str, Any], path: Path, readme: Path | None) -> None:
    from . import report

    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.markdown(results))
    if readme is not None:
        readme.write_text(report.with_runs(readme.read_text(), path.parent))
