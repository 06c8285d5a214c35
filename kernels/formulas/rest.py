"""RestStats: the summary of all classes but the label, an associative and commutative monoid.

With ``e = exp(z - max)`` over the classes summarised:

    max, argmax (smallest index), sum_exp = sum e, sum_exp2 = sum e^2, sum_exp_z = sum e (z - max)

It serves the lanes of a program, the edges of a row, the programs that share a row, and shards of a vocabulary alike.
`empty` is the identity, `absorb` takes a tile, `merge` joins two states and `across` a whole axis of them.
"""

from __future__ import annotations

from typing import NamedTuple

from .language import jit, tl
from .scalar import exp

NO_CLASS = tl.constexpr(2**31 - 1)
# e * d with d below this is exactly 0 in any dtype; bounding d keeps 0 * -inf from becoming NaN
LOWEST = tl.constexpr(-1000.0)


class RestStats(NamedTuple):
    max: tl.tensor
    argmax: tl.tensor
    sum_exp: tl.tensor
    sum_exp2: tl.tensor
    sum_exp_z: tl.tensor


@jit
def origin(maximum):
    """Return the point to subtract: the max, but 0 where it is -inf, since -inf - -inf is NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@jit
def merge(a, b):
    """Join two states of the same shape."""
    new_max = tl.maximum(a.max, b.max)
    at = origin(new_max)
    scale_a, scale_b = exp(a.max - at), exp(b.max - at)
    shift_a, shift_b = tl.maximum(a.max - at, LOWEST), tl.maximum(b.max - at, LOWEST)
    return RestStats(
        new_max,
        tl.minimum(
            tl.where(a.max == new_max, a.argmax, NO_CLASS),
            tl.where(b.max == new_max, b.argmax, NO_CLASS),
        ),
        a.sum_exp * scale_a + b.sum_exp * scale_b,
        a.sum_exp2 * (scale_a * scale_a) + b.sum_exp2 * (scale_b * scale_b),
        (a.sum_exp_z + a.sum_exp * shift_a) * scale_a + (b.sum_exp_z + b.sum_exp * shift_b) * scale_b,
    )
