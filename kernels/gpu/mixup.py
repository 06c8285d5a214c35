"""Two labels a row (mixup): both losses of the gap from one sweep, and their gradient.

The rest here is all classes but both labels; the rest of either label is that and the other label. With
``r`` the logsumexp of a label's rest and ``A`` its slope times its upstream gradient

    dL/dz_a = -A_a + A_b exp(z_a - r_b)        dL/dz_k = A_a exp(z_k - r_a) + A_b exp(z_k - r_b)

Traffic a row of V logits of b bytes: forward reads V b + 2 b; backward reads V b and writes V b.
"""

import triton
import triton.language as tl

from ..formulas.rest import NO_CLASS, RestStats, merge, origin
from ..formulas.scalar import exp
from ..formulas.scores import gap_of
from .params import widen
from .rest import absorb, across, empty
from .rows import (
    CHUNK,
    Rows,
    accumulable,
    chunk_classes,
    chunk_mask,
    edge_classes,
    is_spread,
    load,
    load_chunks,
    load_classes,
    row_index,
    row_ptr,
    rows_at,
    store_chunks,
)
from .tiles import all_tiles, masked, n_masked, n_segments, needs_no_mask, segment, tiles_of_program


@triton.jit
def two_rows_at(logits_ptr, targets_ptr, row, shape, strides, ignore_index, VECTOR: tl.constexpr):
    """Return the rows for each label; both are read wherever either label counts."""
    a = rows_at(logits_ptr, targets_ptr, row, shape, strides, ignore_index, VECTOR)
    b = rows_at(logits_ptr, targets_ptr + shape[0], row, shape, strides, ignore_index, VECTOR)
    either = a.active | b.active
    return a, b, Rows(a.ptr, a.head, a.n_chunks, a.target, either, a.ignored & b.ignored)


@triton.jit
def mixup_sweep(rows, other, n_classes, class_stride, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the RestStats of all classes but ``rows.target`` and ``other`` [ROWS]."""
    lane = tl.arange(0, LANES)[None, :]
    rest = empty(accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty)))
    tiles = all_tiles(rows, (rows.target, other), ROWS, LANES, VECTOR)
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                chunk = tile * LANES + lane
                rest = absorb(rest, load_chunks(rows, chunk, None, class_stride, VECTOR), chunk)
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        mask = chunk_mask(rows, chunk, rows.active)
        classes = chunk_classes(rows, chunk)
        z = load_chunks(rows, chunk, mask, class_stride, VECTOR)
        keep = mask & (classes != rows.target[:, None, None]) & (classes != other[:, None, None])
        rest = absorb(rest, tl.where(keep, z, -float("inf")), chunk, is_spread(VECTOR))
    classes = edge_classes(rows)
    mask = (classes < n_classes) & (classes != rows.target[:, None]) & (classes != other[:, None])
    z = load_classes(rows, classes, mask & rows.active[:, None], class_stride)
    return merge(across(rest), across(absorb(empty(z), z[:, :, None], classes)))


@triton.jit
def with_class(rest, z):
    """Return ``rest`` and one more class, whose logit is -inf where there is none."""
    one = tl.where(z == -float("inf"), 0.0, 1.0)
    return merge(rest, RestStats(z, tl.full(z.shape, NO_CLASS, tl.int32), one, one, tl.zeros_like(z)))


@triton.jit
def below(z, rest):
    """Return z - logsumexp(rest), -inf with no rest."""
    return tl.where(rest.sum_exp == 0.0, -float("inf"), (z - origin(rest.max)) - tl.log(rest.sum_exp))


@triton.jit
def mixup_forward_kernel(
    logits_ptr, targets_ptr, outputs, shape, strides, ignore_index, loss_params,
    VALUE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Store losses [2, n_rows] and for backward [7, n_rows]: two gaps, max, max and other label below either rest."""
    n_rows, class_stride = shape[0], strides[2]
    row = row_index(ROWS)
    a, b, rows = two_rows_at(logits_ptr, targets_ptr, row, shape, strides, ignore_index, VECTOR)
    rest = mixup_sweep(rows, b.target, shape[1], class_stride, ROWS, LANES, VECTOR)
    z_a = load(a.ptr + a.target.to(tl.int64) * class_stride, a.active)
    z_b = load(b.ptr + b.target.to(tl.int64) * class_stride, b.active)
    same = a.target == b.target
    other_a, other_b = tl.where(same, -float("inf"), z_b), tl.where(same, -float("inf"), z_a)
    rest_a, rest_b = with_class(rest, other_a), with_class(rest, other_b)
    gap_a = tl.where(a.active, gap_of(z_a, rest_a), float("nan"))
    gap_b = tl.where(b.active, gap_of(z_b, rest_b), float("nan"))
    params = widen(loss_params[0], loss_params[1], gap_a)

    inside = row < n_rows
    loss = outputs[0] + row
    tl.store(loss, tl.where(a.ignored, 0.0, VALUE(gap_a, params)), inside)
    tl.store(loss + n_rows, tl.where(b.ignored, 0.0, VALUE(gap_b, params)), inside)
    column = outputs[1] + row
    tl.store(column, gap_a, inside)
    tl.store(column + n_rows, gap_b, inside)
    tl.store(column + 2 * n_rows, rest.max, inside)
    tl.store(column + 3 * n_rows, below(rest.max, rest_a), inside)
    tl.store(column + 4 * n_rows, below(rest.max, rest_b), inside)
    tl.store(column + 5 * n_rows, below(other_b, rest_b), inside)
    tl.store(column + 6 * n_rows, below(other_a, rest_a), inside)


@triton.jit
def mixup_backward_kernel(
    logits_ptr, targets_ptr, saved_ptr, grad_loss_ptr, grad_ptr, shape, strides, grad_strides, ignore_index,
    loss_params, SLOPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1)."""
    n_rows, n_classes = shape[0], shape[1]
    row = row_index(ROWS)
    inside = row < n_rows
    a, b, rows = two_rows_at(logits_ptr, targets_ptr, row, shape, strides, ignore_index, VECTOR)
    column = saved_ptr + row
    gap_a, gap_b = tl.load(column, inside, 0.0), tl.load(column + n_rows, inside, 0.0)
    rest_max = tl.load(column + 2 * n_rows, inside, 0.0)
    params = widen(loss_params[0], loss_params[1], gap_a)
    grad_a = tl.load(grad_loss_ptr + row, inside, 0.0).to(gap_a.dtype)
    grad_b = tl.load(grad_loss_ptr + row + n_rows, inside, 0.0).to(gap_a.dtype)
    slope_a = tl.where(a.ignored, 0.0, SLOPE(gap_a, params) * grad_a)
    slope_b = tl.where(b.ignored, 0.0, SLOPE(gap_b, params) * grad_b)
    # a label with no rest teaches nothing
    slope_a = tl.where(gap_a == float("inf"), 0.0, slope_a)
    slope_b = tl.where(gap_b == float("inf"), 0.0, slope_b)
    scale = slope_a * exp(tl.load(column + 3 * n_rows, inside, 0.0))
    scale += slope_b * exp(tl.load(column + 4 * n_rows, inside, 0.0))
    same = a.target == b.target
    at_a = tl.where(same, -slope_b, slope_b * exp(tl.load(column + 5 * n_rows, inside, 0.0))) - slope_a
    at_b = tl.where(same, -slope_a, slope_a * exp(tl.load(column + 6 * n_rows, inside, 0.0))) - slope_b
    special = a.target, at_a, b.target, at_b

    out = row_ptr(grad_ptr, row, shape[2], grad_strides)
    tiles = tiles_of_program(rows, (a.target, b.target), n_classes, ROWS, LANES, VECTOR)
    lane = tl.arange(0, LANES)[None, :]
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                chunk = tile * LANES + lane
                z = load_chunks(rows, chunk, None, strides[2], VECTOR)
                x = gradient_of_others(z, rest_max, scale)
                store_chunks(out, rows, chunk, x, None, grad_strides[2], VECTOR)
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        mask = chunk_mask(rows, chunk, inside)
        classes = chunk_classes(rows, chunk)
        z = load_chunks(rows, chunk, mask & rows.active[:, None, None], strides[2], VECTOR)
        store_chunks(out, rows, chunk, mixup_gradient(z, classes, rest_max, scale, special), mask, grad_strides[2],
                     VECTOR)  # fmt: skip
    if tl.program_id(1) == 0:
        classes = edge_classes(rows)
        mask = (classes < n_classes) & inside[:, None]
        z = load_classes(rows, classes, mask & rows.active[:, None], strides[2])
        x = tl.reshape(mixup_gradient(z[:, :, None], classes[:, :, None], rest_max, scale, special), [ROWS, 2 * CHUNK])
        tl.store(out[:, None] + classes.to(tl.int64) * grad_strides[2], x.to(grad_ptr.dtype.element_ty), mask)


@triton.jit
def gradient_of_others(z, rest_max, scale):
    """Return the gradient of classes [ROWS, n, k] that are no label; an ignored row has scale 0 and logits of -inf."""
    x = scale[:, None, None] * exp(z - origin(rest_max)[:, None, None])
    return tl.where((scale == 0.0)[:, None, None], 0.0, x)


@triton.jit
def mixup_gradient(z, classes, rest_max, scale, special):
    """Return the gradient of the classes [ROWS, n, k]."""
    x = gradient_of_others(z, rest_max, scale)
    x = tl.where(classes == special[0][:, None, None], special[1][:, None, None], x)
    return tl.where(classes == special[2][:, None, None], special[3][:, None, None], x)
