"""The order in which a program visits the tiles of a row: those that need no mask first, then the others.

A tile needs a mask where it ends past the row or holds a class that is set apart: the label, the runner-up. Several
rows of a program need one everywhere; float64 and classes read one by one have it everywhere, to save registers.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import CHUNK


class Tiles(NamedTuple):
    """Tile numbers: unmasked are ``first <= tile < full`` but ``low <= high``, which are ``full`` where not there."""

    first: tl.tensor
    low: tl.tensor
    high: tl.tensor
    full: tl.tensor
    last: tl.tensor


@triton.constexpr_function
def needs_no_mask(ROWS, VECTOR):
    """Return whether there may be tiles without a mask."""
    return ROWS == 1 and VECTOR >= 4


@triton.jit
def tiles_of(rows, classes, first, last, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the order of tiles ``first`` to ``last`` with two classes [ROWS] set apart."""
    if not needs_no_mask(ROWS, VECTOR):
        return Tiles(first, first, first, first, last)
    full = tl.max(tl.where(rows.active, rows.n_chunks // LANES, 0), 0)
    full = tl.maximum(tl.minimum(full, last), first)
    a = tl.max((classes[0] - rows.head) // (CHUNK * LANES), 0)
    b = tl.max((classes[1] - rows.head) // (CHUNK * LANES), 0)
    a = tl.where((a >= first) & (a < full), a, full)
    b = tl.where((b >= first) & (b < full) & (b != a), b, full)
    return Tiles(first, tl.minimum(a, b), tl.maximum(a, b), full, last)


@triton.jit
def all_tiles(rows, classes, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the order of all tiles of the rows with two classes [ROWS] set apart."""
    n_tiles = tl.cdiv(tl.max(tl.where(rows.active, rows.n_chunks, 0), 0), LANES)
    return tiles_of(rows, classes, 0, n_tiles, ROWS, LANES, VECTOR)


@triton.jit
def tiles_of_program(rows, classes, n_classes, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the order of a program's share (axis 1) of all tiles with two classes [ROWS] set apart."""
    n_tiles = tl.cdiv(n_classes // CHUNK, LANES)
    share = tl.cdiv(n_tiles, tl.num_programs(1))
    first = tl.program_id(1) * share
    return tiles_of(rows, classes, first, tl.minimum(first + share, n_tiles), ROWS, LANES, VECTOR)


@triton.jit
def n_segments(tiles):
    return 1 + tl.where(tiles.low < tiles.full, 1, 0) + tl.where(tiles.high < tiles.full, 1, 0)


@triton.jit
def segment(tiles, i):
    """Return the ends of the ``i``-th run of tiles without a mask."""
    start = tl.where(i == 0, tiles.first, tl.where(i == 1, tiles.low, tiles.high) + 1)
    return start, tl.where(i == 0, tiles.low, tl.where(i == 1, tiles.high, tiles.full))


@triton.jit
def n_masked(tiles):
    return n_segments(tiles) - 1 + tiles.last - tiles.full


@triton.jit
def masked(tiles, i):
    """Return the ``i``-th tile with a mask."""
    from_full = tiles.last - n_masked(tiles) + i  # past those set apart
    one_apart = (i == 0) & (tiles.low < tiles.full)
    two_apart = (i == 1) & (tiles.high < tiles.full)
    return tl.where(one_apart, tiles.low, tl.where(two_apart, tiles.high, from_full))
