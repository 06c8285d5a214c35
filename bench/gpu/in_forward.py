"""An experiment: the gradient made in the forward visit, for an upstream gradient known to be 1.

The rows that a GPU works on at a time have to fit its L2 together, so that the second sweep of a row reads nothing from
memory: R + W instead of 2 R + W. Hence one long row a multiprocessor, by as many threads as it has. It becomes an
option of the library if a GPU shows that it wins a fifth; another upstream gradient costs one more pass, R + W.

Traffic a row of V logits of b bytes: forward's, then V b from L2, and V b written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonus_ops.kernels.formulas.scores import pulls
from bonus_ops.kernels.gpu import launch
from bonus_ops.kernels.gpu.labels import finish
from bonus_ops.kernels.gpu.launching import WARP_SIZE, device_guard, gap_kernel, vector
from bonus_ops.kernels.gpu.params import widen
from bonus_ops.kernels.gpu.rows import CHUNK, row_index, row_ptr, rows_at
from bonus_ops.kernels.gpu.spread import write_rows
from bonus_ops.kernels.gpu.sweep import sweep

from .peers import BONUS

SCALED = 4096  # elements a program


@triton.jit
def forward_gradient_kernel(
    logits_ptr, target_ptr, grad_ptr, outputs, n_rows, shape, strides, grad_strides, ignore_index, loss_params,
    upstream,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, then a second sweep of the same rows, still in cache, writes their gradient."""
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, VECTOR)
    rest = sweep(rows, shape[1], strides[2], 0, 1, ROWS, LANES, VECTOR)
    gap = finish(rest, rows, row, n_rows, strides[2], outputs, loss_params, VALUE, False)
    slope = SLOPE(gap, widen(loss_params[0], loss_params[1], gap)) * upstream
    scale, at_target = pulls(tl.where(rows.ignored, 0.0, slope), rest.sum_exp)
    out = row_ptr(grad_ptr, row, shape[0], grad_strides)
    write_rows(out, rows, row < n_rows, shape[1], strides[2], grad_strides[2], rest.max, scale, at_target,
               0, tl.cdiv(shape[1] // CHUNK, LANES), True, ROWS, LANES, VECTOR)  # fmt: skip


@triton.jit
def scale_kernel(grad_ptr, upstream_ptr, n, BLOCK: tl.constexpr):
    """Multiply the gradient by the upstream scalar, unless that is 1: then nothing is read, and no host asked."""
    upstream = tl.load(upstream_ptr).to(tl.float32)
    if upstream != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(grad_ptr + at, at < n).to(tl.float32) * upstream
        tl.store(grad_ptr + at, scaled.to(grad_ptr.dtype.element_ty), at < n)


def launch_of(n_rows: int, n_classes: int) -> launch.Launch:
    """Return the shape of a program: short rows as in `launch.forward`, long ones by up to 1024 threads."""
    n_chunks = n_classes // launch.CHUNK
    if n_chunks < 256:
        return launch.forward(n_rows, n_classes)
    lanes = min(1 << (n_chunks.bit_length() - 1), 1024)
    return launch.Launch(1, lanes, 1, lanes // WARP_SIZE)


class InForward(torch.autograd.Function):
    """Mean bonus loss of [n_rows, n_classes] and all scores; its gradient comes from the same launch."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        n_rows, n_classes = logits.shape
        z, grad = logits[:, None], torch.empty_like(logits)[:, None]
        loss = logits.new_empty(n_rows, dtype=torch.float32)
        scores, runner_up = loss.new_empty(5, n_rows), target.new_empty(n_rows, dtype=torch.int32)
        kernel = gap_kernel(BONUS)
        how = launch_of(n_rows, n_classes)
        with device_guard(logits):
            forward_gradient_kernel[(-(-n_rows // how.rows),)](
                logits_ptr=z, target_ptr=target, grad_ptr=grad, outputs=(loss, scores, runner_up, None),
                n_rows=n_rows, shape=(1, n_classes), strides=z.stride(), grad_strides=grad.stride(), ignore_index=-100,
                loss_params=kernel.params, upstream=1.0 / n_rows, VALUE=kernel.value, SLOPE=kernel.slope,
                ROWS=how.rows, LANES=how.lanes, VECTOR=vector(z, grad), num_warps=how.num_warps,
            )  # fmt: skip
        ctx.grad = grad[:, 0]
        return loss.mean().to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        grad, ctx.grad = ctx.grad, None
        with device_guard(grad):
            scale_kernel[(triton.cdiv(grad.numel(), SCALED),)](grad, upstream, grad.numel(), BLOCK=SCALED, num_warps=8)
        return grad, None
