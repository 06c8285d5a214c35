"""Command line: measure, print, and write JSON, Markdown and pictures.

python -m bench [section ...]       see SECTIONS; all of them without a name
python -m bench report              the tables, the pictures and the README's again, from the JSON
python -m bench codegen [--gate]    machine code of the kernels, compiled offline
python -m bench gpu                 everything that needs a GPU: tests, times, goals
python -m bench claims [name ...]   what the papers claim, with verdicts from the data
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bonus_ops import ops

from . import accuracy, digits, elementwise, plots, report, shares, speed, tracker

SECTIONS = {
    "accuracy": accuracy.run,
    "speed": speed.run,
    "shares": shares.run,
    "elementwise": elementwise.run,
    "tracker": tracker.run,
    "digits": digits.run,
}
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["codegen"]:
        from . import codegen

        return codegen.main(arguments[1:], RESULTS, _commit)
    if arguments[:1] == ["gpu"]:
        from . import gpu

        return gpu.main(arguments[1:], RESULTS, _commit)
    if arguments[:1] == ["claims"]:
        from . import claims

        return claims.main(arguments[1:])
    options = _parser().parse_args(arguments)
    device = options.device
    if device == "cpu":
        torch.set_num_threads(1)
    folder = options.out or (RESULTS / "quick" if options.quick else RESULTS)
    stem = "cpu" if device == "cpu" else re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    path = folder / f"{stem}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if "report" not in options.sections:
        measure(results, options, ["python -m bench", *arguments])
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
        results = json.loads(path.read_text())  # what `report` will read
    elif not results:
        sys.exit(f"{path}: nothing measured yet; run `python -m bench`")
    pictures = []
    if why := plots.why_not():
        print(why, file=sys.stderr)
    else:
        pictures = plots.draw(results, folder, stem)
    text = report.markdown(results, pictures)
    (folder / f"{stem}.md").write_text(text)
    print(text)
    if path == RESULTS / "cpu.json" and not options.quick:  # what the README quotes
        readme = ROOT / "README.md"
        readme.write_text(report.with_results(readme.read_text(), results))
    print("".join(report.missed(results)), end="", file=sys.stderr)
    print(f"written: {', '.join(str(folder / name) for name in (path.name, f'{stem}.md', *pictures))}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure what bonus_ops costs and how exact it is."
    )
    parser.add_argument(
        "sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)} (default: all) or report"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its figures mean nothing")
    parser.add_argument(
        "--out", type=Path, help="where to write; default bench/results, with --quick bench/results/quick"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh-memory", action="store_true", help="speed on a CPU: let malloc return freed memory")
    return parser


def measure(results: dict[str, Any], options: argparse.Namespace, command: list[str]) -> None:
    """Measure the sections asked for into ``results``; what else it holds stays, each with its own stamp."""
    asked = options.sections or list(SECTIONS)
    if unknown := set(asked) - set(SECTIONS):
        sys.exit(f"unknown section {', '.join(sorted(unknown))}; expected {', '.join(SECTIONS)} or report")
    runs = {"environment": lambda: environment(options.device)}
    for name in asked:
        more = {"fresh_memory": options.fresh_memory} if name == "speed" else {}
        runs[name] = lambda name=name, more=more: SECTIONS[name](options.quick, options.device, _progress, **more)
    stamp = {"command": " ".join(command), "commit": _commit(), "quick": options.quick}
    for name, run in runs.items():
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        start = time.perf_counter()
        results[name] = run() | stamp | {"date": date, "elapsed_s": time.perf_counter() - start}
    _progress("")


def environment(device: str) -> dict[str, Any]:
    """Return versions, machine, and which implementation runs by default and why."""
    why_not, on_gpu = ops.why_not_triton(device), device == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "bonus_ops": _version("bonus-ops"),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if on_gpu else "none used",
        "gpu_driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none",
        "threads": torch.get_num_threads(),
        "implementation": ops.default_implementation(device),
        "why": why_not or "triton is installed and has kernels for this device",
    }  # fmt: skip


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # bonus_ops: run from the checkout


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _commit() -> str:
    commit = _run("git", "rev-parse", "--short", "HEAD")
    changed = _run("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return commit + (" with changes" if changed and changed != "unknown" else "")


def _progress(text: str) -> None:
    """Show what is running, on a terminal only: one line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _plain(x: Any) -> Any:
    """Return ``x`` as JSON holds it: five significant digits, None for what is not finite."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


if __name__ == "__main__":
    main(sys.argv[1:])
