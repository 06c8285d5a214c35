"""The loss an example would have had under a random label, and a quantile of it: on-the-fly denoising's yardstick."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scores import Scores
from .field import Batch, Column, Field, State

__all__ = ["RandomLabelLosses", "random_label_loss"]

BINS = 4096
LARGEST = 1e5  # nats; larger losses count as this
SCALE = BINS / math.log1p(LARGEST)  # a bin is 0.3 % of (1 + loss) wide


def random_label_loss(
    logits: Tensor,
    target: Tensor,
    scores: Scores,
    *,
    exclude_target: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the cross-entropy of each example under a random label, ``logsumexp(z) - z_k``.

    On-the-fly denoising flags an example whose recent loss is above a quantile of these: it is learned no better than a
    label drawn by lot. One element a row is read; the normaliser comes with the scores.

    Args:
        logits: [N, C] or [N, C, d1, ...], as given to the loss.
        target: labels, [N] or [N, d1, ...].
        scores: of these logits and labels.
        exclude_target: draw k from the other classes, uniformly. False draws from all C as the paper does: a share 1/C
            of the draws is then the label itself, and a quantile p <= 1/C flags clean examples.
        generator: source of the draws, on the device of ``logits``.

    Returns:
        float32 shaped like ``target``, in nats, [0, inf]; NaN where ignored.

    Raises:
        TypeError: ``logits`` or ``target`` is no Tensor, or ``scores`` no `Scores`.
        ValueError: a single class leaves no other.
        RuntimeError: the shapes do not go together, or ``target`` holds no class indices.

    References:
        Song et al., Robust and On-the-fly Dataset Denoising for Image Classification, 2020, arXiv 2003.10647, which
        simulates the logits from random features; the training logits stand in for them here.
    """
    for name, x, kind in (("logits", logits, Tensor), ("target", target, Tensor), ("scores", scores, Scores)):
        if not isinstance(x, kind):
            raise TypeError(f"random_label_loss: {name} must be {kind.__name__}, got {type(x).__name__}")
    if logits.dim() < 2 or logits.shape[:1] + logits.shape[2:] != target.shape or target.shape != scores.energy.shape:
        raise RuntimeError(
            f"expected logits [N, C, ...] with target and scores [N, ...], got {list(logits.shape)}, "
            f"{list(target.shape)} and {list(scores.energy.shape)}"
        )
    if target.is_floating_point():
        raise RuntimeError(f"random_label_loss: target must hold class indices, got {target.dtype}")
    n_classes = logits.shape[1]
    if n_classes - exclude_target < 1:
        raise ValueError("random_label_loss: a single class leaves no other label to draw; use exclude_target=False")
    draw = torch.randint(n_classes - exclude_target, target.shape, generator=generator, device=logits.device)
    if exclude_target:
        draw = draw + (draw >= target)  # skips the label
        draw = draw.clamp(max=n_classes - 1)  # where the label is ignore_index: NaN anyway
    picked = logits.detach().gather(1, draw.unsqueeze(1)).squeeze(1).to(torch.float32)
    loss = (-scores.energy - picked).clamp(min=0)
    return torch.where(scores.loss.isnan(), torch.nan, loss)


@dataclass(frozen=True)
class RandomLabelLosses(Field):
    """Histogram of the random-label losses of an epoch, on the device; `ExampleTracker.random_label_quantile` reads it.

    Bins are even in log(1 + loss), so a quantile is exact to 0.3 % of (1 + loss). Memory: 32 KiB, none an example.
    """

    name = "random_label_loss"
    columns = (
        Column("random_label_counts", torch.int32, 0, "sum", BINS),
        Column("random_label_counts_before", torch.int32, 0, "sum", BINS),
    )
    statistics = ()

    def update(self, state: State, batch: Batch) -> None:
        if batch.random_label_loss is None:
            return
        loss = batch.random_label_loss
        bins = (torch.log1p(loss) * SCALE).clamp(max=BINS - 1).nan_to_num(0).to(torch.int64)
        counts = (batch.labelled != batch.spare) & ~loss.isnan()
        state["random_label_counts"].index_add_(0, bins, counts.to(torch.int32))

    def end_epoch(self, state: State) -> None:
        state["random_label_counts_before"].copy_(state["random_label_counts"])
        state["random_label_counts"].zero_()


def quantile(counts: Tensor, p: float) -> Tensor:
    """Return the loss below which a share p of the counted ones lies, a scalar tensor; NaN if none was counted."""
    below = counts.to(torch.float64).cumsum(0)
    wanted = p * below[-1]
    bin = torch.searchsorted(below, wanted).clamp(max=BINS - 1)
    # `take`, since indexing by a scalar tensor reads it on the host; 0 / 0 is NaN where nothing was counted
    inside = 1 - (below.take(bin) - wanted) / counts.take(bin)
    return torch.expm1((bin + inside) / SCALE).to(torch.float32)
