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
from .scores import SCORES, Score, Scores

__all__ = [
    "SCORES",
    "BonusCrossEntropyLoss",
    "CosineBonus",
    "CrossEntropy",
    "Focal",
    "GapLoss",
    "GeneralizedCrossEntropy",
    "LogBonus",
    "Poly1",
    "PowerBonus",
    "Score",
    "Scores",
    "SubDataBonus",
    "bonus_cross_entropy",
    "bonus_cross_entropy_with_scores",
    "bonus_cross_entropy_with_softmax",
    "difficulty_scores",
]
