"""One sweep over a row: the RestStats of all classes but the label."""

import triton
import triton.language as tl

from ..formulas.rest import NO_CLASS, RestStats, merge
from .rest import absorb, across, empty
from .rows import (
    CHUNK,
    chunk_classes,
    chunk_mask,
    edge_classes,
    fetch,
    fetch_whole,
    is_spread,
    load_classes,
    logits_of,
    zeros,
)
from .tiles import chunks_of, holds, label_tiles, n_all, n_plain, tiles_of_part


@triton.jit
def sweep(rows, part, n_parts, options, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """Summarise the rest of each row (of its ``part``-th share of tiles): RestStats of [ROWS]."""
    if TILE.rows == 1:
        rest = across(sweep_row(rows, part, n_parts, options, LOGIT, TILE))
    else:
        rest = across(sweep_rows(rows, options, LOGIT, TILE))
    rest = exact_argmax(rest, rows, options, LOGIT)
    if TILE.ragged:
        return merge(rest, sweep_edge(rows, part, options, LOGIT))
    else:
        return rest


@triton.jit
def sweep_row(rows, part, n_parts, options, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """Summarise a share of the vectors of one row: RestStats of [1, LANES], argmax the number of a chunk."""
    LANES: tl.constexpr = TILE.lanes
    tiles = tiles_of_part(rows, (rows.target,), part, n_parts, TILE, True)
    rest = empty(zeros(rows, 1, LANES))
    n, chunk = n_all(tiles), chunks_of(tiles, 0, LANES)
    raw = fetch(rows, chunk, rows.active & (n > 0), TILE.vector)
    # the long run: whole tiles without the label, so nothing is masked
    start = tl.maximum(n_plain(tiles) - 1, 0)
    for i in range(start):
        after = chunks_of(tiles, i + 1, LANES, True)
        ahead = fetch(rows, after, None, TILE.vector)
        z = logits_of(raw, rows, None, options, LOGIT)
        rest = absorb(rest, z, chunk, is_spread(TILE.vector))
        raw, chunk = ahead, after

    for i in range(start, n):
        after = chunks_of(tiles, i + 1, LANES)
        ahead = fetch(rows, after, rows.active & (i + 1 < n), TILE.vector)
        z = logits_of(raw, rows, chunk_mask(rows, chunk, rows.active, TILE.vector), options, LOGIT)
        rest = absorb_in_any_order(rest, without_target(z, rows, chunk), chunk, is_spread(TILE.vector))
        raw, chunk = ahead, after
    return rest


@triton.jit
def sweep_rows(rows, options, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """Summarise the vectors of several rows: RestStats of [ROWS, LANES], argmax as above."""
    LANES: tl.constexpr = TILE.lanes
    rest, labels = empty(zeros(rows, TILE.rows, LANES)), label_tiles(rows, LANES)
    n, start = tl.cdiv(rows.n_classes // CHUNK, LANES), 0
    lane = tl.arange(0, LANES)[None, :]
    raw = fetch(rows, lane, rows.active, TILE.vector)
    if TILE.vector > 1:
        # so many tiles are whole whatever the head; the last of their turns loads the first that may not be
        start = tl.maximum((rows.n_classes - CHUNK + 1) // (CHUNK * LANES) - 1, 0)
        for i in range(start):
            ahead = fetch_whole(rows, (i + 1) * LANES + lane, TILE.vector)
            z = logits_of(raw, rows, None, options, LOGIT)
            if holds(labels, i):
                z = without_target(z, rows, i * LANES + lane)
            rest = absorb(rest, z, i * LANES + lane, is_spread(TILE.vector))
            raw = ahead
    for i in range(start, n):
        ahead, chunk = fetch(rows, (i + 1) * LANES + lane, rows.active, TILE.vector), i * LANES + lane
        z = logits_of(raw, rows, chunk_mask(rows, chunk, rows.active, TILE.vector), options, LOGIT)
        if holds(labels, i):
            z = without_target(z, rows, chunk)
        rest = absorb(rest, z, chunk, is_spread(TILE.vector))
        raw = ahead
    nothing, active = empty(zeros(rows, TILE.rows, LANES)), rows.active[:, None]  # of other rows anything was loaded
    return RestStats(
        tl.where(active, rest.max, nothing.max),
        tl.where(active, rest.argmax, nothing.argmax),
        tl.where(active, rest.sum_exp, nothing.sum_exp),
        tl.where(active, rest.sum_exp2, nothing.sum_exp2),
        tl.where(active, rest.sum_exp_z, nothing.sum_exp_z),
    )


@triton.jit
def sweep_edge(rows, part, options, LOGIT: tl.constexpr):
    classes = edge_classes(rows)
    bound = tl.where(part == 0, rows.n_classes, 0)  # one part has the edge
    mask = (classes < bound) & (classes != rows.target[:, None]) & rows.active[:, None]
    z = logits_of(load_classes(rows, classes, mask), rows, mask, options, LOGIT)
    return across(absorb(empty(z), z[:, :, None], classes))


@triton.jit
def sweep_planes(rows, part, n_parts, options, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """As `sweep`, of planes: there is no edge, and neither the label nor the max is read again.

    Either would be a sector for one logit. Returns the label's logit [ROWS] too, 0 where it is in another part.
    """
    LANES: tl.constexpr = TILE.lanes
    tiles = tiles_of_part(rows, (rows.target,), part, n_parts, TILE, False)
    rest = empty(zeros(rows, TILE.rows, LANES))
    z_target = tl.zeros_like(rest.max)
    n, chunk = n_all(tiles), chunks_of(tiles, 0, LANES)
    raw = fetch(rows, chunk, rows.active & (n > 0), 0)
    for i in range(n):
        after = chunks_of(tiles, i + 1, LANES)
        ahead = fetch(rows, after, rows.active & (i + 1 < n), 0)
        z = logits_of(raw, rows, chunk_mask(rows, chunk, rows.active, 0), options, LOGIT)
        classes = chunk_classes(rows, chunk)
        at_target = classes == rows.target[:, None, None]
        z_target += tl.sum(tl.where(at_target, z, 0.0), 2)
        z = tl.where(at_target, -float("inf"), z)
        rest = absorb(rest, z, largest_class(z, classes))
        raw, chunk = ahead, after
    return across(rest), tl.sum(z_target, 1)


@triton.jit
def largest_class(z, classes):
    """Return the smallest class [ROWS, LANES] that attains the max of each chunk."""
    return tl.min(tl.where(z == tl.max(z, 2)[:, :, None], classes, NO_CLASS), 2)


@triton.jit
def absorb_in_any_order(rest, z, chunk, SPREAD: tl.constexpr):
    """As `absorb`, of chunks that may come after later ones: argmax wants the smallest."""
    tied = (tl.max(z, 2) == rest.max) & (rest.max > -float("inf"))
    smallest = tl.minimum(rest.argmax, chunk)
    rest = absorb(rest, z, chunk, SPREAD)
    argmax = tl.where(tied, smallest, rest.argmax)
    return RestStats(rest.max, argmax, rest.sum_exp, rest.sum_exp2, rest.sum_exp_z)


@triton.jit
def without_target(z, rows, chunk):
    """Replace the label's logit by -inf in the tile ``z`` of chunks ``chunk``."""
    at = rows.target[:, None] - rows.head[:, None] - chunk * CHUNK
    return tl.where(tl.arange(0, CHUNK)[None, None, :] == at[:, :, None], -float("inf"), z)


@triton.jit
def exact_argmax(rest, rows, options, LOGIT: tl.constexpr):
    """Turn argmax from a chunk number into the smallest class of that chunk which attains the max."""
    found = rest.argmax < rows.n_chunks
    classes = rows.head[:, None] + (tl.where(found, rest.argmax, 0) * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    mask = found[:, None] & (classes != rows.target[:, None])
    z = logits_of(load_classes(rows, classes, mask), rows, mask, options, LOGIT)
    argmax = tl.min(tl.where(mask & (z == rest.max[:, None]), classes, NO_CLASS), 1)
    return RestStats(rest.max, argmax, rest.sum_exp, rest.sum_exp2, rest.sum_exp_z)
