"""What one class adds to a row of a soft target: ``(p, rest, log_p, log_rest, share, params) -> value, pull``.

``rest = 1 - p``, at least `tiny`, and ``pull = -p dvalue/dp``; ``log_rest`` is looked at only where ``rest`` is `tiny`.
Each repeats `class_value` of the class it serves in ``bonus_ops``; ``params`` is what that class's ``parameters()``
returns. A bonus leaves cross-entropy itself out.
"""

from __future__ import annotations

import math
from typing import Any

from .language import jit, tl
from .scalar import HALF_PI, PI, exp, expm1, log_of_rest, power, reciprocal, sigmoid, sin, tiny

# Bonuses: params = (strength, start, bonus at start, abrupt, ...) with start and abrupt as gaps.


@jit
def bonus_terms(p, rest, bonus, odds, share, params):
    inside = (p >= sigmoid(params[1])) & (rest >= sigmoid(-params[3]))
    scale = tl.where(inside, params[0] * share, 0.0)
    return scale * (bonus - params[2]), scale * odds


@jit
def log_bonus_terms(p, rest, log_p, log_rest, share, params):
    inverse_rest_end, clamp = params[6], exp(params[7])
    # min(p, LE) = 1 - max(1 - p, 1 - LE); at LE = 1 the clamp takes the place of 1 - LE and nothing is linear
    conservative = inverse_rest_end < float("inf")
    lowest = tl.maximum(tl.maximum(rest, tiny(rest)), tl.where(conservative, 1.0 / inverse_rest_end, clamp))
    linear = tl.where(conservative, (lowest - rest) * tl.where(conservative, inverse_rest_end, 0.0), 0.0)
    odds = tl.where(rest >= tl.where(conservative, 0.0, clamp), p / lowest, 0.0)
    log_lowest = tl.where(lowest <= tiny(rest), log_rest, tl.log(lowest))
    return bonus_terms(p, rest, log_lowest - linear, odds, share, params)


@jit
def log_bonus_below_half_terms(p, rest, log_p, log_rest, share, params):
    """As `log_bonus_terms` of p <= 1/2 where log_end is above that and there is no window."""
    share *= params[0]
    return share * log_of_rest(p), share * (p * reciprocal(rest))


@jit
def power_bonus_terms(p, rest, log_p, log_rest, share, params):
    powered = power(p, log_p, params[4])
    return bonus_terms(p, rest, -powered, params[4] * powered, share, params)


@jit
def cosine_bonus_terms(p, rest, log_p, log_rest, share, params):
    half = sin(HALF_PI * p)
    return bonus_terms(p, rest, -2.0 * half * half, PI * p * sin(PI * tl.minimum(p, rest)), share, params)


@jit
def sub_data_bonus_terms(p, rest, log_p, log_rest, share, params):
    left = params[5] + params[4] * rest
    clamp = tl.maximum(exp(params[6]), tiny(rest))
    lowest = tl.maximum(left, clamp)
    odds = tl.where(left >= clamp, params[4] * p / lowest, 0.0)
    return bonus_terms(p, rest, tl.where(lowest <= tiny(rest), log_rest, tl.log(lowest)), odds, share, params)


# Losses of the gap that do not add to cross-entropy.


@jit
def focal_terms(p, rest, log_p, log_rest, share, params):
    log_rest = tl.log(tl.maximum(rest, tiny(rest)))
    damping = power(rest, log_rest, params[0])
    pull = damping - params[0] * p * tl.maximum(log_p, -1000.0) * exp((params[0] - 1.0) * log_rest)
    return tl.where(share == 0.0, 0.0, -share * damping * log_p), share * pull


@jit
def poly1_terms(p, rest, log_p, log_rest, share, params):
    value = tl.where(share == 0.0, 0.0, -share * log_p) + share * params[0] * rest
    return value, share * (1.0 + params[0] * p)


@jit
def generalized_cross_entropy_terms(p, rest, log_p, log_rest, share, params):
    return -share * expm1(params[0] * log_p) / params[0], share * exp(params[0] * log_p)


# Errors on all classes: params = (strength, gamma) of the mirror bonus.


@jit
def mirror_terms(p, rest, log_p, log_rest, share, params):
    log_rest = tl.log(tl.maximum(rest, tiny(rest)))
    value = share * power(p, log_p, params[1]) + (1.0 - share) * power(rest, log_rest, params[1])
    pull = share * power(p, log_p, params[1]) - (1.0 - share) * p * exp((params[1] - 1.0) * log_rest)
    return -params[0] * value, params[0] * params[1] * pull


@jit
def softmax_squared_error_terms(p, rest, log_p, log_rest, share, params):
    value, pull = mirror_terms(p, rest, log_p, log_rest, share, params)
    distance = (1.0 - share) * p - share * rest
    return value + distance * distance, pull - 2.0 * p * distance


@jit
def softmax_absolute_error_terms(p, rest, log_p, log_rest, share, params):
    value, pull = mirror_terms(p, rest, log_p, log_rest, share, params)
    distance = (1.0 - share) * p - share * rest
    return value + tl.abs(distance), pull - p * tl.where(distance > 0.0, 1.0, tl.where(distance < 0.0, -1.0, 0.0))


# Which of them serve a loss.


def terms_of(loss: Any) -> tuple[str, str, tuple[float, ...]]:
    """Return the stems of the terms of a class and of one with p <= 1/2, and their params."""
    kernel, params = loss.kernel, loss.parameters()
    if loss.is_cross_entropy():
        kernel, params = "power_bonus", (0.0, -math.inf, 0.0, math.inf, 1.0)
    elif kernel == "log_bonus" and params[4] == -math.inf:  # of log_end = 0 the tangent is left, -p
        kernel, params = "power_bonus", (*params[:4], 1.0)
    below_half = kernel
    if kernel == "log_bonus" and params[4] >= 0 and params[7] <= math.log(0.5) and not has_window(params):
        below_half = "log_bonus_below_half"
    return kernel, below_half, params


def has_window(params: tuple[float, ...]) -> bool:
    """Return whether a bonus with these params is off for some p."""
    return params[1:4:2] != (-math.inf, math.inf)
