"""What the example tracker costs beside a training step, and beside the scatter-adds it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bonus_ops import bonus_cross_entropy_with_scores, difficulty_scores
from bonus_ops.dynamics import DEFAULT_FIELDS, FIELDS, ExampleTracker, random_label_loss

from . import measure

N_CLASSES = 10
CNN_BATCH, CNN_EXAMPLES = 128, 50_000  # CIFAR-10's
LARGE_BATCH, LARGE_EXAMPLES = 65_536, 1_000_000
STEP_LIMIT, SCATTER_LIMIT = 0.02, 3.0
KEPT = {"all fields": "all", "default fields": DEFAULT_FIELDS}


def run(quick: bool, device: str, progress: Callable[[str], None]) -> dict[str, Any]:
    on_gpu = device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    reps, budget_s = ((2, 2), 0.0) if quick else ((15, 101), 4.0)
    shrink = 16 if quick else 1
    cases = {}
    for name, steps in (
        ("beside a training step", _beside_training(CNN_BATCH // shrink, device)),
        ("beside index_add_", _beside_scatters(LARGE_BATCH // shrink, LARGE_EXAMPLES // shrink, device)),
    ):
        progress(f"tracker: {name}")
        for step in steps.values():
            measure.time_ms(step, on_gpu)
        times = measure.interleave(steps, on_gpu, budget_s, reps)
        base = next(iter(times))
        cases[name] = {
            "base": base,
            "time_ms": {each: measure.summary(values) for each, values in times.items()},
            "ratios": {each: measure.ratio(times[each], times[base]) for each in times if each in KEPT},
        }
    return {"cases": cases, "threads": None if on_gpu else 1, "bounds": [] if quick or on_gpu else _verdicts(cases)}


def _updates(n_rows: int, n_examples: int, device: str) -> dict[str, measure.Step]:
    """Return a step that updates a tracker, for either choice of fields; another shuffle each time, not timed."""
    logits = 3 * torch.randn(n_rows, N_CLASSES, device=device)
    target = torch.randint(N_CLASSES, (n_rows,), device=device)
    scores = difficulty_scores(logits, target)
    randomly = random_label_loss(logits, target, scores)
    steps = {}
    for name, fields in KEPT.items():
        tracker, index = ExampleTracker(n_examples, fields, device), torch.empty(n_rows, dtype=torch.int64)

        def prepare(index: torch.Tensor = index) -> None:
            index.copy_(torch.randperm(n_examples)[:n_rows])

        def update(tracker: ExampleTracker = tracker, index: torch.Tensor = index) -> None:
            tracker.update(scores, index.to(device), target, random_label_loss=randomly)

        tracker.epoch = 6  # the early window costs too
        steps[name] = measure.Step(prepare, update)
    return steps


def _beside_training(n_rows: int, device: str) -> dict[str, measure.Step]:
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 8 * 8, N_CLASSES),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    images = torch.randn(n_rows, 3, 32, 32, device=device)
    target = torch.randint(N_CLASSES, (n_rows,), device=device)

    def train() -> None:
        optimizer.zero_grad()
        loss, _ = bonus_cross_entropy_with_scores(model(images), target)
        loss.backward()
        optimizer.step()

    name = f"training step of a small CNN, {n_rows}x3x32x32"
    return {name: measure.Step(lambda: None, train), **_updates(n_rows, CNN_EXAMPLES, device)}


def _beside_scatters(n_rows: int, n_examples: int, device: str) -> dict[str, measure.Step]:
    """One `index_add_` for each of the 16 fields, though they keep 27 columns: the stricter reading."""
    columns = [torch.zeros(n_examples, device=device) for _ in FIELDS]
    values, index = torch.randn(n_rows, device=device), torch.empty(n_rows, dtype=torch.int64, device=device)

    def add() -> None:
        for column in columns:
            column.index_add_(0, index, values)

    name = f"one index_add_ a field, {n_rows} of {n_examples} examples"
    return {
        name: measure.Step(lambda: index.copy_(torch.randperm(n_examples)[:n_rows]), add),
        "all fields": _updates(n_rows, n_examples, device)["all fields"],
    }


def _verdicts(cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    limits = {"beside a training step": STEP_LIMIT, "beside index_add_": SCATTER_LIMIT}
    verdicts = []
    for name, limit in limits.items():
        value = cases[name]["ratios"]["all fields"]["median"]
        what = f"tracker update, all fields / {cases[name]['base']} <= {limit:g}"
        verdicts.append({"bound": what, "value": value, "passed": value <= limit})
    return verdicts
