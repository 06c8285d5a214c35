"""The focal loss and its kin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .base import GapLoss

__all__ = ["Focal", "FocalStar", "HaltedFocal"]


@dataclass(frozen=True)
class Focal(GapLoss):
    """The focal loss on softmax: ``L = -(1 - p)^gamma log p``.

    ``A = (1 - p)^gamma ((1 - p) - gamma p log p)``; ``gamma=0`` is cross-entropy.

    Args:
        gamma: exponent >= 0. Default 2, the paper's.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, https://arxiv.org/abs/1708.02002, eq. 4.
    """

    kernel: ClassVar[Any] = "focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        self.check_fields(gamma="[0, inf)")

    def value(self, gap: Tensor) -> Tensor:
        return torch.exp(self.gamma * logsigmoid(-gap).clamp(min=-1000.0)) * -logsigmoid(gap)

    def slope(self, gap: Tensor) -> Tensor:
        damping = torch.exp(self.gamma * logsigmoid(-gap).clamp(min=-1000.0))
        log_p = logsigmoid(gap).clamp(min=-1000.0)  # p log p is 0 at p = 0, not 0 * -inf
        return damping * (torch.sigmoid(-gap) - self.gamma * torch.sigmoid(gap) * log_p)


@dataclass(frozen=True)
class HaltedFocal(GapLoss):
    """The halted focal loss: focal where the label is less likely than not, cross-entropy where it is more.

        L = -(1 - p)^gamma log p                   A = (1 - p)^gamma ((1 - p) - gamma p log p)      p <= 1/2
        L = -log p - log 2 (1 - 2^-gamma)          A = 1 - p                                        p > 1/2

    The value is continuous at ``p = 1/2``, where the slope steps up to that of cross-entropy. The paper's detector code
    switches on the sign of the logit instead, a defect: for negatives that is the reverse of the paper's figure.

    Args:
        gamma: exponent >= 0. Default 2.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, the halted focal loss.
    """

    kernel: ClassVar[Any] = "halted_focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        self.check_fields(gamma="[0, inf)")

    def _step(self) -> float:
        return math.log(2) * -math.expm1(-self.gamma * math.log(2))

    def parameters(self) -> tuple[float, ...]:
        return self.gamma, self._step()

    def value(self, gap: Tensor) -> Tensor:
        # each part sees its own side: the derivative of the other would be NaN at an infinite gap; no clamp, whose
        # derivative at 0 differs between versions of torch
        low = Focal(self.gamma).value(torch.where(gap > 0, 0.0, gap))
        return torch.where(gap > 0, -logsigmoid(torch.where(gap > 0, gap, 0.0)) - self._step(), low)

    def slope(self, gap: Tensor) -> Tensor:
        return torch.where(gap > 0, torch.sigmoid(-gap), Focal(self.gamma).slope(torch.where(gap > 0, 0.0, gap)))


@dataclass(frozen=True)
class FocalStar(GapLoss):
    """Focal loss star, focal's simpler twin: ``L = softplus(-(gamma gap + beta)) / gamma``.

    ``A = sigmoid(-(gamma gap + beta))``; ``gamma=1, beta=0`` is cross-entropy.

    Args:
        gamma: steepness > 0. Default 4.
        beta: shift of the gap. Default 0; the paper also uses ``gamma=2, beta=1``.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, https://arxiv.org/abs/1708.02002, appendix A.
    """

    kernel: ClassVar[Any] = "focal_star"
    gamma: float = 4.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        self.check_fields(gamma="(0, inf)", beta="(-inf, inf)")

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(self.gamma * gap + self.beta) / self.gamma

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-(self.gamma * gap + self.beta))
