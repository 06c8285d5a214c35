"""The order in which a program visits the tiles of a row: those that need no mask first, then the others.

A tile needs a mask where it ends past the row or holds a class that is set apart: the label, the runner-up. Several
rows of a program need one everywhere.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import CHUNK


class Tiles(NamedTuple):
    """Tile numbers: unmasked are ``first <= tile < full`` but the ``apart``, ascending, which are ``full`` if none."""

    first: tl.tensor
    apart: tl.tuple
    full: tl.tensor
    last: tl.tensor


@triton.constexpr_function
def needs_no_mask(TILE):
    """Return whether soft targets have tiles without a mask; float64 and single classes do not, to save registers."""
    return TILE.rows == 1 and TILE.vector >= 4


@triton.jit
def tiles_of(rows, classes, first, last, LANES: tl.constexpr, NO_MASK: tl.constexpr):
    """Return the order of tiles ``first`` to ``last`` of one row with one or two classes [1] set apart.

    Without ``NO_MASK``, and with several rows, every tile has a mask.
    """
    if not NO_MASK:
        return Tiles(first, (), first, last)
    full = tl.max(tl.where(rows.active, rows.n_chunks // LANES, 0), 0)
    full = tl.maximum(tl.minimum(full, last), first)
    a = tl.max((classes[0] - rows.head) // (CHUNK * LANES), 0)
    a = tl.where((a >= first) & (a < full), a, full)
    if len(classes) == 1:
        return Tiles(first, (a,), full, last)
    else:
        b = tl.max((classes[1] - rows.head) // (CHUNK * LANES), 0)
        b = tl.where((b >= first) & (b < full) & (b != a), b, full)
        return Tiles(first, (tl.minimum(a, b), tl.maximum(a, b)), full, last)


@triton.jit
def tiles_of_part(rows, classes, part, n_parts, TILE: tl.constexpr, NO_MASK: tl.constexpr):
    """Return the order of the ``part``-th share of all tiles with one or two classes [ROWS] set apart."""
    WHOLE: tl.constexpr = CHUNK if TILE.vector > 0 else 1  # the last chunk of planes need not be whole
    n_tiles = tl.cdiv(rows.n_classes // WHOLE, TILE.lanes * (CHUNK // WHOLE))
    share = tl.cdiv(n_tiles, n_parts)
    first = part * share
    return tiles_of(rows, classes, first, tl.minimum(first + share, n_tiles), TILE.lanes, NO_MASK)


@triton.jit
def n_plain(tiles):
    """Return how many tiles of the order need no mask: its first ones."""
    return tiles.full - tiles.first - n_apart(tiles)


@triton.jit
def n_all(tiles):
    return tiles.last - tiles.first


@triton.jit
def n_apart(tiles):
    n = 0
    for j in tl.static_range(len(tiles.apart)):
        n += tl.where(tiles.apart[j] < tiles.full, 1, 0)
    return n


@triton.jit
def chunks_of(tiles, i, LANES: tl.constexpr, PLAIN: tl.constexpr = False):
    """Return the chunk numbers [1, LANES] of the ``i``-th tile in order, one that needs no mask if ``PLAIN``."""
    tile = tiles.first + i
    for j in tl.static_range(len(tiles.apart)):
        tile += tl.where(tile >= tiles.apart[j], 1, 0)
    if not PLAIN:
        past = i - n_plain(tiles)  # those set apart come next, then what ends past the row
        tile = tl.where(past < 0, tile, tiles.first + i)
        for j in tl.static_range(len(tiles.apart)):
            tile = tl.where((past == j) & (tiles.apart[j] < tiles.full), tiles.apart[j], tile)
    return tile * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def label_tiles(rows, LANES: tl.constexpr):
    """Return a word whose bit ``tile % 32`` is set where that tile holds the label of one of several rows."""
    tile = (rows.target - rows.head) // (CHUNK * LANES)
    return tl.reduce(1 << (tile & 31), 0, either)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def holds(labels, tile):
    return ((labels >> (tile & 31)) & 1) != 0
