"""Write a row that is a multiple of exp(z - max), all but the label's entry: a gradient or the probabilities."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..formulas.rest import origin
from ..formulas.scalar import exp
from .probabilities import along
from .rows import (
    accumulable,
    chunk_classes,
    chunk_mask,
    edge_classes,
    fetch,
    load_classes,
    numbers_of,
    store_chunks,
)
from .tiles import chunks_of, holds, label_tiles, n_all, n_plain, tiles_of_part


class Spread(NamedTuple):
    """``x_k = scale exp(z_k - max)`` and ``x_y = at_target``, each times dz/draw; all [ROWS]."""

    max: tl.tensor
    scale: tl.tensor
    at_target: tl.tensor


@triton.jit
def write_rows(
    out, rows, inside, spread, part, n_parts, options, LOGIT: tl.constexpr, LOGIT_SLOPE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the ``part``-th share of tiles, the first also the edge, of rows ``inside`` to (addresses, class stride).

    One read and one write a class. With a vector above 1 the rows of ``out`` are as aligned as the logits'.
    """
    LANES: tl.constexpr = TILE.lanes
    ONE: tl.constexpr = TILE.rows == 1 and TILE.vector > 0
    # a thread need not hold a whole chunk: float32 is stored by whole sectors where two share one
    BY: tl.constexpr = 2 if TILE.vector == 4 else TILE.vector
    out_ptr, out_class_stride = out
    tiles = tiles_of_part(rows, (rows.target,), part, n_parts, TILE, ONE)
    read = rows.active & inside
    n, chunk = n_all(tiles), chunks_of(tiles, 0, LANES)
    raw = fetch(rows, chunk, read & (n > 0), BY)
    start, labels = 0, label_tiles(rows, LANES)
    if ONE:
        start = tl.maximum(n_plain(tiles) - 1, 0)
        for i in range(start):
            after = chunks_of(tiles, i + 1, LANES, True)
            ahead = fetch(rows, after, None, BY)
            raw = numbers_of(raw, rows)
            x = spread_of(raw, spread, options, LOGIT) * LOGIT_SLOPE(raw, options)
            store_chunks(out_ptr, out_class_stride, rows, chunk, x, None, BY)
            raw, chunk = ahead, after

    for i in range(start, n):
        ahead = fetch(rows, chunks_of(tiles, i + 1, LANES), read & (i + 1 < n), BY)
        chunk = chunks_of(tiles, i, LANES)  # not carried: that would fix its layout, and shuffle
        raw = numbers_of(raw, rows)
        x = spread_of(raw, spread, options, LOGIT)
        if TILE.rows > 1 and BY == 8:  # float32 would take 104 registers
            if holds(labels, tiles.first + i):
                x = with_label(x, chunk_classes(rows, chunk), rows, spread)
        else:
            x = with_label(x, chunk_classes(rows, chunk), rows, spread)
        x *= LOGIT_SLOPE(raw, options)
        mask = inside if BY == 0 else chunk_mask(rows, chunk, inside, BY)
        store_chunks(out_ptr, out_class_stride, rows, chunk, x, mask, BY)
        raw = ahead

    if TILE.ragged and TILE.vector > 0:
        if part == 0:
            write_edge(out, rows, inside, spread, options, LOGIT, LOGIT_SLOPE)


@triton.jit
def write_edge(out, rows, inside, spread, options, LOGIT: tl.constexpr, LOGIT_SLOPE: tl.constexpr):
    out_ptr, out_class_stride = out
    classes = edge_classes(rows)
    mask = (classes < rows.n_classes) & inside[:, None]
    raw = accumulable(load_classes(rows, classes, mask & rows.active[:, None]))
    x = with_label(spread_of(raw, spread, options, LOGIT), classes, rows, spread) * LOGIT_SLOPE(raw, options)
    at = out_ptr[:, None] + classes.to(tl.int64) * out_class_stride
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def spread_of(raw, spread, options, LOGIT: tl.constexpr):
    """Return the entries of numbers [ROWS, ...] but for the slope; what a masked one gives is not looked at."""
    return along(spread.scale, raw) * exp(LOGIT(raw, options) - along(origin(spread.max), raw))


@triton.jit
def with_label(x, classes, rows, spread):
    return tl.where(classes == along(rows.target, x), along(spread.at_target, x), x)
