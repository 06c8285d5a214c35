"""Forward: one read of the logits to loss, scores and what backward needs.

Traffic a row of V logits of b bytes: reads V b + b (the label's logit, masked in the sweep, fetched apart) + CHUNK b a
part (the runner-up's chunk again, from cache) + the target index; writes 4 bytes a requested column.
"""

import triton
import triton.language as tl

from .rest import NO_CLASS, RestStats, absorb, across, empty, merge
from .rows import CHUNK, accumulable, edge_classes, is_spread, load, load_chunks, row_index, row_ptr, rows_at
from .scalar import sigmoid
from .scores import gap_of, store_scores
from .spread import write_rows


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


@triton.jit
def widen(params, low, like):
    """Return run-time parameters in the dtype of ``like``: two float32 halves restore a float64."""
    wide = ()
    for i in tl.static_range(len(params)):
        wide = wide + (tl.zeros((), like.dtype) + params[i] + low[i],)
    return wide


@triton.jit
def finish(rest, rows, row, n_rows, class_stride, outputs, loss_params, VALUE: tl.constexpr):
    """Store loss, scores and saved columns of each row; returns (gap, scale of the rest's probabilities)."""
    loss_ptr, scores_ptr, runner_up_ptr, saved_ptr = outputs
    z_target = load(rows.ptr + rows.target.to(tl.int64) * class_stride, rows.active)
    gap = tl.where(rows.active, gap_of(z_target, rest), float("nan"))
    missing = tl.where(rows.active, 0.0, float("nan"))
    inside = row < n_rows

    # an ignored row costs nothing; a label out of range leaves NaN
    loss = tl.where(rows.ignored, 0.0, VALUE(gap, widen(loss_params[0], loss_params[1], gap)))
    tl.store(loss_ptr + row, loss, inside)
    if scores_ptr is not None:
        store_scores(scores_ptr, row, n_rows, z_target, gap, rest, missing)
        known = (gap == gap) & (rest.max > -float("inf"))
        tl.store(runner_up_ptr + row, tl.where(known, rest.argmax, -1), inside)
    if saved_ptr is not None:
        tl.store(saved_ptr + row, gap, inside)
        tl.store(saved_ptr + row + n_rows, rest.max, inside)
        tl.store(saved_ptr + row + n_rows + n_rows, rest.sum_exp, inside)
    return gap


@triton.jit
def forward_kernel(
    logits_ptr, target_ptr, outputs, shape, strides, ignore_index, loss_params,
    VALUE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program: sweep, finish."""
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, target_ptr, row, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], 0, 1, ROWS, LANES, VECTOR)
    finish(rest, rows, row, shape[0], strides[2], outputs, loss_params, VALUE)


@triton.jit
def forward_softmax_kernel(
    logits_ptr, target_ptr, softmax_ptr, outputs, shape, strides, softmax_strides, ignore_index, loss_params,
    VALUE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, then a second sweep of the same rows, still in cache, writes their probabilities."""
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, target_ptr, row, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], 0, 1, ROWS, LANES, VECTOR)
    gap = finish(rest, rows, row, shape[0], strides[2], outputs, loss_params, VALUE)
    scale = sigmoid(-gap) / tl.where(rest.sum_exp == 0.0, 1.0, rest.sum_exp)
    scale, at_target = tl.where(rows.ignored, 0.0, scale), tl.where(rows.ignored, 0.0, sigmoid(gap))
    out = row_ptr(softmax_ptr, row, shape[2], softmax_strides)
    n_tiles = tl.cdiv(shape[1] // CHUNK, LANES)
    write_rows(out, rows, row, shape, strides[2], softmax_strides[2], rest.max, scale, at_target,
               0, n_tiles, True, ROWS, LANES, VECTOR)  # fmt: skip


@triton.jit
def partial_kernel(
    logits_ptr, target_ptr, sums_ptr, argmax_ptr, shape, strides, ignore_index,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A share of one row: sweep, store its RestStats in [4, n_rows, n_parts] and [n_rows, n_parts]."""
    row, part, n_parts = row_index(1), tl.program_id(1), tl.num_programs(1)
    rows = rows_at(logits_ptr, target_ptr, row, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], part, n_parts, 1, LANES, VECTOR)
    at = row * n_parts + part
    column = shape[0] * n_parts
    tl.store(sums_ptr + at, rest.max)
    tl.store(sums_ptr + at + column, rest.sum_exp)
    tl.store(sums_ptr + at + 2 * column, rest.sum_exp2)
    tl.store(sums_ptr + at + 3 * column, rest.sum_exp_z)
    tl.store(argmax_ptr + at, rest.argmax)


@triton.jit
def merge_kernel(
    logits_ptr, target_ptr, sums_ptr, argmax_ptr, outputs, shape, strides, ignore_index, loss_params,
    VALUE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row from its parts: merge by a fixed tree, finish."""
    row = row_index(1)
    rows = rows_at(logits_ptr, target_ptr, row, shape, strides, ignore_index, 1)
    at = row[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    column = shape[0] * PARTS
    rest = RestStats(
        tl.load(sums_ptr + at),
        tl.load(argmax_ptr + at),
        tl.load(sums_ptr + at + column),
        tl.load(sums_ptr + at + 2 * column),
        tl.load(sums_ptr + at + 3 * column),
    )
    finish(across(rest), rows, row, shape[0], strides[2], outputs, loss_params, VALUE)
