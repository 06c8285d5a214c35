"""Targets that are shares of classes: forward by one sweep where algebra allows, by two where not; backward.

    L = sum t_k (lse - z_k) + sum value_k        dL/dz_j = p_j (sum t_k + sum pull_k) - (t_j + pull_j)

Label and runner-up are left out of the sums over classes and added from their gaps: only they can be near p = 1.

Traffic a row of V logits of b bytes and, where given, V probabilities of c bytes: a sweep reads V (b + c), the second
from cache as far as it reaches. Besides, forward reads the label's logit, the runner-up's chunk, and label's and
runner-up's probabilities again. Backward reads V (b + c) and writes V b. Either reads class weights as a sweep reads
probabilities.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .class_terms import TINY
from .forward import absorb_in_any_order, exact_argmax, widen
from .rest import absorb, across, empty, merge, origin
from .rows import CHUNK, accumulable, edge_classes, load, load_chunks, row_index, row_ptr, rows_at
from .scalar import exp, log_sigmoid, sigmoid
from .scores import gap_of, scores_of
from .shares import shares_at, shares_in_chunks, target_of, where_any
from .tiles import masked, n_masked, n_segments, needs_no_mask, segment, tiles_of

LARGEST = tl.constexpr(3.4e38)  # a float32


@triton.jit
def chunk_classes(rows, chunk):
    """Return the classes [ROWS, LANES, CHUNK] of chunk numbers [1, LANES]."""
    return rows.head[:, None, None] + (chunk * CHUNK)[:, :, None] + tl.arange(0, CHUNK)[None, None, :]


class Paid(NamedTuple):
    """Sums over classes, each [ROWS, LANES]: of t, of t (max - z), of v exp(gamma (z - max))."""

    total: tl.tensor
    cost: tl.tensor
    power: tl.tensor


@triton.jit
def pay(paid, before, maximum, z, t, v, others, gamma, POWER: tl.constexpr):
    """Add the tile ``z`` that moved the max from ``before`` to ``maximum``: all of it, or ``others``.

    ``t`` and ``v`` are numbers where all classes of the tile have the same share; without one a class pays nothing.
    """
    at = origin(maximum)
    d = z - at[:, :, None]
    # where the max was -inf, nothing was paid or an infinity
    shift = tl.minimum(tl.where(before == -float("inf"), 0.0, at - before), LARGEST)
    if len(t.shape) == 0:
        # asking for z ties the mask to the lanes of z, else it would be shuffled
        n = CHUNK if others is None else tl.sum(tl.where(others & (z == z), 1.0, 0.0), 2)
        total, cost = t * n, tl.where(t == 0.0, 0.0, -t * tl.sum(where_any(others, d), 2))
    else:
        t = where_any(others, t)
        total, cost = tl.sum(t, 2), tl.sum(tl.where(t == 0.0, 0.0, -t * d), 2)
    power = paid.power
    if POWER:
        power = power * exp(gamma * (before - at)) + tl.sum(v * exp(gamma * d), 2)
    return Paid(paid.total + total, paid.cost + paid.total * shift + cost, power)


@triton.jit
def first_sweep(
    rows, target, n_classes, class_stride, gamma, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    POWER: tl.constexpr,
):  # fmt: skip
    """Return RestStats and Paid of each row, both without the label."""
    lane = tl.arange(0, LANES)[None, :]
    rest = empty(accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty)))
    paid = Paid(tl.zeros_like(rest.max), tl.zeros_like(rest.max), tl.zeros_like(rest.max))
    n_tiles = tl.cdiv(tl.max(tl.where(rows.active, rows.n_chunks, 0), 0), LANES)
    tiles = tiles_of(rows, (rows.target, rows.target), 0, n_tiles, ROWS, LANES, VECTOR)
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                chunk = tile * LANES + lane
                z = load_chunks(rows, chunk, None, class_stride, VECTOR)
                t, v = shares_in_chunks(target, chunk, None, z, VECTOR)
                before = rest.max
                rest = absorb(rest, z, chunk)
                paid = pay(paid, before, rest.max, z, t, v, None, gamma, POWER)
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        mask = ((chunk < rows.n_chunks[:, None]) & rows.active[:, None])[:, :, None]
        classes = chunk_classes(rows, chunk)
        z = load_chunks(rows, chunk, mask, class_stride, VECTOR)
        others = mask & (classes != rows.target[:, None, None])
        t, v = shares_in_chunks(target, chunk, mask, z, VECTOR)
        z = tl.where(others, z, -float("inf"))
        before = rest.max
        rest = absorb_in_any_order(rest, z, chunk)
        paid = pay(paid, before, rest.max, z, t, v, others, gamma, POWER)
    lanes_max = rest.max
    rest = exact_argmax(across(rest), rows, class_stride)
    paid = paid_by_row(paid, lanes_max, rest.max, gamma, POWER)

    classes = edge_classes(rows)
    mask = (classes < n_classes) & rows.active[:, None]
    z = load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask)
    others = mask & (classes != rows.target[:, None])
    t, v = shares_at(target, classes, mask, z)
    z = tl.where(others, z, -float("inf"))
    both = merge(rest, across(absorb(empty(z), z[:, :, None], classes)))
    zero, at = tl.zeros_like(z), both.max[:, None]
    edge = pay(Paid(zero, zero, zero), at, at, z[:, :, None], t[:, :, None], v[:, :, None], others[:, :, None], gamma,
               POWER)  # fmt: skip
    body = Paid(paid.total[:, None], paid.cost[:, None], paid.power[:, None])
    body = paid_by_row(body, rest.max[:, None], both.max, gamma, POWER)
    return both, Paid(
        body.total + tl.sum(edge.total, 1), body.cost + tl.sum(edge.cost, 1), body.power + tl.sum(edge.power, 1)
    )


@triton.jit
def paid_by_row(paid, lanes_max, maximum, gamma, POWER: tl.constexpr):
    """Return the sums [ROWS] over lanes that counted from ``lanes_max``, counted from the row's max."""
    at = origin(maximum)[:, None]
    shift = tl.minimum(tl.where(lanes_max == -float("inf"), 0.0, at - lanes_max), LARGEST)
    power = tl.sum(paid.power * exp(gamma * (lanes_max - at)), 1) if POWER else tl.sum(paid.power, 1)
    return Paid(tl.sum(paid.total, 1), tl.sum(paid.cost + paid.total * shift, 1), power)


@triton.jit
def second_sweep(
    rows, target, rest, gap, n_classes, class_stride, params, TERMS: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the sums of exp(z - max), of value and of pull over all classes but label and runner-up."""
    lane = tl.arange(0, LANES)[None, :]
    at = origin(rest.max)
    sum_exp = tl.maximum(rest.sum_exp, 1.0)
    scale, log_scale = sigmoid(-gap) / sum_exp, log_sigmoid(-gap) - tl.log(sum_exp)
    zero = accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty))
    sum_exp, value, pull = zero, zero, zero
    n_tiles = tl.cdiv(tl.max(tl.where(rows.active, rows.n_chunks, 0), 0), LANES)
    tiles = tiles_of(rows, (rows.target, rest.argmax), 0, n_tiles, ROWS, LANES, VECTOR)
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                chunk = tile * LANES + lane
                z = load_chunks(rows, chunk, None, class_stride, VECTOR)
                _, v = shares_in_chunks(target, chunk, None, z, VECTOR)
                d = z - at[:, None, None]
                e = exp(d)
                p, log_p = e * scale[:, None, None], d + log_scale[:, None, None]
                tile_value, tile_pull = SUMS(TERMS, None, p, log_p, v, params)
                sum_exp += tl.sum(e, 2)
                value += tile_value
                pull += tile_pull
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        mask = ((chunk < rows.n_chunks[:, None]) & rows.active[:, None])[:, :, None]
        classes = chunk_classes(rows, chunk)
        z = load_chunks(rows, chunk, mask, class_stride, VECTOR)
        _, v = shares_in_chunks(target, chunk, mask, z, VECTOR)
        others = mask & (classes != rows.target[:, None, None]) & (classes != rest.argmax[:, None, None])
        d = z - at[:, None, None]
        e = exp(d)
        e = tl.where(others, e, 0.0)
        p, log_p = e * scale[:, None, None], d + log_scale[:, None, None]
        tile_value, tile_pull = SUMS(TERMS, others, p, log_p, v, params)
        sum_exp += tl.sum(e, 2)
        value += tile_value
        pull += tile_pull

    classes = edge_classes(rows)
    mask = (classes < n_classes) & rows.active[:, None]
    z = load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask)
    _, v = shares_at(target, classes, mask, z)
    others = mask & (classes != rows.target[:, None]) & (classes != rest.argmax[:, None])
    d = z - at[:, None]
    e = exp(d)
    p = e * scale[:, None]
    edge_value, edge_pull = TERMS(p, 1.0 - p, d + log_scale[:, None], v, params)
    sum_exp = tl.sum(sum_exp, 1) + tl.sum(tl.where(others, e, 0.0), 1)
    value = tl.sum(value, 1) + tl.sum(tl.where(others, edge_value, 0.0), 1)
    return sum_exp, value, tl.sum(pull, 1) + tl.sum(tl.where(others, edge_pull, 0.0), 1)


@triton.jit
def dense_forward_kernel(
    logits_ptr, targets, outputs, shape, strides, target_strides, ignore_index, loss_params, share_params,
    TERMS: tl.constexpr, SUMS: tl.constexpr, POWER: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program; with POWER the bonus is ``-p^gamma`` and one sweep does."""
    n_rows, n_classes, class_stride = shape[0], shape[1], strides[2]
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, targets[0], row, shape, strides, ignore_index, VECTOR)
    z_target = load(rows.ptr + rows.target.to(tl.int64) * class_stride, rows.active)
    params = widen(loss_params[0], loss_params[1], z_target)
    target = target_of(rows, row, shape[2], targets, target_strides, widen(share_params[0], share_params[1], z_target))
    gamma = params[4] if POWER else 0.0
    rest, paid = first_sweep(rows, target, n_classes, class_stride, gamma, ROWS, LANES, VECTOR, POWER)
    gap = tl.where(rows.active, gap_of(z_target, rest), float("nan"))
    loss_ptr, scores_ptr, runner_up_ptr, saved_ptr = outputs
    inside = row < n_rows
    missing = tl.where(rows.active, 0.0, float("nan"))
    # stored first: what a second sweep need not keep
    if scores_ptr is not None:
        column = scores_ptr + row
        for score in tl.static_range(5):
            tl.store(column, scores_of(z_target, gap, rest)[score] + missing, inside)
            column += n_rows
    known = rows.active & (rest.argmax >= 0) & (rest.argmax < n_classes)
    runner_up = tl.where(known, rest.argmax, 0)
    tl.store(runner_up_ptr + row, tl.where(known & (gap == gap) & (rest.max > -float("inf")), runner_up, -1), inside)
    column = saved_ptr + row
    tl.store(column, rest.max, inside)
    tl.store(column + n_rows, sigmoid(-gap) / tl.maximum(rest.sum_exp, 1.0), inside)

    # t (lse - z) of the others, by way of the rest's max: no term is negative
    log_scale = log_sigmoid(-gap) - tl.log(tl.maximum(rest.sum_exp, 1.0))
    lse = tl.where(log_scale == -float("inf"), LARGEST, -log_scale)  # an overflow
    loss = tl.where(paid.total == 0.0, 0.0, paid.total * lse) + paid.cost
    above = tl.where(rest.max == -float("inf"), float("inf"), exp(z_target - origin(rest.max)))
    if POWER:
        power = params[0] * exp(gamma * log_scale) * paid.power
        others, value, pull = tl.maximum(rest.sum_exp - 1.0, 0.0), -power, gamma * power
    else:
        others, value, pull = second_sweep(
            rows, target, rest, gap, n_classes, class_stride, params, TERMS, SUMS, ROWS, LANES, VECTOR
        )

    # the label, from its gap
    t_label, v_label = shares_at(target, rows.target[:, None], rows.active[:, None], z_target)
    t_label, v_label = tl.sum(t_label, 1), tl.sum(v_label, 1)
    p, u = sigmoid(gap), sigmoid(-gap)
    label_value, label_pull = TERMS(p, tl.maximum(u, TINY), log_sigmoid(gap), v_label, params)
    # the runner-up, from its own: against the label and all others
    t_next, v_next = shares_at(target, runner_up[:, None], known[:, None], z_target)
    t_next, v_next = tl.sum(t_next, 1), tl.sum(v_next, 1)
    gap_next = -tl.log(others + above)
    p_next, u_next = sigmoid(gap_next), sigmoid(-gap_next)
    next_value, next_pull = TERMS(p_next, tl.maximum(u_next, TINY), log_sigmoid(gap_next), v_next, params)
    next_value, next_pull = tl.where(known, next_value, 0.0), tl.where(known, next_pull, 0.0)

    loss += tl.where(t_label == 0.0, 0.0, t_label * -log_sigmoid(gap))
    mass = paid.total - t_next + pull
    if POWER:
        loss += value + label_value
        mass -= next_pull
    else:
        loss += value + label_value + next_value
    label_pull += t_label
    next_pull += t_next
    at_label = p * (mass + next_pull) - u * label_pull
    at_next = p_next * (mass + label_pull) - u_next * next_pull

    tl.store(loss_ptr + row, tl.where(rows.ignored, 0.0, loss + missing), inside)
    tl.store(column + 2 * n_rows, mass + label_pull + next_pull + missing, inside)
    tl.store(column + 3 * n_rows, at_label, inside)
    tl.store(column + 4 * n_rows, at_next, inside)


@triton.jit
def dense_backward_kernel(
    logits_ptr, targets, saved, grad_ptr, shape, strides, target_strides, grad_strides, ignore_index, loss_params,
    share_params, TERMS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1); ``saved`` is (columns, runner_up, upstream gradient)."""
    n_rows, n_classes, class_stride = shape[0], shape[1], strides[2]
    row = row_index(ROWS)
    inside = row < n_rows
    rows = rows_at(logits_ptr, targets[0], row, shape, strides, ignore_index, VECTOR)
    column = saved[0] + row
    rest_max, scale = tl.load(column, inside, 0.0), tl.load(column + n_rows, inside, 0.0)
    params = widen(loss_params[0], loss_params[1], scale)
    target = target_of(rows, row, shape[2], targets, target_strides, widen(share_params[0], share_params[1], scale))
    grad_loss = tl.load(saved[2] + row, inside, 0.0).to(scale.dtype)
    mass = tl.load(column + 2 * n_rows, inside, 0.0) * grad_loss
    at_label = tl.load(column + 3 * n_rows, inside, 0.0) * grad_loss
    at_next = tl.load(column + 4 * n_rows, inside, 0.0) * grad_loss
    runner_up = tl.load(saved[1] + row, inside, -1)
    special = rows.target, at_label, runner_up, at_next
    of_row = rest_max, scale, tl.log(tl.maximum(scale, TINY)), mass, grad_loss

    out = row_ptr(grad_ptr, row, shape[2], grad_strides)
    n_tiles = tl.cdiv(n_classes // CHUNK, LANES)
    share = tl.cdiv(n_tiles, tl.num_programs(1))
    first = tl.program_id(1) * share
    tiles = tiles_of(rows, (rows.target, runner_up), first, tl.minimum(first + share, n_tiles), ROWS, LANES, VECTOR)
    lane = tl.arange(0, LANES)[None, :]
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                chunk = tile * LANES + lane
                z = load_chunks(rows, chunk, None, class_stride, VECTOR)
                t, v = shares_in_chunks(target, chunk, None, z, VECTOR)
                x = gradient_of_others(z, t, v, of_row, params, TERMS)
                store_chunks(out, rows, chunk, x, None, grad_strides[2], VECTOR)
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        mask = ((chunk < rows.n_chunks[:, None]) & inside[:, None])[:, :, None]
        classes = chunk_classes(rows, chunk)
        z = load_chunks(rows, chunk, mask & rows.active[:, None, None], class_stride, VECTOR)
        t, v = shares_in_chunks(target, chunk, mask & rows.active[:, None, None], z, VECTOR)
        x = dense_gradient(z, classes, t, v, of_row, special, params, TERMS)
        x = tl.where(rows.ignored[:, None, None], 0.0, x)
        store_chunks(out, rows, chunk, x, mask, grad_strides[2], VECTOR)

    if tl.program_id(1) == 0:
        classes = edge_classes(rows)
        mask = (classes < n_classes) & inside[:, None]
        z = load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask & rows.active[:, None])
        t, v = shares_at(target, classes, mask & rows.active[:, None], z)
        x = dense_gradient(z[:, :, None], classes[:, :, None], t[:, :, None], v[:, :, None], of_row, special, params,
                           TERMS)  # fmt: skip
        x = tl.where(rows.ignored[:, None], 0.0, tl.reshape(x, [ROWS, 2 * CHUNK]))
        at = out[:, None] + classes.to(tl.int64) * grad_strides[2]
        tl.store(at, x.to(grad_ptr.dtype.element_ty), mask)


@triton.jit
def dense_gradient(z, classes, t, v, of_row, special, params, TERMS: tl.constexpr):
    """Return the gradient of the classes [ROWS, n, k]."""
    x = gradient_of_others(z, t, v, of_row, params, TERMS)
    x = tl.where(classes == special[2][:, None, None], special[3][:, None, None], x)
    return tl.where(classes == special[0][:, None, None], special[1][:, None, None], x)


@triton.jit
def gradient_of_others(z, t, v, of_row, params, TERMS: tl.constexpr):
    """Return the gradient of classes [ROWS, n, k] that are neither label nor runner-up."""
    rest_max, scale, log_scale, mass, grad_loss = of_row
    d = z - origin(rest_max)[:, None, None]
    p = exp(d) * scale[:, None, None]
    _, pull = TERMS(p, 1.0 - p, d + log_scale[:, None, None], v, params)
    return p * mass[:, None, None] - grad_loss[:, None, None] * (t + pull)


@triton.jit
def store_chunks(out_ptr, rows, chunk, x, mask, out_class_stride, VECTOR: tl.constexpr):
    """Store [ROWS, LANES, CHUNK]; with VECTOR > 1 the rows of ``out_ptr`` are as aligned as the logits'."""
    x = x.to(out_ptr.dtype.element_ty)
    first = (chunk * CHUNK)[:, :, None]
    if VECTOR == 1:
        at = (first + tl.arange(0, CHUNK)[None, None, :]).to(tl.int64) * out_class_stride
        tl.store(out_ptr[:, None, None] + at, x, mask)
    else:
        out = tl.multiple_of(out_ptr + rows.head, 16)[:, None, None] + first
        if VECTOR == 4:  # as `load_chunks`
            halves = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], 2, 4]), (0, 1, 3, 2))
            low, high = tl.split(halves)
            half = tl.arange(0, 4)[None, None, :]
            tl.store(out + half, low, mask)
            tl.store(out + (4 + half), high, mask)
        else:
            tl.store(out + tl.arange(0, CHUNK)[None, None, :], x, mask)
