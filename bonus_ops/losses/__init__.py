"""Losses: frozen dataclasses with their torch formulas.

For logits ``z`` with label ``y`` let the *rest* be every other class and

    gap = z_y - logsumexp(z_k, k != y)        p = p_y = sigmoid(gap)        1 - p = sigmoid(-gap)

A hard-label loss is a scalar function of the gap, given by two formulas:

    value(gap) = L                            slope(gap) = A = -dL/dgap

and its row gradient is ``dL/dz_y = -A``, ``dL/dz_k = A exp(z_k - logsumexp(rest))``.

To add a loss, subclass `GapLoss`: fields are numbers (or None), `value` and `slope` are torch formulas, and for
the GPU `kernel` is a pair of ``@triton.jit`` functions ``(gap, params) -> tensor`` fed by `parameters`.
A loss of all classes, not of the gap alone, is a `ClassLoss`.
"""

from .base import GapLoss
from .base import Loss as Loss
from .base import decode as decode
from .base import encode as encode
from .bonus import Bonus as Bonus
from .class_distances import ClassLoss, SoftmaxAbsoluteError, SoftmaxSquaredError
from .cosine_bonus import CosineBonus
from .cross_entropy import CrossEntropy
from .distances import AbsoluteError, SquaredError
from .focal import Focal, FocalStar, HaltedFocal
from .gap import logit as logit
from .generalized_cross_entropy import GeneralizedCrossEntropy
from .log_bonus import LogBonus
from .poly1 import Poly1
from .power_bonus import PowerBonus
from .sub_data_bonus import SubDataBonus

__all__ = [
    "AbsoluteError",
    "ClassLoss",
    "CosineBonus",
    "CrossEntropy",
    "Focal",
    "FocalStar",
    "GapLoss",
    "GeneralizedCrossEntropy",
    "HaltedFocal",
    "LogBonus",
    "Poly1",
    "PowerBonus",
    "SoftmaxAbsoluteError",
    "SoftmaxSquaredError",
    "SquaredError",
    "SubDataBonus",
]
