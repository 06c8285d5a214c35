"""A tile of rows: what is kept of each in columns, and how rows are finished from it.

Rows are finished in whole vectors, `PAD` at a time, so that a row's bits do not tell its place.
"""

from __future__ import annotations

from ..formulas.rest import RestStats
from ..formulas.scores import gap_of, lse_of, pulls, pulls_of_lse, scores_of
from .names import call5, float32, int32, int64, numbers, real, real_size, vector

# bound: whether the slope of a logit is one number; whether there is more than loss and gradient to make
SCALED = MORE = False

ROWS = 512  # of a tile at most
PAD = 64
# where the columns of a tile begin in its memory
Z_TARGET, MAX, SUM_EXP, SUM_EXP2, SUM_EXP_Z, GAP, VALUE, SLOPE, SCALE, AT_TARGET, UPSTREAM, GRAD_LSE = range(
    0, 12 * ROWS, ROWS
)
S0, S1, S2, S3, S4, END = range(12 * ROWS, 18 * ROWS, ROWS)
LABEL, ARGMAX = 0, ROWS  # of its int32 columns


def padded(n):
    return (n + PAD - 1) // PAD * PAD


def load_labels(p, row, n, index):
    """Copy the labels of a tile, -1 where a row is ignored."""
    target = vector(p.target + row * 8, n, int64)
    for i in range(n):
        index[LABEL + i] = -1 if target[i] == p.ignore_index else target[i]
    for i in range(n, padded(n)):
        index[LABEL + i] = -1


def load_upstream(p, row, n, column):
    up = vector(p.upstream + row * p.upstream_stride * real_size, (n - 1) * p.upstream_stride + 1, real)
    for i in range(n):
        column[UPSTREAM + i] = up[i * p.upstream_stride]
    if MORE and p.grad_lse:
        of_lse = vector(p.grad_lse + row * p.grad_lse_stride * real_size, (n - 1) * p.grad_lse_stride + 1, real)
        for i in range(n):
            column[GRAD_LSE + i] = of_lse[i * p.grad_lse_stride]


def options_of(p):
    """Return scale and cap of the logits, and what times the logsumexp of a row is the loss's gradient for it."""
    return numbers(p.options, 3, real)


def finish(p, row, n, index, column, address):
    """Finish the rows of a tile from their sums: loss, scores, and what the gradient of a row is made of."""
    find_gaps(n, column)
    if p.column:
        pay(p, padded(n), address)
    if p.loss:
        loss = vector(p.loss + row * real_size, n, real)
        for i in range(n):
            loss[i] = 0.0 if index[LABEL + i] < 0 else column[VALUE + i]
    if MORE and p.lse:
        find_lse(p, row, n, index, column)
    if p.saved:
        for i in range(n):
            store(p.saved, row + i, column[GAP + i])
            store(p.saved, row + i + p.n_rows, column[MAX + i])
            store(p.saved, row + i + 2 * p.n_rows, column[SUM_EXP + i])
    if MORE and p.scores:
        score(p, row, n, index, column)


def find_gaps(n, column):
    for i in range(padded(n)):
        rest = RestStats(column[MAX + i], 0, column[SUM_EXP + i], column[SUM_EXP2 + i], column[SUM_EXP_Z + i])
        column[GAP + i] = gap_of(column[Z_TARGET + i], rest)


def find_lse(p, row, n, index, column):
    """Store the logsumexps of a tile, and find their upstream gradients: times those given, where any are."""
    lse, twice = vector(p.lse + row * real_size, n, real), options_of(p)[2]
    if not p.grad_lse:
        for i in range(padded(n)):
            column[GRAD_LSE + i] = 1.0
    for i in range(padded(n)):
        rest = RestStats(column[MAX + i], 0, column[SUM_EXP + i], column[SUM_EXP2 + i], column[SUM_EXP_Z + i])
        column[S0 + i] = lse_of(column[Z_TARGET + i], column[GAP + i], rest)
        column[GRAD_LSE + i] *= twice * column[S0 + i]
    for i in range(n):
        lse[i] = 0.0 if index[LABEL + i] < 0 else column[S0 + i]


def pay(p, width, address):
    at = address + GAP * real_size, p.params, address + VALUE * real_size, address + SLOPE * real_size
    call5((p.column, width, *at))


def store(address, i, x):
    vector(address + i * real_size, 1, real)[0] = x


def score(p, row, n, index, column):
    for i in range(padded(n)):
        rest = RestStats(column[MAX + i], 0, column[SUM_EXP + i], column[SUM_EXP2 + i], column[SUM_EXP_Z + i])
        a, b, c, d, e = scores_of(column[Z_TARGET + i], column[GAP + i], rest)
        column[S0 + i] = a
        column[S1 + i] = b
        column[S2 + i] = c
        column[S3 + i] = d
        column[S4 + i] = e
    for j in range(5):
        out = vector(p.scores + (j * p.n_rows + row) * 4, n, float32)
        for i in range(n):
            out[i] = NAN if index[LABEL + i] < 0 else column[S0 + j * ROWS + i]
    runner_up = vector(p.runner_up + row * 4, n, int32)
    for i in range(n):
        gap = column[GAP + i]
        known = (gap == gap) & (column[MAX + i] > -INFINITY) & (index[LABEL + i] >= 0)
        runner_up[i] = index[ARGMAX + i] if known else -1


def pull(p, n, column):
    """Turn slopes into the gradient's factor of exp(z - max) and its number at the label; of probabilities p itself."""
    for i in range(padded(n)):
        scale, at_target = pulls(column[SLOPE + i] * column[UPSTREAM + i], column[SUM_EXP + i])
        column[SCALE + i] = scale
        column[AT_TARGET + i] = column[VALUE + i] if p.softmax else at_target
    if MORE and p.lse | p.grad_lse:
        for i in range(padded(n)):
            scale, at_target = pulls_of_lse(column[GAP + i], column[GRAD_LSE + i], column[SUM_EXP + i])
            column[SCALE + i] += scale
            column[AT_TARGET + i] += at_target
    if SCALED and not p.softmax:
        slope = options_of(p)[0]
        for i in range(padded(n)):
            column[SCALE + i] *= slope
            column[AT_TARGET + i] *= slope


INFINITY, NAN = float("inf"), float("nan")
