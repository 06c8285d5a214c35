"""The encouraging loss on digits: what log_end does to margins, energies, gradients, accuracy and robustness."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bonus_ops import GapLoss, LogBonus, bonus_cross_entropy

from . import digits
from .claims_verdict import ABOVE_ZERO, paired, verdict
from .intervals import interval, mean
from .measure import Effort
from .tables import table

TITLE = "Encouraging loss"
PLAIN = "cross-entropy"


@dataclass(frozen=True)
class ScaledCrossEntropy(GapLoss):
    """Cross-entropy times a factor: under plain SGD the same as a learning rate that much larger."""

    factor: float = 1.0

    def value(self, gap: Tensor) -> Tensor:
        return -self.factor * F.logsigmoid(gap)

    def slope(self, gap: Tensor) -> Tensor:
        return self.factor * torch.sigmoid(-gap)


LOG_ENDS = (0.0, 0.5, 0.75, 0.9, 1.0)
CONTROLS = {f"cross-entropy, rate x {k:g}": ScaledCrossEntropy(k) for k in (2.0, 4.0)}  # a bonus takes larger steps too
ENDS = {f"log_end {end:g}": LogBonus(end) for end in LOG_ENDS}
LOSSES: dict[str, GapLoss | None] = {PLAIN: None, **CONTROLS, **ENDS}
SEEDS, EPOCHS = 10, 30  # enough seeds to tell a difference of half a point of accuracy
EPSILON = 0.1  # of an attack, in pixel values from 0 to 1
COLUMNS = {
    "accuracy": "test accuracy, %",
    "train_margin": "train margin, logits",
    "target_energy": "-z_y, train",
    "rest_energy": "-max z_k, train",
    "confident_share": "gradient share of p > .9 after epoch 3",
    "under_ce": "accuracy under FGSM by F.cross_entropy, float64, %",
    "under_exact_ce": "by the same gradient, exact, %",
    "under_gap": "by -gap, %",
    "zero_gradient": "test images without a gradient of F.cross_entropy in float32, %",
}


def jobs(effort: Effort) -> list[tuple[Any, ...]]:
    if effort is Effort.QUICK:
        return [(name, 0, digits.SHARE_EPOCH) for name in (PLAIN, "log_end 0.75")]
    return [(name, seed, EPOCHS) for name in LOSSES for seed in range(SEEDS)]


def work(name: str, seed: int, epochs: int) -> dict[str, float]:
    run = digits._Run(LOSSES[name], seed).train(epochs)
    train = run.scores(run.train_rows)
    target_logit = -train.energy - train.loss
    result = {key: run.result[key] for key in ("accuracy", "train_margin", "confident_share")}
    return result | {
        "target_energy": -float(target_logit.mean()),
        "rest_energy": -float((target_logit - train.margin).mean()),
        **_robustness(run),
    }


def _robustness(run: digits._Run) -> dict[str, float]:
    """Return accuracy after one signed gradient step, the gradient taken in float64.

    The gradient of cross-entropy is 1 - p times that of -gap, so both attacks are the same. Unless it is computed by
    softmax - onehot: from a gap of 37 on the label's part rounds to 0, the attack loses its way, and the model looks
    robust. In float32 the rest underflows too, and there is no gradient at all.
    """
    model = copy.deepcopy(run.model).double()
    images, labels = run.images[run.test_rows].double(), run.labels[run.test_rows]

    def gradient(model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        images = images.clone().requires_grad_()
        return torch.autograd.grad(loss(model(images)).sum(), images)[0]

    def accuracy(loss: Callable[[Tensor], Tensor]) -> float:
        attacked = (images + EPSILON * gradient(model, images, loss).sign()).clamp(0, 1)
        with torch.no_grad():
            return 100 * float((model(attacked).argmax(1) == labels).double().mean())

    def softmax_minus_onehot(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")

    def exact(logits: Tensor) -> Tensor:
        return bonus_cross_entropy(logits, labels, reduction="none", bonus=None)

    in_float32 = gradient(run.model, images.float(), softmax_minus_onehot)
    return {
        "under_ce": accuracy(softmax_minus_onehot),
        "under_exact_ce": accuracy(exact),
        "under_gap": accuracy(lambda logits: -_gap(logits, labels)),
        "zero_gradient": 100 * float((in_float32 == 0).all(1).double().mean()),
    }


def _gap(logits: Tensor, labels: Tensor) -> Tensor:
    label = F.one_hot(labels, logits.shape[1]).bool()
    return logits[label] - logits.masked_fill(label, -torch.inf).logsumexp(1)


def conclude(results: dict[tuple[Any, ...], dict[str, float]], effort: Effort) -> dict[str, Any]:
    names = list(dict.fromkeys(job[0] for job in results))
    by_key = {
        key: {name: {job[1]: value[key] for job, value in results.items() if job[0] == name} for name in names}
        for key in COLUMNS
    }
    table = {name: {key: interval(list(by_key[key][name].values())) for key in COLUMNS} for name in names}
    return {"table": table, "verdicts": [] if effort is Effort.QUICK else _verdicts(by_key)}


def _verdicts(by_key: dict[str, dict[str, dict[int, float]]]) -> list[dict[str, Any]]:
    def ratio(key: str, name: str) -> list[float]:
        return [value / by_key[key][PLAIN][seed] for seed, value in by_key[key][name].items()]

    def gain(key: str, name: str) -> list[float]:
        return paired(by_key[key], name, PLAIN)

    def masked(name: str) -> list[float]:
        return [value - by_key["under_gap"][name][seed] for seed, value in by_key["under_ce"][name].items()]

    names = [PLAIN, *ENDS]
    margins = by_key["train_margin"]
    steps = [
        min(margins[after][seed] - margins[before][seed] for before, after in zip(names, names[1:], strict=False))
        for seed in margins[PLAIN]
    ]
    accuracies = by_key["accuracy"]
    best = {
        key: max(CONTROLS, key=lambda name, key=key: statistics.fmean(by_key[key][name].values())) for key in by_key
    }
    furthest = max(names[1:], key=lambda name: abs(statistics.fmean(gain("accuracy", name))))
    return [
        verdict("train margin grows with log_end: least step, logits", steps, at_least=ABOVE_ZERO),
        verdict("train margin, log_end .75 / cross-entropy", ratio("train_margin", "log_end 0.75"), at_least=1.3),
        verdict("train margin, log_end 1 / cross-entropy", ratio("train_margin", "log_end 1"), at_least=4),
        verdict(f"by more than larger steps do: log_end .75 - {best['train_margin']}, logits",
                paired(margins, "log_end 0.75", best["train_margin"]), at_least=ABOVE_ZERO),
        verdict(f"by more than larger steps do: log_end 1 - {best['train_margin']}, logits",
                paired(margins, "log_end 1", best["train_margin"]), at_least=ABOVE_ZERO),
        verdict("energy of the label, log_end 1 / cross-entropy", ratio("target_energy", "log_end 1"), at_least=4),
        verdict("gradient share of p > .9, log_end 1 / cross-entropy", ratio("confident_share", "log_end 1"),
                at_least=2),
        verdict(f"it grows by more than larger steps do: log_end .75 - {best['confident_share']}",
                paired(by_key["confident_share"], "log_end 0.75", best["confident_share"]), at_least=ABOVE_ZERO),
        verdict("accuracy rises (the paper): log_end .75 - cross-entropy, points", gain("accuracy", "log_end 0.75"),
                at_least=ABOVE_ZERO),
        verdict("accuracy rises (the paper): log_end 1 - cross-entropy, points", gain("accuracy", "log_end 1"),
                at_least=ABOVE_ZERO),
        verdict(f"by more than larger steps do: log_end .75 - {best['accuracy']}, points",
                paired(accuracies, "log_end 0.75", best["accuracy"]), at_least=ABOVE_ZERO),
        verdict(f"accuracy stays within 1.5 points: furthest is {furthest} ({len(accuracies[PLAIN])} seeds)",
                gain("accuracy", furthest), at_least=-1.5, at_most=1.5),
        verdict("robust to FGSM by cross-entropy (the paper): log_end 1 - cross-entropy, points",
                gain("under_ce", "log_end 1"), at_least=5),
        verdict("of that, gradient masking: log_end 1, attacked by cross-entropy - by -gap, points",
                masked("log_end 1"), at_least=3),
        verdict("of that, real: log_end 1 - cross-entropy, both attacked by -gap, points",
                gain("under_gap", "log_end 1"), at_least=ABOVE_ZERO),
        verdict(f"by more than larger steps do: log_end 1 - {best['under_gap']}, both attacked by -gap, points",
                paired(by_key["under_gap"], "log_end 1", best["under_gap"]), at_least=ABOVE_ZERO),
        verdict("no masking below log_end 1: log_end .9, by cross-entropy - by -gap, points",
                masked("log_end 0.9"), at_least=-1, at_most=1),
    ]  # fmt: skip


def markdown(section: dict[str, Any]) -> str:
    rows = ([name, *(mean(each[key]) for key in COLUMNS)] for name, each in section["table"].items())
    return (
        "A 64-256-256-10 ReLU network on scikit-learn's digits, 30 epochs, the last 450 of a seeded order as test "
        f"images. Attacks move every pixel by {EPSILON}, within [0, 1]. Of the five log_end tried, one in twenty would "
        "seem to change the accuracy by chance alone.\n\n" + table(["loss", *COLUMNS.values()], rows)
    )


PANELS = {  # what is drawn in a panel: its axis, then column and legend
    "margin on training images, logits\n(the label's logit less the largest other)": {"train_margin": ""},
    "share of the gradient that comes from\nexamples with p > 0.9, after epoch 3": {"confident_share": ""},
    "accuracy on test images, % (higher is better)": {
        "accuracy": "as they are",
        "under_ce": "attacked (FGSM) along the gradient of cross-entropy",
        "under_gap": "attacked along the gradient of the label's log-odds",
    },
}


def draw(section: dict[str, Any], figure: Any) -> None:
    names = list(section["table"])[::-1]
    figure.suptitle("Cross-entropy and the bonus at several log_end, on digits: mean of the seeds, 95 % interval")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (label, columns) in zip(panels, PANELS.items(), strict=True):
        for i, (key, legend) in enumerate(columns.items()):
            each = [section["table"][name][key] for name in names]
            at = [y - 0.2 * (i - (len(columns) - 1) / 2) for y in range(len(names))]  # none behind another
            axes.errorbar([one["mean"] for one in each], at, xerr=[one["half"] or 0 for one in each],
                          fmt="os^"[i], capsize=3, label=legend)  # fmt: skip
        axes.set_xlabel(label)
        axes.set_yticks(range(len(names)), [name.replace("rate x", "learning rate x") for name in names])
        axes.grid(alpha=0.3)
    panels[0].set_xscale("log")
    panels[0].set_xticks(ticks := (10, 20, 40, 60), map(str, ticks))
    panels[0].minorticks_off()
    panels[-1].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
