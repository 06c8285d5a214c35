"""Rows of soft targets: a tile of them by steps that take turns, vectors of classes and vectors of rows.

    L = sum t_k (lse - z_k) + sum value_k        dL/dz_j = p_j M - (t_j + pull_j)        M = sum (t_k + pull_k)

Label and runner-up stand apart. By classes: the largest logit, exponentials and sums; what each class adds, which
cross-entropy alone does without; the gradient. Between them rows are finished in columns, as `tile` has it.
"""

from __future__ import annotations

from typing import NamedTuple

from ..formulas.rest import RestStats
from ..formulas.scalar import log_sigmoid, sigmoid
from ..formulas.soft_targets import (
    Apart,
    Softmax,
    cross_entropy_apart,
    cross_entropy_of,
    gap_of_runner_up,
    gradient_apart,
    of_runner_up,
    rest_of,
    softmax_of,
)
from .names import (
    call8,
    call9,
    element,
    given_element,
    given_size,
    int32,
    largest_of,
    narrow,
    real,
    real_size,
    record,
    size,
    unrelated,
    vector,
    where,
    widen,
    widen_given,
)
from .rows import SEARCHED, exps_at, largest, logits_at, out_at, row_at, sums_of
from .tile import (
    ARGMAX,
    GAP,
    LABEL,
    MAX,
    PAD,
    ROWS,
    SUM_EXP,
    SUM_EXP2,
    SUM_EXP_Z,
    UPSTREAM,
    Z_TARGET,
    find_gaps,
    load_labels,
    load_upstream,
    padded,
    score,
)
from .tile import END as END_OF_TILE

CHUNK = 512  # classes
# where columns of a row's sums begin after those of the tile, each of PAD rows
OTHERS, TOTAL, COST, SCALE, LOG_SCALE, VALUE, PULL, FACTOR, END_OF_SUMS = range(END_OF_TILE, END_OF_TILE + 9 * PAD, PAD)
# and those of a class apart, from where the label's or the runner-up's begin
P, REST, LOG_P, LOG_REST, SHARE, BONUS, OWN_VALUE, OWN_PULL, GRADIENT, END_OF_APART = range(0, 10 * PAD, PAD)
OF_LABEL, OF_OTHER, SUMS = range(END_OF_SUMS, END_OF_SUMS + 3 * END_OF_APART, END_OF_APART)  # SUMS of value and pull
# and those of a chunk of classes: shares of cross-entropy and of the bonus, then log p or what is taken off
T, V, CHUNK_OF, END = range(SUMS + PAD, SUMS + PAD + 4 * CHUNK, CHUNK)


class Plan(NamedTuple):
    """What loops are told: sizes, addresses (0: not wanted, not given) and strides in elements."""

    n_rows: int
    n_inner: int
    n_classes: int
    tile: int  # rows
    logits: int
    outer_stride: int
    inner_stride: int
    target: int  # labels; 0 where probabilities are given
    ignore_index: int
    given: int  # probabilities
    given_outer_stride: int
    given_inner_stride: int
    weight: int
    bonus_weight: int
    uniform: int  # whether all classes but the label have the same share
    shares: int  # keep and off of cross-entropy, keep and off of the bonus
    terms: int  # `losses.summed_terms` of the loss; 0 where cross-entropy is all
    terms_apart: int  # `losses.terms`
    needs_log_p: int  # whether the former do
    params: int
    upstream: int
    upstream_stride: int
    grad_lse: int
    grad_lse_stride: int
    loss: int
    scores: int
    runner_up: int
    out: int
    out_outer_stride: int
    out_inner_stride: int
    in_place: int  # whether exponentials are kept in the rows of out


class Paid(NamedTuple):
    """The sums of t and of t (max - z) over all classes but the label."""

    total: float
    cost: float


def visit_loop(plan, first, last, work):
    """Compute rows ``first`` to ``last``: loss, scores; the gradient where it is wanted."""
    p = record(plan, Plan)
    column, index = vector(work, END, real), vector(work + END * real_size, 2 * ROWS, int32)
    exps = unrelated(work + END * real_size + 2 * ROWS * 4)
    pulls = unrelated(exps + (0 if p.in_place else p.tile * p.n_classes * real_size))
    if p.uniform:
        of = vector(p.shares, 4, real)
        for i in range(CHUNK):
            column[T + i], column[V + i] = of[1], of[3]
    row = first
    while row < last:
        n = min(p.tile, last - row)
        find_labels(p, row, n, index)
        sum_up(p, row, n, index, column, exps)
        find_gaps(n, column)
        set_apart(p, row, n, index, column, work)
        if p.terms:
            add_terms(p, row, n, index, column, work, exps, pulls)
        finish(p, row, n, index, column)
        if p.out:
            write(p, row, n, index, column, exps, pulls)
        row += n


# --- labels and shares ------------------------------------------------------------------------------------------------


def find_labels(p, row, n, index):
    """Fill the labels of a tile, of probabilities the largest, -1 where a row is ignored."""
    if p.target:
        load_labels(p, row, n, index)
    else:
        for i in range(n):
            index[LABEL + i] = largest_given(vector(given_at(p, row + i), p.n_classes, given_element))


def largest_given(given):
    """Return the first class that has the largest probability; 0 where one is NaN, and so is the row."""
    best, block = -INFINITY, 0
    for first in range(0, len(given), SEARCHED):
        part, here = given[first : first + SEARCHED], -INFINITY
        for i in range(len(part)):
            here = largest_of(here, real(widen_given(part[i])))
        block = where(here > best, first, block)
        best = largest_of(best, here)
    part = given[block : block + SEARCHED]
    found = int32(SEARCHED)
    for i in range(len(part)):
        k = where(real(widen_given(part[i])) == best, int32(i), int32(SEARCHED))
        found = where(k < found, k, found)
    return block + found if found < int32(SEARCHED) else 0


def given_at(p, row):
    return p.given + row_at(row, p.n_inner, p.given_outer_stride, p.given_inner_stride) * given_size


def share_of(p, row, k, label, number):
    """Return the share of one class, of cross-entropy (0) or of the bonus (1)."""
    numbers = vector(p.shares, 4, real)
    h = 1.0 if k == label else 0.0
    if p.given:
        h = real(widen_given(vector(given_at(p, row), p.n_classes, given_element)[k]))
    share = numbers[2 * number] * h + numbers[2 * number + 1]
    weight = p.bonus_weight if number else p.weight
    return share * vector(weight, p.n_classes, real)[k] if weight else share


def fill_shares(p, row, first, n, column, at, number):
    """Fill a chunk with the shares of its classes, right for all but the label; where they are all alike, it is."""
    if p.uniform:
        return
    numbers = vector(p.shares, 4, real)
    keep, off = numbers[2 * number], numbers[2 * number + 1]
    if p.given:
        given = vector(given_at(p, row) + first * given_size, n, given_element)
        for i in range(n):
            column[at + i] = keep * real(widen_given(given[i])) + off
    else:
        for i in range(n):
            column[at + i] = off
    weight = p.bonus_weight if number else p.weight
    if weight:
        of_class = vector(weight + first * real_size, n, real)
        for i in range(n):
            column[at + i] *= of_class[i]


# --- by classes -------------------------------------------------------------------------------------------------------


def sum_up(p, row, n, index, column, exps):
    """Fill the sums of a tile, and its exponentials."""
    for i in range(padded(n)):
        column[Z_TARGET + i] = column[MAX + i] = column[SUM_EXP2 + i] = column[SUM_EXP_Z + i] = 0.0
        column[SUM_EXP + i] = 1.0
        index[ARGMAX + i] = -1
    for i in range(n):
        label = index[LABEL + i]
        if label >= 0:
            z = vector(logits_at(p, row + i), p.n_classes, element)
            e = vector(exps_at(p, row, i, exps), p.n_classes, real)
            m, other = largest(z, label)
            known = m > -INFINITY
            s, s2, sz, sd = sums_of(z, e, label, other if known else label, m)
            one = 1.0 if known else 0.0  # exp(z - max) of the runner-up
            one = NAN if m == INFINITY else one
            paid = paid_of(p, row + i, z, label, m, sd, column)
            column[Z_TARGET + i] = widen(z[label])
            column[MAX + i] = m
            column[OTHERS + i] = s
            column[SUM_EXP + i] = s + one
            column[SUM_EXP2 + i] = s2 + one
            column[SUM_EXP_Z + i] = sz
            column[TOTAL + i] = paid.total
            column[COST + i] = paid.cost
            index[ARGMAX + i] = other if known else -1


def paid_of(p, row, z, label, m, sum_of_d, column):
    if p.uniform:  # not as a sum of many that rounds
        t = column[T]
        return Paid(real(p.n_classes - 1) * t, 0.0 if t == 0.0 else -t * sum_of_d)
    at = 0.0 if m == -INFINITY else m
    total = cost = 0.0
    for first in range(0, p.n_classes, CHUNK):
        part, skip = z[first : first + CHUNK], int32(label - first)
        fill_shares(p, row, first, len(part), column, T, 0)
        total_here = cost_here = 0.0
        for i in range(len(part)):
            t = where(int32(i) == skip, 0.0, column[T + i])
            total_here += t
            cost_here -= where(t == 0.0, 0.0, t * (widen(part[i]) - at))
        total += total_here
        cost += cost_here
    return Paid(total, cost)


def add_terms(p, row, n, index, column, work, exps, pulls):
    """Add up value and pull of all classes but label and runner-up; keep every pull."""
    for i in range(n):
        label, other = index[LABEL + i], index[ARGMAX + i]
        if label >= 0:
            other = other if other >= 0 else label
            e, pulled = exps_at(p, row, i, exps), pulls + i * p.n_classes * real_size
            column[SUMS] = column[SUMS + 1] = 0.0
            for first in range(0, p.n_classes, CHUNK):
                size_here = min(CHUNK, p.n_classes - first)
                fill_shares(p, row + i, first, size_here, column, V, 1)
                if p.needs_log_p:
                    fill_log_p(p, row + i, i, first, size_here, column)
                start = 0
                for stop in (min(label, other) - first, max(label, other) - first, size_here):
                    stop_here = min(max(stop, start), size_here)
                    if stop_here > start:
                        k = (first + start) * real_size
                        of = e + k, work + (SCALE + i) * real_size, work + (CHUNK_OF + start) * real_size
                        of_share = work + (V + start) * real_size
                        call8(
                            (p.terms, stop_here - start, *of, of_share, p.params, pulled + k, work + SUMS * real_size)
                        )
                    start = max(start, min(stop + 1, size_here))
            column[VALUE + i] = column[SUMS]
            column[PULL + i] = column[SUMS + 1]


def fill_log_p(p, row, i, first, n, column):
    z, m, log_scale = vector(logits_at(p, row) + first * size, n, element), column[MAX + i], column[LOG_SCALE + i]
    at = 0.0 if m == -INFINITY else m
    for k in range(n):
        d = widen(z[k]) - at
        d = 0.0 if d > 0.0 else d  # it never is; or log_scale - at would be taken out of the loop, and round
        column[CHUNK_OF + k] = d + log_scale


def write(p, row, n, index, column, exps, pulls):
    """Write the gradient of a tile."""
    for i in range(n):
        label, other = index[LABEL + i], index[ARGMAX + i]
        out = vector(out_at(p, row + i), p.n_classes, element)
        if label < 0:  # whatever an ignored row holds
            for k in range(p.n_classes):
                out[k] = narrow(0.0)
        else:
            e = exps_at(p, row, i, exps)
            factor, up = column[FACTOR + i], column[UPSTREAM + i]
            for first in range(0, p.n_classes, CHUNK):
                part = out[first : first + CHUNK]
                fill_shares(p, row + i, first, len(part), column, T, 0)
                if p.terms:
                    pulled = vector(pulls + (i * p.n_classes + first) * real_size, len(part), real)
                    for k in range(len(part)):
                        column[CHUNK_OF + k] = (column[T + k] + pulled[k]) * up
                else:
                    for k in range(len(part)):
                        column[CHUNK_OF + k] = column[T + k] * up
                if p.in_place:
                    for k in range(len(part)):
                        part[k] = narrow(widen(part[k]) * factor - column[CHUNK_OF + k])
                else:
                    kept = vector(e + first * real_size, len(part), real)
                    for k in range(len(part)):
                        part[k] = narrow(kept[k] * factor - column[CHUNK_OF + k])
            if other >= 0:
                out[other] = narrow(column[OF_OTHER + GRADIENT + i])
            out[label] = narrow(column[OF_LABEL + GRADIENT + i])


# --- by rows ----------------------------------------------------------------------------------------------------------


def set_apart(p, row, n, index, column, work):
    """Find the softmax of a tile's rows, and what label and runner-up add."""
    width = padded(n)
    for i in range(width):
        gap, rest = column[GAP + i], rest_at(column, i)
        softmax = softmax_of(gap, rest)
        column[SCALE + i], column[LOG_SCALE + i] = softmax.scale, softmax.log_scale
        column[OF_LABEL + GRADIENT + i] = gap
        column[OF_OTHER + GRADIENT + i] = gap_of_runner_up(column[Z_TARGET + i], rest, column[OTHERS + i])
    for i in range(n):
        label, other = index[LABEL + i], index[ARGMAX + i]
        if label >= 0:
            other = other if other >= 0 else label
            for number in range(2):
                column[OF_LABEL + SHARE + number * PAD + i] = share_of(p, row + i, label, label, number)
                column[OF_OTHER + SHARE + number * PAD + i] = share_of(p, row + i, other, label, number)
    for of in (OF_LABEL, OF_OTHER):
        for i in range(width):
            gap = column[of + GRADIENT + i]
            column[of + P + i], column[of + REST + i] = sigmoid(gap), rest_of(gap)
            column[of + LOG_P + i], column[of + LOG_REST + i] = log_sigmoid(gap), log_sigmoid(-gap)
            column[of + OWN_VALUE + i] = column[of + OWN_PULL + i] = 0.0
        if p.terms:
            at = work + of * real_size
            logs = at + LOG_P * real_size, at + LOG_REST * real_size
            to = at + OWN_VALUE * real_size, at + OWN_PULL * real_size
            of_class = at + P * real_size, at + REST * real_size, *logs, at + BONUS * real_size
            call9((p.terms_apart, width, *of_class, p.params, *to))


def finish(p, row, n, index, column):
    """Finish the rows of a tile: loss, scores, and what the gradient of a row is made of."""
    if p.out:
        load_upstream(p, row, n, column)
    for i in range(padded(n)):
        gap, known, up = column[GAP + i], index[ARGMAX + i] >= 0, column[UPSTREAM + i]
        softmax = Softmax(column[MAX + i], column[SCALE + i], column[LOG_SCALE + i])
        paid = Paid(column[TOTAL + i], column[COST + i])
        label = apart_at(column, OF_LABEL, i)
        other = of_runner_up(known, apart_at(column, OF_OTHER, i), label, softmax)
        other = Apart(other.p, other.rest, other.log_p, where(known, other.share, 0.0), other.value, other.pull)
        value, pull = (column[VALUE + i], column[PULL + i]) if p.terms else (0.0, 0.0)
        missing = where(gap != gap, NAN, 0.0)
        loss = cross_entropy_of(paid, softmax.log_scale) + cross_entropy_apart(label)
        column[VALUE + i] = loss + value + label.value + other.value + missing
        mass = paid.total - other.share + pull
        whole = mass + (label.pull + label.share) + (other.pull + other.share) + missing
        column[FACTOR + i] = softmax.scale * whole * up
        column[OF_LABEL + GRADIENT + i] = gradient_apart(label, other, mass) * up + missing
        column[OF_OTHER + GRADIENT + i] = gradient_apart(other, label, mass) * up + missing
    if p.loss:
        out = vector(p.loss + row * real_size, n, real)
        for i in range(n):
            out[i] = 0.0 if index[LABEL + i] < 0 else column[VALUE + i]
    if p.scores:
        score(p, row, n, index, column)


def rest_at(column, i):
    return RestStats(column[MAX + i], 0, column[SUM_EXP + i], column[SUM_EXP2 + i], column[SUM_EXP_Z + i])


def apart_at(column, of, i):
    """Return the label of a row or its runner-up."""
    own = column[of + OWN_VALUE + i], column[of + OWN_PULL + i]
    return Apart(column[of + P + i], column[of + REST + i], column[of + LOG_P + i], column[of + SHARE + i], *own)


INFINITY, NAN = float("inf"), float("nan")
