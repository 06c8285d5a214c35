"""The sweeps over rows whose target is shares of classes: the first finds lse, the second sums what asks for p.

Both leave out the label, the second also the runner-up, see `apart`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..formulas.rest import merge
from ..formulas.scalar import exp
from .paid import Paid, paid_by_row, pay, unpaid
from .probabilities import probabilities
from .rest import absorb, across, empty
from .rows import accumulable, chunk_classes, chunk_mask, edge_classes, is_spread, load_chunks, load_classes
from .soft_targets import shares_at, shares_in_chunks
from .sweep import absorb_in_any_order, exact_argmax
from .tiles import all_tiles, masked, n_masked, n_segments, needs_no_mask, segment


@triton.constexpr_function
def may_be_spread(ROWS, VECTOR):
    """Return whether the classes of a chunk may lie in several threads: short rows have more threads than chunks."""
    return ROWS > 1 or is_spread(VECTOR)


@triton.jit
def first_sweep(
    rows, target, n_classes, class_stride, gamma, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Return RestStats and Paid of all classes but the label, each [ROWS]."""
    lane = tl.arange(0, LANES)[None, :]
    zero = accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty))
    lanes, paid = empty(zero), unpaid(zero)
    tiles = all_tiles(rows, (rows.target, rows.target), ROWS, LANES, VECTOR)
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                chunk = tile * LANES + lane
                lanes, paid = pay_tile(lanes, paid, rows, target, chunk, class_stride, gamma, False, False, VECTOR)
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        lanes, paid = pay_tile(
            lanes, paid, rows, target, chunk, class_stride, gamma, True, may_be_spread(ROWS, VECTOR), VECTOR
        )
    rest = exact_argmax(across(lanes), rows, class_stride)
    paid = paid_by_row(paid, lanes.max, rest.max, gamma)

    classes = edge_classes(rows)
    mask = (classes < n_classes) & rows.active[:, None]
    z = load_classes(rows, classes, mask, class_stride)
    others = mask & (classes != rows.target[:, None])
    t, v = shares_at(target, classes, mask, z)
    z = tl.where(others, z, -float("inf"))
    both = merge(rest, across(absorb(empty(z), z[:, :, None], classes)))
    at = both.max[:, None]
    edge = pay(unpaid(z), at, at, z[:, :, None], t[:, :, None], v[:, :, None], others[:, :, None], gamma, False)
    body = Paid(paid.total[:, None], paid.cost[:, None], paid.power[:, None])
    body = paid_by_row(body, rest.max[:, None], both.max, gamma)
    return both, Paid(
        body.total + tl.sum(edge.total, 1), body.cost + tl.sum(edge.cost, 1), body.power + tl.sum(edge.power, 1)
    )


@triton.jit
def pay_tile(
    rest, paid, rows, target, chunk, class_stride, gamma,
    MASKED: tl.constexpr, SPREAD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add chunks [1, LANES] to RestStats and Paid of each lane; a tile without a mask must hold no label."""
    before = rest.max
    mask = chunk_mask(rows, chunk, rows.active) if MASKED else None
    z = load_chunks(rows, chunk, mask, class_stride, VECTOR)
    others = mask & (chunk_classes(rows, chunk) != rows.target[:, None, None]) if MASKED else None
    t, v = shares_in_chunks(target, chunk, mask, z, VECTOR)
    if MASKED:
        z = tl.where(others, z, -float("inf"))
        rest = absorb_in_any_order(rest, z, chunk, SPREAD)
    else:
        rest = absorb(rest, z, chunk)
    return rest, pay(paid, before, rest.max, z, t, v, others, gamma, SPREAD)


class Sums(NamedTuple):
    """Sums over all classes but label and runner-up."""

    exp: tl.tensor  # exp(z - max)
    value: tl.tensor
    pull: tl.tensor


@triton.jit
def second_sweep(
    rows, target, runner_up, softmax, n_classes, class_stride, params, TERMS: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return the Sums [ROWS]."""
    lane = tl.arange(0, LANES)[None, :]
    zero = accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty))
    body = Sums(zero, zero, zero)
    tiles = all_tiles(rows, (rows.target, runner_up), ROWS, LANES, VECTOR)
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                body = add_tile(
                    body, rows, target, runner_up, softmax, tile * LANES + lane, class_stride, params, TERMS, SUMS,
                    False, False, VECTOR,
                )  # fmt: skip
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        body = add_tile(
            body, rows, target, runner_up, softmax, chunk, class_stride, params, TERMS, SUMS,
            True, may_be_spread(ROWS, VECTOR), VECTOR,
        )  # fmt: skip

    classes = edge_classes(rows)
    mask = (classes < n_classes) & rows.active[:, None]
    z = load_classes(rows, classes, mask, class_stride)
    _, v = shares_at(target, classes, mask, z)
    others = mask & (classes != rows.target[:, None]) & (classes != runner_up[:, None])
    e, p, log_p = probabilities(softmax, z, others)
    value, pull = TERMS(p, 1.0 - p, log_p, log_p, v, params)
    return Sums(
        tl.sum(body.exp, 1) + tl.sum(e, 1),
        tl.sum(body.value, 1) + tl.sum(tl.where(others, value, 0.0), 1),
        tl.sum(body.pull, 1) + tl.sum(tl.where(others, pull, 0.0), 1),
    )


@triton.jit
def add_tile(
    sums, rows, target, runner_up, softmax, chunk, class_stride, params, TERMS: tl.constexpr, SUMS: tl.constexpr,
    MASKED: tl.constexpr, SPREAD: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Add chunks [1, LANES] to the Sums of each lane; a tile without a mask must hold neither label nor runner-up."""
    mask = chunk_mask(rows, chunk, rows.active) if MASKED else None
    z = load_chunks(rows, chunk, mask, class_stride, VECTOR)
    _, v = shares_in_chunks(target, chunk, mask, z, VECTOR)
    others = None
    if MASKED:
        classes = chunk_classes(rows, chunk)
        others = mask & (classes != rows.target[:, None, None]) & (classes != runner_up[:, None, None])
    e, p, log_p = probabilities(softmax, z, others)
    value, pull = SUMS(TERMS, others, p, log_p, v, params, SPREAD)
    return Sums(sums.exp + tl.sum(e, 2), sums.value + value, sums.pull + pull)


@triton.jit
def power_sums(paid, rest, softmax, strength, gamma):
    """Return the Sums of the bonus ``-strength p^gamma`` without a second sweep; value and pull hold the runner-up."""
    power = strength * exp(gamma * softmax.log_scale) * paid.power
    return Sums(tl.maximum(rest.sum_exp - 1.0, 0.0), -power, gamma * power)
