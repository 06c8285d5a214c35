"""Scalar formulas of a row whose target is soft: label and runner-up apart, and what the sums over the others give.

Only the largest two can be near p = 1, where 1 - p must not be a difference: a gap knows it.
"""

from __future__ import annotations

from typing import NamedTuple

from .language import jit, tl
from .rest import origin
from .scalar import exp, log_sigmoid, sigmoid, tiny

LARGEST = tl.constexpr(3.4e38)  # a float32


class Apart(NamedTuple):
    """One class of each row."""

    p: tl.tensor
    rest: tl.tensor  # 1 - p
    log_p: tl.tensor
    share: tl.tensor  # of cross-entropy
    value: tl.tensor
    pull: tl.tensor


class Softmax(NamedTuple):
    """What gives p of all classes but the label: p = scale exp(z - max), log p = z - max + log_scale."""

    max: tl.tensor
    scale: tl.tensor
    log_scale: tl.tensor


@jit
def rest_of(gap):
    """Return 1 - p, 0 without a rest, else at least `tiny`: what is divided by it is multiplied by it again."""
    rest = sigmoid(-gap)
    return tl.where((rest < tiny(rest)) & (gap < float("inf")), tiny(rest), rest)


@jit
def softmax_of(gap, rest):
    sum_exp = tl.maximum(rest.sum_exp, 1.0)  # no rest, no matter
    return Softmax(rest.max, rest_of(gap) / sum_exp, log_sigmoid(-gap) - tl.log(sum_exp))


@jit
def of_runner_up(known, one, label, softmax):
    """Return ``one``, adding nothing to rows that have no such class, its p as that of all others."""
    value, pull = tl.where(known, one.value, 0.0), tl.where(known, one.pull, 0.0)
    p = tl.where(label.rest <= tiny(label.rest), softmax.scale, one.p)
    return Apart(p, one.rest, one.log_p, one.share, value, pull)


@jit
def gap_of_runner_up(z_target, rest, others):
    """Return the gap of the class at the max of ``rest``; ``others`` sums exp(z - max) of all but it and the label."""
    above = tl.where(rest.max == -float("inf"), float("inf"), exp(z_target - origin(rest.max)))
    return -tl.log(others + above)


@jit
def cross_entropy_apart(one):
    return tl.where(one.share == 0.0, 0.0, one.share * -one.log_p)


@jit
def gradient_apart(one, other, mass):
    """Return dL/dz of ``one``; ``mass`` sums t + pull of all classes but it and the ``other``."""
    return one.p * (mass + (other.pull + other.share)) - one.rest * (one.pull + one.share)


@jit
def cross_entropy_of(paid, log_scale):
    """Return sum t (lse - z) from max - lse: by way of the max no term is negative.

    ``paid`` has ``total = sum t`` and ``cost = sum t (max - z)``.
    """
    above = tl.where(log_scale == -float("inf"), LARGEST, -log_scale)  # an overflow
    return tl.where(paid.total == 0.0, 0.0, paid.total * above) + paid.cost
