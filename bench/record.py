"""What every record of the benchmark holds, and how it is written: versions, machine, commit, plain numbers."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bonus_ops import call, losses

__all__ = ["ROOT", "between", "commit", "environment", "instruction_set", "plain", "progress", "write"]

ROOT = Path(__file__).resolve().parent.parent


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return versions, machine, and which implementation runs by default and why."""
    on_gpu = device == "cuda"
    why_not = call.why_not_triton(device) if on_gpu else call.why_not_numba(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "bonus_ops": _version("bonus-ops"),
        "system": platform.platform(),
        "cpu": _cpu(),
        "instruction_set": instruction_set(),
        "cpu_cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if on_gpu else "none used",
        "gpu_driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none",
        "implementation": call.decide(None, torch.empty(1, 2, device=device), "labels", losses.LogBonus(), None),
        "why": why_not or f"{'triton' if on_gpu else 'numba'} is installed",
    }  # fmt: skip


def instruction_set() -> str:
    """Return the widest vectors that torch finds here, and our loops: avx2, avx512, ... Times differ between them."""
    return torch.backends.cpu.get_cpu_capability().lower()


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


def commit() -> str:
    found = _run("git", "rev-parse", "--short", "HEAD")
    changed = _run("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return found + (" with changes" if changed and changed != "unknown" else "")


def between(text: str, begin: str, end: str, block: str) -> str:
    """Return ``text``, the README's, with ``block`` between two of its lines."""
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"expected {begin!r} and then {end!r} in the README")
    return f"{before}{begin}\n\n{block}\n{end}{after}"


def progress(text: str) -> None:
    """Show what is running, on a terminal only: one line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def plain(x: Any) -> Any:
    """Return ``x`` as JSON holds it: five significant digits, None for what is not finite."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


def write(path: Path, results: dict[str, Any]) -> None:
    """Write a record, a section a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(plain(of), allow_nan=False)}" for name, of in results.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
