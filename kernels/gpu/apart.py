"""Label and runner-up, set apart from the sums over classes: only they can be near p = 1, and a gap knows 1 - p."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..formulas.class_terms import TINY
from ..formulas.rest import origin
from ..formulas.scalar import exp, log_sigmoid, sigmoid
from .soft_targets import shares_at


class Apart(NamedTuple):
    """One class of each row; every field is [ROWS]."""

    p: tl.tensor
    rest: tl.tensor  # 1 - p
    log_p: tl.tensor
    share: tl.tensor  # of cross-entropy
    value: tl.tensor
    pull: tl.tensor


@triton.jit
def apart(classes, mask, gap, target, params, TERMS: tl.constexpr):
    """Return the class of each row whose logit is ``gap`` above the logsumexp of all others."""
    p, rest, log_p = sigmoid(gap), sigmoid(-gap), log_sigmoid(gap)
    t, v = shares_at(target, classes[:, None], mask[:, None], gap)
    t, v = tl.sum(t, 1), tl.sum(v, 1)
    value, pull = TERMS(p, tl.maximum(rest, TINY), log_p, v, params)
    return Apart(p, rest, log_p, t, value, pull)


@triton.jit
def where_known(known, one):
    """Return ``one``, adding nothing to rows that have no such class."""
    value, pull = tl.where(known, one.value, 0.0), tl.where(known, one.pull, 0.0)
    return Apart(one.p, one.rest, one.log_p, one.share, value, pull)


@triton.jit
def gap_of_runner_up(z_target, rest, others):
    """Return the gap of the class at the max of ``rest``; ``others`` sums exp(z - max) of all but it and the label."""
    above = tl.where(rest.max == -float("inf"), float("inf"), exp(z_target - origin(rest.max)))
    return -tl.log(others + above)


@triton.jit
def cross_entropy_apart(one):
    return tl.where(one.share == 0.0, 0.0, one.share * -one.log_p)


@triton.jit
def gradient_apart(one, other, mass):
    """Return dL/dz of ``one``; ``mass`` sums t + pull of all classes but it and the ``other``."""
    return one.p * (mass + (other.pull + other.share)) - one.rest * (one.pull + one.share)
