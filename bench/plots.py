"""Pictures from the JSON of a run."""

from __future__ import annotations

import math
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


def accuracy(section: dict[str, Any], figure: Any) -> None:
    figure.suptitle(
        f"Rounding error in float32 against float64, the worst of {section['n_rows']} rows of {section['n_classes']} "
        f"classes. Lower is better; {FLOOR:g} and below are drawn at the lower edge."
    )
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, quantity in zip(panels.flat, PANELS, strict=True):
        for name, errors in section["by_gap"][quantity].items():
            shown = [math.nan if error is None else max(error, FLOOR) for error in errors]
            if name == "ours":  # thin and on top of the other, so that neither hides
                axes.semilogy(section["gaps"], shown, label="bonus_ops", color="C0", zorder=3)
            else:
                axes.semilogy(section["gaps"], shown, label=name, color="C1", linewidth=4, alpha=0.6)
        what, kind = quantity.rsplit(", ", 1)
        axes.set_title(f"{what.replace('target gradient', 'label gradient')}: {kind} error", fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(loc="center right")
    figure.supxlabel("how sure the model is of the label: log-odds, log(p / (1 - p))")
    figure.supylabel("error; absolute ones in nats")
    panels[0, 0].set_ylim(bottom=FLOOR)


SPEED = {  # what is drawn of the providers
    "ours": "bonus_ops: loss, gradient and six scores",
    "ours, loss only": "bonus_ops: loss and gradient",
    "paper's formula": "the same loss and gradient, written in torch",
    "eager loss and scores": "the same loss, gradient and six scores, written in torch",
    "difficulty_scores": "bonus_ops: six scores alone (against the forward alone)",
}


def speed(section: dict[str, Any], figure: Any) -> None:
    """Dots: time of each provider over that of F.cross_entropy, or over its forward for what has no backward."""
    dtypes = list(dict.fromkeys(case["dtype"] for case in section["cases"]))
    figure.suptitle("Time over that of F.cross_entropy with its gradient. Lower is better; left of 1 is faster.")
    panels = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)
    for axes, dtype in zip(panels.flat, dtypes, strict=True):
        cases = [case for case in section["cases"] if case["dtype"] == dtype][::-1]
        drawn = [name for name in SPEED if name in cases[0]["providers"]]
        for i, name in enumerate(drawn):
            ratios = [_relative_time(case["providers"], name) for case in cases]
            at = [y + 0.12 * ((len(drawn) - 1) / 2 - i) for y in range(len(cases))]
            axes.plot(ratios, at, "osD^v"[i], label=SPEED[name])
        axes.set(xscale="log", title=dtype, xlabel="times the time of F.cross_entropy")
        axes.set_yticks(range(len(cases)), [f"{case['case']}\n{_sizes(case)}" for case in cases])
        axes.set_xticks(ticks := (0.25, 0.5, 1, 2, 5, 10, 20), map(str, ticks))
        axes.minorticks_off()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.grid(alpha=0.3, axis="x")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _sizes(case: dict[str, Any]) -> str:
    return " x ".join(map(str, case.get("shape", (case["n_rows"], case["n_classes"]))))


def _relative_time(providers: dict[str, Any], name: str) -> float:
    unit = providers[UNITS[1] if name == "difficulty_scores" else UNITS[0]]
    if "time_ms" not in unit or "time_ms" not in providers[name]:
        return math.nan
    return providers[name]["time_ms"]["median"] / unit["time_ms"]["median"]


def margins(section: dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    for name, loss in section["losses"].items():
        axes.plot(range(1, len(loss["margins"]) + 1), loss["margins"], label=name)
    axes.set(title="The bonus keeps widening the margin: digits, training images", xlabel="epoch",
             ylabel="mean margin, logits\n(the label's logit less the largest other)")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()


def hardest(section: dict[str, Any], figure: Any) -> None:
    figure.suptitle(
        f"The ten training digits that a network finds hardest, hardest first (trained with {section['hardest_of']}).\n"
        "Margin: by how many logits the label leads the runner-up, the likeliest other class."
    )
    for axes, image in zip(figure.subplots(2, 5).flat, section["hardest"], strict=True):
        pixels = image["pixels"]
        axes.imshow([pixels[i : i + 8] for i in range(0, 64, 8)], cmap="gray_r", vmin=0, vmax=16)
        axes.set_title(
            f"label {image['label']}, runner-up {image['runner_up']}\nmargin {image['margin']:.2f}", fontsize=9
        )
        axes.set(xticks=[], yticks=[])
