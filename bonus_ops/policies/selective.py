"""Selection of hard examples: Selective-Backprop, and selection by rank within a batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_generator, check_integer, check_number, checked_difficulty
from .history import History

__all__ = ["Selection", "rank_selection", "rank_selection_is_due", "selective_backprop", "selective_beta"]


class Selection(NamedTuple):
    """Examples chosen independently of each other.

    Attributes:
        keep: bool [N], which examples were chosen.
        probability: float [N] in [0, 1], the chance each had.
    """

    keep: Tensor
    probability: Tensor

    @property
    def unbiased_weight(self) -> Tensor:
        """``keep / probability`` [N]: ``(unbiased_weight * loss).sum() / N`` has the mean loss as its expectation.

        Examples that could not be chosen (probability 0) are lost: unbiased is over those that could. Divide by the
        fixed N, never by the number kept.
        """
        return torch.where(self.keep, 1 / self.probability, 0.0)


def selective_beta(keep: float) -> float:
    """Return the ``beta`` that keeps the share ``keep`` in (0, 1] of examples on average: ``1 / keep - 1``.

    Raises as all policies.
    """
    check_number("selective_beta", "keep", keep, "(0, 1]")
    return 1 / keep - 1


def selective_backprop(
    difficulty: Tensor,
    history: History,
    *,
    beta: float = 1.0,
    floor: float = 0.0,
    generator: torch.Generator | None = None,
) -> Selection:
    """Choose examples for backpropagation with probability ``CDF(difficulty) ** beta``.

    The CDF is that of the last values pushed into ``history`` (ties count half). Selection makes the gradient biased
    towards hard examples on purpose; use `Selection.unbiased_weight` to undo that. **Under label noise it learns the
    noise**: guard the difficulty with `guarded` first.

    A zero weight saves no time in the backward pass: compact the batch (`keep` to indices) and run forward again, or
    choose before the forward with `DifficultySampler`.

    Args:
        difficulty: [N], higher is harder; NaN takes no part and is not chosen. The method ranks the loss,
            ``scores.loss``.
        history: values seen before; while it is empty everything is chosen. Push the batch's own difficulty first.
        beta: >= 0, default 1 (paper); 3 in the authors' example script; 0 keeps everything.
        floor: smallest probability, in [0, 1], default 0; above 0 no example is lost.
        generator: of the device of ``difficulty``.

    Returns:
        `Selection`, detached, on the device; no host sync. Raises as all policies.

    Example:
        >>> import torch
        >>> from bonus_ops.policies import History, selective_backprop
        >>> loss = torch.tensor([0.1, 1.0, 3.0])
        >>> history = History.empty().push(loss)
        >>> selective_backprop(loss, history).probability
        tensor([0.1667, 0.5000, 0.8333])

    References:
        Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers, 2019, arXiv 1910.00762. Its failure
        under label noise: arXiv 2107.07741.
    """
    difficulty = checked_difficulty("selective_backprop", "difficulty", difficulty)
    if not isinstance(history, History):
        raise TypeError(f"selective_backprop: history must be a History, got {type(history).__name__}")
    check_generator("selective_backprop", generator)
    check_number("selective_backprop", "beta", beta, "[0, inf)")
    check_number("selective_backprop", "floor", floor, "[0, 1]")
    probability = (history.cdf(difficulty) ** beta).clamp(min=floor)
    probability = torch.where(history.filled == 0, 1.0, probability)
    probability = torch.where(difficulty.isnan(), 0.0, probability)
    uniform = torch.rand(probability.shape, dtype=probability.dtype, generator=generator, device=probability.device)
    return Selection(uniform < probability, probability)


def rank_selection(difficulty: Tensor, *, keep: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Choose ``int(keep * N)`` of N examples without replacement, the hard ones more likely.

    Drawn one after another with probability proportional to ``((rank + 0.5) / N) ** (1 / keep - 1)``, rank 0 the
    easiest. The size is fixed, so that indices can be returned without a host sync. Not unbiased, and there are no
    simple weights that make it so.

    Args:
        difficulty: [N], higher is harder; NaN is chosen only when nothing else is left.
        keep: share in (0, 1], default 0.5 (Composer); at least one example is chosen.
        generator: of the device of ``difficulty``.

    Returns:
        int64 [max(1, int(keep * N))], distinct indices (empty for an empty batch). Raises as all policies.

    References:
        MosaicML Composer, Selective Backprop (after arXiv 1910.00762). When: `rank_selection_is_due`.
    """
    difficulty = checked_difficulty("rank_selection", "difficulty", difficulty)
    check_generator("rank_selection", generator)
    check_number("rank_selection", "keep", keep, "(0, 1]")
    n = len(difficulty)
    order = difficulty.argsort(stable=True)  # NaN last
    rank = torch.empty_like(order).scatter(0, order, torch.arange(n, device=order.device))
    log_p = (1 / keep - 1) * torch.log((rank.double() + 0.5) / max(n, 1))
    # the k earliest of exponential clocks with rates p are k draws without replacement
    clock = torch.empty(n, dtype=torch.float64, device=order.device).exponential_(generator=generator)
    arrival = torch.where(difficulty.isnan(), math.inf, clock.log() - log_p)
    return arrival.topk(min(n, max(1, int(keep * n))), largest=False).indices


def rank_selection_is_due(progress: float, step: int, *, start: float = 0.5, end: float = 0.9, every: int = 2) -> bool:
    """Return whether Composer would select at this step: in [start, end) of training, but for every ``every``-th step.

    Args:
        progress: share of training done, in [0, 1].
        step: index of the batch in the epoch, from 0.
        start: default 0.5.
        end: default 0.9.
        every: each such step trains on the whole batch; 0 never does. Default 2. Raises as all policies.
    """
    check_number("rank_selection_is_due", "progress", progress, "[0, 1]")
    check_integer("rank_selection_is_due", "step", step, 0)
    check_number("rank_selection_is_due", "start", start, "[0, 1]")
    check_number("rank_selection_is_due", "end", end, f"[{start}, 1]")
    check_integer("rank_selection_is_due", "every", every, 0)
    return start <= progress < end and (every == 0 or (step + 1) % every != 0)
