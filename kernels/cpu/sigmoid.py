"""Losses of the gap on a sigmoid on a CPU: what `gpu.sigmoid` computes, by chunks of elements in the first cache.

    L = weight (positive pos_weight t value(x) + negative (1 - t) value(-x))        (positive, negative) = scales

A hard target has one of the two terms, so the other is computed only in a chunk that holds a soft one. Tensors are
walked together along as few axes as serve all. Traffic an element: reads input, target and weights, writes its loss or
its gradient.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..elements import Elements, common_axes
from . import stored, threads
from .elements import NAMES, real_of, record_of
from .losses import columns_of
from .names import (
    call5,
    element,
    given_element,
    given_size,
    int32,
    int64,
    narrow,
    real,
    real_size,
    record,
    size,
    vector,
    where,
    widen,
    widen_given,
)
from .tile import padded

__all__ = ["backward", "forward", "visit"]

CHUNK = 512  # elements
# where columns of a chunk begin
T, LIKELIER, OTHER, GAP, VALUE, SLOPE, OTHER_VALUE, OTHER_SLOPE, END = range(0, 9 * CHUNK, CHUNK)
INPUT, TARGET, WEIGHT, POS_WEIGHT, LOSS, GRADIENT, BESIDE = range(7)  # the tensors, BESIDE of them the upstream one


class Plan(NamedTuple):
    """What loops are told: sizes and addresses (0: not wanted, not given)."""

    n_axes: int
    inner: int  # elements of the last axis
    shape: int
    strides: int  # of each tensor one after another, in elements
    tensors: int  # their addresses
    scales: int  # of the positive and of the negative term
    column: int  # `losses.column` of the loss
    params: int
    sums: int  # one for each chunk


def visit_loop(plan, first, last, work):
    """Compute chunks ``first`` to ``last``, counted along the last axis, then along the others."""
    p = record(plan, Plan)
    column, tensors, scales = vector(work, END, real), vector(p.tensors, 7, int64), vector(p.scales, 2, real)
    at = vector(work + END * real_size, 7, int64)
    chunks_a_line = (p.inner + CHUNK - 1) // CHUNK
    for chunk in range(first, last):
        start = chunk % chunks_a_line * CHUNK
        n = min(CHUNK, p.inner - start)
        find(p, chunk // chunks_a_line, start, at)
        soft = load(p, n, at, tensors, column, scales) | weigh(p, n, at, tensors, column)
        total = pay(p, n, soft, at, tensors, column, work)
        store(p, n, at, tensors, column)
        if p.sums:
            vector(p.sums + chunk * real_size, 1, real)[0] = total


def find(p, line, start, at):
    """Find where a chunk begins in each tensor."""
    shape, strides = vector(p.shape, p.n_axes, int64), vector(p.strides, 7 * p.n_axes, int64)
    for j in range(7):
        at[j] = start * strides[j * p.n_axes + p.n_axes - 1]
    for axis in range(p.n_axes - 2, -1, -1):
        index = line % shape[axis]
        line //= shape[axis]
        for j in range(7):
            at[j] += index * strides[j * p.n_axes + axis]


def load(p, n, at, tensors, column, scales):
    """Find the gaps of the likelier terms, and what these and the others count; tell whether any other does."""
    strides = vector(p.strides, 7 * p.n_axes, int64)
    s, of_t = strides[INPUT * p.n_axes + p.n_axes - 1], strides[TARGET * p.n_axes + p.n_axes - 1]
    x = vector(tensors[INPUT] + at[INPUT] * size, (n - 1) * s + 1, element)
    t = vector(tensors[TARGET] + at[TARGET] * given_size, (n - 1) * of_t + 1, given_element)
    soft = int32(0)
    if (s == 1) & (of_t == 1):
        for i in range(n):
            soft |= split(i, widen(x[i]), real(widen_given(t[i])), column, scales)
    else:
        for i in range(n):
            soft |= split(i, widen(x[i * s]), real(widen_given(t[i * of_t])), column, scales)
    for i in range(n, padded(n)):
        column[GAP + i] = 0.0
    return soft


def split(i, x, t, column, scales):
    likely, one, zero = t > 0.5, t * scales[0], (1.0 - t) * scales[1]
    column[T + i] = t
    column[GAP + i] = where(likely, x, -x)
    column[LIKELIER + i] = where(likely, one, zero)
    other = where(likely, zero, one)
    column[OTHER + i] = other
    return int32(other != 0.0)


def numbers_of(p, n, at, tensors, j):
    """Return weights or upstream gradients, and the step from one to the next."""
    s = vector(p.strides, 7 * p.n_axes, int64)[j * p.n_axes + p.n_axes - 1]
    return vector(tensors[j] + at[j] * real_size, (n - 1) * s + 1, real), s


def weigh(p, n, at, tensors, column):
    """Multiply either term by its weights; tell whether any other than the likelier counts."""
    soft = int32(0)
    if tensors[POS_WEIGHT]:
        w, s = numbers_of(p, n, at, tensors, POS_WEIGHT)
        for i in range(n):
            likely = column[T + i] > 0.5
            column[LIKELIER + i] *= where(likely, w[i * s], 1.0)
            column[OTHER + i] *= where(likely, 1.0, w[i * s])
            soft |= int32(column[OTHER + i] != 0.0)
    if tensors[WEIGHT]:
        w, s = numbers_of(p, n, at, tensors, WEIGHT)
        for i in range(n):
            column[LIKELIER + i] *= w[i * s]
            column[OTHER + i] *= w[i * s]
            soft |= int32(column[OTHER + i] != 0.0)
    return soft


def pay(p, n, soft, at, tensors, column, work):
    """Turn gaps into losses and gradients; return the sum of the losses."""
    width, of_gap = padded(n), (work + GAP * real_size, p.params)
    call5((p.column, width, *of_gap, work + VALUE * real_size, work + SLOPE * real_size))
    given, s = numbers_of(p, n, at, tensors, BESIDE)
    up = given[0] if tensors[BESIDE] and s == 0 else 1.0
    total = 0.0
    if soft:
        for i in range(width):
            column[GAP + i] = -column[GAP + i]
        call5((p.column, width, *of_gap, work + OTHER_VALUE * real_size, work + OTHER_SLOPE * real_size))
        for i in range(n):
            count, other = column[LIKELIER + i], column[OTHER + i]
            value, slope = column[VALUE + i] * count, column[SLOPE + i] * count
            value += where(other == 0.0, 0.0, other * column[OTHER_VALUE + i])  # even where the loss is infinite
            slope -= other * column[OTHER_SLOPE + i]
            total += value
            column[VALUE + i], column[SLOPE + i] = value, where(column[T + i] > 0.5, -slope, slope) * up
    else:
        for i in range(n):
            count = column[LIKELIER + i]
            value, slope = column[VALUE + i] * count, column[SLOPE + i] * count
            total += value
            column[VALUE + i], column[SLOPE + i] = value, where(column[T + i] > 0.5, -slope, slope) * up
    if tensors[BESIDE] and s:
        for i in range(n):
            column[SLOPE + i] *= given[i * s]
    return total


def store(p, n, at, tensors, column):
    strides = vector(p.strides, 7 * p.n_axes, int64)
    if tensors[LOSS]:
        s = strides[LOSS * p.n_axes + p.n_axes - 1]
        loss = vector(tensors[LOSS] + at[LOSS] * real_size, (n - 1) * s + 1, real)
        for i in range(n):
            loss[i * s] = column[VALUE + i]
    if tensors[GRADIENT]:
        s = strides[GRADIENT * p.n_axes + p.n_axes - 1]
        grad = vector(tensors[GRADIENT] + at[GRADIENT] * size, (n - 1) * s + 1, element)
        if s == 1:
            for i in range(n):
                grad[i] = narrow(column[SLOPE + i])
        else:
            for i in range(n):
                grad[i * s] = narrow(column[SLOPE + i])


@functools.cache
def _loop(element: str, target: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        return module_of(visit_loop, element, {"Plan": record_of(Plan)}, target)

    name = f"sigmoid_{element}_{target}"
    return stored.entry(4, name, name, make)


# --- what the library calls -------------------------------------------------------------------------------------------


def forward(of: Elements, reduce: bool, out: Tensor) -> Tensor:
    """Return the sum of the losses, or write each into ``out``."""
    if reduce:
        return _run(of, None, True, None)[0].to(out.dtype)
    if out.dtype == of.dtype:
        _run(of, out, False, None)
        return out
    return out.copy_(_run(of, torch.empty_like(out, dtype=of.dtype), False, None)[1])


def backward(of: Elements, grad_loss: Tensor) -> Tensor:
    """Return the gradient from the upstream gradient, one number or one for each element."""
    grad: Tensor = _run(of, None, False, grad_loss)[2]
    return grad


def visit(of: Elements, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and the gradient for an upstream gradient."""
    total, _, grad = _run(of, None, True, upstream)
    return total, grad


def _run(of: Elements, loss: Tensor | None, reduce: bool, upstream: Tensor | None) -> tuple[Any, Any, Any]:
    dtype, input = of.dtype, of.input
    x = input if dtype != torch.float64 else input.double()
    grad = None if upstream is None else torch.empty_like(x)
    up = None if upstream is None else upstream.to(dtype)
    weights = [None if w is None else w.to(dtype) for w in (of.weight, of.pos_weight)]
    tensors = [x, of.target, *weights, loss, grad, up]
    expanded = [None if t is None else t.expand(x.shape) for t in tensors]
    shape, found = common_axes(x.shape, [t.stride() for t in expanded if t is not None])
    known = iter(found)
    none = [0] * len(shape)
    strides = array("q", [s for t in expanded for s in (none if t is None else next(known))])
    n, element = x.numel(), NAMES[x.dtype]
    n_chunks = n // shape[-1] * -(-shape[-1] // CHUNK) if n else 0
    sums = x.new_empty(n_chunks if reduce else 0, dtype=dtype)
    if n:
        columns = columns_of(of.loss, real_of(element))
        sizes, at = array("q", shape), array("q", [0 if t is None else t.data_ptr() for t in tensors])
        scales = torch.tensor(of.scales, dtype=dtype, device="cpu")
        plan = array("q", Plan(
            len(shape), shape[-1], sizes.buffer_info()[0], strides.buffer_info()[0], at.buffer_info()[0],
            scales.data_ptr(), columns.function, columns.params, sums.data_ptr(),
        ))  # fmt: skip
        loop = _loop(element, NAMES[of.target.dtype])
        threads.run(loop, plan.buffer_info()[0], n_chunks, 4 * n, END * dtype.itemsize + 7 * 8)
    if grad is not None and grad.dtype != input.dtype:
        grad = grad.to(input.dtype)
    return sums.sum() if reduce else None, loss, grad
