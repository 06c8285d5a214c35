"""Labels as targets: logits and target to loss, scores and what backward needs, then to the gradient.

    A = slope(gap) grad_loss        grad_y = -A        grad_k = A exp(z_k - max) / sum_exp

Traffic a row of V logits of b bytes. Forward reads V b + b (the label's logit, masked in the sweep, fetched apart)
+ CHUNK b a part (the runner-up's chunk again, from cache) + the target index; writes 4 bytes a requested column.
Backward reads V b + 3 saved columns + target and upstream gradient, writes V b.
"""

import triton
import triton.language as tl

from ..formulas.rest import RestStats
from ..formulas.scalar import sigmoid
from ..formulas.scores import gap_of, pulls
from .params import widen
from .rest import across
from .rows import CHUNK, load, row_index, row_ptr, rows_at
from .scores import store_scores
from .spread import write_rows
from .sweep import sweep


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


@triton.jit
def backward_kernel(
    logits_ptr, target_ptr, saved_ptr, grad_loss_ptr, grad_ptr, shape, strides, grad_strides, grad_loss_stride,
    ignore_index, loss_params, SLOPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1)."""
    row = row_index(ROWS)
    inside = row < shape[0]
    rows = rows_at(logits_ptr, target_ptr, row, shape, strides, ignore_index, VECTOR)
    gap = tl.load(saved_ptr + row, inside, 0.0)
    rest_max = tl.load(saved_ptr + row + shape[0], inside, 0.0)
    sum_exp = tl.load(saved_ptr + row + shape[0] + shape[0], inside, 1.0)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride, inside, 0.0).to(gap.dtype)

    slope = SLOPE(gap, widen(loss_params[0], loss_params[1], gap)) * grad_loss
    # an ignored row teaches nothing whatever it holds
    scale, at_target = pulls(tl.where(rows.ignored, 0.0, slope), sum_exp)
    part, n_parts = tl.program_id(1), tl.num_programs(1)
    n_tiles = tl.cdiv(shape[1] // CHUNK, LANES)
    share = tl.cdiv(n_tiles, n_parts)
    out = row_ptr(grad_ptr, row, shape[2], grad_strides)
    write_rows(out, rows, row, shape, strides[2], grad_strides[2], rest_max, scale, at_target,
               part * share, tl.minimum(part * share + share, n_tiles), part == 0, ROWS, LANES, VECTOR)  # fmt: skip
