"""Sums of tiles of classes on a CPU: what `row_sums` keeps of every row, added to by loops over rows of a tile.

Traffic a row of T logits of b bytes: reads T b, and reads and writes what is kept.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

from torch import Tensor

from ..formulas.rest import NO_CLASS, RestStats, merge
from . import rows, stored, threads
from .elements import NAMES, record_of
from .labels import bound_options
from .names import int32, int64, read, real, record, size, vector
from .rows import largest, sums_of
from .tile import options_of

__all__ = ["add"]

source = None  # of the options of logits, bound by `_loop`


class Plan(NamedTuple):
    """What the loop is told: sizes, addresses and a stride in elements."""

    n_rows: int
    n_classes: int
    first_class: int
    logits: int
    row_stride: int
    target: int
    options: int
    z_target: int
    max: int
    sum_exp: int
    sum_exp2: int
    sum_exp_z: int
    argmax: int


def add_loop(plan, first, last, work):
    """Add the classes of a tile to the sums of rows ``first`` to ``last``."""
    p = record(plan, Plan)
    e, target = vector(work, p.n_classes, real), vector(p.target, p.n_rows, int64)
    z_target, maximum = vector(p.z_target, p.n_rows, real), vector(p.max, p.n_rows, real)
    sum_exp, sum_exp2 = vector(p.sum_exp, p.n_rows, real), vector(p.sum_exp2, p.n_rows, real)
    sum_exp_z, argmax = vector(p.sum_exp_z, p.n_rows, real), vector(p.argmax, p.n_rows, int32)
    for row in range(first, last):
        z = source(vector(p.logits + row * p.row_stride * size, p.n_classes, real), e, options_of(p))
        label = target[row] - p.first_class
        if (label >= 0) & (label < p.n_classes):
            z_target[row] = read(z[label])
        else:
            label = p.n_classes  # of no class here
        m, k = largest(z, label)
        k = p.first_class + k if (k >= 0) & (m > -INFINITY) else NO_CLASS
        s, s2, sz, _ = sums_of(z, e, label, label, m)
        before = RestStats(maximum[row], argmax[row], sum_exp[row], sum_exp2[row], sum_exp_z[row])
        both = merge(before, RestStats(m, k, s, s2, sz))
        maximum[row], argmax[row] = both.max, both.argmax
        sum_exp[row], sum_exp2[row], sum_exp_z[row] = both.sum_exp, both.sum_exp2, both.sum_exp_z


INFINITY = float("inf")


@functools.cache
def _loop(element: str, of_logit: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        return module_of(add_loop, element, bound_options(rows, of_logit) | {"Plan": record_of(Plan)})

    name = f"{add_loop.__name__}_{element}_{of_logit}"
    return stored.entry(4, name, name, make)


def add(sums: Any, logits: Tensor, target: Tensor, first_class: int, options: Any) -> None:
    """Add to `RowSums` [N], in place, those of logits [N, T] whose classes start at ``first_class``.

    All in the accumulation dtype, which the logits have; a label in ``target`` [N] may lie outside of these classes.
    """
    n_rows, n_classes = logits.shape
    target, double = target.contiguous(), logits.itemsize == 8
    numbers = array("d" if double else "f", (*options.numbers(), 0.0))
    plan = array("q", Plan(
        n_rows, n_classes, first_class, logits.data_ptr(), logits.stride(0), target.data_ptr(),
        numbers.buffer_info()[0], *(x.data_ptr() for x in sums),
    ))  # fmt: skip
    loop = _loop(NAMES[logits.dtype], options.kernel)
    threads.run(loop, plan.buffer_info()[0], n_rows, logits.numel(), n_classes * logits.itemsize)
