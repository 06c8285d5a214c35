"""A real run: a small classifier of scikit-learn's digits, trained with plain and bonus loss.

It shows what the bonus does to margins, energies and gradients, and what the scores find. It claims nothing about
accuracy: on this task its differences are about as large as the spread of the seeds.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from bonus_ops import GapLoss, LogBonus, Scores, bonus_cross_entropy_with_scores, difficulty_scores

from .bounds import bound
from .command import Tell, counted
from .intervals import interval
from .measure import Effort

LOSSES: dict[str, GapLoss | None] = {
    "cross-entropy": None,
    "LogBonus(0.75)": LogBonus(0.75),
    "LogBonus(1.0)": LogBonus(1.0),
}
EPOCHS, DROPS, BATCH, RATE, MOMENTUM, N_TEST = 30, (18, 25), 64, 0.05, 0.9, 450
CONFIDENT = 0.9
SHARE_EPOCH = 3  # when the gradient share is taken: later nearly every row is confident
LAST_EPOCHS = 5  # averaged to find the hardest images
SHOWN = "LogBonus(0.75)"  # the run whose hardest images are shown
COLUMNS = {
    "accuracy": "test accuracy, %",
    "train_margin": "train margin, logits",
    "train_energy": "train energy, nats",
    "confident_share": "gradient share of p > .9 after epoch 3",
}


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    if not importlib.util.find_spec("sklearn"):
        return {"skipped": "scikit-learn is not installed: no digits (pip install scikit-learn)"}
    n_seeds, epochs = (3 if effort is Effort.FULL else 1), (4 if effort is Effort.QUICK else EPOCHS)
    losses, hardest = {}, []
    for (name,) in counted(((name,) for name in LOSSES), tell):
        runs = [_Run(LOSSES[name], seed).train(epochs) for seed in range(n_seeds)]
        losses[name] = _statistics([each.result for each in runs])
        if name == SHOWN:
            hardest = runs[0].hardest(10)
    return {
        "seeds": n_seeds, "epochs": epochs, "losses": losses, "hardest": hardest, "hardest_of": SHOWN,
        "bounds": [] if effort is Effort.QUICK else _verdicts(losses),
    }  # fmt: skip


class _Run:
    """One training run and what it showed."""

    def __init__(self, bonus: GapLoss | None, seed: int) -> None:
        self.bonus = bonus
        self.images, self.labels = load()
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(1000 + seed))
        self.index = order[:-N_TEST]  # of the training images in the data set
        self.train_rows, self.test_rows = order[:-N_TEST], order[-N_TEST:]
        torch.manual_seed(seed)
        layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        self.model = nn.Sequential(*layers)
        self.margins: list[float] = []
        self.difficulty = torch.zeros(len(self.index))
        self.share = float("nan")

    def train(self, epochs: int) -> _Run:
        optimizer = torch.optim.SGD(self.model.parameters(), RATE, MOMENTUM)
        drops = [drop * epochs // EPOCHS for drop in DROPS]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, drops, 0.1)
        for epoch in range(1, epochs + 1):
            for rows in self.train_rows[torch.randperm(len(self.train_rows))].split(BATCH):
                optimizer.zero_grad()
                loss, _ = bonus_cross_entropy_with_scores(
                    self.model(self.images[rows]), self.labels[rows], bonus=self.bonus
                )
                loss.backward()
                optimizer.step()
            schedule.step()
            self._watch(epoch, epochs)
        return self

    def _watch(self, epoch: int, epochs: int) -> None:
        scores = self.scores(self.train_rows)
        self.margins.append(float(scores.margin.mean()))
        if epoch == SHARE_EPOCH:
            norm = scores.grad_norm(self.bonus)
            self.share = float(norm[scores.target_prob > CONFIDENT].sum() / norm.sum())
        if epoch > epochs - LAST_EPOCHS:
            self.difficulty += scores.difficulty("margin") / min(LAST_EPOCHS, epochs)

    @torch.no_grad()
    def scores(self, rows: Tensor) -> Scores:
        return difficulty_scores(self.model(self.images[rows]), self.labels[rows])

    @property
    def result(self) -> dict[str, Any]:
        train, test = self.scores(self.train_rows), self.scores(self.test_rows)
        return {
            "accuracy": 100 * float(test.correct(self.labels[self.test_rows]).float().mean()),
            "train_margin": float(train.margin.mean()),
            "train_energy": float(train.energy.mean()),
            "confident_share": self.share,
            "margins": self.margins,
        }

    def hardest(self, n: int) -> list[dict[str, Any]]:
        """Return the training images of lowest margin, averaged over the last epochs."""
        scores, labels = self.scores(self.train_rows), self.labels[self.train_rows]
        prediction = scores.prediction(labels)
        return [
            {
                "index": int(self.index[i]), "label": int(labels[i]), "prediction": int(prediction[i]),
                "runner_up": int(scores.runner_up[i]), "margin": -float(self.difficulty[i]),
                "pixels": (16 * self.images[self.train_rows[i]]).round().int().tolist(),
            }
            for i in self.difficulty.topk(n).indices.tolist()
        ]  # fmt: skip


@functools.cache
def load() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's images in [0, 1] [1797, 64], and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def _statistics(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each number over the seeds, and the mean margin after each epoch."""
    margins = [statistics.fmean(values) for values in zip(*(r["margins"] for r in results), strict=True)]
    return {key: interval([result[key] for result in results]) for key in COLUMNS} | {"margins": margins}


def _verdicts(losses: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare with what the bonus is known to do: bounds well inside what `python -m bench claims` measures."""

    def over_plain(key: str, name: str) -> float:
        return losses[name][key]["mean"] / losses["cross-entropy"][key]["mean"]

    accuracy = {name: each["accuracy"]["mean"] for name, each in losses.items()}
    furthest = max(abs(each - accuracy["cross-entropy"]) for each in accuracy.values())
    wanted = (("train_margin", "LogBonus(0.75)", 1.3), ("train_margin", "LogBonus(1.0)", 4.0),
              ("confident_share", "LogBonus(1.0)", 2.0))  # fmt: skip
    return [
        *(bound(f"{key.replace('_', ' ')}, {name} / cross-entropy", over_plain(key, name), at_least=at_least)
          for key, name, at_least in wanted),
        bound("accuracy of the furthest less that of cross-entropy, points", furthest, at_most=1.5),
    ]  # fmt: skip
