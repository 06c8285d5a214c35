"""Difficulty scores of a row from its label's logit, its gap and the summary of the rest.

Identities: with ``u = 1 - p = sigmoid(-gap)``, ``w = sum_exp2 / sum_exp^2`` and the entropy of the rest
``h = log sum_exp - sum_exp_z / sum_exp``

    loss = softplus(-gap)      el2n = u sqrt(1 + w)      margin = z_y - max
    entropy = p softplus(-gap) + u (softplus(gap) + h)   energy = -logsumexp(z)
"""

from __future__ import annotations

from .language import jit, tl
from .scalar import log_sigmoid, sigmoid


@jit
def gap_of(z_target, rest):
    """Return z_y - logsumexp(rest); +inf with no rest, NaN where torch's loss is NaN."""
    gap = (z_target - rest.max) - tl.log(rest.sum_exp)
    gap = tl.where(rest.sum_exp == 0.0, float("inf"), gap)
    nothing = (rest.sum_exp == 0.0) & (z_target == -float("inf"))
    return tl.where(nothing | (z_target == float("inf")) | (z_target != z_target), float("nan"), gap)


@jit
def scores_of(z_target, gap, rest):
    """Return (loss, el2n, margin, entropy, energy)."""
    one_class = rest.sum_exp == 0.0
    sum_exp = tl.where(one_class, 1.0, rest.sum_exp)
    p, u = sigmoid(gap), sigmoid(-gap)
    loss, log_odds_loss = -log_sigmoid(gap), -log_sigmoid(-gap)
    purity = rest.sum_exp2 / (sum_exp * sum_exp)
    rest_entropy = tl.log(sum_exp) - rest.sum_exp_z / sum_exp
    # a factor of exactly 0 stands before an infinite logarithm
    entropy = tl.where(p == 0.0, 0.0, p * loss) + tl.where(u == 0.0, 0.0, u * (log_odds_loss + rest_entropy))
    margin = tl.where(gap == gap, z_target - rest.max, float("nan"))
    return loss, u * tl.sqrt(1.0 + purity), margin, entropy, -lse_of(z_target, gap, rest)


@jit
def lse_of(z_target, gap, rest):
    """Return the logsumexp of the row."""
    sum_exp = tl.where(rest.sum_exp == 0.0, 1.0, rest.sum_exp)
    return tl.where(gap > 0.0, z_target - log_sigmoid(gap), rest.max + tl.log(sum_exp) - log_sigmoid(-gap))


@jit
def pulls(slope, sum_exp):
    """Return a row's factor of exp(z - max) and its gradient at the label, from the slope at its gap."""
    # a row with no rest teaches nothing; an infinite slope is NaN at the label, as torch's
    slope = tl.where(sum_exp == 0.0, slope * 0.0, slope)
    return slope / tl.where(sum_exp == 0.0, 1.0, sum_exp), slope * 0.0 - slope


@jit
def pulls_of_lse(gap, grad_lse, sum_exp):
    """Return what a gradient of the row's logsumexp adds to `pulls`: it times the probabilities."""
    return grad_lse * sigmoid(-gap) / tl.where(sum_exp == 0.0, 1.0, sum_exp), grad_lse * sigmoid(gap)
