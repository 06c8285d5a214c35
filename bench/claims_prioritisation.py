"""Prioritising hard examples under label noise: test error of each policy at the same number of backward passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

from bonus_ops import Scores, bonus_cross_entropy_with_scores, difficulty_scores
from bonus_ops.policies import (
    TAKEN_OUT,
    DifficultySampler,
    History,
    exponentiated_gradient,
    exponentiated_weight,
    guarded,
    importance_draw,
    infobatch,
    noise_mask,
    selective_backprop,
)

from .claims_data import BATCH, EASY, NOISY, RATE, Network, digits_split, error, sgd, task
from .claims_verdict import ABOVE_ZERO, paired, verdict
from .intervals import interval, mean
from .measure import Effort
from .tables import table

TITLE = "Prioritisation under label noise"
NOISE = (0, 25, 50)  # % of the training labels drawn at random
SEEDS, EPOCHS = 5, 30  # the budget, in backward passes per example
PRESAMPLE = 3 * BATCH
MOST_SCORED = 200  # forward passes per example without a backward pass: a guard that is too strict never fills a batch
LEAST_RATE = 0.02  # of the initial learning rate
GUARD_FORWARDS, GUARD_QUANTILE = 5, 0.10  # an example is judged once it has five losses


class Run:
    """One training run under a budget of backward passes."""

    def __init__(self, noise: int, seed: int, epochs: int) -> None:
        rng = numpy.random.RandomState(seed)
        images, labels, test_images, test_labels = digits_split(rng)
        n = len(labels)
        bad = rng.choice(n, int(noise / 100 * n), replace=False)
        labels, kind = labels.copy(), numpy.full(n, EASY)
        labels[bad], kind[bad] = rng.randint(0, 10, len(bad)), NOISY
        self.data = task(images, labels, kind, test_images, test_labels)
        torch.manual_seed(seed)
        self.model = Network(64, 10)
        self.optimizer = sgd(self.model)
        self.n, self.budget = n, epochs * n
        self.spent = self.spent_on_bad = self.scored = 0

    @property
    def progress(self) -> float:
        return min(1.0, self.spent / self.budget)

    @property
    def going(self) -> bool:
        return self.spent < self.budget and self.scored < MOST_SCORED * self.n

    def batches(self, size: int = BATCH) -> Iterator[Tensor]:
        """Yield batches of shuffled epochs, the last one of each partial, while the budget lasts."""
        while self.going:
            for rows in torch.randperm(self.n).split(size):
                if self.going:
                    yield rows

    def score(self, rows: Tensor) -> tuple[Tensor, Scores]:
        """Return logits and scores of a forward pass alone."""
        self.scored += len(rows)
        with torch.no_grad():
            logits = self.model(self.data.images[rows])
        return logits, difficulty_scores(logits, self.data.labels[rows])

    def step(self, rows: Tensor, weight: Tensor | None = None, divide_by: Tensor | int | None = None) -> Scores:
        """Train on ``sum(weight * loss) / divide_by``; the plain mean without weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * max(LEAST_RATE, 1 - self.progress)
        self.optimizer.zero_grad()
        loss, scores = bonus_cross_entropy_with_scores(
            self.model(self.data.images[rows]), self.data.labels[rows], reduction="none", bonus=None
        )
        (loss.mean() if weight is None else (weight * loss).sum() / divide_by).backward()
        self.optimizer.step()
        self.spent += len(rows)
        self.spent_on_bad += int((self.data.kind[rows] == NOISY).sum())
        return scores


def uniform(run: Run) -> None:
    for rows in run.batches():
        run.step(rows)


def selective(run: Run, guard: float | None = None) -> None:
    """Selective-Backprop; with ``guard``, suspects above that quantile of the random-label losses are left out."""
    history, denoiser = History.empty(), Denoiser(run.n)
    queue = torch.empty(0, dtype=torch.int64)
    for rows in run.batches():
        warm = run.scored < run.n
        logits, scores = run.score(rows)
        difficulty = scores.difficulty("loss")
        if guard is not None:
            difficulty = guarded(difficulty, denoiser.suspects(rows, guard))
            denoiser.observe(rows, logits, scores)
        history = history.push(difficulty)
        keep = difficulty > TAKEN_OUT if warm else selective_backprop(difficulty, history).keep
        queue = torch.cat([queue, rows[keep]])
        while len(queue) >= BATCH:
            run.step(queue[:BATCH])
            queue = queue[BATCH:]


class Denoiser:
    """On-the-fly denoising: the last two losses of each example against a quantile of random-label losses.

    Examples are judged by what was known before the present forward pass, as a tracker would know it.
    """

    def __init__(self, n: int) -> None:
        self.last = torch.full((2, n), torch.nan)
        self.seen = torch.zeros(n, dtype=torch.int64)
        self.random = History.empty(2048)

    def suspects(self, rows: Tensor, quantile: float) -> Tensor:
        threshold = self.random.quantile(quantile)
        return noise_mask(
            self.last[:, rows].mean(0), threshold, observations=self.seen[rows], min_observations=GUARD_FORWARDS
        )

    def observe(self, rows: Tensor, logits: Tensor, scores: Scores) -> None:
        self.last[:, rows] = torch.stack([self.last[1, rows], scores.loss])
        self.seen[rows] += 1
        label = torch.randint(logits.shape[1], rows.shape)  # of all classes, as in the paper
        self.random = self.random.push(-scores.energy - logits.gather(1, label[:, None])[:, 0])


def importance(run: Run, unbiased: bool, score: str = "loss") -> None:
    for rows in run.batches(PRESAMPLE):
        _, scores = run.score(rows)
        draw = importance_draw(scores.difficulty(score), BATCH, smoothing=1e-6)
        run.step(rows[draw.indices], draw.unbiased_weight if unbiased else None, BATCH)


def exponentiated(run: Run, eta: float = 0.05) -> None:
    log_weight = torch.zeros(run.n)
    while run.going:
        weight = exponentiated_weight(log_weight)  # frozen for the epoch
        for rows in torch.randperm(run.n).split(BATCH):
            scores = run.step(rows, weight[rows], weight[rows].sum())
            log_weight = exponentiated_gradient(log_weight, scores.loss, eta=eta, index=rows)


def pruned(run: Run) -> None:
    loss = torch.full((run.n,), torch.inf)  # never seen
    sampler = DifficultySampler(
        lambda: loss.clone(), lambda d, g: infobatch(d, progress=run.progress, generator=g), seed=torch.initial_seed()
    )
    while run.going:
        for rows in torch.tensor(list(sampler)).split(BATCH):
            if run.going:
                loss[rows] = run.step(rows, sampler.weight[rows], len(rows)).loss


METHODS: dict[str, Callable[[Run], None]] = {
    "uniform": uniform,
    "selective backprop": selective,
    "importance sampling, plain": functools.partial(importance, unbiased=False),
    "importance sampling, unbiased": functools.partial(importance, unbiased=True),
    "importance sampling by EL2N, unbiased": functools.partial(importance, unbiased=True, score="el2n"),
    "guarded selective backprop": functools.partial(selective, guard=GUARD_QUANTILE),
    "guarded, quantile .05": functools.partial(selective, guard=0.05),
    "guarded, quantile .20": functools.partial(selective, guard=0.20),
    "exponentiated gradient": exponentiated,
    "InfoBatch": pruned,
}
SENSITIVITY = ("guarded, quantile .05", "guarded, quantile .20")  # at the most noise only


def jobs(effort: Effort) -> list[tuple[Any, ...]]:
    if effort is Effort.QUICK:
        return [(name, 50, 0, 1) for name in METHODS if name not in SENSITIVITY]
    return [
        (name, noise, seed, EPOCHS)
        for name in METHODS
        for noise in NOISE
        for seed in range(SEEDS)
        if noise == NOISE[-1] or name not in SENSITIVITY
    ]


def work(name: str, noise: int, seed: int, epochs: int) -> dict[str, float]:
    run = Run(noise, seed, epochs)
    METHODS[name](run)
    return {
        "error": error(run.model, run.data),
        "bad": 100 * run.spent_on_bad / run.spent,
        "forwards": (run.scored + run.spent) / run.n,
        "backwards": run.spent / run.n,
    }


def conclude(results: dict[tuple[Any, ...], dict[str, float]], effort: Effort) -> dict[str, Any]:
    table: dict[str, dict[str, Any]] = {}
    errors: dict[int, dict[str, dict[int, float]]] = {}
    for (name, noise, seed, _), result in results.items():
        errors.setdefault(noise, {}).setdefault(name, {})[seed] = result["error"]
    for noise, by_name in errors.items():
        for name in by_name:
            each = [value for job, value in results.items() if job[:2] == (name, noise)]
            table.setdefault(name, {})[str(noise)] = {key: interval([one[key] for one in each]) for key in each[0]}
    return {"table": table, "verdicts": [] if effort is Effort.QUICK else _verdicts(errors)}


def _verdicts(errors: dict[int, dict[str, dict[int, float]]]) -> list[dict[str, Any]]:
    def gain(noise: int, name: str) -> list[float]:
        return paired(errors[noise], name, "uniform")

    plain, unbiased = "importance sampling, plain", "importance sampling, unbiased"
    guarded_name = "guarded selective backprop"
    delicate = [
        max(errors[50][name][seed] for name in SENSITIVITY) - value
        for seed, value in errors[50][guarded_name].items()
    ]  # fmt: skip
    return [
        verdict("clean labels: selective backprop - uniform, points", gain(0, "selective backprop"),
                at_least=-1, at_most=1),
        verdict("25 % noise: selective backprop fails, - uniform", gain(25, "selective backprop"), at_least=2),
        verdict("50 % noise: selective backprop fails, - uniform", gain(50, "selective backprop"), at_least=5),
        verdict("50 % noise: plain importance sampling fails, - uniform", gain(50, plain), at_least=2),
        verdict("50 % noise: unbiased importance sampling as uniform, - uniform", gain(50, unbiased),
                at_least=-2, at_most=2),
        verdict("50 % noise: the guard rescues selective backprop, - uniform", gain(50, guarded_name), at_most=0),
        verdict("50 % noise: its quantile is delicate, worst of .05 and .20 - .10", delicate, at_least=3),
        verdict("50 % noise: exponentiated gradient helps, - uniform", gain(50, "exponentiated gradient"), at_most=-3),
        verdict("clean labels: exponentiated gradient costs, - uniform", gain(0, "exponentiated gradient"),
                at_least=ABOVE_ZERO),
        verdict("50 % noise: InfoBatch, unbiased, is not robust, - uniform", gain(50, "InfoBatch"), at_least=1),
    ]  # fmt: skip


def markdown(section: dict[str, Any]) -> str:
    noises = list(dict.fromkeys(noise for each in section["table"].values() for noise in each))

    def rows(key: str) -> Any:
        return ([name, *(mean(each[n][key]) if n in each else "-" for n in noises)]
                for name, each in section["table"].items())  # fmt: skip

    head = ["policy", *(f"{noise} % random labels" for noise in noises)]
    return (
        "A 64-256-256-10 ReLU network on 1297 digits, SGD at 0.1 falling with the budget: 30 backward passes an "
        "example, whatever a policy chooses them to be. Test error on clean labels, %:\n\n" + table(head, rows("error"))
        + "\nShare of the backward passes spent on random labels, %:\n\n" + table(head, rows("bad"))
        + "\nForward passes an example, those of training included:\n\n" + table(head, rows("forwards"))
    )  # fmt: skip


def draw(section: dict[str, Any], figure: Any) -> None:
    names = list(section["table"])[::-1]
    noises = list(dict.fromkeys(noise for each in section["table"].values() for noise in each))
    figure.suptitle(
        "Choosing which examples to train on, at the same number of backward passes. Lower is better; bars: "
        "95 % interval of the mean."
    )
    panels = figure.subplots(1, len(noises), sharex=True, sharey=True, squeeze=False)
    for axes, noise in zip(panels.flat, noises, strict=True):
        for y, name in enumerate(names):
            if noise not in section["table"][name]:
                axes.text(0.02, y, "not measured", transform=axes.get_yaxis_transform(), va="center", color="gray",
                          backgroundcolor="white")  # fmt: skip
                continue
            error = section["table"][name][noise]["error"]
            axes.errorbar(error["mean"], y, xerr=error["half"] or 0, fmt="o", color="C0", capsize=3)
        uniform = section["table"]["uniform"][noise]["error"]["mean"]
        axes.axvline(uniform, color="gray", linewidth=0.8, linestyle="--")
        axes.set(title=f"{noise} % of the labels random", xlabel="test error, %", xscale="log")
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(ticks := (2, 5, 10, 20, 50), map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3, axis="x")
    figure.supxlabel(
        "dashed: uniform, every example alike. Guarded: without suspects, those whose loss is above the .10 (.05, .20) "
        "quantile of what random labels would cost.",
        fontsize=10,
    )
