"""Soft targets on a CPU: what `gpu.soft` computes, a row at a time, by chunks of classes that stay in the first cache.

    L = sum t_k (lse - z_k) + sum value_k        dL/dz_j = p_j M - (t_j + pull_j)        M = sum (t_k + pull_k)

Label and runner-up stand apart. Three loops over a row: its largest logit; exponentials and the sums of t; what each
class adds, which cross-entropy alone does without; and a fourth for the gradient. Logits whose classes lie apart are
copied first. Traffic a row of V logits of b bytes and V probabilities of c bytes: reads V (b + c), writes V b.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas.rest import RestStats
from ..formulas.scalar import log_sigmoid, sigmoid
from ..formulas.scores import gap_of, scores_of
from ..formulas.soft_targets import (
    Apart,
    cross_entropy_apart,
    cross_entropy_of,
    gap_of_runner_up,
    gradient_apart,
    of_runner_up,
    rest_of,
    softmax_of,
)
from ..results import SoftResult, empty_soft, fill_ignored
from . import stored, threads
from .elements import NAMES, real_of, record_of
from .losses import terms_of
from .names import (
    call9,
    element,
    exp_below,
    float32,
    given_element,
    given_size,
    int32,
    int64,
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
from .rows import largest, place_of, row_at

__all__ = ["forward", "backward", "visit"]

CHUNK = 256  # classes
T, V, P, REST, LOG_P, VALUE, PULL, SHARE, LOG_REST, END = range(
    0, 10 * CHUNK, CHUNK
)  # where the columns of a chunk begin
INFINITY, NAN = float("inf"), float("nan")


class Plan(NamedTuple):
    """What loops are told: sizes, addresses (0: not wanted, not given) and strides in elements."""

    n_rows: int
    n_inner: int
    n_classes: int
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
    terms: int  # `losses.terms` of a class with p <= 1/2; 0 where cross-entropy is all
    terms_apart: int  # of any class
    needs_log_p: int  # whether the former do
    params: int
    upstream: int
    upstream_stride: int
    loss: int
    scores: int
    runner_up: int
    out: int
    out_outer_stride: int
    out_inner_stride: int
    in_place: int


class Paid(NamedTuple):
    """The sums of t and of t (max - z) over all classes but the label."""

    total: float
    cost: float


def visit_loop(plan, first, last, work):
    """Compute rows ``first`` to ``last``: loss, scores; the gradient where it is wanted."""
    p = record(plan, Plan)
    chunk = vector(work, END, real)
    if p.uniform:
        of = vector(p.shares, 4, real)
        for i in range(CHUNK):
            chunk[T + i], chunk[V + i] = of[1], of[3]
    pulls = unrelated(work + END * real_size)
    for row in range(first, last):
        label = label_of(p, row)
        e = unrelated(pulls + p.n_classes * real_size)
        if p.in_place:
            e = p.out + row_at(row, p.n_inner, p.out_outer_stride, p.out_inner_stride) * size
        if label < 0:
            ignore(p, row)
        else:
            one_row(p, row, label, chunk, work, pulls, e)


def label_of(p, row):
    """Return the label of a row, of probabilities the largest, -1 where it is ignored."""
    if p.target:
        y = vector(p.target + row * 8, 1, int64)[0]
        return -1 if y == p.ignore_index else y
    given = vector(given_at(p, row), p.n_classes, given_element)
    best = -INFINITY
    for k in range(p.n_classes):
        best = largest_of(best, widen_given(given[k]))
    for first in range(0, p.n_classes, CHUNK):
        last = min(first + CHUNK, p.n_classes)
        found = 0
        for k in range(first, last):
            found |= widen_given(given[k]) == best
        if found:
            for k in range(first, last):
                if widen_given(given[k]) == best:
                    return k
    return 0  # all are NaN, and so is the row


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


def fill_shares(p, row, first, n, chunk, at, number):
    """Fill a chunk with the shares of its classes, right for all but the label; where they are all alike, it is."""
    if p.uniform:
        return
    numbers = vector(p.shares, 4, real)
    keep, off = numbers[2 * number], numbers[2 * number + 1]
    if p.given:
        given = vector(given_at(p, row) + first * given_size, n, given_element)
        for i in range(n):
            chunk[at + i] = keep * widen_given(given[i]) + off
    else:
        for i in range(n):
            chunk[at + i] = off
    weight = p.bonus_weight if number else p.weight
    if weight:
        of_class = vector(weight + first * real_size, n, real)
        for i in range(n):
            chunk[at + i] *= of_class[i]


def one_row(p, row, label, chunk, work, pulls, e):
    at = p.logits + row_at(row, p.n_inner, p.outer_stride, p.inner_stride) * size
    z = vector(at, p.n_classes, element)
    m = largest(z, label)
    known = (m > -INFINITY) & (p.n_classes > 1)
    runner_up = place_of(z, m, label) if known else -1
    paid, others, s2, sz = sums_of(p, row, at, e, label, runner_up, m, chunk)
    z_target = widen(z[label])
    one = 1.0 if known else 0.0  # exp(z - max) of the runner-up
    one = NAN if m == INFINITY else one
    rest = RestStats(m, 0, others + one, s2 + one, sz)
    gap = gap_of(z_target, rest)
    softmax = softmax_of(gap, rest)
    value, pull = 0.0, 0.0
    if p.terms:
        value, pull = terms_of_others(p, row, at, e, label, runner_up, m, softmax, chunk, work, pulls)
    of_label = apart(p, row, label, label, gap, chunk, work)
    other = runner_up if known else label
    of_other = apart(p, row, other, label, gap_of_runner_up(z_target, rest, others), chunk, work)
    of_other = of_runner_up(known, of_other, of_label, softmax)
    loss = cross_entropy_of(paid, softmax.log_scale) + cross_entropy_apart(of_label)
    loss += value + of_label.value + of_other.value
    share = of_other.share if known else 0.0
    mass = paid.total - share + pull
    missing = NAN if gap != gap else 0.0
    if p.loss:
        vector(p.loss + row * real_size, 1, real)[0] = loss + missing
    if p.scores:
        store_scores(p, row, z_target, gap, rest, runner_up)
    if p.out:
        up = vector(p.upstream + row * p.upstream_stride * real_size, 1, real)[0]
        of_other = Apart(of_other.p, of_other.rest, of_other.log_p, share, of_other.value, of_other.pull)
        whole = mass + (of_label.pull + of_label.share) + (of_other.pull + of_other.share) + missing
        at_label, at_other = gradient_apart(of_label, of_other, mass), gradient_apart(of_other, of_label, mass)
        out = p.out + row_at(row, p.n_inner, p.out_outer_stride, p.out_inner_stride) * size
        write(p, row, e, pulls, softmax.scale * whole * up, up, chunk, out)
        g = vector(out, p.n_classes, element)
        if known:
            g[runner_up] = narrow(at_other * up + missing)
        g[label] = narrow(at_label * up + missing)


def sums_of(p, row, logits, exps, label, runner_up, m, chunk):
    """Return Paid, and sum_exp, sum_exp2 and sum_exp_z of all classes but label and runner-up."""
    at = 0.0 if m == -INFINITY else m
    s = s2 = sz = total = cost = 0.0
    for first in range(0, p.n_classes, CHUNK):
        n = min(CHUNK, p.n_classes - first)
        fill_shares(p, row, first, n, chunk, T, 0)
        # counted from the chunk: an index that the compiler takes for negative keeps a loop from becoming vector code
        z, e = vector(logits + first * size, n, element), vector(exps + first * real_size, n, real)
        label_here, runner_up_here = label - first, runner_up - first
        a = a2 = az = total_here = cost_here = 0.0
        for i in range(n):
            d = widen(z[i]) - at
            t = chunk[T + i]
            t = 0.0 if i == label_here else t
            total_here += t
            cost_here -= where(t == 0.0, 0.0, t * d)
            d = -1000.0 if (d < -1000.0) | (i == label_here) | (i == runner_up_here) else d
            x = exp_below(d)
            e[i] = x
            a += x
            a2 += x * x
            az += x * d
        s += a
        s2 += a2
        sz += az
        total += total_here
        cost += cost_here
    if p.uniform:  # not as a sum of many that rounds
        total = real(p.n_classes - 1) * chunk[T]
    return Paid(total, cost), s, s2, sz


def terms_of_others(p, row, logits, exps, label, runner_up, m, softmax, chunk, work, pulls):
    """Return the sums of value and pull of all classes but label and runner-up; keep every pull."""
    at = 0.0 if m == -INFINITY else m
    value = pull = 0.0
    for first in range(0, p.n_classes, CHUNK):
        n = min(CHUNK, p.n_classes - first)
        fill_shares(p, row, first, n, chunk, V, 1)
        e, pulled = vector(exps + first * real_size, n, real), vector(pulls + first * real_size, n, real)
        for i in range(n):
            x = e[i] * softmax.scale
            chunk[P + i] = x
            chunk[REST + i] = 1.0 - x
        if p.needs_log_p:
            z = vector(logits + first * size, n, element)
            for i in range(n):
                d = widen(z[i]) - at
                d = 0.0 if d > 0.0 else d  # it never is; or log_scale - at would be taken out of the loop, and round
                chunk[LOG_P + i] = d + softmax.log_scale
        at_chunk = work + P * real_size, work + REST * real_size, work + LOG_P * real_size, work + LOG_REST * real_size
        to = work + VALUE * real_size, pulls + first * real_size
        call9((p.terms, n, *at_chunk, work + V * real_size, p.params, *to))
        if (label >= first) & (label < first + n):
            chunk[VALUE + label - first] = pulled[label - first] = 0.0
        if (runner_up >= first) & (runner_up < first + n):
            chunk[VALUE + runner_up - first] = pulled[runner_up - first] = 0.0
        here = pull_here = 0.0
        for i in range(n):
            here += chunk[VALUE + i]
            pull_here += pulled[i]
        value += here
        pull += pull_here
    return value, pull


def apart(p, row, k, label, gap, chunk, work):
    """Return the class whose logit is ``gap`` above the logsumexp of all others."""
    chunk[P], chunk[REST] = sigmoid(gap), rest_of(gap)
    chunk[LOG_P], chunk[LOG_REST] = log_sigmoid(gap), log_sigmoid(-gap)
    chunk[VALUE] = chunk[PULL] = 0.0
    if p.terms:
        chunk[SHARE] = share_of(p, row, k, label, 1)
        at_chunk = work + P * real_size, work + REST * real_size, work + LOG_P * real_size, work + LOG_REST * real_size
        to = work + VALUE * real_size, work + PULL * real_size
        call9((p.terms_apart, 1, *at_chunk, work + SHARE * real_size, p.params, *to))
    return Apart(chunk[P], chunk[REST], chunk[LOG_P], share_of(p, row, k, label, 0), chunk[VALUE], chunk[PULL])


def write(p, row, exps, pulls, scale, up, chunk, out):
    """Write the gradient, right for all classes but label and runner-up."""
    for first in range(0, p.n_classes, CHUNK):
        n = min(CHUNK, p.n_classes - first)
        fill_shares(p, row, first, n, chunk, T, 0)
        g, e = vector(out + first * size, n, element), vector(exps + first * real_size, n, real)
        if p.terms:
            pulled = vector(pulls + first * real_size, n, real)
            for i in range(n):
                g[i] = narrow(e[i] * scale - (chunk[T + i] + pulled[i]) * up)
        else:
            for i in range(n):
                g[i] = narrow(e[i] * scale - chunk[T + i] * up)


def ignore(p, row):
    """Write what an ignored row costs and teaches: nothing, whatever it holds."""
    if p.loss:
        vector(p.loss + row * real_size, 1, real)[0] = 0.0
    if p.scores:
        for j in range(5):
            vector(p.scores + (j * p.n_rows + row) * 4, 1, float32)[0] = NAN
        vector(p.runner_up + row * 4, 1, int32)[0] = -1
    if p.out:
        out = p.out + row_at(row, p.n_inner, p.out_outer_stride, p.out_inner_stride) * size
        g = vector(out, p.n_classes, element)
        for k in range(p.n_classes):
            g[k] = narrow(0.0)


def store_scores(p, row, z_target, gap, rest, runner_up):
    a, b, c, d, e = scores_of(z_target, gap, rest)
    vector(p.scores + row * 4, 1, float32)[0] = a
    vector(p.scores + (p.n_rows + row) * 4, 1, float32)[0] = b
    vector(p.scores + (2 * p.n_rows + row) * 4, 1, float32)[0] = c
    vector(p.scores + (3 * p.n_rows + row) * 4, 1, float32)[0] = d
    vector(p.scores + (4 * p.n_rows + row) * 4, 1, float32)[0] = e
    vector(p.runner_up + row * 4, 1, int32)[0] = runner_up if gap == gap else -1


@functools.cache
def _loop(element: str, given: str) -> Any:
    def make() -> str:
        from .compile import machine_code

        return machine_code(visit_loop, element, {"Plan": record_of(Plan)}, given)

    name = f"soft_{element}_{given}"
    return stored.entry(4, name, name, make)


# --- what the library calls -------------------------------------------------------------------------------------------


def forward(logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any, scores: bool) -> SoftResult:
    """Return loss and scores of rows [outer, inner, C]; `backward` needs nothing saved."""
    out, _ = visit(logits, label, targets, ignore_index, loss, scores, None)
    return out._replace(saved=out.saved.zero_(), runner_up=out.runner_up if scores else out.runner_up.zero_())


def backward(
    logits: Tensor, label: Tensor, targets: Any, saved: Tensor, runner_up: Tensor, grad_loss: Tensor, ignore_index: int,
    loss: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient from the upstream gradient [N] or [1], by another visit."""
    grad: Tensor = visit(logits, label, targets, ignore_index, loss, False, grad_loss)[1]
    return grad


def visit(
    logits: Tensor, label: Tensor | None, targets: Any, ignore_index: int, loss: Any, scores: bool,
    upstream: Tensor | None, out: Tensor | None = None,
) -> tuple[SoftResult, Any]:  # fmt: skip
    """Return loss and scores and, for an upstream gradient [N] or [1], the gradient.

    It is written to ``out``, where that is given: it may be the logits, whose classes then lie side by side. ``label``
    [outer, inner] is not looked at where probabilities are given: theirs is the largest.
    """
    result = empty_soft(logits, scores)
    grad = None if upstream is None else torch.empty_like(logits) if out is None else out
    n_outer, n_inner, n_classes = logits.shape
    if not logits.numel():
        fill_ignored(result)
        return result, grad
    real_dtype, element = result.loss.dtype, NAMES[logits.dtype]
    z = logits if logits.stride(2) == 1 else logits.contiguous()
    out = grad if grad is None or grad.stride(2) == 1 else grad.new_empty(grad.shape)
    given = targets.probabilities
    if given is not None:
        given = given if given.stride(2) == 1 else given.contiguous()
        given = given if given.dtype == logits.dtype else given.to(real_dtype)
        label = None
    t, v = targets.of_cross_entropy(n_classes), targets.of_bonus(n_classes)
    of_t = (t.keep, t.off) if loss.adds_to_cross_entropy else (0.0, 0.0)
    weights = [None if w is None else w.to(real_dtype).contiguous() for w in (t.weight, v.weight)]
    shares = torch.tensor((*of_t, v.keep, v.off), dtype=real_dtype, device="cpu")
    terms = None if loss.is_cross_entropy() else terms_of(loss, real_of(element))
    label = None if label is None else label.reshape(-1).contiguous()
    up = None if upstream is None else upstream.to(real_dtype)
    in_place = out is not None and out.data_ptr() != z.data_ptr() and logits.element_size() == real_dtype.itemsize
    plan = array("q", Plan(
        n_outer * n_inner, n_inner, n_classes, z.data_ptr(), *z.stride()[:2],
        _at(label), ignore_index, _at(given), *((0, 0) if given is None else given.stride()[:2]),
        *map(_at, weights), given is None and weights == [None, None], shares.data_ptr(),
        *((0, 0, 0, 0) if terms is None else terms[:4]),
        _at(up), 0 if up is None or up.numel() == 1 else up.stride(0),
        result.loss.data_ptr(), result.scores.data_ptr(), result.runner_up.data_ptr() if scores else 0,
        _at(out), *((0, 0) if out is None else out.stride()[:2]), int(in_place),
    ))  # fmt: skip
    work = (END + (1 if in_place else 2) * n_classes) * real_dtype.itemsize
    loop = _loop(element, element if given is None else NAMES[given.dtype])
    threads.run(loop, plan.buffer_info()[0], n_outer * n_inner, logits.numel(), work)
    if grad is not out:
        grad.copy_(out)
    return result, grad


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
