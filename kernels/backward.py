"""Backward: logits, the saved (gap, max, sum_exp) of each row and its upstream gradient to grad_logits.

    A = slope(gap) grad_loss        grad_y = -A        grad_k = A exp(z_k - max) / sum_exp

Traffic a row of V logits of b bytes: reads V b + 3 saved columns + target and upstream gradient, writes V b.
"""

import triton
import triton.language as tl

from .forward import widen
from .rows import CHUNK, row_index, row_ptr, rows_at
from .spread import write_rows


@triton.jit
def pulls_of(gap, sum_exp, rows, grad_loss, loss_params, SLOPE: tl.constexpr):
    """Return the factor of exp(z - max) and the gradient at the label, of each row."""
    slope = SLOPE(gap, widen(loss_params[0], loss_params[1], gap)) * grad_loss
    # a row with no rest teaches nothing, an ignored one nothing whatever it holds
    slope = tl.where(sum_exp == 0.0, slope * 0.0, slope)
    slope = tl.where(rows.ignored, 0.0, slope)
    # an infinite slope is NaN at the label, as torch's
    return slope / tl.where(sum_exp == 0.0, 1.0, sum_exp), slope * 0.0 - slope


@triton.jit
def backward_kernel(
    logits_ptr, target_ptr, saved_ptr, grad_loss_ptr, grad_ptr, shape, strides, grad_strides, grad_loss_stride,
    ignore_index, loss_params, SLOPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1)."""
    row = row_index(ROWS)
    inside = row < shape[0]
    rows = rows_at(logits_ptr, target_ptr, row, shape, strides, ignore_index, VECTOR)
    gap = tl.load(saved_ptr + row, inside, 0.0)
    rest_max = tl.load(saved_ptr + row + shape[0], inside, 0.0)
    sum_exp = tl.load(saved_ptr + row + shape[0] + shape[0], inside, 1.0)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride, inside, 0.0).to(gap.dtype)

    scale, at_target = pulls_of(gap, sum_exp, rows, grad_loss, loss_params, SLOPE)
    part, n_parts = tl.program_id(1), tl.num_programs(1)
    n_tiles = tl.cdiv(shape[1] // CHUNK, LANES)
    share = tl.cdiv(n_tiles, n_parts)
    out = row_ptr(grad_ptr, row, shape[2], grad_strides)
    write_rows(out, rows, row, shape, strides[2], grad_strides[2], rest_max, scale, at_target,
               part * share, tl.minimum(part * share + share, n_tiles), part == 0, ROWS, LANES, VECTOR)  # fmt: skip
