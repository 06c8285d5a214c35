"""The encouraging loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .bonus import Bonus
from .gap import logit

__all__ = ["LogBonus"]


@dataclass(frozen=True)
class LogBonus(Bonus):
    """The encouraging loss: cross-entropy plus the (conservative) logarithmic bonus.

    With ``LE = log_end`` the bonus is ``log(1 - p)`` up to ``p = LE`` and its tangent beyond:

        b(p) = log(1 - min(p, LE)) - max(p - LE, 0) / (1 - LE)
        A    = (1 - p) + strength * p * min(1, (1 - p) / (1 - LE))

    ``log_end=1`` never turns linear: ``b(p) = log(max(1 - p, clamp))``, whose gradient stops where ``1 - p < clamp``.
    That clamp bounds the loss from below and keeps training stable; ``clamp=None`` is the exact, unbounded
    ``L = -gap`` at strength 1. ``clamp`` has no effect for ``log_end < 1``.

    Which ``log_end``: the larger, the longer a sure example is pushed on, and the surer the model is where it is wrong.
    Measured on small networks (``python -m bench claims calibration``, 10 seeds, digits and lines of text): .5 and .75
    are equally accurate, .2 to 1.4 points above cross-entropy at the same learning rate, and not above cross-entropy at
    twice that rate. On digits their probabilities are as good as cross-entropy's. On text whose classes overlap, the
    negative log-likelihood rises by 26 % at .75 and by 17 % at .5; a temperature fitted on held-out rows repairs both.
    At 1 it is 2.4 to 3 times cross-entropy's on all four tasks, and with rare classes the accuracy falls too. So take
    .5 or .75, fit a temperature where the probabilities are used, and cross-entropy (``bonus=None``) where you cannot;
    ``log_end=1`` is for large margins and for the paper's figures.

    Args:
        log_end: in [0, 1]; the paper uses .75 (images) and .5 (graphs, translation). Default .5: as accurate as .75
            in ``python -m bench claims calibration``, at a lower negative log-likelihood.
        clamp: lower bound of 1 - p inside the logarithm at ``log_end=1``, or None. Default 1e-5, the paper's.
        strength: finite factor on the bonus, the paper's bonus_rho; 0 is cross-entropy. Default 1. Keyword only, like
            the next two.
        start: in [0, 1), below ``abrupt``: no bonus below this p, and shifted to start at 0 there. Default 0, off.
        abrupt: in (0, 1]: no bonus above this p (the paper's ablation). Default 1, off.

    Raises:
        ValueError: a parameter is outside its range.
        TypeError: a parameter is not a number.

    Example:
        >>> import torch
        >>> from bonus_ops import LogBonus, bonus_cross_entropy
        >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0])
        >>> bonus_cross_entropy(logits, target, bonus=LogBonus(log_end=0.75), reduction="none")
        tensor([-1.7826,  2.0000])

    References:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural Networks,
        AAAI 2022, https://arxiv.org/abs/2110.06537, the conservative encouraging loss.
    """

    kernel: ClassVar[Any] = "log_bonus"
    log_end: float = 0.5
    clamp: float | None = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fields(log_end="[0, 1]", clamp="(0, 1) or None")

    def _floor(self) -> float:
        """Return the lowest log(1 - p) that is rewarded: only log_end=1 needs one."""
        return math.log(self.clamp) if self.log_end == 1 and self.clamp is not None else -math.inf

    def bonus(self, gap: Tensor) -> Tensor:
        log_rest = logsigmoid(-gap)  # log(1 - p)
        if self.log_end == 1:
            return log_rest if self.clamp is None else log_rest.clamp(min=self._floor())
        rest_end = 1 - self.log_end
        tangent = math.log(rest_end) - 1 + torch.sigmoid(-gap) / rest_end
        return torch.where(gap <= logit(self.log_end), log_rest, tangent)

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        if self.log_end == 1:
            return p if self.clamp is None else torch.where(logsigmoid(-gap) >= self._floor(), p, 0.0)
        return p * (rest / (1 - self.log_end)).clamp(max=1.0)

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        # min(p, LE) = 1 - max(1 - p, 1 - LE); at LE = 1 the clamp takes the place of 1 - LE and nothing is linear
        lowest = rest.clamp(min=self._lowest_rest())
        bonus = torch.log(lowest)
        return bonus if self.log_end == 1 else bonus - (lowest - rest) / (1 - self.log_end)

    def _lowest_rest(self) -> float:
        return 1 - self.log_end if self.log_end < 1 else self.clamp or torch.finfo(torch.float32).tiny

    def bonus_parameters(self) -> tuple[float, ...]:
        rest_end = 1 - self.log_end
        inverse, log_end = (1 / rest_end, math.log(rest_end)) if rest_end > 0 else (math.inf, -math.inf)
        return logit(self.log_end), log_end, inverse, self._floor()
