"""RestStats: the summary of all classes but the label, an associative and commutative monoid.

With ``e = exp(z - max)`` over the classes summarised:

    max, argmax (smallest index), sum_exp = sum e, sum_exp2 = sum e^2, sum_exp_z = sum e (z - max)

It serves the lanes of a program, the edges of a row, the programs that share a row, and shards of a vocabulary alike.
`empty` is the identity, `absorb` takes a tile, `merge` joins two states and `across` a whole axis of them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

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


@triton.jit
def origin(maximum):
    """Return the point to subtract: the max, but 0 where it is -inf, since -inf - -inf is NaN."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def empty(like):
    """Return the identity, shaped and typed as ``like``."""
    zero = tl.zeros_like(like)
    return RestStats(zero - float("inf"), tl.full(like.shape, NO_CLASS, tl.int32), zero, zero, zero)


@triton.jit
def absorb(rest, z, index, SPREAD: tl.constexpr = False):
    """Add the tile ``z`` [ROWS, LANES, K] to the per-lane states; ``index`` [ROWS, LANES] is what argmax records.

    One exp a logit and one a lane: only the old state is rescaled. ``SPREAD``: several threads share a lane.
    """
    tile_max = tl.max(z, 2)
    new_max = tl.maximum(rest.max, tile_max)
    at = origin(new_max)
    d = z - at[:, :, None]
    e = exp(d)
    shift = tl.maximum(rest.max - at, LOWEST)
    scale = exp(rest.max - at)
    return RestStats(
        new_max,
        tl.where(tile_max > rest.max, index, rest.argmax),
        rest.sum_exp * scale + tl.sum(e, 2),
        rest.sum_exp2 * (scale * scale) + chunk_sum(e * e, SPREAD),
        (rest.sum_exp_z + rest.sum_exp * shift) * scale + chunk_sum(e * tl.maximum(d, LOWEST), SPREAD),
    )


@triton.jit
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


@triton.jit
def across(rest):
    """Merge [ROWS, LANES] states along the lanes, by a fixed tree."""
    new_max = tl.max(rest.max, 1)
    at = origin(new_max)[:, None]
    scale = exp(rest.max - at)
    shift = tl.maximum(rest.max - at, LOWEST)
    return RestStats(
        new_max,
        tl.min(tl.where(rest.max == new_max[:, None], rest.argmax, NO_CLASS), 1),
        tl.sum(rounded(rest.sum_exp * scale), 1),
        tl.sum(rounded(rest.sum_exp2 * (scale * scale)), 1),
        tl.sum(rounded((rest.sum_exp_z + rest.sum_exp * shift) * scale), 1),
    )


@triton.jit
def chunk_sum(product, SPREAD: tl.constexpr):
    """Return the sum over the classes of each chunk, ``SPREAD`` over threads or in one."""
    return tl.sum(rounded(product) if SPREAD else product, 2)


@triton.jit
def rounded(product):
    """Return a product that threads will add up, as it is.

    Threads that hold the same sum then hold the same bits: the choice keeps the compiler from fusing the product into
    the first addition, where either thread of a pair would round the other's product and not its own.
    """
    return tl.where(product == 0.0, 0.0, product)
