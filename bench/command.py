"""What `python -m bench`, `bench claims` and `bench lm` share: their words, their record, and its report."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measure
from .bounds import missed
from .measure import Effort
from .record import ROOT, commit, environment, progress, write

RESULTS = ROOT / "bench" / "results"
Tell = Callable[[str], None]  # what is running


class Picture(NamedTuple):
    draw: Callable[[dict[str, Any], Any], None]  # a section into a figure
    width: float
    height: float


class Section(NamedTuple):
    title: str
    run: Callable[[Effort, Tell], dict[str, Any]]
    markdown: Callable[[dict[str, Any]], str]
    pictures: dict[str, Picture] = {}  # by what follows the section's name


class Book(NamedTuple):
    """A command, its record, and its report."""

    command: str
    about: str
    title: str
    sections: dict[str, Section]
    stem: Callable[[], str]  # name of the record
    opening: Callable[[dict[str, Any]], str] = lambda results: ""
    quote: Callable[[Path], None] = lambda folder: None  # from all full records, where the README quotes them
    default: Effort = Effort.FULL


def main(book: Book, arguments: list[str]) -> None:
    """Parse, measure, write, print."""
    options = _parser(book).parse_args(arguments)
    if unknown := set(options.names) - {*book.sections, "report"}:
        expected = ", ".join([*book.sections, "report"])
        sys.exit(f"unknown section {', '.join(sorted(unknown))}; expected {expected}")
    whole = options.full or (options.names and not options.quick)
    effort = Effort.QUICK if options.quick else Effort.FULL if whole else book.default
    folder, stem = options.out, book.stem() + effort.suffix
    if "report" in options.names:
        stems = sorted(path.stem for path in folder.glob(f"{book.stem().partition('-')[0]}*.json"))
        if not stems:
            sys.exit(f"{folder}: nothing measured yet; run `{book.command}`")
    else:
        stems = [stem]
        kept = not options.fresh_memory and measure.keep_memory()
        torch.set_num_threads(1)
        stamp = {"command": " ".join([book.command, *arguments]), "commit": commit(), "effort": effort.value}
        stamp |= {"threads": 1, "memory_kept": kept}
        folder.mkdir(parents=True, exist_ok=True)
        record(book, options.names or list(book.sections), folder / f"{stem}.json", effort, stamp)
    for each in stems:
        results = json.loads((folder / f"{each}.json").read_text())
        text, written = report(book, folder, each)
        print(text)
        print("".join(missed(results)), end="", file=sys.stderr)
        print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
    if folder == RESULTS and (effort is Effort.FULL or "report" in options.names):
        book.quote(folder)


def _parser(book: Book) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=book.command, description=book.about)
    names = f"{', '.join(book.sections)} (default: all), or report, which measures nothing"
    parser.add_argument("names", nargs="*", metavar="name", help=names)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; its figures mean nothing")
    parser.add_argument("--full", action="store_true", help="measure all of it, as for a section that is named")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write; default bench/results")
    parser.add_argument("--fresh-memory", action="store_true", help="let malloc return freed memory")
    return parser


def record(book: Book, names: list[str], path: Path, effort: Effort, stamp: dict[str, Any]) -> None:
    """Measure ``names`` into a record; what else it holds stays, each with its own stamp."""
    results = json.loads(path.read_text()) if path.exists() else {}
    gc.collect()
    gc.freeze()  # what was imported: every case collects garbage first, a quarter of a second among all that
    begun = time.perf_counter()
    for i, name in enumerate(names, 1):

        def tell(text: str, where: str = f"{name}, section {i} of {len(names)}") -> None:
            progress(f"{where}, {time.perf_counter() - begun:.0f} s: {text}")

        tell("begins")
        date, start = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
        results["environment"] = environment() | stamp | {"date": date}
        found = book.sections[name].run(effort, tell)
        results[name] = found | stamp | {"date": date, "elapsed_s": time.perf_counter() - start}
        write(path, results)  # kept if the next one fails
    gc.unfreeze()
    progress("")


def counted(keys: Iterable[tuple[str, ...]], tell: Tell) -> Iterator[tuple[str, ...]]:
    """Yield cases, telling which of how many."""
    keys = list(keys)
    for i, key in enumerate(keys, 1):
        tell(f"case {i} of {len(keys)}, {' '.join(key)}")
        yield key


# --- report -----------------------------------------------------------------------------------------------------------

EFFORTS = {
    "quick": " `--quick` is a smoke run: its figures mean nothing.",
    "short": " A short run; `--full` measures all.",
}


def report(book: Book, folder: Path, stem: str) -> tuple[str, list[Path]]:
    """Write the Markdown and the pictures of a record; return the text and all files."""
    results = json.loads((folder / f"{stem}.json").read_text())
    pictures: list[Path] = []
    if not importlib.util.find_spec("matplotlib"):
        print("matplotlib is not installed: no pictures", file=sys.stderr)
    else:
        pictures = list(_drawn(book, results, folder, stem))
    text = markdown(book, results, [picture.name for picture in pictures])
    (folder / f"{stem}.md").write_text(text)
    return text, [folder / f"{stem}.json", folder / f"{stem}.md", *pictures]


def _drawn(book: Book, results: dict[str, Any], folder: Path, stem: str) -> Iterator[Path]:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    for name, section in book.sections.items():
        if name not in results or "skipped" in results[name]:
            continue
        for suffix, picture in section.pictures.items():
            figure = Figure(figsize=(picture.width, picture.height), layout="constrained")
            picture.draw(results[name], figure)
            yield (path := folder / f"{stem}-{name}{suffix}.png")
            figure.savefig(path, dpi=100)


def markdown(book: Book, results: dict[str, Any], pictures: Iterable[str] = ()) -> str:
    """Return the report of every section in ``results``; ``pictures`` are file names beside it."""
    parts = [f"# {book.title}\n\nGenerated by `{book.command}`; do not edit.\n", book.opening(results)]
    for name, (title, _, render, _) in book.sections.items():
        if name not in results:
            continue
        section = results[name]
        body = section["skipped"] if "skipped" in section else render(section)
        shown = "".join(f"\n![{title}]({picture})\n" for picture in pictures if f"-{name}" in picture)
        stamp = f"`{section['command']}`, {section['date']}, commit {section['commit']}."
        took = f" It took {section['elapsed_s']:.0f} s.{EFFORTS.get(section['effort'], '')}"
        parts.append(f"## {title}\n\n{stamp}{took}\n\n{body.strip()}\n{shown}")
    hidden = ("command", "date", "commit", "effort")
    about = (f"- {key.replace('_', ' ')}: {x}" for key, x in results["environment"].items() if key not in hidden)
    parts.append("## Environment of the last run\n\n" + "\n".join(about) + "\n")
    return "\n".join(part for part in parts if part)
