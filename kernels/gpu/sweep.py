"""One sweep over a row: the RestStats of all classes but the label."""

import triton
import triton.language as tl

from ..formulas.rest import NO_CLASS, RestStats, merge
from .rest import absorb, across, empty
from .rows import CHUNK, accumulable, edge_classes, is_spread, load, load_chunks


@triton.jit
def sweep(rows, n_classes, class_stride, part, n_parts, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Summarise the rest of each row (of its ``part``-th share of tiles): RestStats of [ROWS]."""
    lane = tl.arange(0, LANES)[None, :]
    n_tiles = tl.cdiv(n_classes // CHUNK, LANES)
    share = tl.cdiv(n_tiles, n_parts)
    first, last = part * share, tl.minimum(part * share + share, n_tiles)
    rest = empty(accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty)))

    if ROWS == 1:
        # the long run: whole tiles without the label, so nothing is masked
        full = tl.max(tl.where(rows.active, rows.n_chunks // LANES, 0), 0)
        full = tl.maximum(tl.minimum(full, last), first)
        target_tile = tl.max((rows.target - rows.head) // (CHUNK * LANES), 0)
        held = ((target_tile >= first) & (target_tile < full)).to(tl.int32)
        for i in range(first, full - held):
            tile = i + tl.where(i >= target_tile, held, 0)
            chunk = tile * LANES + lane
            rest = absorb(rest, load_chunks(rows, chunk, None, class_stride, VECTOR), chunk, is_spread(VECTOR))
        # then the tile that holds the label and the last, partial one
        first, last = 1 - held, 1 + (full < last).to(tl.int32)

    for i in range(first, last):
        tile = tl.where(i == 0, target_tile, full) if ROWS == 1 else i
        chunk = tile * LANES + lane
        mask = ((chunk < rows.n_chunks[:, None]) & rows.active[:, None])[:, :, None]
        z = without_target(load_chunks(rows, chunk, mask, class_stride, VECTOR), rows, chunk)
        rest = absorb_in_any_order(rest, z, chunk, is_spread(VECTOR))

    rest = exact_argmax(across(rest), rows, class_stride)
    classes = edge_classes(rows)
    bound = tl.where(part == 0, n_classes, 0)  # one part has the edge
    mask = (classes < bound) & (classes != rows.target[:, None]) & rows.active[:, None]
    z = load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask)
    edge = across(absorb(empty(z), z[:, :, None], classes))
    return merge(rest, edge)


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
def exact_argmax(rest, rows, class_stride):
    """Turn argmax from a chunk number into the smallest class of that chunk which attains the max."""
    found = rest.argmax < rows.n_chunks
    classes = rows.head[:, None] + (tl.where(found, rest.argmax, 0) * CHUNK)[:, None] + tl.arange(0, CHUNK)[None, :]
    mask = found[:, None] & (classes != rows.target[:, None])
    z = load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask)
    argmax = tl.min(tl.where(mask & (z == rest.max[:, None]), classes, NO_CLASS), 1)
    return RestStats(rest.max, argmax, rest.sum_exp, rest.sum_exp2, rest.sum_exp_z)
