"""Scores of examples whose label is unknown."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import difficulty_scores
from ..scores import Scores

__all__ = ["label_free_scores"]


def label_free_scores(logits: Tensor) -> Scores:
    """Score examples without a label: entropy and energy are theirs, every score that needs a label is NaN.

    An `ExampleTracker` takes such rows for its label-free statistics only.

    Args:
        logits: [C], [N, C] or [N, C, d1, ...], as in `difficulty_scores`.

    Returns:
        `Scores` shaped [], [N] or [N, d1, ...], ``runner_up`` -1.

    Raises:
        As `difficulty_scores`.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"label_free_scores: logits must be a Tensor, got {type(logits).__name__}")
    if logits.dim() == 0:
        raise RuntimeError("label_free_scores: logits must have shape [C], [N, C] or [N, C, d1, ...], got []")
    scores = difficulty_scores(logits, logits.detach().argmax(min(1, logits.dim() - 1)))
    unknown = torch.full_like(scores.loss, torch.nan)
    return scores._replace(loss=unknown, el2n=unknown, margin=unknown, runner_up=torch.full_like(scores.runner_up, -1))
