"""What the compiler makes of the kernels, for GPUs that are not here, and the times that this allows.

    python -m bench codegen          compiles offline, writes bench/results/codegen.md
    python -m bench codegen --gate   compiles and exits with an error where a bound of `gates.py` is missed

Runs without TRITON_INTERPRET, which must be unset when triton is imported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..record import progress


def main(arguments: list[str], results_folder: Path, commit: Callable[[], str]) -> None:
    """Compile, print and write what was asked for."""
    from . import build, gates, launches, report

    parser = argparse.ArgumentParser(prog="python -m bench codegen", description=__doc__)
    parser.add_argument("--gate", action="store_true", help="only check the bounds; exit 1 where one is missed")
    parser.add_argument("--quick", action="store_true", help="each path once on four targets")
    parser.add_argument("--json", action="store_true", help="print all as JSON and write nothing")
    parser.add_argument("--out", type=Path, default=results_folder, help="where codegen.md goes")
    options = parser.parse_args(arguments)
    stamp = {"date": datetime.date.today().isoformat(), "commit": commit()}
    cases = launches.quick_cases() if options.quick else launches.cases()
    results: dict[str, Any] = stamp | build.build(cases, progress)
    progress("")
    wrong = list(gates.failures(results["builds"]))
    if options.json:
        print(json.dumps(results | {"failures": wrong}))
        return
    if not options.gate:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "codegen.md").write_text(report.markdown(results, results_folder))
        print(f"written: {options.out / 'codegen.md'}", file=sys.stderr)
    print(f"{len(results['builds'])} kernels compiled for {len(launches.TARGETS)} targets; {len(wrong)} bounds missed")
    print(*wrong, sep="\n")
    if wrong:
        sys.exit(1)
