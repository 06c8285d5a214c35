"""Class indices on a CPU: what `gpu.labels` computes, by loops over rows that stay in cache.

A tile of rows takes three steps: sum up every row, finish them all, write what follows from it. Rows are summed up one
after another, by vectors of classes (`rows`); where classes are few or lie apart, side by side, by vectors of rows
(`lanes`). Traffic a row of V logits of b bytes: reads V b, writes V b for a gradient and 4 bytes a requested column.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formulas import logits as of_logits
from ..results import LabelResult, accumulation_dtype, fill_ignored
from . import lanes, rows, stored, threads
from .elements import NAMES, real_of, record_of, strided
from .losses import Columns, columns_of, probability
from .names import element, int32, int64, narrow, real, real_size, record, vector
from .tile import END, GAP, MAX, ROWS, SUM_EXP, finish, load_labels, load_upstream, padded, pay, pull

__all__ = ["backward", "count", "forward", "visit"]

FEW = 24  # classes up to which rows go side by side; measured on a server with AVX2, one thread

BLOCK = rows_of_tile = sum_up = exps_again = write_tile = None  # of the layout, bound by `_loop`


class Plan(NamedTuple):
    """What loops are told: sizes, addresses (0: not wanted) and strides in elements."""

    n_rows: int
    n_inner: int
    n_classes: int
    tile: int  # rows
    logits: int
    outer_stride: int
    inner_stride: int
    class_stride: int
    target: int
    ignore_index: int
    column: int  # `losses.column` of the loss
    params: int
    options: int  # `tile.options_of`
    upstream: int
    upstream_stride: int
    grad_lse: int
    grad_lse_stride: int
    loss: int
    lse: int
    scores: int
    runner_up: int
    saved: int
    out: int
    softmax: int  # whether out is of probabilities
    out_outer_stride: int
    out_inner_stride: int
    out_class_stride: int
    in_place: int  # whether exponentials are kept in the rows of out


# --- loops ------------------------------------------------------------------------------------------------------------


def visit_loop(plan, first, last, work):
    """Compute rows ``first`` to ``last``: loss, scores, what backward needs; the gradient where it is wanted."""
    p = record(plan, Plan)
    column, index = vector(work, END, real), vector(work + END * real_size, 2 * ROWS, int32)
    exps = work + END * real_size + 2 * ROWS * 4
    row = first
    while row < last:
        n = rows_of_tile(p, row, last)
        load_labels(p, row, n, index)
        sum_up(p, row, n, index, column, exps)
        if p.out:
            load_upstream(p, row, n, column)
        finish(p, row, n, index, column, work)
        if p.out:
            pull(p, n, column)
            write_tile(p, row, n, index, column, exps)
        row += n


def again_loop(plan, first, last, work):
    """Write the gradient of rows, or their probabilities, from what `visit_loop` saved."""
    p = record(plan, Plan)
    column, index = vector(work, END, real), vector(work + END * real_size, 2 * ROWS, int32)
    exps = work + END * real_size + 2 * ROWS * 4
    saved = vector(p.saved, 3 * p.n_rows, real)
    row = first
    while row < last:
        n = rows_of_tile(p, row, last)
        load_labels(p, row, n, index)
        for i in range(padded(n)):
            at = row + min(i, n - 1)
            column[GAP + i] = saved[at]
            column[MAX + i] = saved[at + p.n_rows]
            column[SUM_EXP + i] = saved[at + 2 * p.n_rows]
        pay(p, padded(n), work)
        load_upstream(p, row, n, column)
        pull(p, n, column)
        exps_again(p, row, n, index, column, exps)
        write_tile(p, row, n, index, column, exps)
        row += n


def count_loop(target, n, n_classes, ignore_index, out):
    """Write how many labels count, how many are out of range, and the first of these."""
    labels, found = vector(target, n, int64), vector(out, 3, int64)
    counted = bad = one = 0
    for i in range(n):
        y = labels[i]
        counts = y != ignore_index
        outside = counts & ((y < 0) | (y >= n_classes))
        counted += counts
        one = y if outside & (bad == 0) else one
        bad += outside
    found[0], found[1], found[2] = counted, bad, one


def total_loop(loss, n, divisor, out):
    """Write the sum of ``n`` losses over a divisor, added up by blocks so that many lose no digits."""
    x, total = vector(loss, n, real), 0.0
    for first in range(0, n, BLOCK):
        part, a = x[first : first + BLOCK], 0.0
        for i in range(len(part)):
            a += part[i]
        total += a
    vector(out, 1, element)[0] = narrow(total / real(divisor))


@functools.cache
def _loop(body: Any, layout: Any, element: str, of_logit: str, more: bool) -> Any:
    def make() -> Any:
        from .compile import module_of

        bound = {name: getattr(layout, name) for name in ("rows_of_tile", "sum_up", "exps_again")}
        bound |= {"write_tile": layout.write_capped if of_logit == "capped" else layout.write, "MORE": more}
        return module_of(body, element, bound | bound_options(layout, of_logit) | {"Plan": record_of(Plan)})

    name = f"{body.__name__}_{layout.__name__.rpartition('.')[2]}_{element}_{of_logit}{'_more' * more}"
    return stored.entry(4, name, name, make)


def bound_options(layout: Any, of_logit: str) -> dict[str, Any]:
    """Return what loops name of the options of logits; ``of_logit`` is `LogitOptions.kernel`."""
    pair = {"OF_LOGIT": getattr(of_logits, of_logit), "SLOPE_OF_LOGIT": getattr(of_logits, f"{of_logit}_slope")}
    if of_logit == "as_given":
        return pair | {"source": layout.as_they_lie, "CHANGED": False, "SCALED": False}
    return pair | {"source": layout.changed, "CHANGED": True, "SCALED": of_logit == "scaled", "read": rows.as_it_is}


@functools.cache
def _plain(body: Any, n_integers: int, element: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        return module_of(body, element, {"BLOCK": rows.BLOCK})

    name = f"{body.__name__}_{element}"
    return stored.entry(n_integers, name, name, make)


# --- what the library calls -------------------------------------------------------------------------------------------


def count(target: Tensor, n_classes: int, ignore_index: int) -> tuple[int, int, int]:
    """Return how many labels count, how many are out of range, and one of these."""
    target, found = target if target.is_contiguous() else target.contiguous(), array("q", (0, 0, 0))
    _plain(count_loop, 5, "float32")(target.data_ptr(), target.numel(), n_classes, ignore_index, found.buffer_info()[0])
    return found[0], found[1], found[2]


def total(loss: Tensor, divisor: int, dtype: torch.dtype) -> Tensor:
    """Return the sum of losses [N] over a divisor, NaN over 0, in a dtype whose accumulation dtype they have."""
    out = loss.new_empty((), dtype=dtype)
    _plain(total_loop, 4, NAMES[dtype])(loss.data_ptr(), loss.numel(), divisor, out.data_ptr())
    return out


class Visited(NamedTuple):
    """What a visit returns; None where it was not asked for."""

    loss: Tensor  # [N]
    lse: Tensor | None  # [N] logsumexp, 0 where ignored
    scores: Tensor | None  # [5, N] float32
    runner_up: Tensor | None  # [N] int32
    saved: Tensor | None  # [3, N]
    grad: Any  # as the logits


def visit(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, scores: bool, upstream: Tensor | float | None,
    save: bool, options: Any, z_factor: float, out: Tensor | None = None, of_z: Tensor | None = None,
) -> Visited:  # fmt: skip
    """Return the results of rows [outer, inner, C] or [N, C] and, for an upstream gradient, the gradient.

    That is a number, or one for each row [N] or for all [1] in the accumulation dtype. ``z_factor`` times the squared
    logsumexp of every row, times its ``of_z`` [N], is added to what the gradient is of; 0 leaves it out, and ``lse`` of
    the result too. The gradient is written to ``out``, where it is given: it may be the logits.
    """
    n_rows, dtype = target.numel(), accumulation_dtype(logits.dtype)
    visited = Visited(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty(n_rows, dtype=dtype) if z_factor else None,
        logits.new_empty((5, n_rows), dtype=torch.float32) if scores else None,
        logits.new_empty(n_rows, dtype=torch.int32) if scores else None,
        logits.new_empty((3, n_rows), dtype=dtype) if save else None,
        None if upstream is None else _empty_like(logits) if out is None else out,
    )
    if logits.numel():
        columns = columns_of(loss, real_of(NAMES[logits.dtype]))
        numbers, grad = (*options.numbers(), 2 * z_factor), visited.grad
        rows_of = (logits, target, ignore_index, columns, options)
        threads.run(*_planned(visit_loop, *rows_of, numbers, visited, grad, upstream, of_z, False))
    else:
        fill_ignored(visited)
        if visited.lse is not None:
            visited.lse.zero_()
    return visited


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, scores: bool, softmax: bool, options: Any
) -> LabelResult:
    """Return loss, scores, what `backward` needs and the probabilities of rows [outer, inner, C]."""
    out = visit(logits, target, ignore_index, loss, scores, None, True, options, 0.0)
    probabilities = _empty_like(logits) if softmax else None
    if probabilities is not None and logits.numel():
        columns = probability(real_of(NAMES[logits.dtype]))
        numbers = (*options.numbers(), 0.0)
        rows_of = (logits, target, ignore_index, columns, options)
        threads.run(*_planned(again_loop, *rows_of, numbers, out, probabilities, 1.0, None, True))
    given = (out.loss, out.scores, out.runner_up, out.saved, probabilities)
    kinds = (out.loss.dtype, torch.float32, torch.int32, out.loss.dtype, logits.dtype)
    return LabelResult(*(logits.new_empty(0, dtype=k) if x is None else x for x, k in zip(given, kinds, strict=True)))


def backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, ignore_index: int,
    loss: Any, options: Any, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient from what `forward` saved: one read, one write.

    Upstream gradients are [N] or [1]: of the loss of each row and, where it matters, of its logsumexp. It is written to
    ``out``, where that is given: it may be the logits.
    """
    grad = _empty_like(logits) if out is None else out
    if logits.numel():
        known = Visited(saved, None, None, None, saved, None)
        columns = columns_of(loss, real_of(NAMES[logits.dtype]))
        grad_loss, numbers = grad_loss.to(saved.dtype), (*options.numbers(), 0.0)
        of_lse = None if grad_lse is None else grad_lse.to(saved.dtype)
        rows_of = (logits, target, ignore_index, columns, options)
        threads.run(*_planned(again_loop, *rows_of, numbers, known, grad, grad_loss, of_lse, False))
    return grad


def _empty_like(logits: Tensor) -> Tensor:
    out = torch.empty_like(logits)
    if not logits.is_contiguous() and logits.stride(-1) == 1 and out.stride(-1) != 1:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return out


def _strides(rows: Tensor) -> tuple[int, int, int]:
    """Return the strides of rows [outer, inner, C], or of [N, C] with one inner row each."""
    outer, *inner, classes = rows.stride()
    return outer, inner[0] if inner else 0, classes


def _planned(
    body: Any, logits: Tensor, target: Tensor, ignore_index: int, columns: Columns, options: Any,
    numbers: tuple[float, ...], result: Visited, out: Tensor | None, upstream: Tensor | float | None,
    grad_lse: Tensor | None, softmax: bool,
) -> tuple[Any, int, int, int, int, Any]:  # fmt: skip
    """Return what `threads.run` takes: a loop, the address of its plan, sizes, and what the plan points to."""
    n_rows, n_classes, strides, element = target.numel(), logits.shape[-1], _strides(logits), NAMES[logits.dtype]
    of_logit, real_bytes = options.kernel, 8 if element == "float64" else 4
    target = target if target.is_contiguous() else target.contiguous()
    held = array("d" if real_bytes == 8 else "f", (*numbers, upstream if isinstance(upstream, float) else 0.0))
    at = held.buffer_info()[0]
    up = (at + 3 * real_bytes, 0) if isinstance(upstream, float) else strided(upstream)
    side_by_side = n_classes <= FEW or strides[2] != 1
    in_place = 0
    if side_by_side:
        tile = min(max(4096 // n_classes // 64 * 64, 64), ROWS)
        kept = (tile + lanes.BETWEEN) * n_classes * (2 if of_logit == "capped" else 1)
    else:
        tile = min(max((1 << 16) // n_classes, 1), 64)
        in_place = int(out is not None and out.data_ptr() != logits.data_ptr() and logits.element_size() == real_bytes)
        kept = 0 if in_place else tile * n_classes
    made = [0 if x is None else x.data_ptr() for x in (*result[:5], out)]
    plan = array("q", Plan(
        n_rows, logits.shape[1] if logits.dim() == 3 else 1, n_classes, tile, logits.data_ptr(), *strides,
        target.data_ptr(), ignore_index, columns.function, columns.params, at, *up, *strided(grad_lse), *made, softmax,
        *((0, 0, 0) if out is None else _strides(out)), in_place,
    ))  # fmt: skip
    work = END * real_bytes + 2 * ROWS * 4 + kept * real_bytes
    more = not (result.scores is None and result.lse is None and grad_lse is None)
    loop = _loop(body, lanes if side_by_side else rows, element, of_logit, more)
    return loop, plan.buffer_info()[0], n_rows, logits.numel(), work, (plan, held, target)
