"""Markdown tables from the JSON of a run, and the five numbers of the README; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import bounds
from .accuracy import TABLE_GAPS
from .bounds import MET, bounds_of, by_bound, span, verdict, verdicts
from .digits import COLUMNS
from .intervals import mean, spread
from .record import ROOT, between
from .tables import number, table

WORDS = """`a / b` is the time of a over that of b, forward and backward unless said otherwise: below 1, a is faster.
"ours" is the loss with `LogBonus(0.75)`, its gradient and all six scores; "loss only" leaves the scores out; "paper's
formula" is the same loss and gradient written in torch, "eager loss and scores" the scores too; "gradients" is extra
memory over that of the logits' gradient. The sizes of each case stand in the tables below.
"""
NOT_MEASURED = "not measured"


def opening(results: dict[str, Any]) -> str:
    """Return what the words mean, what was won, and what was missed or not timed."""
    held = bounds.opening(results)
    return held and f"{WORDS}\n{held}"


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy(section: dict[str, Any]) -> str:
    rows = f"{section['n_rows']} rows of {section['n_classes']} classes, float32; the worst error of the rows"
    gaps = [gap for gap in TABLE_GAPS if gap in section["gaps"]]
    at = [section["gaps"].index(gap) for gap in gaps]
    return (
        f"Error against float64 of the same rounded logits: {rows}. The gap is the log-odds of the label; past 87.3 "
        "its 1 - p is below the smallest normal float32.\n\n"
        + _errors([f"gap {gap}" for gap in gaps], section["by_gap"], at)
        + "\nThe same, at a gap of about 2, with a common offset added to all logits before rounding:\n\n"
        + _errors(
            [f"{offset:g}" for offset in section["offsets"]], section["by_offset"], range(len(section["offsets"]))
        )
    )


def _errors(columns: list[str], series: dict[str, Any], at: Iterable[int]) -> str:
    at = list(at)
    rows = (
        [quantity, name, *(number(errors[i], "{:.0e}") for i in at)]
        for quantity, by_name in series.items()
        for name, errors in by_name.items()
    )
    return table(["error of", "by", *columns], rows)


# --- speed ------------------------------------------------------------------------------------------------------------


INTRO = """Forward and backward (`difficulty_scores` and `forward`: forward alone), one thread, providers interleaved,
each checked against float64 truth first. "ours" is `bonus_cross_entropy_with_scores` with `LogBonus(0.75)`: loss,
gradient and six scores; "upstream 1/2" is the same with another upstream gradient than 1.
"""


def speed(section: dict[str, Any]) -> str:
    cases = section["cases"]
    names = list(cases[0]["providers"])
    labels = list(dict.fromkeys(label for case in cases for label in case["ratios"]))

    def by_provider(cell: Callable[[dict[str, Any]], str]) -> str:
        return table(["case", *names], ([_case(c), *(cell(c["providers"][n]) for n in names)] for c in cases))

    parts = {
        INTRO: "",
        "Required:": verdicts(section["bounds"]),
        "Ratio of times, median over the rounds:": table(
            ["case", *labels], ([_case(c), *(_ratio(c, label) for label in labels)] for c in cases)
        ),
        "Time in ms, median and half the interquartile range:": by_provider(_time),
        "GB/s, all charged the least traffic possible (read once; gradient written once):": by_provider(
            lambda provider: _get(provider, "gb_per_s")
        ),
        "Peak extra memory in gradients:": by_provider(lambda provider: _get(provider, "peak_gradients")),
        "Of the bandwidth of a copy:": _bandwidth(section),
        "One thread and two, and the first call of a process:": _of_process(section),
        "Left out:": _skipped(cases),
    }
    return "\n".join(f"{title}\n\n{body}" for title, body in parts.items() if body or title.startswith("Forward"))


def _case(case: dict[str, Any]) -> str:
    sizes = case["shape"] if "shape" in case else (case["n_rows"], case["n_classes"])
    return f"{case['case']} {'x'.join(map(str, sizes))} {case['dtype']}"


def _time(provider: dict[str, Any]) -> str:
    return spread(provider["time_ms"]) if "time_ms" in provider else "-"


def _ratio(case: dict[str, Any], label: str) -> str:
    return number(case["ratios"][label]["median"]) if label in case["ratios"] else "-"


def _get(provider: dict[str, Any], key: str) -> str:
    return number(provider[key]) if key in provider else "-"


def _bandwidth(section: dict[str, Any]) -> str:
    shares = ([_case(c), *(_get(c["providers"][name], "share_of_copy") for name in ("difficulty_scores", "ours"))]
              for c in section["cases"])  # fmt: skip
    header = ["case", "scores (1 read)", "loss, scores, gradient (1 read, 1 write)"]
    copy = f"Copy bandwidth {section['copy_gb_per_s']:.3g} GB/s, read plus written; - where all of it fits caches."
    return f"{copy}\n\n{table(header, shares)}"


def _of_process(section: dict[str, Any]) -> str:
    if not section.get("two_threads"):
        return ""
    times = ([name, _time({"time_ms": times})] for name, times in section["two_threads"]["time_ms"].items())
    calls = ([f"first call, {name}", f"{1e3 * s:.3g}"] for name, s in section["first_call_s"].items() if s)
    return table(["1024x32000 float32, loss, scores and gradient; first calls of 64x10", "ms"], [*times, *calls])


def _skipped(cases: list[dict[str, Any]]) -> str:
    where: dict[str, list[str]] = {}
    for case in cases:
        for name, provider in case["providers"].items():
            if "skipped" in provider:
                where.setdefault(f"{name} skipped: {provider['skipped']}", []).append(_case(case))
    return "\n".join(f"- {why} ({', '.join(names)})" for why, names in where.items())


# --- soft targets, sigmoid family, tracker ----------------------------------------------------------------------------


def soft(section: dict[str, Any]) -> str:
    cases = section["cases"]
    labels = list(dict.fromkeys(label for case in cases for label in case["ratios"]))
    names = list(dict.fromkeys(name for case in cases for name in case["providers"]))
    times = ([*_asked(c), *(_time(c["providers"].get(n, {})) for n in names)] for c in cases)
    peaks = ([*_asked(c), *(_get(c["providers"].get(n, {}), "peak_gradients") for n in names)] for c in cases)
    return "\n".join(
        [
            'Forward and backward, "ours" with all six scores, mean over rows; `F.cross_entropy` has the same options '
            "and no bonus; the paper's formula is eager. Squared error is that of the softmax, with hard labels.\n",
            verdicts(section["bounds"]),
            "Ratio of times, median over the rounds:\n",
            table(["case", "target", *labels], ([*_asked(c), *(_ratio(c, label) for label in labels)] for c in cases)),
            "Time in ms, median and half the interquartile range:\n",
            table(["case", "target", *names], times),
            "Peak extra memory in gradients:\n",
            table(["case", "target", *names], peaks),
        ]
    )


def _asked(case: dict[str, Any]) -> tuple[str, str]:
    return _case(case), case["target"]


def sigmoid(section: dict[str, Any]) -> str:
    header = ["case", "loss", "eager / ours", "ours, ms", "peak memory in gradients, ours", "eager"]
    rows = (
        [_case(c), c["loss"], number(c["eager / ours"]["median"]), number(c["ours_ms"]["median"]),
         number(c["ours_peak_gradients"]), number(c["eager_peak_gradients"])]
        for c in section["cases"]
    )  # fmt: skip
    return (
        "Forward and backward of `bonus_binary_cross_entropy_with_logits`, summed; eager is the formula as users write "
        "it, for None torch's own fused operator.\n\n"
        f"{verdicts(section['bounds'])}\n{table(header, rows)}"
    )


def linear(section: dict[str, Any]) -> str:
    cases, mib = section["cases"], 1 << 20
    names, peaks = (list(dict.fromkeys(n for c in cases for n in c[key])) for key in ("time_ms", "peaks"))
    labels = list(dict.fromkeys(label for case in cases for label in case["ratios"]))

    def by_case(header: list[str], cell: Callable[[dict[str, Any], str], str], *more: str) -> str:
        rows = ([_layer(c), *(number(c[key] / mib) for key in more), *(cell(c, n) for n in header)] for c in cases)
        return table(["rows x hidden x classes", *more, *header], rows)

    return "\n".join([
        '"ours" is `linear_bonus_cross_entropy_with_scores` with `LogBonus(0.75)`, forward and backward; "scores '
        'alone" is `linear_difficulty_scores`. Bare products are written into outputs made beforehand: three give '
        'logits and both gradients. "chunked" is torch\'s with its `LinearCrossEntropyOptions()`, run once.\n',
        verdicts(section["bounds"]),
        "Ratio of times, median over the rounds:\n",
        by_case(labels, _ratio),
        "Time in ms, median and half the interquartile range:\n",
        by_case(names, lambda c, n: _time({"time_ms": c["time_ms"][n]}) if n in c["time_ms"] else "-"),
        "Peak extra memory in MiB, and what of it gradients take:\n",
        by_case(peaks, lambda c, n: number(c["peaks"][n] / mib) if n in c["peaks"] else "-", "gradients"),
    ])  # fmt: skip


def _layer(case: dict[str, Any]) -> str:
    return f"{case['case']} {case['n_rows']}x{case['hidden']}x{case['n_classes']}"


def host(section: dict[str, Any]) -> str:
    times = ([r["call"], f"{r['us']:.0f}", f"{r['median_us']:.0f}", f"{r['ratio']:.2f}"] for r in section["rows"])
    launches = (
        [r["call"], r["dtype"], *(_launches(r[which]) for which in ("forward", "backward"))]
        for r in section["launches"]
    )
    shape = "x".join(map(str, section["shape"]))
    return "\n".join([
        verdicts(section["bounds"]),
        table([f"{shape}, forward and backward", "us of CPU time, least", "median", "ratio"], times),
        table(["call", "dtype", "forward launches", "backward launches"], launches),
    ])  # fmt: skip


def _launches(found: dict[str, Any]) -> str:
    return " + ".join([f"{found['kernels']} of ours", *found["operators"]])


def tracker(section: dict[str, Any]) -> str:
    rows = (
        [where, name, _time({"time_ms": times}), _ratio(case, name) if name in case["ratios"] else "1"]
        for where, case in section["cases"].items()
        for name, times in case["time_ms"].items()
    )
    header = ["", "step", "ms, median and half the interquartile range", "ratio"]
    return f"{verdicts(section['bounds'])}\n{table(header, rows)}"


# --- digits -----------------------------------------------------------------------------------------------------------


def digits(section: dict[str, Any]) -> str:
    rows = ([name, *(mean(loss[key]) for key in COLUMNS)] for name, loss in section["losses"].items())
    hardest = (
        [h["index"], h["label"], h["prediction"], h["runner_up"], f"{h['margin']:.2f}"] for h in section["hardest"]
    )
    return "\n".join(
        [
            f"A 64-256-256-10 ReLU network on scikit-learn's digits, {section['epochs']} epochs, mean of "
            f"{section['seeds']} seeds ± half its 95 % confidence interval. The bonus raises margins and keeps "
            "confident rows teaching. No claim is made about accuracy: its differences are about as large as the "
            "spread of the seeds.\n",
            table(["loss", *COLUMNS.values()], rows),
            verdicts(section["bounds"]),
            f"The ten hardest training images of {section['hardest_of']}, seed 0, by "
            '`scores.difficulty("margin")` averaged over the last epochs:\n',
            table(["image", "label", "prediction", "runner-up", "margin"], hardest),
        ]
    )  # fmt: skip


# --- the README -------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- from bench/results/cpu-*.json: python -m bench report -->", "<!-- end of numbers -->"
FIVE = {  # what it says: the bound without its limit, and its case
    "loss, gradient, six scores over `F.cross_entropy` without scores, 1024 x 32000": (
        "ours / F.cross_entropy", "llama2-vocab"),
    "the same formula in torch, without scores, over ours with six": ("paper's formula / ours", None),
    "with `label_smoothing=0.1`, over `F.cross_entropy` with it": (
        "label smoothing 0.1: ours / F.cross_entropy", None),
    "a tiny batch, 64 x 10, over `F.cross_entropy`": ("ours / F.cross_entropy", "one-batch"),
    "tracking all statistics, over a training step of a small CNN": (
        "tracker update, all fields / training step of a small CNN, 128x3x32x32", None),
}  # fmt: skip


def quote(folder: Path, readme: Path = ROOT / "README.md") -> None:
    """Write into the README what the full records of a folder say."""
    readme.write_text(between(readme.read_text(), BEGIN, END, readme_block(full_records(folder))))


def full_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the records of CPUs by name."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("cpu-*.json"))}
    return {name: results for name, results in found.items() if results["environment"]["effort"] == "full"}


def readme_block(records: dict[str, dict[str, Any]]) -> str:
    """Return five numbers that matter to a user, each beside what was wanted, in a column a machine."""
    columns = [_five(results) for results in records.values()]
    rows = ([says, wanted, *(column[says][1] for column in columns)] for says, (wanted, _) in columns[0].items())
    counts = []
    for name, results in records.items():
        held = [verdict(same) for _, same, _ in by_bound(bounds_of(results))]
        counts.append(f"{held.count(MET)} of {len(held)} bounds are met in [{name}.md](bench/results/{name}.md)")
    return (
        "`python -m bench --full`, one thread, float32 and bfloat16. Times of forward and backward, below 1 the first\n"
        "is faster:\n\n"
        + table(["time of", "wanted", *(_cpu(results["environment"]) for results in records.values())], rows)
        + f"\n{', '.join(counts)}: each opens with what was won and what was missed.\n"
    )


def _five(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return what was wanted and what was measured."""
    found = {}
    for says, (what, case) in FIVE.items():
        same = [
            b for b in bounds_of(results)
            if b["bound"].rpartition(" ")[0][:-3] == what and case in (None, b.get("case"))
        ]  # fmt: skip
        limits = {each["dtype"]: _limit(each) for each in same if "dtype" in each}
        alike = len(set(limits.values())) < 2
        wanted = _limit(same[0]) if same and alike else ", ".join(f"{x} ({dtype})" for dtype, x in limits.items())
        found[says] = (wanted, f"{span(same)}, {verdict(same)}" if same else NOT_MEASURED)
    return found


def _limit(each: dict[str, Any]) -> str:
    return " ".join(each["bound"].rsplit(" ", 2)[1:])


def _cpu(where: dict[str, Any]) -> str:
    """Name a CPU with the instructions that torch and our loops find there: ratios differ between them."""
    return f"{where['cpu']} with {where['instruction_set'].upper()}"
