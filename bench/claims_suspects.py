"""Suspects of a training with flipped labels: how many are flipped, and what dropping them does to the test error."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bonus_ops import ExampleTracker, bonus_cross_entropy_with_scores

from . import digits
from .claims_data import BATCH, HIDDEN, MOMENTUM, N_TEST, RATE
from .claims_verdict import ABOVE_ZERO, verdict
from .command import Picture
from .intervals import interval, mean
from .measure import Effort
from .tables import table

TITLE = "Mislabelled examples"
SEEDS, EPOCHS, QUICK_EPOCHS = 10, 30, 6
SHOWN = 16  # suspects in the second picture


class Setting(NamedTuple):
    flipped: float  # share of the labels, and of the suspects asked for
    hidden_layers: int

    def __str__(self) -> str:
        layers = "two hidden layers" if self.hidden_layers == 2 else "one hidden layer"
        return f"{self.flipped:.0%} flipped, {layers}".replace("%", " %")


SETTINGS = {str(setting): setting for setting in (Setting(0.3, 2), Setting(0.2, 1), Setting(0.15, 1))}
COLUMNS = {
    "precision": "suspects that are flipped, %",
    "recall": "flipped that are suspects, %",
    "before": "test error before, %",
    "after": "after, %",
    "change": "change, points",
}


class Flipped(NamedTuple):
    """Digits, some training labels of which were flipped to another class."""

    images: Tensor  # [N, 64], pixels in [0, 1]
    given: Tensor
    true: Tensor
    test_images: Tensor
    test_labels: Tensor


def flip(share: float) -> Flipped:
    images, labels = digits.load()
    order = torch.randperm(len(labels))
    test, train = order[:N_TEST], order[N_TEST:]
    given = labels[train].clone()
    flipped = torch.rand(len(given)) < share
    given[flipped] = (given[flipped] + torch.randint(1, 10, (int(flipped.sum()),))) % 10
    return Flipped(images[train], given, labels[train], images[test], labels[test])


def fit(data: Flipped, rows: Tensor, hidden_layers: int, epochs: int, tracker: ExampleTracker | None = None) -> float:
    """Train on ``rows`` and return the test error in %."""
    layers: list[nn.Module] = [nn.Linear(64, HIDDEN), nn.ReLU()]
    for _ in range(hidden_layers - 1):
        layers += [nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(HIDDEN, 10))
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, epochs)
    for _ in range(epochs):
        for index in rows[torch.randperm(len(rows))].split(BATCH):
            loss, scores = bonus_cross_entropy_with_scores(model(data.images[index]), data.given[index], bonus=None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if tracker is not None:
                tracker.update(scores, index)
        schedule.step()
        if tracker is not None:
            tracker.end_epoch()
    return 100 * (model(data.test_images).argmax(1) != data.test_labels).double().mean().item()


def jobs(effort: Effort) -> list[tuple[Any, ...]]:
    seeds, epochs = (1, QUICK_EPOCHS) if effort is Effort.QUICK else (SEEDS, EPOCHS)
    return [(name, seed, epochs) for name in SETTINGS for seed in range(seeds)]


def work(name: str, seed: int, epochs: int) -> dict[str, Any]:
    setting = SETTINGS[name]
    torch.manual_seed(seed)
    data = flip(setting.flipped)
    flipped = data.given != data.true
    tracker = ExampleTracker(len(flipped))
    before = fit(data, torch.arange(len(flipped)), setting.hidden_layers, epochs, tracker)
    report = tracker.report(suspect=setting.flipped)
    kept = torch.ones(len(flipped), dtype=torch.bool)
    kept[report.suspects] = False
    after = fit(data, kept.nonzero().squeeze(1), setting.hidden_layers, epochs)
    suspects, found = report.suspects, int(flipped[report.suspects].sum())
    return {
        "precision": 100 * found / len(suspects), "recall": 100 * found / int(flipped.sum()), "before": before,
        "after": after, "worst": [_shown(data, report, index) for index in suspects[:SHOWN].tolist()],
    }  # fmt: skip


def _shown(data: Flipped, report: Any, index: int) -> dict[str, Any]:
    pixels = (16 * data.images[index]).int().tolist()
    suggested = int(report.labels.suggested[index])
    return {"given": int(data.given[index]), "suggested": suggested, "true": int(data.true[index]), "pixels": pixels}


def conclude(results: dict[tuple[Any, ...], dict[str, Any]], effort: Effort) -> dict[str, Any]:
    by_seed: dict[str, list[dict[str, Any]]] = {}
    worst: list[dict[str, Any]] = []  # of the first setting and seed
    for (name, seed, _), found in sorted(results.items(), key=lambda one: one[0][1]):
        measured = {key: found[key] for key in COLUMNS if key != "change"}
        by_seed.setdefault(name, []).append({"seed": seed, **measured, "change": found["after"] - found["before"]})
        if (name, seed) == (next(iter(SETTINGS)), 0):
            worst = found["worst"]
    table = {name: {key: interval([one[key] for one in by_seed[name]]) for key in COLUMNS} for name in SETTINGS}
    verdicts = [
        verdict(f"{name}: dropping the suspects lowers the test error, by points",
                [-one["change"] for one in by_seed[name]], at_least=ABOVE_ZERO)
        for name in SETTINGS
    ]  # fmt: skip
    return {"table": table, "by_seed": by_seed, "worst": worst, "verdicts": [] if effort is Effort.QUICK else verdicts}


def markdown(section: dict[str, Any]) -> str:
    head = ["seed", *COLUMNS.values()]
    parts = [
        f"Digits with flipped labels, {EPOCHS} epochs of plain cross-entropy, watched by an `ExampleTracker`; its "
        "report is asked for as many suspects as flips were made, and a new network is trained without them.\n\n",
        table(["setting", *COLUMNS.values()],
              ([name, *(mean(each[key]) for key in COLUMNS)] for name, each in section["table"].items())),
    ]  # fmt: skip
    for name, seeds in section["by_seed"].items():
        rows = ([one["seed"], *(f"{one[key]:.2f}" for key in COLUMNS)] for one in seeds)
        parts.append(f"\n{name}:\n\n" + table(head, rows))
    return "".join(parts)


def draw(section: dict[str, Any], figure: Any) -> None:
    by_seed = section["by_seed"]
    figure.suptitle("Digits with flipped labels: what dropping the suspects does to the test error. Lower is better.")
    panels = figure.subplots(1, len(by_seed), sharey=True, squeeze=False)
    for axes, (name, seeds) in zip(panels.flat, by_seed.items(), strict=True):
        for one in seeds:
            (line,) = axes.plot([0, 1], [one["before"], one["after"]], "o-", color="C0", alpha=0.5)
        line.set_label("one run")
        mean = section["table"][name]
        axes.plot([0, 1], [mean["before"]["mean"], mean["after"]["mean"]], "o-", color="black", linewidth=3,
                  label=f"mean of {len(seeds)} runs")  # fmt: skip
        axes.set(title=name, xlim=(-0.2, 1.2), ylim=(0, None))
        axes.set_xticks([0, 1], ["trained on all", "suspects dropped"])
        axes.grid(alpha=0.3, axis="y")
    panels.flat[0].set_ylabel("test error, %")
    panels.flat[0].legend()


def draw_worst(section: dict[str, Any], figure: Any) -> None:
    """Draw the images suspected most, with the label given, the one suggested, and whether that is right."""
    figure.suptitle(
        "Handwritten digits, 30 % of their labels flipped on purpose:\nwhat the tracker suspects most after one "
        "training, and the label it suggests"
    )
    for axes, image in zip(figure.subplots(2, SHOWN // 2).flat, section["worst"], strict=True):
        axes.imshow([image["pixels"][i : i + 8] for i in range(0, 64, 8)], cmap="gray_r", vmin=0, vmax=16)
        axes.set_title(f"labelled {image['given']}", fontsize=11, color="firebrick")
        right = image["suggested"] == image["true"]
        axes.set_xlabel(f"suggests {image['suggested']}{'' if right else ' (wrong)'}", fontsize=11, color="darkgreen")
        axes.set(xticks=[], yticks=[])


MORE_PICTURES = {"-worst": Picture(draw_worst, 11, 4)}
