"""bonus_ops: cross-entropy with a bonus for well-classified examples, and difficulty scores, in one pass."""

from .functional import (
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
)
from .losses import (
    CosineBonus,
    CrossEntropy,
    Focal,
    GapLoss,
    GeneralizedCrossEntropy,
    LogBonus,
    Poly1,
    PowerBonus,
    SubDataBonus,
)
from .modules import BonusCrossEntropyLoss
from .schedules import Cosine, Deferred, Exponential, Linear, Scheduled
from .patch import patch_cross_entropy
from .scores import SCORES, Score, Scores

__all__ = [
    "SCORES",
    "BonusCrossEntropyLoss",
    "Cosine",
    "CosineBonus",
    "CrossEntropy",
    "Deferred",
    "Exponential",
    "Focal",
    "GapLoss",
    "GeneralizedCrossEntropy",
    "Linear",
    "LogBonus",
    "Poly1",
    "PowerBonus",
    "Scheduled",
    "Score",
    "Scores",
    "SubDataBonus",
    "bonus_cross_entropy",
    "bonus_cross_entropy_with_scores",
    "bonus_cross_entropy_with_softmax",
    "difficulty_scores",
    "patch_cross_entropy",
]
