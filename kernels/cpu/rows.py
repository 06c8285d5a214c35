"""Rows one after another, by vectors of classes, which lie side by side."""

from __future__ import annotations

from .names import (
    bounded,
    element,
    exp_below,
    exp_of_bounded,
    int32,
    largest_of,
    narrow,
    read,
    real,
    real_size,
    size,
    vector,
    where,
    widen,
)
from .tile import ARGMAX, AT_TARGET, LABEL, MAX, SCALE, SUM_EXP, SUM_EXP2, SUM_EXP_Z, Z_TARGET, options_of, padded

OF_LOGIT = SLOPE_OF_LOGIT = CHANGED = source = None  # of the options of logits, bound by what compiles the loop
BLOCK = 1024  # classes added up on their own, so that sums of many lose no digits
SEARCHED = 128  # classes of which the largest is found at once


def rows_of_tile(p, row, last):
    return min(p.tile, last - row)


def row_at(row, n_inner, outer_stride, inner_stride):
    """Return how many elements lie before a row."""
    return (row // n_inner) * outer_stride + (row % n_inner) * inner_stride


def logits_at(p, row):
    return p.logits + row_at(row, p.n_inner, p.outer_stride, p.inner_stride) * size


def out_at(p, row):
    return p.out + row_at(row, p.n_inner, p.out_outer_stride, p.out_inner_stride) * size


def exps_at(p, row, i, exps):
    """Return where the exponentials of a tile's ``i``-th row are kept: in the gradient's rows, or apart."""
    return out_at(p, row + i) if p.in_place else exps + i * p.n_classes * real_size


def as_they_lie(raw, e, options):
    return raw


def as_it_is(z):
    return z


def changed(raw, e, options):
    """Write z where a row's exponentials will be."""
    for k in range(len(raw)):
        e[k] = OF_LOGIT(widen(raw[k]), options)
    return e


def sum_up(p, row, n, index, column, exps):
    """Fill the columns of a tile, and its exponentials."""
    for i in range(padded(n)):
        column[Z_TARGET + i] = column[MAX + i] = column[SUM_EXP2 + i] = column[SUM_EXP_Z + i] = 0.0
        column[SUM_EXP + i] = 1.0
        index[ARGMAX + i] = -1
    for i in range(n):
        label = index[LABEL + i]
        if label >= 0:
            raw = vector(logits_at(p, row + i), p.n_classes, element)
            e = vector(exps_at(p, row, i, exps), p.n_classes, real)
            z = source(raw, e, options_of(p))
            m, index[ARGMAX + i] = largest(z, label)
            column[Z_TARGET + i] = read(z[label])
            s, s2, sz, _ = sums_of(z, e, label, label, m)
            column[MAX + i] = m
            column[SUM_EXP + i] = s
            column[SUM_EXP2 + i] = s2
            column[SUM_EXP_Z + i] = sz


def largest(z, label):
    """Return the largest logit but the label's, NaN where there is one, and the first class that has it, or -1."""
    m, block = -INFINITY, 0
    for first in range(0, len(z), SEARCHED):
        last = min(first + SEARCHED, len(z))
        here = largest_of(largest_in(z[first : min(label, last)]), largest_in(z[max(label + 1, first) : last]))
        block = where(here > m, first, block)
        m = largest_of(m, here)
    part, skip = z[block : block + SEARCHED], int32(label - block)
    found = nobody = int32(SEARCHED)
    for i in range(len(part)):
        k = int32(i)
        k = where((read(part[i]) == m) & (k != skip), k, nobody)
        found = where(k < found, k, found)
    return m, block + found if found < nobody else -1


def largest_in(z):
    m = -INFINITY
    for i in range(len(z)):
        m = largest_of(m, read(z[i]))
    return m


def sums_of(z, e, label, other, m):
    """Return sum_exp, sum_exp2, sum_exp_z of all classes but two, and the sum of z - m of all but the label.

    The exponentials are kept in ``e``.
    """
    at = 0.0 if m == -INFINITY else m
    s = s2 = sz = sd = 0.0
    for first in range(0, len(z), BLOCK):
        part = z[first : first + BLOCK]
        if CHANGED:  # z lies where they are kept: a second array at its address would be taken for an overlap
            out = part
        else:
            out = e[first : first + BLOCK]
        skip, skip_other = int32(label - first), int32(other - first)
        a = a2 = az = ad = 0.0
        for i in range(len(part)):
            k, d = int32(i), read(part[i]) - at
            ad += where(k == skip, 0.0, d)
            d = bounded(where((k == skip) | (k == skip_other), -1000.0, d))  # 0 * -inf would be NaN
            x = exp_of_bounded(d)
            out[i] = x
            a += x
            a2 += x * x
            az += x * d
        s += a
        s2 += a2
        sz += az
        sd += ad
    return s, s2, sz, sd


def exps_again(p, row, n, index, column, exps):
    """Fill the exponentials of a tile from the maxima of its rows."""
    for i in range(n):
        if index[LABEL + i] >= 0:
            raw = vector(logits_at(p, row + i), p.n_classes, element)
            e = vector(exps_at(p, row, i, exps), p.n_classes, real)
            z = source(raw, e, options_of(p))
            m = column[MAX + i]
            at = 0.0 if m == -INFINITY else m
            for k in range(p.n_classes):
                e[k] = exp_below(read(z[k]) - at)


def write(p, row, n, index, column, exps):
    """Write rows that are multiples of their exponentials, but for the label's entry."""
    for i in range(n):
        out, label = vector(out_at(p, row + i), p.n_classes, element), index[LABEL + i]
        if label < 0:  # whatever an ignored row holds
            for k in range(p.n_classes):
                out[k] = narrow(0.0)
        else:
            scale = column[SCALE + i]
            if p.in_place:
                for k in range(p.n_classes):
                    out[k] = narrow(widen(out[k]) * scale)
            else:
                e = vector(exps_at(p, row, i, exps), p.n_classes, real)
                for k in range(p.n_classes):
                    out[k] = narrow(e[k] * scale)
            out[label] = narrow(column[AT_TARGET + i])


def write_capped(p, row, n, index, column, exps):
    """As `write`, every entry times the slope of its logit; probabilities have none."""
    if p.softmax:
        write(p, row, n, index, column, exps)
        return
    options = options_of(p)
    for i in range(n):
        out, label = vector(out_at(p, row + i), p.n_classes, element), index[LABEL + i]
        if label < 0:
            for k in range(p.n_classes):
                out[k] = narrow(0.0)
        else:
            raw = vector(logits_at(p, row + i), p.n_classes, element)  # which the gradient may take the place of
            scale = column[SCALE + i]
            at_target = column[AT_TARGET + i] * SLOPE_OF_LOGIT(widen(raw[label]), options)
            if p.in_place:
                for k in range(p.n_classes):
                    out[k] = narrow(widen(out[k]) * scale * SLOPE_OF_LOGIT(widen(raw[k]), options))
            else:
                e = vector(exps_at(p, row, i, exps), p.n_classes, real)
                for k in range(p.n_classes):
                    out[k] = narrow(e[k] * scale * SLOPE_OF_LOGIT(widen(raw[k]), options))
            out[label] = narrow(at_target)


INFINITY = float("inf")
