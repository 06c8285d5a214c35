"""Paid: what classes add to a loss while lse is not known yet, sums that are counted from the max.

    total = sum t        cost = sum t (max - z)        power = sum v exp(gamma (z - max))

`unpaid` is the identity, `pay` adds a tile, `paid_by_row` joins lanes. Where ``gamma`` is None no power is summed.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..formulas.rest import origin
from ..formulas.scalar import exp
from ..formulas.soft_targets import LARGEST
from .rest import chunk_sum, rounded
from .rows import CHUNK
from .soft_targets import where_any


class Paid(NamedTuple):
    total: tl.tensor
    cost: tl.tensor
    power: tl.tensor


@triton.jit
def unpaid(like):
    """Return the identity, shaped and typed as ``like``."""
    zero = tl.zeros_like(like)
    return Paid(zero, zero, zero)


@triton.jit
def pay(paid, before, maximum, z, t, v, others, gamma, SPREAD: tl.constexpr):
    """Add the tile ``z`` that moved the max from ``before`` to ``maximum``: all of it, or ``others``.

    ``t`` and ``v`` are numbers where all classes of the tile have the same share; without one a class pays nothing.
    """
    at = origin(maximum)
    d = z - at[:, :, None]
    shift = rise(before, at)
    if len(t.shape) == 0:
        # asking for z ties the mask to the lanes of z, else it would be shuffled
        n = CHUNK if others is None else tl.sum(tl.where(others & (z == z), 1.0, 0.0), 2)
        total, cost = t * n, tl.where(t == 0.0, 0.0, -t * tl.sum(where_any(others, d), 2))
    else:
        t = where_any(others, t)
        total, cost = tl.sum(t, 2), tl.sum(tl.where(t == 0.0, 0.0, -t * d), 2)
    power = paid.power
    if gamma is not None:
        power = power * exp(gamma * (before - at)) + chunk_sum(v * exp(gamma * d), SPREAD)
    return Paid(paid.total + total, paid.cost + paid.total * shift + cost, power)


@triton.jit
def rise(before, at):
    """Return how far the max rose; where it was -inf, nothing was paid or an infinity."""
    return tl.minimum(tl.where(before == -float("inf"), 0.0, at - before), LARGEST)


@triton.jit
def paid_by_row(paid, lanes_max, maximum, gamma):
    """Return the sums [ROWS] over lanes that counted from ``lanes_max``, counted from the row's max."""
    at = origin(maximum)[:, None]
    power = paid.power if gamma is None else rounded(paid.power * exp(gamma * (lanes_max - at)))
    return Paid(tl.sum(paid.total, 1), tl.sum(paid.cost + paid.total * rise(lanes_max, at), 1), tl.sum(power, 1))
