"""Labels as targets: logits and target to loss, scores and what backward needs, then to the gradient.

    A = slope(gap) grad_loss        grad_y = -A        grad_k = A exp(z_k - max) / sum_exp

Traffic a row of V logits of b bytes. Forward reads V b + b (the label's logit, masked in the sweep, fetched apart)
+ CHUNK b a part (the runner-up's chunk again, from cache) + the target index; writes 4 bytes a requested column.
Backward reads V b + 3 saved columns + target and upstream gradient, writes V b.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas.rest import RestStats
from ..formulas.scalar import sigmoid
from ..formulas.scores import gap_of, pulls
from ..results import LabelResult, accumulation_dtype, empty_labels
from . import launch
from .launching import FEW_VARIANTS, WARP_SIZE, device_guard, gap_kernel, vector
from .params import widen
from .rest import across
from .rows import CHUNK, load, row_index, row_ptr, rows_at
from .scores import store_scores
from .spread import write_rows
from .sweep import sweep


@triton.jit
def finish(rest, rows, row, n_rows, class_stride, outputs, loss_params, VALUE: tl.constexpr, COUNTED: tl.constexpr):
    """Store loss, scores and saved columns of each row, with COUNTED also whether it counts; returns the gap."""
    loss_ptr, scores_ptr, runner_up_ptr, saved_ptr = outputs
    z_target = load(rows.ptr + rows.target.to(tl.int64) * class_stride, rows.active)
    gap = tl.where(rows.active, gap_of(z_target, rest), float("nan"))
    missing = tl.where(rows.active, 0.0, float("nan"))
    inside = row < n_rows

    # an ignored row costs nothing; a label out of range leaves NaN
    loss = tl.where(rows.ignored, 0.0, VALUE(gap, widen(loss_params[0], loss_params[1], gap)))
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


@triton.jit(**FEW_VARIANTS)
def forward_kernel(
    logits_ptr, target_ptr, outputs, n_rows, shape, strides, ignore_index, loss_params,
    VALUE: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program: sweep, finish."""
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], 0, 1, ROWS, LANES, VECTOR)
    finish(rest, rows, row, n_rows, strides[2], outputs, loss_params, VALUE, COUNTED)


@triton.jit(**FEW_VARIANTS)
def forward_softmax_kernel(
    logits_ptr, target_ptr, softmax_ptr, outputs, n_rows, shape, strides, softmax_strides,
    ignore_index, loss_params,
    VALUE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, then a second sweep of the same rows, still in cache, writes their probabilities."""
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], 0, 1, ROWS, LANES, VECTOR)
    gap = finish(rest, rows, row, n_rows, strides[2], outputs, loss_params, VALUE, False)
    scale = sigmoid(-gap) / tl.where(rest.sum_exp == 0.0, 1.0, rest.sum_exp)
    scale, at_target = tl.where(rows.ignored, 0.0, scale), tl.where(rows.ignored, 0.0, sigmoid(gap))
    out = row_ptr(softmax_ptr, row, shape[0], softmax_strides)
    n_tiles = tl.cdiv(shape[1] // CHUNK, LANES)
    write_rows(out, rows, row < n_rows, shape[1], strides[2], softmax_strides[2], rest.max, scale, at_target,
               0, n_tiles, True, ROWS, LANES, VECTOR)  # fmt: skip


@triton.jit(**FEW_VARIANTS)
def partial_kernel(
    logits_ptr, target_ptr, sums_ptr, argmax_ptr, n_rows, shape, strides, ignore_index,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """A share of one row: sweep, store its RestStats in [4, n_rows, n_parts] and [n_rows, n_parts]."""
    row, part, n_parts = row_index(1), tl.program_id(1), tl.num_programs(1)
    rows = rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], part, n_parts, 1, LANES, VECTOR)
    at = row * n_parts + part
    column = n_rows * n_parts
    tl.store(sums_ptr + at, rest.max)
    tl.store(sums_ptr + at + column, rest.sum_exp)
    tl.store(sums_ptr + at + 2 * column, rest.sum_exp2)
    tl.store(sums_ptr + at + 3 * column, rest.sum_exp_z)
    tl.store(argmax_ptr + at, rest.argmax)


@triton.jit(**FEW_VARIANTS)
def merge_kernel(
    logits_ptr, target_ptr, sums_ptr, argmax_ptr, outputs, n_rows, shape, strides, ignore_index,
    loss_params, VALUE: tl.constexpr, COUNTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One row from its parts: merge by a fixed tree, finish."""
    row = row_index(1)
    rows = rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, 1)
    at = row[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    column = n_rows * PARTS
    rest = RestStats(
        tl.load(sums_ptr + at),
        tl.load(argmax_ptr + at),
        tl.load(sums_ptr + at + column),
        tl.load(sums_ptr + at + 2 * column),
        tl.load(sums_ptr + at + 3 * column),
    )
    finish(across(rest), rows, row, n_rows, strides[2], outputs, loss_params, VALUE, COUNTED)


@triton.jit(**FEW_VARIANTS)
def backward_kernel(
    logits_ptr, target_ptr, saved_ptr, grad_loss_ptr, grad_ptr, count_ptr, n_rows, shape, strides,
    grad_strides, grad_loss_stride, ignore_index, loss_params,
    SLOPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1); of a mean, whose rows ``count_ptr`` counts, or None."""
    row = row_index(ROWS)
    inside = row < n_rows
    rows = rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, VECTOR)
    gap = tl.load(saved_ptr + row, inside, 0.0)
    rest_max = tl.load(saved_ptr + row + n_rows, inside, 0.0)
    sum_exp = tl.load(saved_ptr + row + n_rows + n_rows, inside, 1.0)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride, inside, 0.0).to(gap.dtype)
    if count_ptr is not None:
        grad_loss = over(grad_loss, tl.load(count_ptr))

    slope = SLOPE(gap, widen(loss_params[0], loss_params[1], gap)) * grad_loss
    # an ignored row teaches nothing whatever it holds
    scale, at_target = pulls(tl.where(rows.ignored, 0.0, slope), sum_exp)
    part, n_parts = tl.program_id(1), tl.num_programs(1)
    n_tiles = tl.cdiv(shape[1] // CHUNK, LANES)
    share = tl.cdiv(n_tiles, n_parts)
    out = row_ptr(grad_ptr, row, shape[0], grad_strides)
    write_rows(out, rows, inside, shape[1], strides[2], grad_strides[2], rest_max, scale, at_target,
               part * share, tl.minimum(part * share + share, n_tiles), part == 0, ROWS, LANES, VECTOR)  # fmt: skip


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
        _launch_softmax(logits, target, ignore_index, loss, outputs, out.softmax)
    else:
        _launch(logits, target, ignore_index, loss, outputs, counted=False)
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
    _launch(logits, target, ignore_index, loss, (losses, columns, runner_up, saved), counted=True)
    total, count = losses.sum(1).unbind()
    return total / count, columns, runner_up, (saved, count)


def _launch(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, outputs: tuple[Tensor | None, ...], counted: bool
) -> None:
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    if n_rows == 0:
        return
    kernel, how = gap_kernel(loss), launch.forward(n_rows, n_classes, WARP_SIZE)
    rows = dict(
        logits_ptr=logits, target_ptr=_in_order(target), n_rows=n_rows, shape=(n_inner, n_classes),
        strides=logits.stride(), ignore_index=ignore_index,
    )  # fmt: skip
    of_loss = dict(outputs=outputs, loss_params=kernel.params, VALUE=kernel.value, COUNTED=counted)
    with device_guard(logits):
        if how.parts == 1:
            forward_kernel[(-(-n_rows // how.rows),)](
                **rows, **of_loss, ROWS=how.rows, LANES=how.lanes, VECTOR=vector(logits), num_warps=how.num_warps
            )
            return
        sums = outputs[0].new_empty(4, n_rows, how.parts)
        argmax = logits.new_empty((n_rows, how.parts), dtype=torch.int32)
        parts = dict(sums_ptr=sums, argmax_ptr=argmax)
        partial_kernel[(n_rows, how.parts)](
            **rows, **parts, LANES=how.lanes, VECTOR=vector(logits), num_warps=how.num_warps
        )
        merge_kernel[(n_rows,)](**rows, **parts, **of_loss, PARTS=how.parts, num_warps=1)


def _launch_softmax(
    logits: Tensor, target: Tensor, ignore_index: int, loss: Any, outputs: tuple[Tensor | None, ...], softmax: Tensor
) -> None:
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    if n_rows == 0:
        return
    kernel, how = gap_kernel(loss), launch.forward(n_rows, n_classes, WARP_SIZE)
    with device_guard(logits):
        forward_softmax_kernel[(-(-n_rows // how.rows),)](
            logits_ptr=logits, target_ptr=_in_order(target), softmax_ptr=softmax, outputs=outputs, n_rows=n_rows,
            shape=(n_inner, n_classes), strides=logits.stride(), softmax_strides=softmax.stride(),
            ignore_index=ignore_index, loss_params=kernel.params, VALUE=kernel.value, ROWS=how.rows, LANES=how.lanes,
            VECTOR=vector(logits, softmax), num_warps=how.num_warps,
        )  # fmt: skip


def backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, ignore_index: int,
    loss: Any, options: Any, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradients [N] of each row's loss and logsumexp.

    It is written to ``out``, where that is given: it may be the logits.
    """
    grad = torch.empty_like(logits) if out is None else out
    return _launch_backward(logits, target, saved, grad_loss, grad_loss.stride(0), None, ignore_index, loss, grad)


def backward_mean(
    logits: Tensor, target: Tensor, saved: tuple[Tensor, Tensor], grad_loss: Tensor, ignore_index: int, loss: Any,
    options: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from that of the mean, 0-d and of any dtype, and what `forward_mean` saved."""
    grad = torch.empty_like(logits)
    return _launch_backward(logits, target, saved[0], grad_loss, 0, saved[1], ignore_index, loss, grad)


def _launch_backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, grad_loss_stride: int, count: Tensor | None,
    ignore_index: int, loss: Any, grad: Tensor,
) -> Tensor:  # fmt: skip
    n_outer, n_inner, n_classes = logits.shape
    n_rows = n_outer * n_inner
    if n_rows == 0:
        return grad
    kernel, how = gap_kernel(loss), launch.backward(n_rows, n_classes, WARP_SIZE)
    with device_guard(logits):
        backward_kernel[(-(-n_rows // how.rows), how.parts)](
            logits_ptr=logits, target_ptr=_in_order(target), saved_ptr=saved, grad_loss_ptr=grad_loss, grad_ptr=grad,
            count_ptr=count, n_rows=n_rows, shape=(n_inner, n_classes), strides=logits.stride(),
            grad_strides=grad.stride(), grad_loss_stride=grad_loss_stride, ignore_index=ignore_index,
            loss_params=kernel.params, SLOPE=kernel.slope, ROWS=how.rows, LANES=how.lanes, VECTOR=vector(logits, grad),
            num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _in_order(target: Tensor) -> Tensor:
    """Return labels that kernels read one after another."""
    return target if target.is_contiguous() else target.contiguous()
