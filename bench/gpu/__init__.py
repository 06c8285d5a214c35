"""Everything that needs a GPU, in one command of under eight minutes: tests, ceilings, times, goals, launch parameters.

    python -m bench gpu                      every step: bench/results/gpu-<name>.{json,md}, a picture, bench/README.md
    python -m bench gpu --steps speed sweep  some of them, into files of their own
    python -m bench gpu --report             Markdown, pictures, bench/README.md again, from the JSON: needs no GPU
    python -m bench gpu --dry-run            every path on the CPU at toy sizes with a stand-in clock

Each step is a process of its own with a time limit; what it has saved counts even if it is killed or crashes, and the
results are written after every step. Nothing is installed: torch, triton and pytest suffice, peers are used if found.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..record import ROOT, plain

BUDGET_S = 460.0
LEAST_S = 5.0  # with less left a step is skipped


class Step(NamedTuple):
    function: str  # in steps.py
    limit_s: float


STEPS = {
    "ceilings": Step("ceilings", 60),
    "gpu tests": Step("gpu_tests", 90),
    "speed": Step("speed", 130),
    "small": Step("small", 40),
    "targets": Step("targets", 40),
    "matrix": Step("matrix", 120),
    "parity": Step("parity", 90),
    "linear": Step("linear", 40),
    "sanitizer": Step("sanitizer", 120),
    "sweep": Step("sweep", 90),  # last: what the time is short for is the least needed
}


def main(arguments: list[str], results_folder: Path, commit: Callable[[], str]) -> None:
    options = _parser().parse_args(arguments)
    if options.step:
        return _child(options)
    if options.dry_run and options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="bench-gpu-dry-run-"))
    folder = (options.out or results_folder).resolve()
    if options.dry_run and folder.is_relative_to(results_folder.resolve()):
        sys.exit(f"a dry run is no measurement: give --out another folder than {results_folder}")
    readme = results_folder.parent / "README.md" if folder == results_folder.resolve() else None
    if options.report:
        for path in sorted(folder.glob("gpu-*.json")):
            write(json.loads(path.read_text()), folder, path.stem)
        if readme is not None:
            readme.write_text(_report().with_runs(readme.read_text(), folder))
        return
    if not options.dry_run:
        import torch

        if not torch.cuda.is_available():
            sys.exit("no CUDA device here; --dry-run shows that every path runs")
    results = run(options, folder, " ".join(["python -m bench gpu", *arguments]), commit(), readme)
    print(_report().summary(results))
    if any(step["status"] != "done" for step in results["steps"].values()):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), metavar="STEP",
                        help=", ".join(STEPS))  # fmt: skip
    parser.add_argument("--out", type=Path, help="where to write; default bench/results")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all steps together")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no measurement: show that every path runs")
    parser.add_argument("--report", action="store_true", help="measure nothing, write again what is made from the JSON")
    parser.add_argument("--step", help=argparse.SUPPRESS)  # the one that a child process runs
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    return parser


def _report() -> Any:
    from . import report

    return report


# --- the parent -------------------------------------------------------------------------------------------------------


def run(
    options: argparse.Namespace, folder: Path, command: str, commit: str, readme: Path | None = None
) -> dict[str, Any]:
    """Run the steps, each in its process; write the results, and the page that quotes them, after every one."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.budget
    results: dict[str, Any] = {
        "command": command,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dry": options.dry_run,
        "steps": {},
    }
    stem = "gpu-dry-run" if options.dry_run else None
    for name in dict.fromkeys(["ceilings", *options.steps]):  # the ratios need the ceilings of the same run
        limit = min(STEPS[name].limit_s, end - time.monotonic())
        print(f"=== {name} (at most {max(limit, 0):.0f} s)", flush=True)
        results["steps"][name] = rehearse(name) if options.dry_run else in_process(name, limit)
        print(f"=== {name}: {results['steps'][name]['status']}", flush=True)
        if stem is None:
            device = results["steps"].get("ceilings", {}).get("device", {})
            stem = stem_of(device["gpu"], options.steps) if "gpu" in device else None
        write(results, folder, stem or "gpu-unknown")
        if readme is not None:
            readme.write_text(_report().with_runs(readme.read_text(), folder))
    return results


def stem_of(gpu: str, steps: list[str]) -> str:
    """Return the name of a run's files: some steps alone must not take the place of a whole run."""
    some = [] if set(steps) == set(STEPS) else steps
    return "-".join(re.sub(r"\W+", "-", x).strip("-").lower() for x in ("gpu", gpu, *some))


def rehearse(name: str) -> dict[str, Any]:
    """Run a step here, on the stand-in."""
    from . import steps
    from .devices import StandIn

    start, found = time.monotonic(), {}
    try:
        getattr(steps, STEPS[name].function)(StandIn(), found.update)
        found["status"] = "done"
    except Exception as error:
        found |= {"status": "failed", "error": f"{type(error).__name__}: {str(error)[:300]}"}
    return plain(found | {"seconds": round(time.monotonic() - start, 1)})


def in_process(name: str, limit_s: float, command: list[str] | None = None) -> dict[str, Any]:
    """Run a step in a process of its own; return what it saved, and how it ended."""
    if limit_s < LEAST_S:
        return {"status": "skipped", "seconds": 0.0, "error": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved.json"
        command = command or [sys.executable, "-m", "bench", "gpu", "--step", name]
        command = [*command, "--save", str(saved)]
        start = time.monotonic()
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
        try:
            code: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it started
        child.wait()
        found: dict[str, Any] = json.loads(saved.read_text()) if saved.exists() else {}
    found["seconds"] = round(time.monotonic() - start, 1)
    found["status"] = "timed out" if code is None else "done" if code == 0 else "failed"
    if code is None:
        found["error"] = f"stopped after {limit_s:.0f} s; what it had saved counts"
    elif code:
        found.setdefault("error", f"exit {code}")
    return found


def write(results: dict[str, Any], folder: Path, stem: str) -> None:
    """Write JSON first: Markdown and the picture are made from it and may fail."""
    (folder / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        report = _report()
        picture = f"{stem}.png"
        drawn = report.draw(results, folder / picture)
        (folder / f"{stem}.md").write_text(report.markdown(results, picture if drawn else None))
    except Exception as error:
        print(f"report: {type(error).__name__}: {error}", flush=True)


# --- the child --------------------------------------------------------------------------------------------------------


def _child(options: argparse.Namespace) -> None:
    from . import steps
    from .devices import Gpu

    latest: dict[str, Any] = {}

    def save(found: dict[str, Any]) -> None:
        latest.update(found)
        new = options.save.with_suffix(".new")
        new.write_text(json.dumps(plain(latest)))
        new.replace(options.save)  # never half written

    try:
        getattr(steps, STEPS[options.step].function)(Gpu(), save)
    except Exception as error:
        said = traceback.format_exc().splitlines()[-40:]  # nobody may see the terminal
        save({"error": f"{type(error).__name__}: {str(error)[:300]}", "traceback": said})
        raise
