"""Suspects of a training with flipped labels: how many are flipped, and what dropping them does to the test error.

The code is the README's own, the block under Training dynamics, as it stands but for what a setting replaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import sys
from typing import Any

from .claims_verdict import ABOVE_ZERO, interval, verdict
from .record import ROOT, between

TITLE = "Suspects of the README's example"
README, HEADING = ROOT / "README.md", "## Training dynamics"
SEEDS, EPOCHS, QUICK_EPOCHS = 10, 30, 6
AS_IT_STANDS = "30 % flipped, two hidden layers"


def _fewer(share: float) -> dict[str, str]:
    """Return what to replace for that share of flips and suspects, and one hidden layer."""
    return {"< 0.3": f"< {share}", "suspect=0.3": f"suspect={share}", "nn.Linear(256, 256), nn.ReLU(), ": ""}


SETTINGS: dict[str, dict[str, str]] = {
    AS_IT_STANDS: {},
    "20 % flipped, one hidden layer": _fewer(0.2),
    "15 % flipped, one hidden layer": _fewer(0.15),
}
BEGIN = "<!-- suspects: from bench/results/claims.json, by `python -m bench claims suspects` -->"
END = "<!-- end of suspects -->"
WRITES_FILES = re.compile(r"^report\.(?:to_csv|plot)\(.*\)\n", re.MULTILINE)
COLUMNS = {
    "precision": "suspects that are flipped, %",
    "recall": "flipped that are suspects, %",
    "before": "test error before, %",
    "after": "after, %",
    "change": "change, points",
}


def block() -> str:
    """Return the README's code; exit where there is none."""
    if not README.exists():
        sys.exit(f"{README} is not there: this claim runs the code in it, so run it from a checkout")
    section = README.read_text().partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    if len(found) != 1:
        sys.exit(f"{README}: expected one block of python under {HEADING!r}, found {len(found)}")
    return found[0]


def digest(text: str) -> str:
    """Return what tells whether a record was measured with this code."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code(name: str, seed: int, epochs: int) -> str:
    """Return the README's code with another seed, length and setting, writing no file."""
    text = WRITES_FILES.sub("", block())
    changes = {"manual_seed(0)": f"manual_seed({seed})", f"epochs={EPOCHS}": f"epochs={epochs}", **SETTINGS[name]}
    for old, new in changes.items():
        if text.count(old) != 1:
            sys.exit(f"{README}: expected {old!r} once in the code under {HEADING!r}, found it {text.count(old)} times")
        text = text.replace(old, new)
    return text


def jobs(quick: bool) -> list[tuple[Any, ...]]:
    seeds, epochs = (1, QUICK_EPOCHS) if quick else (SEEDS, EPOCHS)
    made = [(name, seed, epochs) for name in SETTINGS for seed in range(seeds)]
    for job in made:
        code(*job)  # in time: an exit in a process of the pool says nothing
    return made


def work(name: str, seed: int, epochs: int) -> dict[str, float]:
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code(name, seed, epochs), str(README), "exec"), names)
    flipped, suspects = names["flipped"], names["report"].suspects
    found = int(flipped[suspects].sum())
    return {
        "precision": 100 * found / len(suspects),
        "recall": 100 * found / int(flipped.sum()),
        "before": 100 * names["before"],
        "after": 100 * names["after"],
    }


def conclude(results: dict[tuple[Any, ...], dict[str, float]], quick: bool) -> dict[str, Any]:
    by_seed: dict[str, list[dict[str, float]]] = {}
    for (name, seed, _), found in sorted(results.items(), key=lambda one: one[0][1]):
        by_seed.setdefault(name, []).append({"seed": seed, **found, "change": found["after"] - found["before"]})
    table = {name: {key: interval([one[key] for one in by_seed[name]]) for key in COLUMNS} for name in SETTINGS}
    verdicts = [
        verdict(f"{name}: dropping the suspects lowers the test error, by points",
                [-one["change"] for one in by_seed[name]], at_least=ABOVE_ZERO)
        for name in SETTINGS
    ]  # fmt: skip
    return {"code": digest(block()), "table": table, "by_seed": by_seed, "verdicts": [] if quick else verdicts}


def markdown(section: dict[str, Any], table: Any, cell: Any) -> str:
    head = ["seed", *COLUMNS.values()]
    parts = [
        "The README's example under *Training dynamics*: digits with flipped labels, 30 epochs, as many suspects as "
        "flips were made. The first setting is the code as it stands, the others replace the shares and leave out a "
        f"layer; code {section['code']}.\n\n",
        table(["setting", *COLUMNS.values()],
              ([name, *(cell(each[key]) for key in COLUMNS)] for name, each in section["table"].items())),
    ]  # fmt: skip
    for name, seeds in section["by_seed"].items():
        rows = ([one["seed"], *(f"{one[key]:.2f}" for key in COLUMNS)] for one in seeds)
        parts.append(f"\n{name}:\n\n" + table(head, rows))
    return "".join(parts)


def with_results(readme: str, section: dict[str, Any], table: Any, cell: Any) -> str:
    """Return the README with what this claim measured between its markers."""
    from .report import _paragraph

    first, seeds = section["by_seed"][AS_IT_STANDS][0], section["table"][AS_IT_STANDS]["change"]["seeds"]
    rows = (
        [name, *(cell(each[key]) for key in COLUMNS), v["verdict"]]
        for (name, each), v in zip(section["table"].items(), section["verdicts"], strict=True)
    )
    text = _paragraph(
        f"Seed {first['seed']}: {first['precision']:.0f} % of the suspects are flipped, and the test error goes from "
        f"{first['before']:.1f} to {first['after']:.1f} %. `python -m bench claims suspects` runs this code with "
        f"{seeds} seeds, and with fewer flips and a layer less; mean ± half the 95 % confidence interval, all of it in "
        "[claims.md](bench/results/claims.md):"
    )
    return between(readme, BEGIN, END, f"{text}\n{table(['setting', *COLUMNS.values(), 'the error falls'], rows)}")


def draw(section: dict[str, Any], figure: Any) -> None:
    by_seed = section["by_seed"]
    panels = figure.subplots(1, len(by_seed), sharey=True, squeeze=False)
    for axes, (name, seeds) in zip(panels.flat, by_seed.items(), strict=True):
        for one in seeds:
            axes.plot([0, 1], [one["before"], one["after"]], "o-", color="C0", alpha=0.5)
        mean = section["table"][name]
        axes.plot([0, 1], [mean["before"]["mean"], mean["after"]["mean"]], "o-", color="black", linewidth=3)
        axes.set(title=name, xlim=(-0.2, 1.2), ylim=(0, None))
        axes.set_xticks([0, 1], ["all examples", "suspects dropped"])
        axes.grid(alpha=0.3, axis="y")
    panels.flat[0].set_ylabel("test error, %; a line a seed, black their mean")
