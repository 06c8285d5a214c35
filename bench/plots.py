"""Pictures from the JSON of a run."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

FLOOR = 1e-9  # errors below, and exact results, are drawn here
PANELS = (
    "cross-entropy, relative",
    "target gradient of cross-entropy, relative",
    "EL2N, relative",
    "bonus loss, absolute",
    "target gradient of bonus loss, relative",
    "log(1-p), absolute",
)
UNITS = ("F.cross_entropy", "F.cross_entropy, forward")


def why_not() -> str | None:
    """Return why nothing can be drawn, or None."""
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed: no pictures"


def draw(results: dict[str, Any], folder: Path, stem: str) -> list[str]:
    """Draw what ``results`` holds into ``folder``; return the file names."""
    figures = {}
    if "accuracy" in results:
        figures["accuracy"] = accuracy(results["accuracy"])
    if "speed" in results:
        figures["speed"] = speed(results["speed"])
    if "digits" in results and "skipped" not in results["digits"]:
        figures["digits-margin"] = margins(results["digits"])
        figures["digits-hardest"] = hardest(results["digits"])
    names = [f"{stem}-{name}.png" for name in figures]
    for name, figure in zip(names, figures.values(), strict=True):
        figure.savefig(folder / name, dpi=100)
    return names


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def accuracy(section: dict[str, Any]) -> Any:
    figure = _figure(13, 7)
    for axes, quantity in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name, errors in section["by_gap"][quantity].items():
            shown = [math.nan if error is None else max(error, FLOOR) for error in errors]
            axes.semilogy(section["gaps"], shown, label=name)
        axes.set(title=f"error of {quantity}", xlabel="gap of the label, log p - log(1 - p)", ylim=(FLOOR / 2, None))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def speed(section: dict[str, Any]) -> Any:
    """Bars: time of each provider over that of F.cross_entropy, or over its forward for what has no backward."""
    dtypes = list(dict.fromkeys(case["dtype"] for case in section["cases"]))
    figure = _figure(13, 3.6 * len(dtypes))
    for axes, dtype in zip(figure.subplots(len(dtypes), 1, squeeze=False).flat, dtypes, strict=True):
        cases = [case for case in section["cases"] if case["dtype"] == dtype]
        timed = [n for n in cases[0]["providers"] if any("time_ms" in case["providers"][n] for case in cases)]
        names = [name for name in timed if name not in UNITS]
        width = 0.85 / len(names)
        for i, name in enumerate(names):
            heights = [_relative_time(case["providers"], name) for case in cases]
            axes.bar([j + (i - len(names) / 2 + 0.5) * width for j in range(len(cases))], heights, width, label=name)
        axes.set(yscale="log", title=f"{dtype}: time over that of F.cross_entropy (difficulty_scores: of its forward)")
        axes.set_xticks(range(len(cases)), [_sizes(case) for case in cases])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3, axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _sizes(case: dict[str, Any]) -> str:
    return "x".join(map(str, case.get("shape", (case["n_rows"], case["n_classes"]))))


def _relative_time(providers: dict[str, Any], name: str) -> float:
    unit = providers[UNITS[1] if name == "difficulty_scores" else UNITS[0]]
    if "time_ms" not in unit or "time_ms" not in providers[name]:
        return math.nan
    return providers[name]["time_ms"]["median"] / unit["time_ms"]["median"]


def margins(section: dict[str, Any]) -> Any:
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for name, loss in section["losses"].items():
        axes.plot(range(1, len(loss["margins"]) + 1), loss["margins"], label=name)
    axes.set(title="digits: mean margin of the training images", xlabel="epoch", ylabel="margin, logits")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def hardest(section: dict[str, Any]) -> Any:
    figure = _figure(11, 5.2)
    figure.suptitle(f"digits: the ten hardest training images, {section['hardest_of']}, lowest margin first")
    for axes, image in zip(figure.subplots(2, 5).flat, section["hardest"], strict=True):
        pixels = image["pixels"]
        axes.imshow([pixels[i : i + 8] for i in range(0, 64, 8)], cmap="gray_r", vmin=0, vmax=16)
        axes.set_title(
            f"label {image['label']}, predicted {image['prediction']}\n"
            f"runner-up {image['runner_up']}, margin {image['margin']:.2f}",
            fontsize=9,
        )
        axes.axis("off")
    return figure
