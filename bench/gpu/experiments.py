"""What a GPU has to decide before the library takes it: deeper prefetch, and gradients made in the forward visit.

`Deep` holds several tiles in flight in the forward of split rows, where the library holds one. `InForward` makes the
gradient, for an upstream gradient of 1, in the launch of the loss: a row of up to some 32000 classes stays in
registers, so that R + W are moved.
"""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

from bonus_ops.kernels.formulas.logits import as_given_slope
from bonus_ops.kernels.formulas.rest import merge
from bonus_ops.kernels.formulas.scores import pulls
from bonus_ops.kernels.gpu import labels, launch
from bonus_ops.kernels.gpu.labels import Numbers, finish, options_of
from bonus_ops.kernels.gpu.launching import WARP_SIZE, array, device_guard, gap_kernel, logit_kernel, vector
from bonus_ops.kernels.gpu.params import widen
from bonus_ops.kernels.gpu.rest import absorb, across, empty
from bonus_ops.kernels.gpu.rows import (
    chunk_classes,
    chunk_mask,
    fetch,
    is_spread,
    load_label,
    logits_of,
    numbers_of,
    row_index,
    row_ptr,
    rows_at,
    store_chunks,
    zeros,
)
from bonus_ops.kernels.gpu.spread import Spread, spread_of, with_label, write_edge
from bonus_ops.kernels.gpu.sweep import absorb_in_any_order, exact_argmax, sweep_edge, without_target
from bonus_ops.kernels.gpu.tiles import chunks_of, n_all, n_plain, tiles_of_part

from .cases import BONUS


@triton.jit
def sweep_deep(rows, part, n_parts, options, LOGIT: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """As `sweep.sweep_row`, with the next ``DEPTH`` tiles in flight: as many a turn, since moving one waits for it."""
    LANES: tl.constexpr = TILE.lanes
    tiles = tiles_of_part(rows, (rows.target,), part, n_parts, TILE, True)
    rest, n, ring = empty(zeros(rows, 1, LANES)), n_all(tiles), ()
    for d in tl.static_range(DEPTH):
        ring += (fetch(rows, chunks_of(tiles, d, LANES), rows.active & (d < n), TILE.vector),)
    start = tl.maximum(n_plain(tiles) - DEPTH, 0) // DEPTH * DEPTH
    for i in range(0, start, DEPTH):
        after = ()
        for d in tl.static_range(DEPTH):
            after += (fetch(rows, chunks_of(tiles, i + DEPTH + d, LANES, True), None, TILE.vector),)
            z = logits_of(ring[d], rows, None, options, LOGIT)
            rest = absorb(rest, z, chunks_of(tiles, i + d, LANES, True), is_spread(TILE.vector))
        ring = after
    for i in range(start, n):
        ahead = fetch(rows, chunks_of(tiles, i + DEPTH, LANES), rows.active & (i + DEPTH < n), TILE.vector)
        chunk = chunks_of(tiles, i, LANES)
        z = logits_of(ring[0], rows, chunk_mask(rows, chunk, rows.active, TILE.vector), options, LOGIT)
        rest = absorb_in_any_order(rest, without_target(z, rows, chunk), chunk, is_spread(TILE.vector))
        ring = ring[1:] + (ahead,)
    return rest


@triton.jit
def deep_partial_kernel(
    logits, target_ptr, parts, n_rows, ignore_index, numbers,
    LOGIT: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """As `labels.partial_kernel`, of a row a program."""
    row, part, n_parts = row_index(1), tl.program_id(1), tl.num_programs(1)
    rows, options = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector), options_of(numbers, logits)
    rest = across(sweep_deep(rows, part, n_parts, options, LOGIT, TILE, DEPTH))
    rest = exact_argmax(rest, rows, options, LOGIT)
    rest = merge(rest, sweep_edge(rows, part, options, LOGIT))
    sums_ptr, argmax_ptr = parts
    at, column = row * n_parts + part, n_rows * n_parts
    tl.store(sums_ptr + at, rest.max)
    tl.store(sums_ptr + at + column, rest.sum_exp)
    tl.store(sums_ptr + at + 2 * column, rest.sum_exp2)
    tl.store(sums_ptr + at + 3 * column, rest.sum_exp_z)
    tl.store(argmax_ptr + at, rest.argmax)


class Deep:
    """Stands where `labels.partial_kernel` does."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **options: deep_partial_kernel[grid](**options, DEPTH=self.depth)


def with_depth(depth: int) -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(labels, "partial_kernel", Deep(depth))


def with_launch(kernel: str, shape: launch.Launch) -> contextlib.AbstractContextManager[object]:
    """Launch "forward" or "backward" in another shape than `launch` says."""
    return mock.patch.object(launch, kernel, lambda *_, **__: shape)


@triton.jit
def held_kernel(
    logits, target_ptr, grad, outputs, n_rows, ignore_index, numbers, upstream,
    VALUE: tl.constexpr, SLOPE: tl.constexpr, LOGIT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `labels.forward_kernel`, with the gradient: a row is one tile, and stays in the registers of its program."""
    row, options = row_index(1), options_of(numbers, logits)
    rows = rows_at(logits, target_ptr, row, n_rows, ignore_index, TILE.vector)
    chunk = tl.arange(0, TILE.lanes)[None, :]
    raw = fetch(rows, chunk, rows.active, TILE.vector)
    z = logits_of(raw, rows, chunk_mask(rows, chunk, rows.active, TILE.vector), options, LOGIT)
    nothing = empty(zeros(rows, 1, TILE.lanes))
    rest = across(absorb(nothing, without_target(z, rows, chunk), chunk, is_spread(TILE.vector)))
    rest = merge(exact_argmax(rest, rows, options, LOGIT), sweep_edge(rows, 0, options, LOGIT))
    gap = finish(rest, load_label(rows, options, LOGIT), rows, row, n_rows, outputs, numbers, VALUE, False)
    slope = SLOPE(gap, widen(numbers.loss, gap)) * upstream
    scale, at_target = pulls(tl.where(rows.ignored, 0.0, slope), rest.sum_exp)
    spread, inside = Spread(rest.max, scale, at_target), row < n_rows
    x = spread_of(numbers_of(raw, rows), spread, options, LOGIT)
    out = row_ptr(grad, row), grad.class_stride
    x = with_label(x, chunk_classes(rows, chunk), rows, spread)
    store_chunks(out[0], out[1], rows, chunk, x, chunk_mask(rows, chunk, inside, TILE.vector), TILE.vector)
    write_edge(out, rows, inside, spread, options, LOGIT, as_given_slope)


class InForward(torch.autograd.Function):
    """Mean bonus loss of [n_rows, n_classes] and all scores, with the gradient from the same launch."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        n_rows, n_classes = logits.shape
        z, grad = logits[:, None], torch.empty_like(logits)[:, None]
        loss = logits.new_empty(n_rows, dtype=torch.float32)
        scores, runner_up = loss.new_empty(5, n_rows), target.new_empty(n_rows, dtype=torch.int32)
        kernel, made = gap_kernel(BONUS), logit_kernel(None)
        lanes = max(triton.next_power_of_2(max(n_classes // launch.CHUNK, 1)), WARP_SIZE)  # all chunks of a row
        how = launch.Launch(1, lanes, 1, max(lanes // (8 * WARP_SIZE), 1))
        with device_guard(logits):
            held_kernel[(n_rows,)](
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
        return grad, None
