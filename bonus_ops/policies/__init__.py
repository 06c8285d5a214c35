"""Policies: from scores or statistics of examples to weights and masks.

Pure functions of tensors, on their device, without a host sync; randomness comes from the generator given. Wherever a
policy ranks it takes a *difficulty*, higher is harder: ``scores.difficulty(name)``. NaN (an ignored row, an example not
seen) and -inf (`TAKEN_OUT`: a suspect that `guarded` took out; also a row with one class left, which teaches nothing)
take no part in any of them: they are not chosen and weigh 0. Only `DifficultySampler`, which decides over whole epochs,
visits NaN, so that what was not seen gets seen. A *loss* is the plain cross-entropy, ``scores.loss``, not the training
loss with a bonus; higher is harder. All raise TypeError, ValueError or RuntimeError for an argument of a wrong type,
range or shape.
"""

from .checks import TAKEN_OUT
from .curriculum import co_teaching_keep, self_paced_threshold, self_paced_weight, small_loss
from .denoise import guarded, late_stopping_mask, mastered_mask, noise_mask
from .history import History
from .importance import Draw, importance_draw, importance_gain, importance_pays, poisson_selection
from .pruning import infobatch
from .reference_penalty import kl_to_reference
from .reweighting import (
    exponentiated_gradient,
    exponentiated_weight,
    flow_weight,
    focal_weight,
    group_mean_loss,
    group_weight,
    superloss_weight,
)
from .sampler import DifficultySampler
from .selective import Selection, rank_selection, rank_selection_is_due, selective_backprop, selective_beta

__all__ = [
    "DifficultySampler",
    "Draw",
    "History",
    "Selection",
    "TAKEN_OUT",
    "co_teaching_keep",
    "exponentiated_gradient",
    "exponentiated_weight",
    "flow_weight",
    "focal_weight",
    "group_mean_loss",
    "group_weight",
    "guarded",
    "importance_draw",
    "importance_gain",
    "importance_pays",
    "infobatch",
    "kl_to_reference",
    "late_stopping_mask",
    "mastered_mask",
    "noise_mask",
    "poisson_selection",
    "rank_selection",
    "rank_selection_is_due",
    "selective_backprop",
    "selective_beta",
    "self_paced_threshold",
    "self_paced_weight",
    "small_loss",
    "superloss_weight",
]
