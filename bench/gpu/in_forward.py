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

from bonus_ops.kernels.formulas.logits import as_given_slope
from bonus_ops.kernels.formulas.scores import pulls
from bonus_ops.kernels.gpu import launch
from bonus_ops.kernels.gpu.labels import Numbers, finish, options_of, summary
from bonus_ops.kernels.gpu.launching import WARP_SIZE, array, device_guard, gap_kernel, logit_kernel, vector
from bonus_ops.kernels.gpu.params import widen
from bonus_ops.kernels.gpu.rows import row_index, row_ptr, rows_at
from bonus_ops.kernels.gpu.spread import Spread, write_rows

from .peers import BONUS

SCALED = 4096  # elements a program


@triton.jit
def forward_gradient_kernel(
    logits, target_ptr, grad, outputs, n_rows, ignore_index, numbers, upstream,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, LOGIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `forward_kernel`, then a second sweep of the same rows, still in cache, writes their gradient."""
    row, options = row_index(TILE.rows), options_of(numbers, logits)
    rows = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector)
    rest, z_target = summary(rows, options, LOGIT, TILE)
    gap = finish(rest, z_target, rows, row, n_rows, outputs, numbers, VALUE, False)
    slope = SLOPE(gap, widen(numbers.loss, gap)) * upstream
    scale, at_target = pulls(tl.where(rows.ignored, 0.0, slope), rest.sum_exp)
    out = row_ptr(grad, row), grad.class_stride
    write_rows(out, rows, row < n_rows, Spread(rest.max, scale, at_target), 0, 1, options, LOGIT, as_given_slope, TILE)


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
        kernel, made, how = gap_kernel(BONUS), logit_kernel(None), launch_of(n_rows, n_classes)
        with device_guard(logits):
            forward_gradient_kernel[(-(-n_rows // how.rows),)](
                logits=array(z), target_ptr=target, grad=array(grad), outputs=(loss, scores, runner_up, None),
                n_rows=n_rows, ignore_index=-100, numbers=Numbers(kernel.params, made.options), upstream=1.0 / n_rows,
                VALUE=kernel.value, SLOPE=kernel.slope, LOGIT=made.value, TILE=how.tile(vector(z, grad)),
                num_warps=how.num_warps,
            )  # fmt: skip
        ctx.grad = grad[:, 0]
        return loss.mean().to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        grad, ctx.grad = ctx.grad, None
        with device_guard(grad):
            scale_kernel[(triton.cdiv(grad.numel(), SCALED),)](grad, upstream, grad.numel(), BLOCK=SCALED, num_warps=8)
        return grad, None
