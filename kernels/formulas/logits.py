"""What becomes of a logit before the softmax: ``(raw, options) -> z`` and its slope dz/draw, a pair each.

``options`` are (scale, cap), run-time numbers. The slope is taken from the raw logit: from the capped one nothing is
left of it past 10 caps in float32.
"""

from __future__ import annotations

from .language import jit, tl
from .scalar import exp, tanh


@jit
def as_given(raw, options):
    return raw


@jit
def as_given_slope(raw, options):
    return 1.0


@jit
def scaled(raw, options):
    return raw * options[0]


@jit
def scaled_slope(raw, options):
    return options[0]


@jit
def capped(raw, options):
    """Return cap tanh(scale raw / cap)."""
    return options[1] * tanh(raw * options[0] / options[1])


@jit
def capped_slope(raw, options):
    x = exp(-2.0 * tl.abs(raw * options[0] / options[1]))
    return options[0] * (4.0 * x / ((1.0 + x) * (1.0 + x)))
