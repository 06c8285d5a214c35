"""Importance sampling: draw hard examples more often, weigh them less, keep the expected gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_generator, check_integer, check_number, checked_difficulty
from .selective import Selection

__all__ = ["Draw", "importance_draw", "importance_gain", "importance_pays", "poisson_selection"]

LARGEST = torch.finfo(torch.float32).max


class Draw(NamedTuple):
    """Examples drawn with replacement.

    Attributes:
        indices: int64 [size], which examples; may repeat.
        unbiased_weight: float [size]; ``(unbiased_weight * loss[indices]).mean()`` has the mean loss as expectation.
    """

    indices: Tensor
    unbiased_weight: Tensor


def importance_draw(
    difficulty: Tensor, size: int, *, smoothing: float = 0.0, generator: torch.Generator | None = None
) -> Draw:
    """Draw ``size`` of B presampled examples with replacement, ``p_i = (s_i + c) / sum (s + c)``.

    The weights are ``1 / (B p_i)``. They are for draws with replacement only: without, they would be biased. Clipping
    them is a bias too.

    Args:
        difficulty: s, [B], >= 0: ``el2n`` (the paper's gradient norm) or ``loss``. NaN and -inf (taken out) take no
            part; another negative counts as 0, +inf as the largest float32. Where all are 0 the draw is uniform;
            where all are NaN it weighs 0.
        size: how many to draw, >= 1; the paper presamples B = 3 size.
        smoothing: c >= 0, default 0; above 0 every example can be drawn and no weight exceeds ``mean(s + c) / c``.
        generator: of the device of ``difficulty``.

    Returns:
        `Draw`, on the device; no host sync. B counts the examples that are not NaN.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of a wrong type, range or shape, or nothing to draw from.

    Example:
        >>> import torch
        >>> from bonus_ops.policies import importance_draw
        >>> draw = importance_draw(torch.tensor([0.0, 1.0, 3.0]), 2, generator=torch.Generator().manual_seed(0))
        >>> draw.unbiased_weight * torch.tensor([0.0, 1.0, 3.0])[draw.indices]  # every draw estimates the mean, 4 / 3
        tensor([1.3333, 1.3333])

    References:
        Katharopoulos & Fleuret, Not All Samples Are Created Equal, ICML 2018, arXiv 1803.00942.
    """
    check_integer("importance_draw", "size", size, 1)
    check_generator("importance_draw", generator)
    score, valid = _scores("importance_draw", difficulty, smoothing)
    if len(score) == 0:
        raise ValueError("importance_draw: difficulty must hold at least one example, got 0")
    cumulative = score.cumsum(0)
    total = cumulative[-1]
    uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=score.device)
    # strictly below the total even when the product rounds up, so that a last example of probability 0 is not drawn
    level = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, level, right=True).clamp(max=len(score) - 1)  # all NaN: past the end
    weight = torch.where(total > 0, total / (valid.sum() * score[index]), 0.0)
    return Draw(index, weight.to(torch.promote_types(difficulty.dtype, torch.float32)))


def poisson_selection(
    difficulty: Tensor, size: int, *, smoothing: float = 0.0, generator: torch.Generator | None = None
) -> Selection:
    """Choose each of N examples independently with ``pi_i = min(1, size (s_i + c) / sum (s + c))``.

    About ``size`` are chosen (fewer where probabilities hit 1), none twice. `Selection.unbiased_weight` is 1 / pi_i:
    divide the weighted sum by the fixed N (those not NaN).

    Args:
        difficulty: s, [N], as in `importance_draw`.
        size: expected number chosen, >= 1.
        smoothing: c >= 0, default 0.
        generator: of the device of ``difficulty``.

    Returns:
        `Selection`, on the device; no host sync. Raises as all policies.

    References:
        Poisson (Bernoulli) sampling of the scores of arXiv 1803.00942.
    """
    check_integer("poisson_selection", "size", size, 1)
    check_generator("poisson_selection", generator)
    score, _ = _scores("poisson_selection", difficulty, smoothing)
    probability = (size * score / score.sum()).clamp(max=1).nan_to_num(nan=0.0)  # 0 / 0: all NaN
    uniform = torch.rand(score.shape, dtype=torch.float64, generator=generator, device=score.device)
    return Selection(uniform < probability, probability.to(torch.promote_types(difficulty.dtype, torch.float32)))


def importance_gain(difficulty: Tensor) -> Tensor:
    """Return ``tau = sqrt(B sum s^2) / sum s``, a scalar in [1, sqrt B]: how unequal the scores are.

    Drawing by s has the variance of a uniform draw of ``tau^2`` times the examples (to first order in the paper's
    bound). Smooth it over steps: ``tau = 0.9 * tau + 0.1 * importance_gain(el2n)``. NaN takes no part; all 0 gives 1,
    all NaN (or nothing) NaN. Raises as all policies.

    References:
        arXiv 1803.00942, Eq. 26, simplified: ``1 - ||g - u||^2 / ||g||^2 = 1 / tau^2``.
    """
    score, valid = _scores("importance_gain", difficulty, 0.0)
    return (torch.sqrt(valid.sum() * (score * score).sum()) / score.sum()).to(difficulty.dtype)


def importance_pays(gain: Tensor, presample: int, size: int) -> Tensor:
    """Return whether importance sampling beats uniform for its cost: ``tau > (B + 3 b) / (3 b)``, a bool tensor.

    Args:
        gain: tau, best a running mean of `importance_gain`.
        presample: B, examples scored by a forward pass; the paper's 3 b makes the bar 2.
        size: b, examples drawn for forward and backward (a backward costs two forwards). Raises as all policies.

    References:
        arXiv 1803.00942, section 3.3.
    """
    if not isinstance(gain, Tensor):
        raise TypeError(f"importance_pays: gain must be a Tensor, got {type(gain).__name__}")
    check_integer("importance_pays", "size", size, 1)
    check_integer("importance_pays", "presample", presample, size)
    return gain > (presample + 3 * size) / (3 * size)


def _scores(function: str, difficulty: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the scores in float64, 0 where NaN, all 1 where none is positive; and which are not NaN."""
    difficulty = checked_difficulty(function, "difficulty", difficulty)
    check_number(function, "smoothing", smoothing, "[0, inf)")
    valid = ~difficulty.isnan()
    score = torch.where(valid, difficulty.double().clamp(0, LARGEST) + smoothing, 0.0)
    return torch.where(score.sum() > 0, score, valid.double()), valid
