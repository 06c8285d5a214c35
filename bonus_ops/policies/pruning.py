"""Pruning by the epoch: leave out some easy examples, weigh the others up."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_generator, check_number, checked_difficulty

__all__ = ["infobatch"]


def infobatch(
    difficulty: Tensor,
    *,
    ratio: float = 0.5,
    progress: float = 0.0,
    stop: float = 0.875,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the weights of InfoBatch for an epoch: drop easy examples at random, rescale those that stay.

    An example below the mean is dropped with probability ``ratio``, and otherwise weighs ``1 / (1 - ratio)``; all
    others weigh 1. So the expected weight is 1 and ``(weight * loss).mean()`` over the data stays unbiased. From
    ``stop`` of the training on nothing is dropped. **Unbiased is not robust**: under label noise what it drops is
    clean.

    Args:
        difficulty: [N], the last ``scores.loss`` of each example; higher is harder. +inf (never seen) is kept
            and left out of the mean; NaN and -inf (taken out) take no part and weigh 0.
        ratio: in [0, 1), default 0.5.
        progress: share of training done, in [0, 1].
        stop: in [0, 1], default 0.875.
        generator: of the device of ``difficulty``.

    Returns:
        Weights [N], each 0, 1 or ``1 / (1 - ratio)``, at least float32, on the device; no host sync. Raises as all
        policies.

    References:
        Qin et al., InfoBatch, ICLR 2024, arXiv 2303.04947.
    """
    difficulty = checked_difficulty("infobatch", "difficulty", difficulty)
    check_generator("infobatch", generator)
    check_number("infobatch", "ratio", ratio, "[0, 1)")
    check_number("infobatch", "progress", progress, "[0, 1]")
    check_number("infobatch", "stop", stop, "[0, 1]")
    difficulty = difficulty.to(torch.promote_types(difficulty.dtype, torch.float32))
    everyone = (~difficulty.isnan()).to(difficulty.dtype)
    if progress >= stop:
        return everyone
    finite = difficulty.isfinite()
    mean = torch.where(finite, difficulty, 0.0).sum() / finite.sum()
    uniform = torch.rand(difficulty.shape, dtype=difficulty.dtype, generator=generator, device=difficulty.device)
    return torch.where(difficulty < mean, (uniform >= ratio).to(difficulty.dtype) / (1 - ratio), everyone)
