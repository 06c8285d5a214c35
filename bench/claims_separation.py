"""Telling noisy from hard: which score, and which pair of scores, ranks mislabelled above clean but hard examples."""

from __future__ import annotations

import itertools
from typing import Any

import numpy
import torch
from torch import Tensor

from bonus_ops import bonus_cross_entropy_with_scores

from .claims_data import BATCH, EASY, HARD, NOISY, RATE, Network, Task, digits_split, error, sgd, task
from .claims_verdict import verdict
from .intervals import interval, mean
from .measure import Effort
from .tables import table

TITLE = "Noisy against hard"
TASKS = {
    "ambig": "12 % of the images are blends of two digits, 15 % of the others have a random wrong label",
    "ambig_pair": "the same, wrong labels are the next digit",
    "rare": "5 classes of two digits, one of them rare (6 images); 15 % random wrong labels",
    "synth": "10 classes of five Gaussian modes of falling size, the last two rare; 15 % random wrong labels",
    "rare_gauss": "as rare, but 15 % of the images are replaced by Gaussian noise instead",
}
SEEDS, EPOCHS, EARLY, JITTER = 6, 60, 6, 0.08
PAIRS = (("el2n_mean", "entropy_mean"), ("el2n_mean", "entropy_early"), ("entropy_early", "loss_mean"))
QUESTIONS = {"noisy/hard": (NOISY, (HARD,)), "noisy/all clean": (NOISY, (EASY, HARD)), "hard/easy": (HARD, (EASY,))}
MODES = (90, 30, 15, 6, 2)  # examples of each mode of a class of `synth`; the last two are hard
TEST_MODES = (30, 10, 5, 2, 2)


def jobs(effort: Effort) -> list[tuple[Any, ...]]:
    if effort is Effort.QUICK:
        return [("rare", seed, 3) for seed in range(2)]
    return [(name, seed, EPOCHS) for name in TASKS for seed in range(SEEDS)]


# --- the tasks --------------------------------------------------------------------------------------------------------


def make(name: str, seed: int) -> Task:
    rng = numpy.random.RandomState(seed)
    if name == "synth":
        images, labels, hard, test_images, test_labels = _modes(rng)
    elif name.startswith("ambig"):
        images, labels, test_images, test_labels = digits_split(rng)
        images, hard = _blend(rng, images, labels)
    else:
        images, labels, hard, test_images, test_labels = _rare(rng)
    kind = numpy.where(hard, HARD, EASY)
    noisy = rng.choice(numpy.flatnonzero(~hard), int(0.15 * len(labels)), replace=False)
    kind[noisy] = NOISY
    n_classes = int(test_labels.max()) + 1
    images, labels = images.copy(), labels.copy()
    if name == "rare_gauss":
        mean, spread = images[noisy].mean(1, keepdims=True), images[noisy].std(1, keepdims=True)
        images[noisy] = mean + spread * rng.randn(*images[noisy].shape)
    else:
        shift = 1 if name == "ambig_pair" else rng.randint(1, n_classes, len(noisy))
        labels[noisy] = (labels[noisy] + shift) % n_classes
    return task(images, labels, kind, test_images, test_labels)


def _blend(rng: numpy.random.RandomState, images: Any, labels: Any) -> tuple[Any, Any]:
    """Return images of which 12 % are mostly themselves and partly an image of another class; and which."""
    chosen = rng.choice(len(labels), int(0.12 * len(labels)), replace=False)
    blended, hard = images.copy(), numpy.zeros(len(labels), bool)
    hard[chosen] = True
    for i in chosen:
        other = rng.choice(numpy.flatnonzero(labels != labels[i]))
        share = rng.uniform(0.52, 0.66)
        blended[i] = share * images[i] + (1 - share) * images[other]
    return blended, hard


def _rare(rng: numpy.random.RandomState) -> tuple[Any, ...]:
    """Return two digits a class, the odd one with 6 images, which are the hard ones."""
    images, digit, test_images, test_digit = digits_split(rng)
    odd = digit % 2 == 1
    kept = numpy.concatenate(
        [numpy.flatnonzero(~odd), *(numpy.flatnonzero(digit == d)[:6] for d in range(1, 10, 2))]
    )  # fmt: skip
    return images[kept], digit[kept] // 2, odd[kept], test_images, test_digit // 2


def _modes(rng: numpy.random.RandomState) -> tuple[Any, ...]:
    centre = rng.randn(10, len(MODES), 32)

    def draw(sizes: tuple[int, ...]) -> tuple[Any, Any, Any]:
        label, mode = (
            numpy.repeat(x, numpy.tile(sizes, 10)) for x in numpy.divmod(numpy.arange(10 * len(sizes)), len(sizes))
        )
        return centre[label, mode] + 0.8 * rng.randn(len(label), 32), label, mode >= len(sizes) - 2

    images, labels, hard = draw(MODES)
    test_images, test_labels, _ = draw(TEST_MODES)
    return images, labels, hard, test_images, test_labels


# --- training, and what it shows of each example ----------------------------------------------------------------------


def work(name: str, seed: int, epochs: int) -> dict[str, Any]:
    data = make(name, seed)
    torch.manual_seed(seed)
    n = len(data.labels)
    model = Network(data.images.shape[1], data.n_classes)
    optimizer = sgd(model)
    seen = {key: torch.empty(epochs, n) for key in ("loss", "el2n", "margin", "entropy", "energy", "correct", "norm")}
    step, steps = 0, epochs * -(-n // BATCH)
    for epoch in range(epochs):
        for rows in torch.randperm(n).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            step += 1
            images, labels = data.images[rows], data.labels[rows]
            optimizer.zero_grad()
            loss, scores = bonus_cross_entropy_with_scores(
                model(images + JITTER * torch.randn_like(images)), labels, bonus=None
            )
            loss.backward()
            optimizer.step()
            for key in ("loss", "el2n", "margin", "entropy", "energy"):
                seen[key][epoch, rows] = getattr(scores, key)
            seen["correct"][epoch, rows] = scores.correct(labels).float()
            seen["norm"][epoch, rows] = model.hidden_norm
    found = statistics(seen, epochs)
    return {
        "accuracy": 100 - error(model, data),
        "auroc": {score: {q: auroc(x, data.kind, *of) for q, of in QUESTIONS.items()} for score, x in found.items()},
        "kind": data.kind.numpy(),
        "features": {key: found[key].numpy() for key in dict.fromkeys(itertools.chain(*PAIRS))},
    }


def statistics(seen: dict[str, Tensor], epochs: int) -> dict[str, Tensor]:
    """Return every score of every example, oriented so that more should mean noisier (a minus sign says it was turned).

    ``last`` is the final epoch, ``early`` the sixth, ``half`` the mean of the first half, ``mean`` of all.
    """
    p = torch.exp(-seen["loss"])
    other = torch.exp(-seen["loss"] - seen["margin"])
    max_logit = -seen["energy"] - seen["loss"] - seen["margin"].clamp(max=0)
    last_layer = seen["el2n"] * torch.sqrt(seen["norm"] ** 2 + 1)
    early = min(EARLY, epochs) - 1
    correct = seen["correct"].bool()
    forgotten = (correct[:-1] & ~correct[1:]).sum(0).float()
    streak = correct[2:] & correct[1:-1] & correct[:-2]
    return {
        "loss_last": seen["loss"][-1],
        "loss_early": seen["loss"][early],
        "loss_mean": seen["loss"].mean(0),
        "el2n_last": seen["el2n"][-1],
        "el2n_early": seen["el2n"][early],
        "el2n_mean": seen["el2n"].mean(0),
        "last_layer_grad_norm_early": last_layer[early],
        "last_layer_grad_norm_mean": last_layer.mean(0),
        "-margin_mean (AUM)": -seen["margin"].mean(0),
        "-margin_half": -seen["margin"][: epochs // 2].mean(0),
        "-prob_margin_mean": -(p - other).mean(0),
        "other_prob_mean": other.mean(0),
        "-target_prob_mean (confidence)": -p.mean(0),
        "target_prob_std (variability)": p.std(0, correction=0),
        "entropy_early": seen["entropy"][early],
        "entropy_mean": seen["entropy"].mean(0),
        "energy_mean": seen["energy"].mean(0),
        "-max_logit_mean": -max_logit.mean(0),
        "loss_minus_entropy_mean": (seen["loss"] - seen["entropy"]).mean(0),
        "forgetting, never learned = T": torch.where(correct.any(0), forgotten, epochs),
        "forgetting": forgotten,
        "first_learned": _first(correct, epochs),
        "learned_for_3": _first(streak, epochs),
        "learned_forever": epochs - _first(~correct.flip(0), epochs),
        "-correctness": -seen["correct"].mean(0),
    }


def _first(event: Tensor, never: int) -> Tensor:
    """Return the first epoch [T, N] of an event, ``never`` where there was none."""
    return torch.where(event.any(0), event.float().argmax(0), never).float()


def auroc(score: Tensor, kind: Tensor, positive: int, negative: tuple[int, ...]) -> float:
    """Return the chance that a positive scores above a negative, ties counted half."""
    above = score[kind == positive].double()
    below = torch.cat([score[kind == k] for k in negative]).double().sort().values
    low, high = torch.searchsorted(below, above), torch.searchsorted(below, above, right=True)
    return float((low + high).double().mean() / (2 * len(below)))


# --- two axes ---------------------------------------------------------------------------------------------------------


def pair_auroc(results: dict[int, dict[str, Any]], pair: tuple[str, str]) -> dict[str, list[float]]:
    """Return the AUROC of a logistic map of two ranks, fitted on half the seeds, per seed of the other halves."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # which scikit-learn brings

    features = {seed: _ranks([result["features"][key] for key in pair]) for seed, result in results.items()}
    kinds = {seed: result["kind"] for seed, result in results.items()}
    by_seed: dict[int, list[dict[str, float]]] = {seed: [] for seed in results}
    for fit in itertools.combinations(results, len(results) // 2):
        model = LogisticRegression(C=1.0, class_weight="balanced")
        with threadpool_limits(1):  # more only wait for each other on so small a problem
            model.fit(numpy.concatenate([features[s] for s in fit]), numpy.concatenate([kinds[s] for s in fit]))
        for seed in set(results) - set(fit):
            log_p = torch.tensor(model.predict_log_proba(features[seed]))
            clean = torch.logsumexp(log_p[:, [EASY, HARD]], 1)
            score = {
                "noisy/hard": log_p[:, NOISY] - log_p[:, HARD],
                "noisy/all clean": log_p[:, NOISY] - clean,
                "hard/easy": log_p[:, HARD] - log_p[:, EASY],
            }
            kind = torch.tensor(kinds[seed])
            by_seed[seed].append({q: auroc(score[q], kind, *of) for q, of in QUESTIONS.items()})
    return {q: [float(numpy.mean([one[q] for one in each])) for each in by_seed.values()] for q in QUESTIONS}


def _ranks(columns: list[Any]) -> Any:
    """Return the columns as standardised ranks, [N, len(columns)]."""
    ranks = numpy.stack([column.argsort(kind="stable").argsort() / len(column) for column in columns], 1)
    return (ranks - ranks.mean(0)) / ranks.std(0)


# --- verdicts ---------------------------------------------------------------------------------------------------------


def conclude(results: dict[tuple[Any, ...], dict[str, Any]], effort: Effort) -> dict[str, Any]:
    by_task: dict[str, dict[int, dict[str, Any]]] = {}
    for (name, seed, _), result in results.items():
        by_task.setdefault(name, {})[seed] = result
    values: dict[str, dict[str, dict[str, list[float]]]] = {}  # task, score, question: one a seed
    for name, by_seed in by_task.items():
        runs = list(by_seed.values())
        values[name] = {s: {q: [run["auroc"][s][q] for run in runs] for q in QUESTIONS} for s in runs[0]["auroc"]}
        for pair in PAIRS:
            values[name][" + ".join(pair)] = pair_auroc(by_seed, pair)
    return {
        "accuracy": {name: interval([r["accuracy"] for r in by_seed.values()]) for name, by_seed in by_task.items()},
        "table": {
            name: {score: {q: interval(each) for q, each in of.items()} for score, of in scores.items()}
            for name, scores in values.items()
        },
        "verdicts": [] if effort is Effort.QUICK else _verdicts(values),
    }


def _verdicts(values: dict[str, dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    def at(name: str, score: str, question: str = "noisy/hard") -> list[float]:
        return values[name][score][question]

    def lead(name: str) -> list[float]:
        return [a - b for a, b in zip(at(name, "el2n_mean"), at(name, "loss_last"), strict=True)]

    label_noise = [name for name in values if name != "rare_gauss"]
    made = [verdict(f"{name}: mean EL2N tells noisy from hard", at(name, "el2n_mean"),
                    at_least=0.93 if name == "ambig_pair" else 0.95) for name in label_noise]  # fmt: skip
    made += [verdict(f"{name}: mean EL2N leads the last loss", lead(name), at_least=0.05)
             for name in ("ambig", "ambig_pair")]  # fmt: skip
    made += [verdict(f"{name}: the plain count of forgetting fails", at(name, "forgetting"), at_most=0.6)
             for name in ("ambig", "ambig_pair")]  # fmt: skip
    made += [verdict(f"{name}: noisy has low, hard has high early entropy", at(name, "entropy_early"), at_most=0.3)
             for name in ("ambig", "rare")]  # fmt: skip
    pair = " + ".join(PAIRS[0])
    made += [
        verdict(f"ambig_pair: {pair}, noisy/hard", at("ambig_pair", pair), at_least=0.95),
        verdict(f"ambig_pair: {pair}, hard/easy", at("ambig_pair", pair, "hard/easy"), at_least=0.87),
        verdict("rare_gauss: early entropy finds damaged inputs", at("rare_gauss", "entropy_early"), at_least=0.75),
        verdict("rare_gauss: mean loss does not", at("rare_gauss", "loss_mean"), at_most=0.6),
    ]
    return made


def markdown(section: dict[str, Any]) -> str:
    names = list(section["table"])
    scores = list(section["table"][names[0]])
    parts = [
        "AUROC over the examples of scores from the training logits, before each update, of a D-256-256-C network; "
        "0.5 is chance. Two scores with a plus are a logistic map of their ranks, fitted on other seeds.\n",
        "\n".join(f"- `{name}`: {TASKS[name]}; test accuracy {mean(section['accuracy'][name])} %" for name in names),
    ]
    for question in QUESTIONS:
        rows = ([score, *(mean(section["table"][name][score][question], 3) for name in names)] for score in scores)
        parts.append(f"\n{question}:\n\n" + table(["score", *names], rows))
    parts.append("Second-split forgetting, which takes two trainings, is not measured here.\n")
    return "\n".join(parts)


ASKED = {
    "noisy/hard": "damaged above hard",
    "noisy/all clean": "damaged above all others",
    "hard/easy": "hard above easy",
}
DATA = {
    "ambig": "blends are hard,\nrandom wrong labels",
    "ambig_pair": "blends are hard,\nlabels one off",
    "rare": "rare digits are hard,\nrandom wrong labels",
    "synth": "synthetic, rare modes hard,\nrandom wrong labels",
    "rare_gauss": "rare digits are hard,\nnoise for images",
}
WHEN = {"_last": ", last epoch", "_early": ", epoch 6", "_mean": ", mean of epochs", "_half": ", mean of first half",
        " never learned = T": " if never learned one an epoch"}  # fmt: skip


def _in_words(score: str) -> str:
    for suffix, words in WHEN.items():
        score = score.replace(suffix, words)
    return score


def draw(section: dict[str, Any], figure: Any) -> None:
    names = list(section["table"])
    scores = list(section["table"][names[0]])
    figure.suptitle("Does a score rank one kind of example above another? Five data sets with known damage")
    panels = figure.subplots(1, len(QUESTIONS), sharey=True)
    for axes, question in zip(panels, QUESTIONS, strict=True):
        grid = [[section["table"][name][score][question]["mean"] for name in names] for score in scores]
        picture = axes.imshow(grid, vmin=0, vmax=1, cmap="RdBu", aspect="auto")
        axes.set_title(ASKED[question])
        axes.set_xticks(range(len(names)), [DATA[name] for name in names], rotation=90, fontsize=9)
        axes.set_yticks(range(len(scores)), map(_in_words, scores))
        for i, row in enumerate(grid):
            for j, x in enumerate(row):
                color = "white" if abs(x - 0.5) > 0.35 else "black"
                axes.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=7, color=color)
    bar = figure.colorbar(picture, ax=panels, fraction=0.02)
    bar.set_label("AUROC: 1 (blue) sorts perfectly, 0.5 (white) is chance, 0 (red) is the wrong way round")
