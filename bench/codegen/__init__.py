"""What the compiler makes of the kernels, for GPUs that are not here, and the times that this allows.

    python -m bench codegen          compiles offline, writes bench/results/codegen.{json,md}
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


def main(arguments: list[str], results_folder: Path, commit: Callable[[], str]) -> None:
    """Compile, print and write what was asked for."""
    from . import build, gates, launches, report

    parser = argparse.ArgumentParser(prog="python -m bench codegen", description=__doc__)
    parser.add_argument("--gate", action="store_true", help="only check the bounds; exit 1 where one is missed")
    parser.add_argument("--quick", action="store_true", help="each path once on four targets")
    parser.add_argument("--json", action="store_true", help="print the JSON and write nothing")
    parser.add_argument("--out", type=Path, default=results_folder, help="where codegen.json and codegen.md go")
    options = parser.parse_args(arguments)

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    stamp = {"date": datetime.date.today().isoformat(), "commit": commit()}
    results: dict[str, Any] = stamp | build.build(
        launches.quick_cases() if options.quick else launches.cases(), progress
    )
    progress("")
    wrong = list(gates.failures(results["builds"]))
    if options.json:
        print(json.dumps(results | {"failures": wrong}))
        return
    if not options.gate:
        options.out.mkdir(parents=True, exist_ok=True)
        rows = ("builds", "cases")  # a line each, so that changes can be read
        head = {key: value for key, value in results.items() if key not in rows}
        text = json.dumps(head)[:-1] + "".join(
            f',\n"{key}": [\n' + ",\n".join(json.dumps(x) for x in results[key]) + "\n]" for key in rows
        )
        (options.out / "codegen.json").write_text(text + "}\n")
        (options.out / "codegen.md").write_text(report.markdown(results))
        print(f"written: {options.out / 'codegen.json'}, {options.out / 'codegen.md'}", file=sys.stderr)
    print(f"{len(results['builds'])} kernels compiled for {len(launches.TARGETS)} targets; {len(wrong)} bounds missed")
    for line in wrong:
        print(line)
    if wrong:
        sys.exit(1)
