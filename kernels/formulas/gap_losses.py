"""Losses of the gap inside a kernel: a value and a slope per loss, ``(gap, params) -> tensor``.

Each pair repeats the torch formulas of the class it serves in ``bonus_ops/losses``; ``params`` is the tuple that
the class's ``parameters()`` returns: run-time numbers, so that a schedule never recompiles. ``slope`` is
``A = -dL/dgap``.
"""

from __future__ import annotations

from .language import jit, tl
from .scalar import HALF_PI, PI, exp, expm1, log_sigmoid, power, sigmoid, sin


@jit
def cross_entropy_value(gap, params):
    return -log_sigmoid(gap)


@jit
def cross_entropy_slope(gap, params):
    return sigmoid(-gap)


# Bonuses: params = (strength, start, bonus at start, abrupt, ...) with start and abrupt as gaps.


@jit
def with_bonus(gap, bonus, params):
    inside = (gap >= params[1]) & (gap <= params[3])
    bonus = tl.where(inside, bonus - params[2], 0.0)
    return -log_sigmoid(gap) + tl.where(params[0] == 0.0, 0.0, params[0] * bonus)


@jit
def with_bonus_slope(gap, slope, params):
    inside = (gap >= params[1]) & (gap <= params[3])
    return sigmoid(-gap) + params[0] * tl.where(inside, slope, 0.0)


@jit
def log_bonus_value(gap, params):
    end, log_rest_end, inverse_rest_end, floor = params[4], params[5], params[6], params[7]
    tangent = log_rest_end - 1.0 + sigmoid(-gap) * inverse_rest_end
    bonus = tl.where(gap <= end, log_sigmoid(-gap), tangent)
    return with_bonus(gap, tl.maximum(bonus, floor), params)


@jit
def log_bonus_slope(gap, params):
    end, inverse_rest_end, floor = params[4], params[6], params[7]
    slope = sigmoid(gap) * tl.where(gap <= end, 1.0, sigmoid(-gap) * inverse_rest_end)
    # the floor is the log of the clamp and acts at log_end = 1 only, where gap <= end always holds
    return with_bonus_slope(gap, tl.where(log_sigmoid(-gap) >= floor, slope, 0.0), params)


@jit
def power_bonus_value(gap, params):
    return with_bonus(gap, -power(sigmoid(gap), log_sigmoid(gap), params[4]), params)


@jit
def power_bonus_slope(gap, params):
    return with_bonus_slope(gap, params[4] * power(sigmoid(gap), log_sigmoid(gap), params[4]) * sigmoid(-gap), params)


@jit
def cosine_bonus_value(gap, params):
    half = sin(HALF_PI * sigmoid(gap))
    return with_bonus(gap, -2.0 * half * half, params)


@jit
def cosine_bonus_slope(gap, params):
    p, rest = sigmoid(gap), sigmoid(-gap)
    # sin(pi p) = sin(pi (1 - p)): the smaller argument keeps relative accuracy
    return with_bonus_slope(gap, PI * sin(PI * tl.minimum(p, rest)) * p * rest, params)


@jit
def sub_data_share(gap, params):
    """Return 1 - k p as (1 - k) + k (1 - p)."""
    return params[5] + params[4] * sigmoid(-gap)


@jit
def sub_data_log_share(gap, params):
    # at k = 1 the share is 1 - p, whose logarithm must not pass through an underflowing 1 - p
    return tl.where(params[5] == 0.0, log_sigmoid(-gap), tl.log(sub_data_share(gap, params)))


@jit
def sub_data_bonus_value(gap, params):
    return with_bonus(gap, tl.maximum(sub_data_log_share(gap, params), params[6]), params)


@jit
def sub_data_bonus_slope(gap, params):
    share = sub_data_share(gap, params)
    odds = tl.where(params[5] == 0.0, 1.0, params[4] * sigmoid(-gap) / tl.where(share == 0.0, 1.0, share))
    slope = sigmoid(gap) * odds
    return with_bonus_slope(gap, tl.where(sub_data_log_share(gap, params) >= params[6], slope, 0.0), params)


@jit
def focal_value(gap, params):
    return -power(sigmoid(-gap), tl.maximum(log_sigmoid(-gap), -1000.0), params[0]) * log_sigmoid(gap)


@jit
def focal_slope(gap, params):
    damping = power(sigmoid(-gap), tl.maximum(log_sigmoid(-gap), -1000.0), params[0])
    log_p = tl.maximum(log_sigmoid(gap), -1000.0)  # p log p is 0 at p = 0, not 0 * -inf
    return damping * (sigmoid(-gap) - params[0] * sigmoid(gap) * log_p)


@jit
def halted_focal_value(gap, params):
    return tl.where(gap > 0.0, -log_sigmoid(gap) - params[1], focal_value(gap, params))


@jit
def halted_focal_slope(gap, params):
    return tl.where(gap > 0.0, sigmoid(-gap), focal_slope(gap, params))


@jit
def focal_star_value(gap, params):
    return -log_sigmoid(params[0] * gap + params[1]) / params[0]


@jit
def focal_star_slope(gap, params):
    return sigmoid(-(params[0] * gap + params[1]))


# Errors in p with a mirror bonus: params = (strength, gamma).


@jit
def squared_error_value(gap, params):
    return sigmoid(-gap) * sigmoid(-gap) - params[0] * power(sigmoid(gap), log_sigmoid(gap), params[1])


@jit
def squared_error_slope(gap, params):
    rest = sigmoid(-gap)
    return rest * (2.0 * sigmoid(gap) * rest + params[0] * params[1] * power(sigmoid(gap), log_sigmoid(gap), params[1]))


@jit
def absolute_error_value(gap, params):
    return sigmoid(-gap) - params[0] * power(sigmoid(gap), log_sigmoid(gap), params[1])


@jit
def absolute_error_slope(gap, params):
    return sigmoid(-gap) * (sigmoid(gap) + params[0] * params[1] * power(sigmoid(gap), log_sigmoid(gap), params[1]))


@jit
def poly1_value(gap, params):
    return -log_sigmoid(gap) + params[0] * sigmoid(-gap)


@jit
def poly1_slope(gap, params):
    return sigmoid(-gap) * (1.0 + params[0] * sigmoid(gap))


@jit
def generalized_cross_entropy_value(gap, params):
    return -expm1(params[0] * log_sigmoid(gap)) / params[0]


@jit
def generalized_cross_entropy_slope(gap, params):
    return sigmoid(-gap) * exp(params[0] * log_sigmoid(gap))
