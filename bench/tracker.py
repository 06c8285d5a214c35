"""What the example tracker costs beside a training step, and beside the scatter-adds it cannot do without."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bonus_ops import bonus_cross_entropy_with_scores, difficulty_scores
from bonus_ops.dynamics import DEFAULT_FIELDS, FIELDS, ExampleTracker, random_label_loss

from . import measure
from .bounds import bound
from .command import Tell, counted
from .intervals import ratio, summary
from .measure import Effort

N_CLASSES = 10
CNN_BATCH, CNN_EXAMPLES = 128, 50_000  # CIFAR-10's
LARGE_BATCH, LARGE_EXAMPLES = 65_536, 1_000_000
BASES = {  # what the update of all fields is held against, and what of it is required
    "beside a training step": (f"training step of a small CNN, {CNN_BATCH}x3x32x32", 0.02),
    "beside index_add_": (f"one index_add_ a field, {LARGE_BATCH} of {LARGE_EXAMPLES} examples", 3.0),
}
KEPT = {"all fields": "all", "default fields": DEFAULT_FIELDS}


def cases() -> list[tuple[str]]:
    return [(name,) for name in BASES]


def names(case: str) -> list[str]:
    return [BASES[case][0], *(KEPT if case == "beside a training step" else ["all fields"])]


def steps(case: str, effort: Effort) -> dict[str, measure.Step]:
    shrink = 16 if effort is Effort.QUICK else 1
    if case == "beside a training step":
        return _beside_training(CNN_BATCH // shrink)
    return _beside_scatters(LARGE_BATCH // shrink, LARGE_EXAMPLES // shrink)


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    found = {}
    for (name,) in counted(cases(), tell):
        made, base = steps(name, effort), BASES[name][0]
        for step in made.values():
            measure.time_ms(step)
        times = measure.interleave(made, *effort.rounds(4.0, (15, 101)))
        found[name] = {
            "base": base,
            "time_ms": {each: summary(values) for each, values in times.items()},
            "ratios": {each: ratio(times[each], times[base]) for each in times if each in KEPT},
        }
    return {"cases": found, "bounds": [] if effort is Effort.QUICK else verdicts(found)}


def _updates(n_rows: int, n_examples: int) -> dict[str, measure.Step]:
    """Return a step that updates a tracker, for either choice of fields; another shuffle each time, not timed."""
    logits = 3 * torch.randn(n_rows, N_CLASSES)
    target = torch.randint(N_CLASSES, (n_rows,))
    scores = difficulty_scores(logits, target)
    randomly = random_label_loss(logits, target, scores)
    steps = {}
    for name, fields in KEPT.items():
        tracker, index = ExampleTracker(n_examples, fields), torch.empty(n_rows, dtype=torch.int64)

        def prepare(index: torch.Tensor = index) -> None:
            index.copy_(torch.randperm(n_examples)[:n_rows])

        def update(tracker: ExampleTracker = tracker, index: torch.Tensor = index) -> None:
            tracker.update(scores, index, target, random_label_loss=randomly)

        tracker.epoch = 6  # the early window costs too
        steps[name] = measure.Step(prepare, update)
    return steps


def _beside_training(n_rows: int) -> dict[str, measure.Step]:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, N_CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(n_rows, 3, 32, 32)
    target = torch.randint(N_CLASSES, (n_rows,))

    def train() -> None:
        optimizer.zero_grad()
        loss, _ = bonus_cross_entropy_with_scores(model(images), target)
        loss.backward()
        optimizer.step()

    return {
        BASES["beside a training step"][0]: measure.Step(lambda: None, train),
        **_updates(n_rows, CNN_EXAMPLES),
    }


def _beside_scatters(n_rows: int, n_examples: int) -> dict[str, measure.Step]:
    """One `index_add_` for each of the 16 fields, though they keep 27 columns: the stricter reading."""
    columns = [torch.zeros(n_examples) for _ in FIELDS]
    values, index = torch.randn(n_rows), torch.empty(n_rows, dtype=torch.int64)

    def add() -> None:
        for column in columns:
            column.index_add_(0, index, values)

    return {
        BASES["beside index_add_"][0]: measure.Step(lambda: index.copy_(torch.randperm(n_examples)[:n_rows]), add),
        "all fields": _updates(n_rows, n_examples)["all fields"],
    }


def verdicts(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        bound(f"tracker update, all fields / {base}", found[name]["ratios"]["all fields"]["median"], at_most=limit)
        for name, (base, limit) in BASES.items()
    ]
