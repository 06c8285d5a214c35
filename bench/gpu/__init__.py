"""Everything that needs a GPU, in one command of under eight minutes: times, goals, launch parameters, then tests.

    python -m bench gpu                         every step: bench/results/gpu-<name>.{json,md}
    python -m bench gpu --steps speed parity    some of them; what the file holds of the others stays
    python -m bench gpu --dry-run               the same without a GPU, small, elsewhere, and nothing is timed

Each step is a process with a time limit; what it has written counts even if it is killed. Nothing is installed: torch,
triton and pytest suffice, peers are used if found.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..record import ROOT, environment
from ..tables import table
from . import goals
from .goals import NOT_MEASURED

# at most seconds each, under eight minutes in all; timings come first: tests can be had elsewhere
LIMITS = {"speed": 190, "linear": 70, "variants": 100, "parity": 100}
KEPT = 80  # last lines of what a step said: nobody may see the terminal
TESTS = ("test_gpu", "test_kernels", "test_rest", "test_soft", "test_mixup", "test_sigmoid")


def main(arguments: list[str], results_folder: Path, commit: Callable[[], str]) -> Path:
    """Run the steps; return where their record is."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=LIMITS, default=list(LIMITS), help="which; all by default")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no measurement: show that every path runs")
    options = parser.parse_args(arguments)
    if not (options.dry_run or torch.cuda.is_available()):
        sys.exit("no CUDA device here; --dry-run shows that every path runs")
    device = "cpu" if options.dry_run else "cuda"
    known = environment(device)
    name = re.sub(r"\W+", "-", known["gpu"]).strip("-").lower()
    # a dry run is no measurement, and never lies among them
    path = Path(tempfile.mkdtemp()) / "dry-run.json" if options.dry_run else results_folder / f"gpu-{name}.json"
    results = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    results |= {"dry": options.dry_run, "environment": known}
    for step in options.steps:
        print(f"=== {step} (at most {LIMITS[step]} s)", flush=True)
        done = run(step, device, LIMITS[step])
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        results["steps"][step] = done | {"date": date, "commit": commit()}
        print(*done["said"][-3:], done["status"], sep="\n", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(results))
    print(f"written: {path}, {path.with_suffix('.md')}")
    if any(results["steps"][step]["status"] != "done" for step in options.steps):
        sys.exit(1)
    return path


def run(step: str, device: str, limit_s: int) -> dict[str, Any]:
    """Run a step in a process of its own; return how it ended, its last words, and the rows that it wrote."""
    environ = os.environ | ({"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"} if device == "cpu" else {})
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "said", "w+") as said:
        rows = Path(folder) / "rows"
        rows.touch()
        try:
            words = command(step, device, str(rows))
            done = subprocess.run(words, cwd=ROOT, env=environ, stdout=said, stderr=said, timeout=limit_s)
            status = "failed" if done.returncode else "done"
        except subprocess.TimeoutExpired:
            status = "timed out"
        said.seek(0)
        last = said.read().splitlines()[-KEPT if status != "done" else -1 :]
        found = [json.loads(row) for row in rows.read_text().splitlines() if row.endswith("}")]  # one may be cut off
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "said": last, "rows": found}


def command(step: str, device: str, rows: str) -> list[str]:
    """Return what a step runs."""
    # the checkout's options ask for a plugin that may not be there
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-q", "--tb=short"]
    files = [str(path) for name in TESTS for path in sorted((ROOT / "tests").rglob(f"{name}.py"))]
    workers = ["-n", str(min(os.cpu_count() or 1, 16))] if importlib.util.find_spec("xdist") else []
    if step == "parity":
        return [*pytest, *(["--collect-only"] if device == "cpu" else workers), "-rf", *files]
    return [sys.executable, "-m", "bench.gpu.steps", step, rows, device]


def markdown(results: dict[str, Any]) -> str:
    times, steps = goals.measured(results), results["steps"]
    facts = results["environment"] | {"copy bandwidth, GB/s": times.copy or NOT_MEASURED}
    rows = [row for step in steps.values() for row in step["rows"] if "loss" in row]
    parts = [
        "# GPU results\n\nGenerated by `python -m bench gpu`; do not edit.\n",
        "**Dry run: nothing was measured.**\n" if results["dry"] else "",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n",
        "## Goals\n\nRatios within a run; R and W: reading and writing the logits once at its copy bandwidth.\n",
        table(["goal", "at", "wanted", "outcome"], ([g.what, g.at, g.wanted, g.outcome] for g in goals.goals(times))),
        "## Steps\n",
        table(["step", "status", "seconds", "rows", "date, commit", "last words"],
              ([name, step["status"], step["seconds"], len(step["rows"]), f"{step['date']}, {step['commit']}",
                _plain("".join(step["said"][-1:]))] for name, step in steps.items())),
        "## Times\n\nMedian, replayed from a graph; last layers and Liger as called; \"host\" is the host's.\n",
        table(["case", "loss", "mode", "ms (fifths at both ends)"],
              ([row.get("case", ""), row["loss"], row.get("mode", ""), _outcome(row)] for row in rows)),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _outcome(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return _plain(row["skipped"])
    memory = f", {row['peak_mib']:.0f} MiB" if row.get("peak_mib") else ""
    return "{:.4g} ({:.4g} to {:.4g})".format(*row["ms"]) + memory if row["ms"] else NOT_MEASURED


def _plain(words: str) -> str:
    return words.replace("|", "/")
