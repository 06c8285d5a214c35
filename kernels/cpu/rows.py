"""Rows one after another, by vectors of classes, which lie side by side."""

from __future__ import annotations

from .names import element, exp_below, largest_of, narrow, read, real, real_size, size, vector, widen
from .tile import ARGMAX, AT_TARGET, LABEL, MAX, SCALE, SUM_EXP, SUM_EXP2, SUM_EXP_Z, Z_TARGET, options_of, padded

OF_LOGIT = SLOPE_OF_LOGIT = source = None  # of the options of logits, bound by what compiles the loop
BLOCK = 1024  # classes added up on their own, so that sums of many lose no digits


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
            m = largest(z, label)
            if p.scores:
                index[ARGMAX + i] = place_of(z, m, label)
            column[Z_TARGET + i] = read(z[label])
            s, s2, sz = sums_of(z, e, label, m)
            column[MAX + i] = m
            column[SUM_EXP + i] = s
            column[SUM_EXP2 + i] = s2
            column[SUM_EXP_Z + i] = sz


def largest(z, label):
    """Return the largest logit but the label's, NaN where there is one."""
    m = -INFINITY
    for k in range(label):
        m = largest_of(m, read(z[k]))
    for k in range(label + 1, len(z)):
        m = largest_of(m, read(z[k]))
    return m


def place_of(z, m, label):
    """Return the first class but the label whose logit is ``m``, or -1."""
    for first in range(0, len(z), 128):
        last = min(first + 128, len(z))
        found = 0
        for k in range(first, last):
            found |= read(z[k]) == m
        if found:
            for k in range(first, last):
                if read(z[k]) == m and k != label:
                    return k
    return -1


def sums_of(z, e, label, m):
    """Return sum_exp, sum_exp2 and sum_exp_z; keep the exponentials in ``e``."""
    at = 0.0 if m == -INFINITY else m
    s = s2 = sz = 0.0
    for first in range(0, len(z), BLOCK):
        a = a2 = az = 0.0
        for k in range(first, min(first + BLOCK, len(z))):
            d = read(z[k]) - at
            d = -1000.0 if (d < -1000.0) | (k == label) else d  # 0 * -inf would be NaN
            x = exp_below(d)
            e[k] = x
            a += x
            a2 += x * x
            az += x * d
        s += a
        s2 += a2
        sz += az
    return s, s2, sz


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
            e, scale = vector(exps_at(p, row, i, exps), p.n_classes, real), column[SCALE + i]
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
            raw = vector(logits_at(p, row + i), p.n_classes, element)
            e, scale = vector(exps_at(p, row, i, exps), p.n_classes, real), column[SCALE + i]
            for k in range(p.n_classes):
                out[k] = narrow(e[k] * scale * SLOPE_OF_LOGIT(widen(raw[k]), options))
            out[label] = narrow(column[AT_TARGET + i] * SLOPE_OF_LOGIT(widen(raw[label]), options))


INFINITY = float("inf")
