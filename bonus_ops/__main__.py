"""The command line: ``python -m bonus_ops suspects logits.npz ...`` lists the examples to look at first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .checks import FLOATS
from .dynamics import DEFAULT_FIELDS, ExampleTracker, Mean, Report
from .functional import difficulty_scores
from .number_checks import check_integer, check_number
from .scores import Scores

__all__ = ["main"]

PROGRAM = "python -m bonus_ops"
IGNORED = -100  # label of a row without one
HEAD = ("index", "kind", "given", "suggested", "p(given)", "p(suggested)", "mean loss", "mean EL2N", "entropy")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for a wrong call or file, with one line on stderr."""
    parser = _Parser(prog=PROGRAM, description="Difficulty of examples from saved logits.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="suspects")
    suspects = commands.add_parser(
        "suspects",
        prog=f"{PROGRAM} suspects",
        help="list the hardest and most suspicious rows",
        description="List the rows whose label or input looks wrong, worst first: the label given, the one suggested, "
        "and how probable the model finds each. Several files are several epochs: the means are over them, the entropy "
        "is of an early one (the tenth part of the way).",
    )
    suspects.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help=".npz or .pt with logits [N, C], labels [N]"
    )
    suspects.add_argument("--top", type=int, default=20, metavar="K", help="rows to print (20)")
    suspects.add_argument("--share", type=float, default=0.15, help="share of the rows to suspect, in [0, 1] (0.15)")
    suspects.add_argument("--csv", type=Path, metavar="FILE", help="write all rows there")
    suspects.add_argument("--plot", type=Path, metavar="FILE", help="draw the map there; needs matplotlib")
    options = parser.parse_args(arguments)
    try:
        check_integer("argument --top", "top", options.top, 0)
        check_number("argument --share", "share", options.share, "[0, 1]")
        _check_targets(options.files, [file for file in (options.csv, options.plot) if file is not None])
        report = _report([_read(file) for file in options.files], options.files, options.share)
        if options.plot is not None:  # first: it may lack matplotlib, or know no such format
            report.plot(options.plot)
        if options.csv is not None:
            report.to_csv(options.csv)
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        suspects.error(str(error).splitlines()[0])
    print(_table(report, options.top))
    return 0


def _check_targets(read: list[Path], written: list[Path]) -> None:
    """Raise where a file cannot be written, or would take the place of another of this call."""
    taken = {file.resolve() for file in read}
    for file in written:
        if file.is_dir():
            raise IsADirectoryError(f"{file}: expected a file to write, got a folder")
        if not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"{file}: no such folder")
        if file.resolve() in taken:
            raise FileExistsError(f"{file}: expected a file of its own to write, got one that this call uses already")
        taken.add(file.resolve())


def _read(file: Path) -> dict[str, Any]:
    """Return what a file holds; never unpickle anything but tensors."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if file.suffix not in (".npz", ".pt", ".pth"):
        raise ValueError(f"{file}: expected a file .npz, .pt or .pth")
    if file.suffix == ".npz":
        import numpy

        try:
            with numpy.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except Exception as error:  # numpy's words would advise to unpickle it
            why = "damaged, no .npz, or with arrays of objects, which are never unpickled"
            raise ValueError(f"{file}: cannot be read as plain arrays ({type(error).__name__}): {why}") from None
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle's errors, and any other, for what is no tensor
        raise ValueError(f"{file}: cannot be read as plain tensors ({type(error).__name__})") from None
    if not isinstance(held, dict):
        raise ValueError(f"{file}: expected a dict with logits and labels, got {type(held).__name__}")
    return held


def _checked(held: dict[str, Any], file: Path) -> tuple[Tensor, Tensor]:
    """Return logits [N, C] and labels [N], int64."""
    if missing := [name for name in ("logits", "labels") if name not in held]:
        raise ValueError(
            f"{file}: expected logits and labels, lacks {' and '.join(missing)}; has {', '.join(map(str, held)) or '-'}"
        )
    logits, labels = (held[name] for name in ("logits", "labels"))
    for name, x in (("logits", logits), ("labels", labels)):
        came: Any = x.layout if isinstance(x, Tensor) else getattr(x, "dtype", None)
        if isinstance(x, Tensor):
            plain = x.layout == torch.strided and x.device.type == "cpu" and not x.is_nested
        else:  # an array of numpy's, of numbers that torch has
            plain = came is not None and came.kind in "fiu" and came.isnative and came.itemsize <= 8
        if not plain:
            came = type(x).__name__ if came is None else came
            raise ValueError(f"{file}: {name} must be an array of numbers, got {came}")
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    if logits.dtype not in FLOATS or logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"{file}: logits must be floating point [N, C], got {logits.dtype} {list(logits.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{file}: labels must be integers, got {labels.dtype}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"{file}: labels must have shape {list(logits.shape[:1])}, got {list(labels.shape)}")
    labels = labels.to(torch.int64)
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[1]))]
    if len(wrong):
        raise ValueError(
            f"{file}: labels must be in [0, {logits.shape[1]}), or {IGNORED} for none, got {int(wrong[0])}"
        )
    return logits, labels


def _report(epochs: list[dict[str, Any]], files: list[Path], share: float) -> Report:
    read = [_checked(held, file) for held, file in zip(epochs, files, strict=True)]
    shape, first = read[0][0].shape, read[0][1]
    for (logits, labels), file in zip(read, files, strict=True):
        if logits.shape != shape:
            raise ValueError(
                f"{file}: logits must have the shape of {files[0]}, {list(shape)}, got {list(logits.shape)}"
            )
        if differs := int(((labels != first) & (labels != IGNORED) & (first != IGNORED)).sum()):
            raise ValueError(
                f"{file}: labels must be those of {files[0]}, row by row, but {differs} of {len(labels)} differ: "
                "are the rows in another order?"
            )
    if not shape[0]:
        raise ValueError(f"{files[0]}: holds no rows")
    early = max(1, round(len(read) / 10))
    fields = [Mean("entropy", (early, early)) if name == "early_entropy" else name for name in DEFAULT_FIELDS]
    tracker = ExampleTracker(shape[0], fields, device="cpu")
    for logits, labels in read:
        tracker.update(Scores(*difficulty_scores(logits, labels), target=labels), torch.arange(shape[0]), labels)
        tracker.end_epoch()
    if not tracker.seen.any():
        raise ValueError(f"{files[0]}: no row has a label and logits without NaN")
    return tracker.report(suspect=share)


def _table(report: Report, top: int) -> str:
    labels, columns = report.labels, report.columns
    assert labels is not None
    rows = []
    for i in report.suspects[:top].tolist():
        kind = report.name_of(i)
        numbers = (labels.given_confidence, labels.suggested_confidence, columns["mean_loss"], columns["mean_el2n"],
                   columns["early_entropy"])  # fmt: skip
        rows.append((str(i), kind, str(int(labels.given[i])), str(int(labels.suggested[i])),
                     *(f"{float(column[i]):.3f}" for column in numbers)))  # fmt: skip
    widths = [max(len(row[c]) for row in (HEAD, *rows)) for c in range(len(HEAD))]
    lines = ["  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in (HEAD, *rows)]
    return "\n".join([*lines, f"{len(report.kind)} rows: {report}"])


if __name__ == "__main__":
    sys.exit(main())
