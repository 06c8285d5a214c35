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
from .rows import (
    chunk_classes,
    chunk_mask,
    edge_classes,
    is_spread,
    load_classes,
    load_label,
    logits_of,
    zeros,
)
from .soft_targets import fetch_both, shares_at, shares_in_chunks
from .sweep import absorb_in_any_order, exact_argmax, largest_class
from .tiles import chunks_of, n_all, n_plain, needs_no_mask, tiles_of_part


@triton.constexpr_function
def may_be_spread(TILE):
    """Return whether the classes of a chunk may lie in several threads: short rows have more threads than chunks."""
    return TILE.vector > 0 and (TILE.rows > 1 or is_spread(TILE.vector))


@triton.jit
def first_sweep(rows, target, gamma, options, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """Return RestStats and Paid of all classes but the label, and the label's logit, each [ROWS]."""
    LANES: tl.constexpr = TILE.lanes
    zero = zeros(rows, TILE.rows, LANES)
    lanes, paid, z_target = empty(zero), unpaid(zero), zero
    tiles = tiles_of_part(rows, (rows.target,), 0, 1, TILE, needs_no_mask(TILE))
    n, chunk = n_all(tiles), chunks_of(tiles, 0, LANES)
    raw, given = fetch_both(rows, target, chunk, rows.active & (n > 0), TILE.vector)
    start = 0
    if needs_no_mask(TILE):
        start = tl.maximum(n_plain(tiles) - 1, 0)
        for i in range(start):
            after = chunks_of(tiles, i + 1, LANES, True)
            raw_ahead, given_ahead = fetch_both(rows, target, after, None, TILE.vector)
            before = lanes.max
            z = logits_of(raw, rows, None, options, LOGIT)
            t, v = shares_in_chunks(target, given, chunk, None, z)
            lanes = absorb(lanes, z, chunk)
            paid = pay(paid, before, lanes.max, z, t, v, None, gamma, False)
            raw, given, chunk = raw_ahead, given_ahead, after

    for i in range(start, n):
        after = chunks_of(tiles, i + 1, LANES)
        raw_ahead, given_ahead = fetch_both(rows, target, after, rows.active & (i + 1 < n), TILE.vector)
        before = lanes.max
        mask, classes = chunk_mask(rows, chunk, rows.active, TILE.vector), chunk_classes(rows, chunk)
        z = logits_of(raw, rows, mask, options, LOGIT)
        others = mask & (classes != rows.target[:, None, None])
        t, v = shares_in_chunks(target, given, chunk, mask, z)
        if TILE.vector == 0:
            z_target += tl.sum(tl.where(classes == rows.target[:, None, None], z, 0.0), 2)
        z = tl.where(others, z, -float("inf"))
        index = largest_class(z, classes) if TILE.vector == 0 else chunk
        lanes = absorb_in_any_order(lanes, z, index, may_be_spread(TILE))
        paid = pay(paid, before, lanes.max, z, t, v, others, gamma, may_be_spread(TILE))
        raw, given, chunk = raw_ahead, given_ahead, after

    rest = across(lanes)
    if TILE.vector == 0:
        return rest, paid_by_row(paid, lanes.max, rest.max, gamma), tl.sum(z_target, 1)
    else:
        rest = exact_argmax(rest, rows, options, LOGIT)
        paid = paid_by_row(paid, lanes.max, rest.max, gamma)
        rest, paid = with_edge(rest, paid, rows, target, gamma, options, LOGIT)
        return rest, paid, load_label(rows, options, LOGIT)


@triton.jit
def with_edge(rest, paid, rows, target, gamma, options, LOGIT: tl.constexpr):
    """Add the edge to RestStats and Paid [ROWS]."""
    classes = edge_classes(rows)
    mask = (classes < rows.n_classes) & rows.active[:, None]
    z = logits_of(load_classes(rows, classes, mask), rows, mask, options, LOGIT)
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


class Sums(NamedTuple):
    """Sums over all classes but label and runner-up."""

    exp: tl.tensor  # exp(z - max)
    value: tl.tensor
    pull: tl.tensor


@triton.jit
def second_sweep(
    rows, target, runner_up, softmax, params, options,
    TERMS: tl.constexpr, SUMS: tl.constexpr, LOGIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the Sums [ROWS]."""
    LANES: tl.constexpr = TILE.lanes
    zero = zeros(rows, TILE.rows, LANES)
    body = Sums(zero, zero, zero)
    tiles = tiles_of_part(rows, (rows.target, runner_up), 0, 1, TILE, needs_no_mask(TILE))
    n, chunk = n_all(tiles), chunks_of(tiles, 0, LANES)
    raw, given = fetch_both(rows, target, chunk, rows.active & (n > 0), TILE.vector)
    start = 0
    if needs_no_mask(TILE):
        start = tl.maximum(n_plain(tiles) - 1, 0)
        for i in range(start):
            after = chunks_of(tiles, i + 1, LANES, True)
            raw_ahead, given_ahead = fetch_both(rows, target, after, None, TILE.vector)
            z = logits_of(raw, rows, None, options, LOGIT)
            _, v = shares_in_chunks(target, given, chunk, None, z)
            body = add_tile(body, z, v, None, softmax, params, TERMS, SUMS, False)
            raw, given, chunk = raw_ahead, given_ahead, after

    for i in range(start, n):
        after = chunks_of(tiles, i + 1, LANES)
        raw_ahead, given_ahead = fetch_both(rows, target, after, rows.active & (i + 1 < n), TILE.vector)
        mask, classes = chunk_mask(rows, chunk, rows.active, TILE.vector), chunk_classes(rows, chunk)
        z = logits_of(raw, rows, mask, options, LOGIT)
        _, v = shares_in_chunks(target, given, chunk, mask, z)
        others = mask & (classes != rows.target[:, None, None]) & (classes != runner_up[:, None, None])
        body = add_tile(body, z, v, others, softmax, params, TERMS, SUMS, may_be_spread(TILE))
        raw, given, chunk = raw_ahead, given_ahead, after

    sums = Sums(tl.sum(body.exp, 1), tl.sum(body.value, 1), tl.sum(body.pull, 1))
    if TILE.vector == 0:
        return sums
    else:
        return sums_with_edge(sums, rows, target, runner_up, softmax, params, options, TERMS, LOGIT)


@triton.jit
def sums_with_edge(sums, rows, target, runner_up, softmax, params, options, TERMS: tl.constexpr, LOGIT: tl.constexpr):
    """Add the edge to the Sums [ROWS]."""
    classes = edge_classes(rows)
    mask = (classes < rows.n_classes) & rows.active[:, None]
    z = logits_of(load_classes(rows, classes, mask), rows, mask, options, LOGIT)
    _, v = shares_at(target, classes, mask, z)
    others = mask & (classes != rows.target[:, None]) & (classes != runner_up[:, None])
    e, p, log_p = probabilities(softmax, z, others)
    value, pull = TERMS(p, 1.0 - p, log_p, log_p, v, params)
    return Sums(
        sums.exp + tl.sum(e, 1),
        sums.value + tl.sum(tl.where(others, value, 0.0), 1),
        sums.pull + tl.sum(tl.where(others, pull, 0.0), 1),
    )


@triton.jit
def add_tile(sums, z, v, others, softmax, params, TERMS: tl.constexpr, SUMS: tl.constexpr, SPREAD: tl.constexpr):
    """Add a tile to the Sums of each lane, all of it or ``others``: without label and runner-up."""
    e, p, log_p = probabilities(softmax, z, others)
    value, pull = SUMS(TERMS, others, p, log_p, v, params, SPREAD)
    return Sums(sums.exp + tl.sum(e, 2), sums.value + value, sums.pull + pull)


@triton.jit
def power_sums(paid, rest, softmax, strength, gamma):
    """Return the Sums of the bonus ``-strength p^gamma`` without a second sweep; value and pull hold the runner-up."""
    power = strength * exp(gamma * softmax.log_scale) * paid.power
    return Sums(tl.maximum(rest.sum_exp - 1.0, 0.0), -power, gamma * power)
