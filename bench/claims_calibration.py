"""Which loss, at what price: accuracy and calibration of the bonus and of what else one would try, on two data sets.

Digits are scikit-learn's. Lines are lines of Python's own standard library, to be told by the package they come from:
no images, many of them ambiguous, and installed wherever Python is.
"""

from __future__ import annotations

import functools
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import Focal, LogBonus, PowerBonus, bonus_cross_entropy

from . import digits
from .claims_data import BATCH, DECAY, MOMENTUM, RATE
from .claims_encouraging import PLAIN, ScaledCrossEntropy
from .claims_verdict import ABOVE_ZERO, verdict
from .intervals import interval, mean
from .measure import Effort
from .tables import table

TITLE = "Accuracy and calibration"
LARGER_STEPS = "cross-entropy, rate x 2"  # a bonus takes larger steps too
LOSSES: dict[str, dict[str, Any]] = {
    PLAIN: {"bonus": None},
    LARGER_STEPS: {"bonus": ScaledCrossEntropy(2.0)},
    "LogBonus(0.5)": {"bonus": LogBonus(0.5)},
    "LogBonus(0.75)": {"bonus": LogBonus(0.75)},
    "LogBonus(1.0)": {"bonus": LogBonus(1.0)},
    "PowerBonus(1.0)": {"bonus": PowerBonus(1.0)},
    "Focal(2.0)": {"bonus": Focal(2.0)},
    "label smoothing 0.1": {"bonus": None, "label_smoothing": 0.1},
}
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
N_FEATURES, SHORTEST = 512, 20  # of a line: hashed groups of letters; characters
DATA = ("digits", "lines")
BALANCES = {"balanced": 1.0, "imbalanced": 0.05}  # the rarest class trains on that share of the most frequent one
SEEDS, HIDDEN, N_BINS = 10, 128, 15
EPOCHS = {"digits": 30, "lines": 10}
COLUMNS = {
    "accuracy": "accuracy, %",
    "gain": "less cross-entropy's, points",
    "nll": "NLL, nats",
    "ece": "ECE, points",
    "temperature": "best temperature",
    "nll_scaled": "NLL with it",
    "ece_scaled": "ECE with it",
}


class Split(NamedTuple):
    """Rows of one data set by seed: features [S, N, D] and labels [S, N] each."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


# --- data -------------------------------------------------------------------------------------------------------------


@functools.cache
def _lines() -> tuple[Tensor, Tensor]:
    from sklearn.feature_extraction.text import HashingVectorizer

    lines, labels = [], []
    for label, package in enumerate(PACKAGES):
        found = sorted(_lines_of(Path(sysconfig.get_path("stdlib")) / package))
        lines += found
        labels += [label] * len(found)
    vectorizer = HashingVectorizer(n_features=N_FEATURES, analyzer="char_wb", ngram_range=(2, 4), dtype=numpy.float32)
    features = torch.from_numpy(vectorizer.transform(lines).toarray())  # of norm 1
    return features * math.sqrt(N_FEATURES) / 4, torch.tensor(labels)


def _lines_of(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*.py") if not {"test", "tests"} & set(file.parts))
    stripped = (line.strip() for file in files for line in file.read_text("utf-8", "replace").splitlines())
    return {line for line in stripped if len(line) >= SHORTEST}


_ROWS = {"digits": digits.load, "lines": _lines}
_PER_CLASS = {"digits": (104, 30, 40), "lines": (400, 200, 400)}  # train, where balanced; validation; test


def split(data: str, rarest: float, n_seeds: int) -> Split:
    """Return rows drawn by each seed; only what is trained on is imbalanced, in an order of classes of the seed."""
    features, labels = _ROWS[data]()
    n_train, n_validation, n_test = _PER_CLASS[data]
    n_classes = int(labels.max()) + 1
    sizes = [round(n_train * rarest ** (rank / (n_classes - 1))) for rank in range(n_classes)]
    parts: list[list[Tensor]] = [[], [], []]
    for seed in range(n_seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        drawn: list[list[Tensor]] = [[], [], []]
        for size, label in zip(sizes, torch.randperm(n_classes, generator=generator).tolist(), strict=True):
            rows = (labels == label).nonzero()[:, 0]
            rows = rows[torch.randperm(len(rows), generator=generator)][: n_train + n_validation + n_test]
            test, validation, train = rows.split((n_test, n_validation, n_train))
            for part, chosen in zip(drawn, (train[:size], validation, test), strict=True):
                part.append(chosen)
        for part, each in zip(parts, drawn, strict=True):
            part.append(torch.cat(each))
    return Split(*((features[rows], labels[rows]) for rows in map(torch.stack, parts)))


# --- networks, one a seed, trained together ---------------------------------------------------------------------------


def _layers(n_inputs: int, n_classes: int, n_seeds: int) -> list[Tensor]:
    """Return weights [S, in, out] and biases [S, 1, out] of D-128-C, drawn by seed as torch's `nn.Linear` draws."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(n_seeds)]
    made = []
    for n_in, n_out in ((n_inputs, HIDDEN), (HIDDEN, n_classes)):
        for shape in ((n_in, n_out), (1, n_out)):
            drawn = [torch.rand(shape, generator=generator) for generator in generators]
            made.append(((2 * torch.stack(drawn) - 1) / math.sqrt(n_in)).requires_grad_())
    return made


def _logits(layers: list[Tensor], features: Tensor) -> Tensor:
    weight, bias, head, head_bias = layers
    return torch.baddbmm(head_bias, torch.baddbmm(bias, features, weight).relu(), head)


def _batches(n_rows: int, n_seeds: int, epochs: int) -> Iterator[Tensor]:
    generators = [torch.Generator().manual_seed(2000 + seed) for seed in range(n_seeds)]
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(n_rows, generator=generator) for generator in generators])
        yield from orders.split(BATCH, 1)


def train(data: Split, options: dict[str, Any], n_seeds: int, epochs: int) -> list[Tensor]:
    """Return a network a seed, trained by SGD whose rate falls linearly to 0."""
    features, labels = data.train
    layers = _layers(features.shape[2], int(labels.max()) + 1, n_seeds)
    optimizer = torch.optim.SGD(layers, RATE, MOMENTUM, weight_decay=DECAY)
    n_steps = epochs * math.ceil(labels.shape[1] / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    seeds = torch.arange(n_seeds)[:, None]
    for rows in _batches(labels.shape[1], n_seeds, epochs):
        optimizer.zero_grad()
        logits = _logits(layers, features[seeds, rows])
        losses = bonus_cross_entropy(logits.flatten(0, 1), labels[seeds, rows].flatten(), reduction="sum", **options)
        (losses / rows.shape[1]).backward()  # the mean of each network, added up
        optimizer.step()
        schedule.step()
    return layers


# --- calibration ------------------------------------------------------------------------------------------------------


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood by seed, in nats: logits [S, N, C], labels [S, N]."""
    return F.cross_entropy(logits.double().transpose(1, 2), labels, reduction="none").mean(1)


def ece(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the expected calibration error by seed, in points of %, over `N_BINS` equal bins of confidence.

    Naeini et al. 2015; Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    confidence, prediction = logits.double().softmax(2).max(2)
    excess = confidence - (prediction == labels).double()
    bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    sums = torch.zeros(len(logits), N_BINS, dtype=torch.float64).scatter_add_(1, bins, excess)
    return 100 * sums.abs().sum(1) / labels.shape[1]


def best_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by seed the T of the least NLL of ``logits / T``, found between 1/20 and 1000 by thirds (it is convex)."""
    low, high = torch.full((len(logits),), -math.log(20)), torch.full((len(logits),), math.log(1000))
    for _ in range(50):
        third = (high - low) / 3
        left, right = low + third, high - third
        falls = nll(logits / left.exp()[:, None, None], labels) > nll(logits / right.exp()[:, None, None], labels)
        low, high = torch.where(falls, left, low), torch.where(falls, high, right)
    return ((low + high) / 2).exp()


def work(name: str, data: str, balance: str, n_seeds: int, epochs: int) -> dict[str, list[float]]:
    rows = split(data, BALANCES[balance], n_seeds)
    layers = train(rows, LOSSES[name], n_seeds, epochs)
    with torch.no_grad():
        logits, held_out = _logits(layers, rows.test[0]), _logits(layers, rows.validation[0])
    temperature = best_temperature(held_out, rows.validation[1])
    scaled, labels = logits / temperature[:, None, None], rows.test[1]
    found = {
        "accuracy": 100 * (logits.argmax(2) == labels).double().mean(1), "temperature": temperature,
        "nll": nll(logits, labels), "nll_scaled": nll(scaled, labels),
        "ece": ece(logits, labels), "ece_scaled": ece(scaled, labels),
    }  # fmt: skip
    return {key: value.tolist() for key, value in found.items()}


# --- verdicts ---------------------------------------------------------------------------------------------------------


def jobs(effort: Effort) -> list[tuple[Any, ...]]:
    if effort is Effort.QUICK:
        return [(name, "digits", "imbalanced", 2, 1) for name in (PLAIN, "LogBonus(0.75)")]
    return [
        (name, data, balance, SEEDS, EPOCHS[data])
        for data in reversed(DATA)  # the longer ones first
        for balance in BALANCES
        for name in LOSSES
    ]


def conclude(results: dict[tuple[Any, ...], dict[str, list[float]]], effort: Effort) -> dict[str, Any]:
    found: dict[str, dict[str, dict[str, list[float]]]] = {}  # task, loss, column: a number a seed
    for job in jobs(effort):
        found.setdefault(f"{job[1]}, {job[2]}", {})[job[0]] = dict(results[job])
    for losses in found.values():
        for each in losses.values():
            each["gain"] = _gain("accuracy", each, losses[PLAIN])
    tables = {
        task: {name: {key: interval(each[key]) for key in COLUMNS} for name, each in losses.items()}
        for task, losses in found.items()
    }
    verdicts = (
        [] if effort is Effort.QUICK else [one for task, losses in found.items() for one in _verdicts(task, losses)]
    )
    return {"tables": tables, "verdicts": verdicts}


def _gain(key: str, one: dict[str, list[float]], base: dict[str, list[float]]) -> list[float]:
    return [a - b for a, b in zip(one[key], base[key], strict=True)]


def _verdicts(task: str, losses: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    def gain(key: str, name: str, base: str) -> list[float]:
        return _gain(key, losses[name], losses[base])

    def ratio(key: str, name: str, base: str) -> list[float]:
        return [a / b for a, b in zip(losses[name][key], losses[base][key], strict=True)]

    low, bonus, unbounded = "LogBonus(0.5)", "LogBonus(0.75)", "LogBonus(1.0)"
    repaired = f"{task}: a temperature repairs %s: NLL / cross-entropy, each with its best"
    return [
        verdict(f"{task}: accuracy rises (the paper): {bonus} - cross-entropy, points",
                gain("accuracy", bonus, PLAIN), at_least=ABOVE_ZERO),
        verdict(f"{task}: by more than larger steps do: {bonus} - {LARGER_STEPS}, points",
                gain("accuracy", bonus, LARGER_STEPS), at_least=ABOVE_ZERO),
        verdict(f"{task}: probabilities stay as good: NLL of {bonus} / cross-entropy",
                ratio("nll", bonus, PLAIN), at_most=1.1),
        verdict(f"{task}: probabilities stay as good: NLL of {unbounded} / cross-entropy",
                ratio("nll", unbounded, PLAIN), at_most=1.1),
        verdict(f"{task}: probabilities stay as good: ECE of {bonus} - cross-entropy, points",
                gain("ece", bonus, PLAIN), at_most=1),
        verdict(repaired % bonus, ratio("nll_scaled", bonus, PLAIN), at_most=1.02),
        verdict(repaired % unbounded, ratio("nll_scaled", unbounded, PLAIN), at_most=1.02),
        verdict(f"{task}: {low} is as accurate: - {bonus}, points", gain("accuracy", low, bonus), at_least=-0.5),
        verdict(f"{task}: {low} has the better probabilities: NLL / {bonus}", ratio("nll", low, bonus),
                at_most=1 - ABOVE_ZERO),
    ]  # fmt: skip


def markdown(section: dict[str, Any]) -> str:
    parts = [
        "Which loss, at what price. A D-128-C ReLU network, SGD of rate 0.1 falling linearly to 0, momentum 0.9, "
        f"weight decay 5e-4, batches of {BATCH}; of a seed, all losses start from the same weights and see the same "
        "batches. "
        "*digits*: scikit-learn's, 10 classes of 104 for training, 30 for validation, 40 for test; 30 epochs. *lines*: "
        f"lines of at least {SHORTEST} characters of Python's own standard library, as {N_FEATURES} hashed groups of 2 "
        f"to 4 letters, to be told by their package ({', '.join(PACKAGES)}): 400, 200 and 400 a package; 10 epochs. "
        "*imbalanced*: the rarest class has 1/20 of the most frequent one's training rows; validation and test stay "
        "balanced. NLL is the negative log-likelihood of the test rows, ECE the expected calibration error over "
        f"{N_BINS} equal bins of confidence, biased upwards where rows are few: lower is better for both. Logits are "
        "divided by the best temperature, that of the least NLL of the validation rows: above 1 the network was too "
        "sure. *rate x 2* is cross-entropy with twice the learning rate: near p = 1/2 a bonus of strength 1 doubles "
        "the steps too.\n"
    ]  # fmt: skip
    for task, losses in section["tables"].items():
        rows = (
            [name, *(mean(each[key], 3 if "nll" in key else 2) for key in COLUMNS)] for name, each in losses.items()
        )
        parts.append(f"\n{task}:\n\n" + table(["loss", *COLUMNS.values()], rows))
    return "".join(parts)


def draw(section: dict[str, Any], figure: Any) -> None:
    """Points with intervals: a column of panels a task, a row a quantity, as trained and with the best temperature."""
    tasks = section["tables"]
    panels = figure.subplots(3, len(tasks), squeeze=False, sharex=True, sharey="row")
    rows = (
        (("gain",), "accuracy less that of\ncross-entropy, points\n(higher is better)", None),
        (("nll", "nll_scaled"), "negative log-likelihood\n(NLL), nats\n(lower is better)", (0.1, 0.2, 0.5, 1, 2, 5)),
        (("ece", "ece_scaled"), "calibration error\n(ECE), points\n(lower is better)", (2, 5, 10, 20, 50)),
    )
    for column, (task, losses) in enumerate(tasks.items()):
        for axes, (keys, unit, ticks) in zip(panels[:, column], rows, strict=True):
            for i, key in enumerate(keys):
                each = [one[key] for one in losses.values()]
                x = [j + 0.2 * (i - (len(keys) - 1) / 2) for j in range(len(each))]
                label = ("as trained", "logits divided by the best temperature")[i]
                axes.errorbar(x, [e["mean"] for e in each], [e["half"] or 0 for e in each], fmt="os"[i], capsize=3,
                              markersize=4, label=label)  # fmt: skip
            axes.grid(alpha=0.3)
            if ticks is None:
                axes.axhline(0, color="gray", linewidth=0.8, linestyle="--")
            else:
                axes.set_yscale("log")
                axes.set_yticks(ticks, map(str, ticks))
                axes.minorticks_off()
            if column == 0:
                axes.set_ylabel(unit)
        panels[0, column].set_title(task)
        panels[2, column].set_xticks(range(len(losses)), list(losses), rotation=40, ha="right")
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    seeds = next(iter(tasks.values()))[PLAIN]["nll"]["seeds"]
    figure.suptitle(f"Test rows: mean and 95 % confidence interval over {seeds} seeds", x=0.02, ha="left")
