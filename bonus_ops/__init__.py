"""bonus_ops: cross-entropy with a bonus for well-classified examples, and difficulty scores, in one pass."""

from . import causal_lm as causal_lm
from . import losses
from . import policies as policies
from .binary_scores import BinaryScores
from .check_loss import LossCheck, check_loss
from .dynamics import ExampleTracker
from .functional import (
    CrossEntropyWithSoftmax,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
)
from .linear import (
    LinearBonusCrossEntropyLoss,
    LinearScores,
    linear_bonus_cross_entropy,
    linear_bonus_cross_entropy_with_scores,
    linear_difficulty_scores,
)
from .losses import *  # noqa: F403 - what its `__all__` names
from .mixup import MixupWithScores, mixup_cross_entropy, mixup_cross_entropy_with_scores
from .modules import BonusCrossEntropyLoss
from .patch import patch_cross_entropy
from .schedules import Cosine, Deferred, Exponential, Linear, Scheduled
from .scores import SCORES, Score, Scores
from .sigmoid import (
    BonusBCEWithLogitsLoss,
    PositiveCount,
    binary_difficulty_scores,
    bonus_binary_cross_entropy_with_logits,
    bonus_binary_cross_entropy_with_logits_and_scores,
)

__all__ = [
    "SCORES",
    "BinaryScores",
    "BonusBCEWithLogitsLoss",
    "BonusCrossEntropyLoss",
    "Cosine",
    "CrossEntropyWithSoftmax",
    "Deferred",
    "ExampleTracker",
    "Exponential",
    "Linear",
    "LinearBonusCrossEntropyLoss",
    "LinearScores",
    "LossCheck",
    "MixupWithScores",
    "PositiveCount",
    "Scheduled",
    "Score",
    "Scores",
    "binary_difficulty_scores",
    "bonus_binary_cross_entropy_with_logits",
    "bonus_binary_cross_entropy_with_logits_and_scores",
    "bonus_cross_entropy",
    "bonus_cross_entropy_with_scores",
    "bonus_cross_entropy_with_softmax",
    "check_loss",
    "difficulty_scores",
    "linear_bonus_cross_entropy",
    "linear_bonus_cross_entropy_with_scores",
    "linear_difficulty_scores",
    "mixup_cross_entropy",
    "mixup_cross_entropy_with_scores",
    "patch_cross_entropy",
]
__all__ += losses.__all__

__version__ = "0.1.0"
