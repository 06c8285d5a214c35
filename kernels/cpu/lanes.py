"""Rows side by side, by vectors of rows: where classes are few, or lie apart as in [N, C, d1, ...]."""

from __future__ import annotations

from .names import element, exp_below, int32, narrow, real, real_size, size, transpose, vector, widen
from .rows import row_at
from .tile import (
    ARGMAX,
    AT_TARGET,
    LABEL,
    MAX,
    SCALE,
    SUM_EXP,
    SUM_EXP2,
    SUM_EXP_Z,
    Z_TARGET,
    options_of,
    padded,
)
from .tile import GAP as PART
from .tile import SLOPE as PART_Z
from .tile import VALUE as PART2

BETWEEN = 16  # numbers between classes, or those of a row would share few lines of the cache
SQUARE = 8  # rows and classes that are transposed by vectors
BLOCK = 32  # classes added up on their own, so that sums of many lose no digits

OF_LOGIT = SLOPE_OF_LOGIT = SCALED = source = None  # of the options of logits, bound by what compiles the loop


def rows_of_tile(p, row, last):
    n = min(p.tile, last - row)
    return min(n, p.n_inner - row % p.n_inner) if p.n_inner >= p.tile else n


def class_at(p, k, exps):
    return exps + k * (p.tile + BETWEEN) * real_size


def rows_in_squares(p, n, class_stride):
    """Return how many rows of a tile can be transposed by vectors: whole squares of numbers side by side."""
    side_by_side = (size == real_size) & (p.n_inner == 1) & (class_stride == 1) & (p.n_classes >= SQUARE)
    return n // SQUARE * SQUARE if side_by_side else 0


def as_they_lie(p, n, exps):
    return


def changed(p, n, exps):
    """Turn raw logits into z; keep the slope of every one behind them, unless it is one number."""
    options = options_of(p)
    for k in range(p.n_classes):
        z, slope = vector(class_at(p, k, exps), p.tile, real), vector(class_at(p, p.n_classes + k, exps), p.tile, real)
        for i in range(padded(n)):
            raw = z[i]
            if not SCALED:
                slope[i] = SLOPE_OF_LOGIT(raw, options)
            z[i] = OF_LOGIT(raw, options)


def load(p, row, n, exps):
    """Copy a tile of rows to [C, tile], 0 past its last row."""
    if p.inner_stride == 1 and row % p.n_inner + n <= p.n_inner:
        at = row_at(row, p.n_inner, p.outer_stride, p.inner_stride)
        for k in range(p.n_classes):
            z, out = (
                vector(p.logits + (at + k * p.class_stride) * size, n, element),
                vector(class_at(p, k, exps), p.tile, real),
            )
            for i in range(n):
                out[i] = widen(z[i])
    else:
        whole = rows_in_squares(p, n, p.class_stride)
        for first in range(0, p.n_classes, SQUARE):
            k = min(first, p.n_classes - SQUARE)
            for i in range(0, whole, SQUARE):
                at = (row + i) * p.outer_stride + k
                transpose(
                    p.logits + at * size,
                    p.outer_stride * size,
                    class_at(p, k, exps) + i * real_size,
                    class_at(p, 1, 0),
                    real,
                )
        everything, lane = vector(exps, p.n_classes * (p.tile + BETWEEN), real), p.tile + BETWEEN
        outer, inner = (row + whole) // p.n_inner, (row + whole) % p.n_inner
        for i in range(whole, n):
            at = outer * p.outer_stride + inner * p.inner_stride
            z = vector(p.logits + at * size, (p.n_classes - 1) * p.class_stride + 1, element)
            for k in range(p.n_classes):
                everything[k * lane + i] = widen(z[k * p.class_stride])
            inner += 1
            if inner == p.n_inner:  # not by a division a row
                outer, inner = outer + 1, 0
    for k in range(p.n_classes):
        out = vector(class_at(p, k, exps), p.tile, real)
        for i in range(n, padded(n)):
            out[i] = 0.0
    source(p, n, exps)


def sum_up(p, row, n, index, column, exps):
    """Fill the columns of a tile, and its exponentials."""
    load(p, row, n, exps)
    width = padded(n)
    for i in range(width):
        column[MAX + i] = -INFINITY
        column[Z_TARGET + i] = column[SUM_EXP + i] = column[SUM_EXP2 + i] = column[SUM_EXP_Z + i] = 0.0
        index[ARGMAX + i] = -1
    for k in range(p.n_classes):
        z, c = vector(class_at(p, k, exps), p.tile, real), int32(k)
        for i in range(width):
            x, mine, m = z[i], index[LABEL + i] == c, column[MAX + i]
            column[Z_TARGET + i] = x if mine else column[Z_TARGET + i]
            x = -INFINITY if mine else x
            index[ARGMAX + i] = c if x > m else index[ARGMAX + i]
            column[MAX + i] = x if x > m else m
    for first in range(0, p.n_classes, BLOCK):
        for i in range(width):
            column[PART + i] = column[PART2 + i] = column[PART_Z + i] = 0.0
        for k in range(first, min(first + BLOCK, p.n_classes)):
            z, c = vector(class_at(p, k, exps), p.tile, real), int32(k)
            for i in range(width):
                m = column[MAX + i]
                d = z[i] - (0.0 if m == -INFINITY else m)
                d = -1000.0 if (d < -1000.0) | (index[LABEL + i] == c) else d
                x = exp_below(d)
                z[i] = x
                column[PART + i] += x
                column[PART2 + i] += x * x
                column[PART_Z + i] += x * d
        for i in range(width):
            column[SUM_EXP + i] += column[PART + i]
            column[SUM_EXP2 + i] += column[PART2 + i]
            column[SUM_EXP_Z + i] += column[PART_Z + i]


def exps_again(p, row, n, index, column, exps):
    """Fill the exponentials of a tile from the maxima of its rows."""
    load(p, row, n, exps)
    for k in range(p.n_classes):
        z = vector(class_at(p, k, exps), p.tile, real)
        for i in range(padded(n)):
            m = column[MAX + i]
            z[i] = exp_below(z[i] - (0.0 if m == -INFINITY else m))


def write(p, row, n, index, column, exps):
    """Write rows that are multiples of their exponentials, but for the label's entry."""
    if p.out_inner_stride == 1 and row % p.n_inner + n <= p.n_inner:
        at = row_at(row, p.n_inner, p.out_outer_stride, p.out_inner_stride)
        for k in range(p.n_classes):
            out, e, c = (
                vector(p.out + (at + k * p.out_class_stride) * size, n, element),
                vector(class_at(p, k, exps), p.tile, real),
                int32(k),
            )
            for i in range(n):
                x = column[AT_TARGET + i] if index[LABEL + i] == c else e[i] * column[SCALE + i]
                out[i] = narrow(0.0 if index[LABEL + i] < 0 else x)
    else:
        for k in range(p.n_classes):
            e, c = vector(class_at(p, k, exps), p.tile, real), int32(k)
            for i in range(n):
                x = column[AT_TARGET + i] if index[LABEL + i] == c else e[i] * column[SCALE + i]
                e[i] = 0.0 if index[LABEL + i] < 0 else x
        whole = rows_in_squares(p, n, p.out_class_stride)
        for first in range(0, p.n_classes, SQUARE):
            k = min(first, p.n_classes - SQUARE)
            for i in range(0, whole, SQUARE):
                at = (row + i) * p.out_outer_stride + k
                transpose(
                    class_at(p, k, exps) + i * real_size,
                    class_at(p, 1, 0),
                    p.out + at * size,
                    p.out_outer_stride * size,
                    real,
                )
        everything, lane = vector(exps, p.n_classes * (p.tile + BETWEEN), real), p.tile + BETWEEN
        outer, inner = (row + whole) // p.n_inner, (row + whole) % p.n_inner
        for i in range(whole, n):
            at = outer * p.out_outer_stride + inner * p.out_inner_stride
            out = vector(p.out + at * size, (p.n_classes - 1) * p.out_class_stride + 1, element)
            for k in range(p.n_classes):
                out[k * p.out_class_stride] = narrow(everything[k * lane + i])
            inner += 1
            if inner == p.n_inner:
                outer, inner = outer + 1, 0


def write_capped(p, row, n, index, column, exps):
    """As `write`, every entry times the slope of its logit; probabilities have none."""
    if not p.softmax:
        for k in range(p.n_classes):
            e, c = vector(class_at(p, k, exps), p.tile, real), int32(k)
            slope = vector(class_at(p, p.n_classes + k, exps), p.tile, real)
            for i in range(padded(n)):
                e[i] *= slope[i]
                at_target = column[AT_TARGET + i]
                column[AT_TARGET + i] = at_target * slope[i] if index[LABEL + i] == c else at_target
    write(p, row, n, index, column, exps)


INFINITY = float("inf")
