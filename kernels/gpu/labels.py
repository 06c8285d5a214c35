"""Labels as targets: logits and target to loss, scores and what backward needs, then to the gradient.

    A = slope(gap) grad_loss        grad_y = -A        grad_k = A exp(z_k - max) / sum_exp

Logits are what `formulas.logits` makes of what is stored, and the gradient of one is times its slope.

Traffic a row of V logits of b bytes. Forward reads V b + b (the label's logit, masked in the sweep, fetched apart)
+ CHUNK b a part (the runner-up's chunk again, from cache) + the target index; writes 4 bytes a requested column.
Backward reads V b + 3 saved columns + target and upstream gradient, writes V b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas.logits import as_given_slope
from ..formulas.rest import NO_CLASS, RestStats
from ..formulas.scalar import sigmoid
from ..formulas.scores import gap_of, pulls, pulls_of_lse
from ..results import LabelResult, accumulation_dtype, empty_at_phase, empty_labels
from . import launch
from .launching import (
    FEW_VARIANTS,
    WARP_SIZE,
    array,
    device_guard,
    gap_kernel,
    is_ragged,
    logit_kernel,
    vector,
)
from .params import widen
from .rest import across
from .rows import accumulable, load_label, row_index, row_index_reversed, row_ptr, rows_at
from .scores import store_scores
from .spread import Spread, write_rows
from .sweep import sweep, sweep_planes


class Numbers(NamedTuple):
    """Run-time numbers of the loss and of the logit options, each by its two halves."""

    loss: tl.tuple
    logits: tl.tuple


@triton.jit
def finish(rest, z_target, rows, row, n_rows, outputs, numbers, VALUE: tl.constexpr, COUNTED: tl.constexpr):
    """Store loss, scores and saved columns of each row, with COUNTED also whether it counts; returns the gap."""
    loss_ptr, scores_ptr, runner_up_ptr, saved_ptr = outputs
    gap = tl.where(rows.active, gap_of(z_target, rest), float("nan"))
    missing = tl.where(rows.active, 0.0, float("nan"))
    inside = row < n_rows

    # an ignored row costs nothing; a label out of range leaves NaN
    loss = tl.where(rows.ignored, 0.0, VALUE(gap, widen(numbers.loss, gap)))
    tl.store(loss_ptr + row, loss, inside)
    if COUNTED:
        tl.store(loss_ptr + n_rows + row, tl.where(rows.ignored, 0.0, 1.0), inside)
    if scores_ptr is not None:
        store_scores(scores_ptr, row, n_rows, z_target, gap, rest, missing)
        known = (gap == gap) & (rest.max > -float("inf"))
        tl.store(runner_up_ptr + row, tl.where(known, rest.argmax, -1), inside)
    if saved_ptr is not None:
        tl.store(saved_ptr + row, gap, inside)
        tl.store(saved_ptr + row + n_rows, rest.max, inside)
        tl.store(saved_ptr + row + n_rows + n_rows, rest.sum_exp, inside)
    return gap


@triton.jit
def summary(rows, options, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """Return RestStats and the label's logit of whole rows."""
    if TILE.vector == 0:
        return sweep_planes(rows, 0, 1, options, LOGIT, TILE)
    else:
        return sweep(rows, 0, 1, options, LOGIT, TILE), load_label(rows, options, LOGIT)


@triton.jit(**FEW_VARIANTS)
def forward_kernel(
    logits, target_ptr, outputs, n_rows, ignore_index, numbers,
    VALUE: tl.constexpr, LOGIT: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program: sweep, finish."""
    row, options = row_index(TILE.rows), options_of(numbers, logits)
    rows = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector)
    rest, z_target = summary(rows, options, LOGIT, TILE)
    finish(rest, z_target, rows, row, n_rows, outputs, numbers, VALUE, COUNTED)


@triton.jit(**FEW_VARIANTS)
def forward_softmax_kernel(
    logits, target_ptr, softmax, outputs, n_rows, ignore_index, numbers,
    VALUE: tl.constexpr, LOGIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, then a second sweep of the same rows, still in cache, writes their probabilities."""
    row, options = row_index(TILE.rows), options_of(numbers, logits)
    rows = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector)
    rest, z_target = summary(rows, options, LOGIT, TILE)
    gap = finish(rest, z_target, rows, row, n_rows, outputs, numbers, VALUE, False)
    scale = sigmoid(-gap) / tl.where(rest.sum_exp == 0.0, 1.0, rest.sum_exp)
    scale, at_target = tl.where(rows.ignored, 0.0, scale), tl.where(rows.ignored, 0.0, sigmoid(gap))
    out = row_ptr(softmax, row), softmax.class_stride
    write_rows(out, rows, row < n_rows, Spread(rest.max, scale, at_target), 0, 1, options, LOGIT, as_given_slope, TILE)


@triton.jit(**FEW_VARIANTS)
def partial_kernel(logits, target_ptr, parts, n_rows, ignore_index, numbers, LOGIT: tl.constexpr, TILE: tl.constexpr):
    """A share of some rows: sweep, store its RestStats in [4, n_rows, n_parts] and [n_rows, n_parts]."""
    row, part, n_parts = row_index(TILE.rows), tl.program_id(1), tl.num_programs(1)
    rows, options = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector), options_of(numbers, logits)
    if TILE.vector == 0:
        rest, _ = sweep_planes(rows, part, n_parts, options, LOGIT, TILE)
    else:
        rest = sweep(rows, part, n_parts, options, LOGIT, TILE)
    sums_ptr, argmax_ptr = parts
    at, column, inside = row * n_parts + part, n_rows * n_parts, row < n_rows
    tl.store(sums_ptr + at, rest.max, inside)
    tl.store(sums_ptr + at + column, rest.sum_exp, inside)
    tl.store(sums_ptr + at + 2 * column, rest.sum_exp2, inside)
    tl.store(sums_ptr + at + 3 * column, rest.sum_exp_z, inside)
    tl.store(argmax_ptr + at, rest.argmax, inside)


@triton.jit(**FEW_VARIANTS)
def merge_kernel(
    logits, target_ptr, parts, outputs, n_rows, ignore_index, numbers,
    VALUE: tl.constexpr, LOGIT: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows from their parts, as many as the tile has lanes: merge by a fixed tree, finish."""
    row = row_index(TILE.rows)
    rows = rows_at(logits, target_ptr, row, n_rows, ignore_index, 1)
    at = row[:, None] * TILE.lanes + tl.arange(0, TILE.lanes)[None, :]
    sums_ptr, argmax_ptr = parts
    column, inside = n_rows * TILE.lanes, (row < n_rows)[:, None]
    rest = RestStats(
        tl.load(sums_ptr + at, inside, -float("inf")),
        tl.load(argmax_ptr + at, inside, NO_CLASS),
        tl.load(sums_ptr + at + column, inside, 0.0),
        tl.load(sums_ptr + at + 2 * column, inside, 0.0),
        tl.load(sums_ptr + at + 3 * column, inside, 0.0),
    )
    z_target = load_label(rows, options_of(numbers, logits), LOGIT)
    finish(across(rest), z_target, rows, row, n_rows, outputs, numbers, VALUE, COUNTED)


@triton.jit(**FEW_VARIANTS)
def backward_kernel(
    logits, target_ptr, saved_ptr, upstream, grad, n_rows, ignore_index, numbers,
    SLOPE: tl.constexpr, LOGIT: tl.constexpr, LOGIT_SLOPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1).

    ``upstream`` are the gradients of losses and their stride, the number of rows that a mean divided by or None, and
    the gradients of logsumexps or None.
    """
    row = row_index_reversed(TILE.rows)
    inside = row < n_rows
    rows = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector)
    gap = tl.load(saved_ptr + row, inside, 0.0)
    rest_max = tl.load(saved_ptr + row + n_rows, inside, 0.0)
    sum_exp = tl.load(saved_ptr + row + n_rows + n_rows, inside, 1.0)
    grad_loss_ptr, grad_loss_stride, count_ptr, grad_lse_ptr = upstream
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride, inside, 0.0).to(gap.dtype)
    if count_ptr is not None:
        grad_loss = over(grad_loss, tl.load(count_ptr))

    slope = SLOPE(gap, widen(numbers.loss, gap)) * grad_loss
    # an ignored row teaches nothing whatever it holds
    scale, at_target = pulls(tl.where(rows.ignored, 0.0, slope), sum_exp)
    if grad_lse_ptr is not None:
        grad_lse = tl.where(rows.ignored, 0.0, tl.load(grad_lse_ptr + row, inside, 0.0).to(gap.dtype))
        more, more_at_target = pulls_of_lse(tl.where(rows.ignored, 0.0, gap), grad_lse, sum_exp)
        scale, at_target = scale + more, at_target + more_at_target
    out = row_ptr(grad, row), grad.class_stride
    write_rows(out, rows, inside, Spread(rest_max, scale, at_target), tl.program_id(1), tl.num_programs(1),
               options_of(numbers, logits), LOGIT, LOGIT_SLOPE, TILE)  # fmt: skip


@triton.jit
def options_of(numbers, logits):
    """Return the numbers of the logit options in the dtype that logits are counted in."""
    return widen(numbers.logits, accumulable(tl.zeros((), logits.ptr.dtype.element_ty)))


@triton.jit
def over(x, count):
    """Return x / count, rounded as torch rounds it."""
    if x.dtype == tl.float64:
        return x / count
    else:
        return tl.div_rn(x, count)


# --- launches, of rows [outer, inner, C] and their labels [outer, inner] ----------------------------------------------


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, scores: bool, softmax: bool, options: Any
) -> LabelResult:
    """Return the results of each row."""
    out = empty_labels(logits, scores, softmax)
    outputs = out.loss, *((out.scores, out.runner_up) if scores else (None, None)), out.saved
    if softmax:
        _launch_softmax(logits, target, ignore_index, loss, options, outputs, out.softmax)
    else:
        _launch(logits, target, ignore_index, loss, options, outputs, counted=False)
    return out


def forward_mean(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, scores: bool, options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, Tensor]]:
    """Return the mean over the rows not ignored, scores [5, N] and runner-up [N] or None, and what backward needs.

    That is the saved columns of `LabelResult` and the number of rows. Three launches: one sum serves both.
    """
    n_rows = logits.shape[0] * logits.shape[1]
    losses = logits.new_empty((2, n_rows), dtype=accumulation_dtype(logits.dtype))  # and whether they count
    saved = losses.new_empty((3, n_rows))
    columns = losses.new_empty((5, n_rows), dtype=torch.float32) if scores else None
    runner_up = losses.new_empty(n_rows, dtype=torch.int32) if scores else None
    _launch(logits, target, ignore_index, loss, options, (losses, columns, runner_up, saved), counted=True)
    total, count = losses.sum(1).unbind()
    return total / count, columns, runner_up, (saved, count)


def _launch(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, options: Any, outputs: tuple[Tensor | None, ...],
    counted: bool,
) -> None:  # fmt: skip
    n_rows, by = logits.shape[0] * logits.shape[1], vector(logits)
    if n_rows == 0:
        return
    kernel, made, how = (
        gap_kernel(loss),
        logit_kernel(options),
        launch.forward(n_rows, logits.shape[2], WARP_SIZE, by),
    )
    rows = dict(
        logits=array(logits), target_ptr=_in_order(target), n_rows=n_rows, ignore_index=ignore_index,
        numbers=Numbers(kernel.params, made.options), LOGIT=made.value,
    )  # fmt: skip
    of_loss = dict(outputs=outputs, VALUE=kernel.value, COUNTED=counted)
    tile = how.tile(by, is_ragged(logits, by))
    grid = -(-n_rows // how.rows)
    with device_guard(logits):
        if how.parts == 1:
            forward_kernel[(grid,)](**rows, **of_loss, TILE=tile, num_warps=how.num_warps)
            return
        sums = outputs[0].new_empty(4, n_rows, how.parts)
        parts = sums, logits.new_empty((n_rows, how.parts), dtype=torch.int32)
        partial_kernel[(grid, how.parts)](**rows, parts=parts, TILE=tile, num_warps=how.num_warps)
        how = launch.merge(how.parts, WARP_SIZE)
        grid = -(-n_rows // how.rows)
        merge_kernel[(grid,)](**rows, **of_loss, parts=parts, TILE=how.tile(1), num_warps=how.num_warps)


def _launch_softmax(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, options: Any, outputs: tuple[Tensor | None, ...],
    softmax: Tensor,
) -> None:  # fmt: skip
    n_rows, by = logits.shape[0] * logits.shape[1], vector(logits, softmax)
    if n_rows == 0:
        return
    kernel, made, how = (
        gap_kernel(loss),
        logit_kernel(options),
        launch.forward(n_rows, logits.shape[2], WARP_SIZE, by),
    )
    with device_guard(logits):
        forward_softmax_kernel[(-(-n_rows // how.rows),)](
            logits=array(logits), target_ptr=_in_order(target), softmax=array(softmax), outputs=outputs,
            n_rows=n_rows, ignore_index=ignore_index, numbers=Numbers(kernel.params, made.options),
            VALUE=kernel.value, LOGIT=made.value, TILE=how.tile(by, is_ragged(logits, by)), num_warps=how.num_warps,
        )  # fmt: skip


def backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, ignore_index: int,
    loss: Any, options: Any, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradients [N] of each row's loss and logsumexp.

    It is written to ``out``, where that is given: it may be the logits.
    """
    grad = empty_at_phase(logits) if out is None else out
    upstream = grad_loss, grad_loss.stride(0), None, None if grad_lse is None else grad_lse.contiguous()
    return _launch_backward(logits, target, saved, upstream, ignore_index, loss, options, grad)


def backward_mean(
    logits: Tensor, target: Tensor, saved: tuple[Tensor, Tensor], grad_loss: Tensor, ignore_index: int, loss: Any,
    options: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from that of the mean, 0-d and of any dtype, and what `forward_mean` saved."""
    upstream = grad_loss, 0, saved[1], None
    return _launch_backward(logits, target, saved[0], upstream, ignore_index, loss, options, empty_at_phase(logits))


def _launch_backward(
    logits: Tensor, target: Tensor, saved: Tensor, upstream: tuple[Any, ...], ignore_index: int, loss: Any,
    options: Any, grad: Tensor,
) -> Tensor:  # fmt: skip
    n_rows, by = logits.shape[0] * logits.shape[1], vector(logits, grad)
    if n_rows == 0:
        return grad
    kernel, made, how = (
        gap_kernel(loss),
        logit_kernel(options),
        launch.backward(n_rows, logits.shape[2], WARP_SIZE, by),
    )
    with device_guard(logits):
        backward_kernel[(-(-n_rows // how.rows), how.parts)](
            logits=array(logits), target_ptr=_in_order(target), saved_ptr=saved, upstream=upstream, grad=array(grad),
            n_rows=n_rows, ignore_index=ignore_index, numbers=Numbers(kernel.params, made.options),
            SLOPE=kernel.slope, LOGIT=made.value, LOGIT_SLOPE=made.slope, TILE=how.tile(by, is_ragged(logits, by)),
            num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _in_order(target: Tensor) -> Tensor:
    """Return labels that kernels read one after another."""
    return target if target.is_contiguous() else target.contiguous()
