"""A language model whose last layer never makes its logits: trained, measured, its hardest pieces shown in context.

    python -m bench lm [train] [cost] [--quick] [--out folder]

Both without a name: `train` takes three to four minutes on two cores, `cost` half a minute on one. Writes JSON, tables
and pictures into bench/results/lm-avx2.*; avx2: the widest vectors of this CPU.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from . import lm_model, measure
from .command import Book, Picture, Section, Tell
from .intervals import ratio, summary
from .lm_model import BONUS, LOGITS, LOSSES, PLAIN, Sizes
from .lm_text import N_PIECES, text
from .measure import Effort
from .record import instruction_set
from .tables import table

SIZES, QUICK = Sizes(N_PIECES, 64, 2, 128, 16, 500), Sizes(512, 16, 1, 16, 4, 6)
QUICK_FILES, ROUNDS = 20, 9
RUNS = (PLAIN, BONUS)
HARDEST, BEFORE, SHOWN = 12, 12, 600  # rows of the table, pieces before each, pieces drawn
MiB = 1 << 20
COLUMNS = {
    "perplexity": "perplexity", "accuracy": "accuracy, %", "ece": "ECE, points", "confidence": "mean confidence, %",
}  # fmt: skip


# --- train ------------------------------------------------------------------------------------------------------------


def train(effort: Effort, tell: Tell) -> dict[str, Any]:
    """Train plain and with the bonus, a process each; judge both by text they did not see."""
    quick = effort is Effort.QUICK
    sizes = QUICK if quick else SIZES
    if quick:
        found = {name: _train(name, quick, lambda done: None) for name in RUNS}
    else:
        context = multiprocessing.get_context("spawn")
        told = context.Manager().dict()
        with ProcessPoolExecutor(len(RUNS), context, torch.set_num_threads, (1,)) as pool:
            start = time.perf_counter()
            waiting = {name: pool.submit(_train_and_tell, name, told) for name in RUNS}
            while not all(each.done() for each in waiting.values()):
                time.sleep(1)
                done = min((told.get(name, 0) for name in RUNS), default=0)
                left = (time.perf_counter() - start) * (sizes.steps / done - 1) if done else math.inf
                tell(f"step {done} of {sizes.steps}, about {left:.0f} s left")
            found = {name: each.result() for name, each in waiting.items()}
    return {"sizes": sizes._asdict(), "processes": 1 if quick else len(RUNS), "runs": found, "text": _of_text(quick)}


def _text(quick: bool) -> Any:
    return text((QUICK if quick else SIZES).n_pieces, QUICK_FILES if quick else None)


def _of_text(quick: bool) -> dict[str, int]:
    of = _text(quick)
    return {
        "files": of.n_files, "characters": of.n_characters, "pieces": len(of.pieces), "train": len(of.train),
        "validation": len(of.validation),
    }  # fmt: skip


def _train_and_tell(name: str, told: Any) -> dict[str, Any]:
    return _train(name, False, lambda done: told.update({name: done}))


def _train(name: str, quick: bool, tell: Callable[[int], None]) -> dict[str, Any]:
    of, sizes = _text(quick), QUICK if quick else SIZES
    validation = of.validation
    start = time.perf_counter()
    run = lm_model.train(name, sizes, of.train, validation, tell)
    scores = run.pop("scores")
    n_parameters = sum(p.numel() for p in lm_model.Transformer(sizes).parameters())

    def piece(i: int) -> str:
        return of.pieces[i]

    shown = slice(0, min(SHOWN, len(scores.loss)))
    order = scores.margin.argsort()[:HARDEST].tolist()
    hardest = [
        {"before": "".join(map(piece, validation[max(i + 1 - BEFORE, 0) : i + 1].tolist())),
         "piece": piece(int(validation[i + 1])), "runner_up": piece(int(scores.runner_up[i])),
         "margin": float(scores.margin[i]), "loss": float(scores.loss[i])}
        for i in order
    ]  # fmt: skip
    return run | lm_model.quality(scores) | {
        "seconds": time.perf_counter() - start, "parameters": n_parameters, "hardest": hardest,
        "shown": list(zip(map(piece, validation[1:][shown].tolist()), scores.loss[shown].tolist(), strict=True)),
        "scored": len(scores.loss),
    }  # fmt: skip


# --- cost -------------------------------------------------------------------------------------------------------------


def cost(effort: Effort, tell: Tell) -> dict[str, Any]:
    """Measure whole training steps, and the last layer with its loss alone, of three ways to the same gradient."""
    quick = effort is Effort.QUICK
    sizes, of = QUICK if quick else SIZES, _text(quick)
    n_rows, steps, alone, first = sizes.batch * sizes.context, {}, {}, {}
    for name, loss in LOSSES.items():
        tell(name)
        training = lm_model.Training(sizes, of.train)
        batch = training.batch()
        first[name] = [training.step(loss, batch) for _ in range(3)]
        steps[name] = measure.Step(lambda: None, lambda t=training, loss=loss, b=batch: t.step(loss, b))
        with torch.no_grad():
            hidden = training.model(batch[0])
        alone[name] = _last_layer(loss, hidden, training.model.weight.detach().clone(), batch[1])
    if abs(first[LOGITS][-1] - first[PLAIN][-1]) > 1e-4:  # three steps on
        raise ValueError(f"expected the same loss with and without logits, got {first[LOGITS]} and {first[PLAIN]}")
    peaks = {name: measure.peak_bytes(step) for name, step in alone.items()}
    rounds = effort.rounds(0.0, (ROUNDS, ROUNDS))
    times = {"step": measure.interleave(steps, *rounds)}
    times["last layer and loss"] = measure.interleave(alone, *rounds)
    return {
        "n_rows": n_rows, "sizes": sizes._asdict(),
        "logits_bytes": 4 * n_rows * sizes.n_pieces, "gradients_bytes": 4 * sizes.width * (n_rows + sizes.n_pieces),
        "peak_bytes": peaks, "first_losses": first,
        "tokens_per_s": {name: 1e3 * n_rows / summary(ms)["median"] for name, ms in times["step"].items()},
        "time_ms": {what: {n: summary(ms) for n, ms in each.items()} for what, each in times.items()},
        "ratios": {what: {n: ratio(ms, each[LOGITS]) for n, ms in each.items()}
                   for what, each in times.items()},
    }  # fmt: skip


def _last_layer(loss: lm_model.Loss, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> measure.Step:
    hidden.requires_grad_()
    weight.requires_grad_()

    def forget() -> None:
        hidden.grad = weight.grad = None

    return measure.Step(forget, lambda: loss(hidden, weight, target).backward())


# --- report -----------------------------------------------------------------------------------------------------------


def _cost(section: dict[str, Any]) -> str:
    of = section["sizes"]
    what, step = "last layer and loss", "step"
    rows = (
        [name, f"{section['tokens_per_s'][name]:.0f}", f"{section['time_ms'][step][name]['median']:.0f}",
         f"{section['ratios'][step][name]['median']:.2f}", f"{section['time_ms'][what][name]['median']:.0f}",
         f"{section['ratios'][what][name]['median']:.2f}", f"{section['peak_bytes'][name] / MiB:.0f}"]
        for name in LOSSES
    )  # fmt: skip
    header = ["loss", "tokens a second", "step, ms", "ratio", f"{what}, ms", "ratio", f"{what}, peak MiB"]
    return (
        f"Training steps of {section['n_rows']} pieces on one thread, with forward, backward and optimizer, and the "
        f"last layer ({of['width']} x {of['n_pieces']}) with its loss, forward and backward, alone. Its logits would "
        f"take {section['logits_bytes'] / MiB:.0f} MiB, its gradients take {section['gradients_bytes'] / MiB:.1f}. "
        f"Medians; lower is better but for tokens a second. *{PLAIN}* is `linear_bonus_cross_entropy` with "
        f"`bonus=None`, *{BONUS}* with `LogBonus(0.75)`; *{PLAIN}* and *{LOGITS}* give the same loss.\n\n"
        + table(header, rows)
    )


def _train_report(section: dict[str, Any]) -> str:
    of, told, runs = section["sizes"], section["text"], section["runs"]
    rows = ([name, *(f"{run[key]:.2f}" for key in COLUMNS), f"{run['seconds']:.0f}"] for name, run in runs.items())
    hardest = (
        [f"{h['margin']:.1f}", f"{h['loss']:.1f}", _code(h["before"]), _code(h["piece"]), _code(h["runner_up"])]
        for h in runs[BONUS]["hardest"]
    )
    n_parameters, scored = runs[PLAIN]["parameters"], runs[PLAIN]["scored"]
    return (
        f"Text: {told['files']} files of Python's own standard library, {told['characters'] / 1e6:.1f} million "
        f"characters, as {told['pieces']} pieces (words with the space before them, indents, signs; rare words by "
        f"letters): {told['train']} to train on, {told['validation']} in every 20th file kept apart. Model: "
        f"{of['depth']} blocks of width {of['width']}, the last layer tied to the embedding, {n_parameters} "
        f"parameters; {of['steps']} steps of {of['batch']} x {of['context']} pieces, AdamW, one seed, both from the "
        f"same weights with the same batches. Quality on {scored} pieces that were kept apart, the curve on "
        f"{lm_model.CONTEXTS} contexts of them; perplexity and ECE "
        "(expected calibration error over 15 bins of confidence): lower is better. All of it comes from "
        "`linear_difficulty_scores`. One seed tells of no difference between losses that is small.\n\n"
        + table(["loss", *COLUMNS.values(), "s"], rows)
        + f"\nThe {len(runs[BONUS]['hardest'])} hardest pieces by `margin`, in logits (how far the piece is ahead of "
        "the likeliest other), trained with the bonus:\n\n"
        + table(["margin", "cross-entropy, nats", "before", "piece", "the model would rather say"], hardest)
    )


def _code(piece: str) -> str:
    """Return a piece of text as it stands in a table."""
    shown = repr(piece)[1:-1].replace("|", "\\|").replace("`", "'")
    return f"`{shown}`"


def _draw_curves(section: dict[str, Any], figure: Any) -> None:
    """Cross-entropy of what is trained on and of what is not, whatever loss is trained with."""
    axes = figure.subplots()
    for i, (name, run) in enumerate(section["runs"].items()):
        steps, trained, held = zip(*run["curve"], strict=True)
        axes.plot(steps, trained, f"C{i}--", alpha=0.6, label=f"{name}, batches")
        axes.plot(steps, held, f"C{i}o-", markersize=3, label=f"{name}, files kept apart")
    axes.set(title="A small transformer on Python's standard library", xlabel="step",
             ylabel="cross-entropy, nats a piece\n(lower is better)")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_text(section: dict[str, Any], figure: Any) -> None:
    """Text kept apart, the darker behind a piece the harder it is."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.patches import Rectangle

    columns, lines, scale = 110, 34, Normalize(0, 10)
    colours, x, y = LinearSegmentedColormap.from_list("hardness", ["white", "gold", "orangered"]), 0, 0
    axes = figure.subplots()
    axes.set(xlim=(0, columns), ylim=(lines, 0), xticks=[], yticks=[])
    axes.set_title(f"Cross-entropy of every piece, trained with the {BONUS}: the darker, the harder for the model")
    for piece, loss in section["runs"][BONUS]["shown"]:
        shown = piece.replace("\n", "")
        if "\n" in piece:
            axes.text(x, y + 0.5, "\N{DOWNWARDS ARROW WITH TIP LEFTWARDS}", fontsize=7, va="center", color="gray")
            x, y = 0, y + 1
        if x + len(shown) > columns:
            x, y = 4, y + 1
        if y >= lines:
            break
        axes.add_patch(Rectangle((x, y), len(shown), 1, color=colours(scale(loss)), linewidth=0))
        for i, letter in enumerate(shown):
            axes.text(x + i + 0.5, y + 0.5, letter, fontsize=9, family="monospace", ha="center", va="center",
                      parse_math=False)  # fmt: skip
        x += len(shown)
    bar = ScalarMappable(scale, colours)
    figure.colorbar(bar, ax=axes, label="cross-entropy, nats (lower is better; 10 and above alike)", shrink=0.6)


BOOK = Book(
    "python -m bench lm", "Train a small language model.", "A language model without its logits",
    {
        "cost": Section("Time and memory", cost, _cost),
        "train": Section(
            "Training", train, _train_report,
            {"-loss": Picture(_draw_curves, 9, 5), "-hardest": Picture(_draw_text, 13, 8)},
        ),
    },
    lambda: f"lm-{instruction_set()}",
)  # fmt: skip
