"""Training dynamics: what the scores of every step say about each example."""

from .events import Correctness, FirstLearned, Forgetting, LearnedFor, LearnedForever, SecondSplit
from .field import Batch, Column, Field, State, Statistic
from .fields import DEFAULT_FIELDS, FIELDS, STATISTICS
from .means import Confidence, Mean
from .random_labels import RandomLabelLosses, random_label_loss
from .recent import RecentLosses
from .report import KINDS, Report
from .suggested import Labels, SuggestedLabel
from .tracker import ExampleTracker
from .unlabelled import label_free_scores
from .weights import ExponentiatedGradient

__all__ = [
    "DEFAULT_FIELDS",
    "FIELDS",
    "KINDS",
    "STATISTICS",
    "Batch",
    "Column",
    "Confidence",
    "Correctness",
    "ExampleTracker",
    "ExponentiatedGradient",
    "Field",
    "FirstLearned",
    "Forgetting",
    "Labels",
    "LearnedFor",
    "LearnedForever",
    "Mean",
    "RandomLabelLosses",
    "RecentLosses",
    "Report",
    "SecondSplit",
    "State",
    "Statistic",
    "SuggestedLabel",
    "label_free_scores",
    "random_label_loss",
]
