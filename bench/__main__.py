"""Command line: measure, print, and write JSON, Markdown and pictures.

python -m bench [section ...]       see SECTIONS; all of them without a name
python -m bench report              the tables, the pictures and the README's again, from the JSON
python -m bench codegen [--gate]    machine code of the kernels, compiled offline
python -m bench gpu                 everything that needs a GPU: tests, times, goals
python -m bench claims [name ...]   what the papers claim, with verdicts from the data
python -m bench lm [name ...]       a language model trained without its logits
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import accuracy, digits, host, linear, plots, report, sigmoid, soft, speed, tracker
from .record import ROOT, commit, environment, progress, write

SECTIONS = {
    "accuracy": accuracy.run,
    "speed": speed.run,
    "soft": soft.run,
    "sigmoid": sigmoid.run,
    "linear": linear.run,
    "host": host.run,
    "tracker": tracker.run,
    "digits": digits.run,
}
RESULTS = ROOT / "bench" / "results"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["codegen"]:
        from . import codegen

        return codegen.main(arguments[1:], RESULTS, commit)
    if arguments[:1] == ["gpu"]:
        from . import gpu

        return gpu.main(arguments[1:], RESULTS, commit)
    if arguments[:1] == ["claims"]:
        from . import claims

        return claims.main(arguments[1:])
    if arguments[:1] == ["lm"]:
        from . import lm

        return lm.main(arguments[1:])
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
        write(path, results)
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
        runs[name] = lambda name=name, more=more: SECTIONS[name](options.quick, options.device, progress, **more)
    stamp = {"command": " ".join(command), "commit": commit(), "quick": options.quick}
    for name, run in runs.items():
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        start = time.perf_counter()
        results[name] = run() | stamp | {"date": date, "elapsed_s": time.perf_counter() - start}
    progress("")


if __name__ == "__main__":
    main(sys.argv[1:])
