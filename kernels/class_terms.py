"""What one class adds to a row whose target is shares of classes: ``(p, rest, log_p, share, params) -> value, pull``.

``rest = 1 - p`` and ``pull = -p dvalue/dp``. Each repeats `class_value` and `class_pull` of the class it serves in
``bonus_ops``; ``params`` is what that class's ``parameters()`` returns. A bonus leaves cross-entropy itself out.
"""

import triton
import triton.language as tl

from .rest import chunk_sum, rounded
from .scalar import HALF_PI, PI, exp, expm1, log_of_rest, reciprocal, sigmoid, sin

TINY = tl.constexpr(2.0**-126)  # the smallest normal float32: a smaller constant would make everything float64


# Bonuses: params = (strength, start, bonus at start, abrupt, ...) with start and abrupt as gaps.


@triton.jit
def bonus_terms(p, rest, bonus, odds, share, params):
    inside = (p >= sigmoid(params[1])) & (rest >= sigmoid(-params[3]))
    scale = tl.where(inside, params[0] * share, 0.0)
    return scale * (bonus - params[2]), scale * odds


@triton.jit
def log_bonus_terms(p, rest, log_p, share, params):
    inverse_rest_end, clamp = params[6], exp(params[7])
    # min(p, LE) = 1 - max(1 - p, 1 - LE); at LE = 1 the clamp takes the place of 1 - LE and nothing is linear
    conservative = inverse_rest_end < float("inf")
    lowest = tl.maximum(tl.maximum(rest, TINY), tl.where(conservative, 1.0 / inverse_rest_end, clamp))
    linear = tl.where(conservative, (lowest - rest) * tl.where(conservative, inverse_rest_end, 0.0), 0.0)
    odds = tl.where(rest >= tl.where(conservative, 0.0, clamp), p / lowest, 0.0)
    return bonus_terms(p, rest, tl.log(lowest) - linear, odds, share, params)


@triton.jit
def log_bonus_below_half_terms(p, rest, log_p, share, params):
    """As `log_bonus_terms` of p <= 1/2 where log_end is above that and there is no window."""
    share *= params[0]
    return share * log_of_rest(p), share * (p * reciprocal(rest))


@triton.jit
def power_bonus_terms(p, rest, log_p, share, params):
    power = exp(params[4] * log_p)
    return bonus_terms(p, rest, -power, params[4] * power, share, params)


@triton.jit
def cosine_bonus_terms(p, rest, log_p, share, params):
    half = sin(HALF_PI * p)
    return bonus_terms(p, rest, -2.0 * half * half, PI * p * sin(PI * tl.minimum(p, rest)), share, params)


@triton.jit
def sub_data_bonus_terms(p, rest, log_p, share, params):
    left = params[5] + params[4] * rest
    clamp = tl.maximum(exp(params[6]), TINY)
    odds = tl.where(left >= clamp, params[4] * p / tl.maximum(left, clamp), 0.0)
    return bonus_terms(p, rest, tl.log(tl.maximum(left, clamp)), odds, share, params)


# Losses of the gap that do not add to cross-entropy.


@triton.jit
def focal_terms(p, rest, log_p, share, params):
    log_rest = tl.log(tl.maximum(rest, TINY))
    pull = exp(params[0] * log_rest) - params[0] * p * tl.maximum(log_p, -1000.0) * exp((params[0] - 1.0) * log_rest)
    return tl.where(share == 0.0, 0.0, -share * exp(params[0] * log_rest) * log_p), share * pull


@triton.jit
def poly1_terms(p, rest, log_p, share, params):
    value = tl.where(share == 0.0, 0.0, -share * log_p) + share * params[0] * rest
    return value, share * (1.0 + params[0] * p)


@triton.jit
def generalized_cross_entropy_terms(p, rest, log_p, share, params):
    return -share * expm1(params[0] * log_p) / params[0], share * exp(params[0] * log_p)


# Errors on all classes: params = (strength, gamma) of the mirror bonus.


@triton.jit
def mirror_terms(p, rest, log_p, share, params):
    log_rest = tl.log(tl.maximum(rest, TINY))
    value = share * exp(params[1] * log_p) + (1.0 - share) * exp(params[1] * log_rest)
    pull = share * exp(params[1] * log_p) - (1.0 - share) * p * exp((params[1] - 1.0) * log_rest)
    return -params[0] * value, params[0] * params[1] * pull


@triton.jit
def softmax_squared_error_terms(p, rest, log_p, share, params):
    value, pull = mirror_terms(p, rest, log_p, share, params)
    distance = (1.0 - share) * p - share * rest
    return value + distance * distance, pull - 2.0 * p * distance


@triton.jit
def softmax_absolute_error_terms(p, rest, log_p, share, params):
    value, pull = mirror_terms(p, rest, log_p, share, params)
    distance = (1.0 - share) * p - share * rest
    return value + tl.abs(distance), pull - p * tl.where(distance > 0.0, 1.0, tl.where(distance < 0.0, -1.0, 0.0))


# Sums over the last axis of classes with p <= 1/2, all or those of a mask, where p is 0.


@triton.jit
def sums_of_terms(TERMS: tl.constexpr, mask, p, log_p, share, params, SPREAD: tl.constexpr):
    value, pull = TERMS(p, 1.0 - p, log_p, share, params)
    if mask is not None:
        value, pull = tl.where(mask, value, 0.0), tl.where(mask, pull, 0.0)
    return tl.sum(value, 2), tl.sum(pull, 2)


@triton.jit
def add_fractions(n, d, other_n, other_d):
    return n * other_d + other_n * d, d * other_d


@triton.jit
def add_fractions_alike(n, d, other_n, other_d):
    """As `add_fractions`, with the same bits in both threads of a pair."""
    return rounded(n * other_d) + rounded(other_n * d), d * other_d


@triton.jit
def log_bonus_below_half_sums(TERMS: tl.constexpr, mask, p, log_p, share, params, SPREAD: tl.constexpr):
    """One division a tile and, where all shares are the same, one logarithm; what is masked adds 0 to both."""
    rest = 1.0 - p
    if len(share.shape) == 0:
        odds, product = tl.reduce((p, rest), 2, add_fractions_alike if SPREAD else add_fractions)
        value, odds = share * tl.log(product), share * odds
    else:
        odds, product = tl.reduce((share * p, rest), 2, add_fractions_alike if SPREAD else add_fractions)
        value = chunk_sum(share * log_of_rest(p), SPREAD)
    return params[0] * value, params[0] * odds * reciprocal(product)
