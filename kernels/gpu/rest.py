"""The axes of RestStats: `empty` is its identity, `absorb` takes a tile, `across` merges a whole axis of lanes."""

import triton
import triton.language as tl

from ..formulas.rest import LOWEST, NO_CLASS, RestStats, origin
from ..formulas.scalar import exp


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
