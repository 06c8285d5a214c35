"""Losses of the gap on a sigmoid: input x and target t in [0, 1], element by element.

    L = weight (positive pos_weight t value(x) + negative (1 - t) value(-x))        (positive, negative) = scales

A hard target has one of the two terms, so the other is computed only in a tile that holds a soft one.

Traffic an element, of b bytes a logit and c a target: forward reads b + c and writes its loss, or 4 bytes a program for
a sum; backward reads b + c, and the upstream gradient if it is not one number, and writes b. Weights are read where
they lie, broadcast.

``operands`` are (input, target, weight or None, pos_weight or None); tensor number 4 is the output, 5 the upstream
gradient. All are walked over one ``shape``, slowest axis first, by ``strides``: theirs one after another, None where
elements lie in order. (Of a tuple of tuples Triton 3.6 loses the ones.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elements import Elements, common_axes
from . import launch
from .launching import WARP_SIZE, device_guard, gap_kernel
from .params import halved, widen
from .rows import accumulable


class Tile(NamedTuple):
    """Elements; the likelier target of an element is 1 where t > 1/2."""

    likely: tl.tensor
    gap: tl.tensor  # x where likely, else -x
    share: tl.tensor  # weight of value(gap)
    other: tl.tensor  # weight of value(-gap), 0 for a hard target


@triton.jit
def offset(index, shape, strides, NUMBER: tl.constexpr, WIDE: tl.constexpr):
    """Return where the elements number ``index`` of tensor ``NUMBER`` lie."""
    first: tl.constexpr = NUMBER * len(shape)
    if strides[first] is None:
        return index
    else:
        if not WIDE:  # a 64-bit division takes some 100 instructions
            index = index.to(tl.int32)
        at = index * 0
        for axis in tl.static_range(len(shape) - 1, 0, -1):
            at += index % shape[axis] * strides[first + axis]
            index = index // shape[axis]
        return at + index * strides[first]


@triton.jit
def load(ptr, index, mask, shape, strides, NUMBER: tl.constexpr, WIDE: tl.constexpr):
    """Load in the accumulation dtype: float64 stays, the rest becomes float32; masked lanes are 0."""
    at = ptr + offset(index, shape, strides, NUMBER, WIDE)
    if mask is None:
        x = tl.load(at)
    else:
        x = tl.load(at, mask, 0.0)
    return accumulable(x)


@triton.jit
def store(ptr, index, x, mask, shape, strides, NUMBER: tl.constexpr, WIDE: tl.constexpr):
    if ptr.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)  # no conversion leads from float64 to bfloat16 at once
    at = ptr + offset(index, shape, strides, NUMBER, WIDE)
    if mask is None:
        tl.store(at, x)
    else:
        tl.store(at, x, mask)


@triton.jit
def load_elements(operands, index, mask, shape, strides, scales, WIDE: tl.constexpr):
    t = load(operands[1], index, mask, shape, strides, 1, WIDE)
    x = load(operands[0], index, mask, shape, strides, 0, WIDE) + tl.zeros((), t.dtype)  # float64 if t is
    scales = widen(scales, x)
    one, zero = t * scales[0], (1.0 - t) * scales[1]
    if operands[3] is not None:
        one *= load(operands[3], index, mask, shape, strides, 3, WIDE)
    if operands[2] is not None:
        weight = load(operands[2], index, mask, shape, strides, 2, WIDE)
        one, zero = one * weight, zero * weight
    likely = t > 0.5
    return Tile(likely, tl.where(likely, x, -x), tl.where(likely, one, zero), tl.where(likely, zero, one))


@triton.jit
def any_soft(elements):
    return tl.max((elements.other != 0.0).to(tl.int32), 0) > 0


@triton.jit
def loss_of(operands, index, mask, shape, strides, loss_params, scales, VALUE: tl.constexpr, WIDE: tl.constexpr):
    e = load_elements(operands, index, mask, shape, strides, scales, WIDE)
    numbers = widen(loss_params, e.gap)
    loss = e.share * VALUE(e.gap, numbers)
    if any_soft(e):
        # no share costs nothing, even where the loss is infinite
        loss += tl.where(e.other == 0.0, 0.0, e.other * VALUE(-e.gap, numbers))
    return loss


@triton.jit
def gradient_of(operands, index, mask, shape, strides, loss_params, scales, SLOPE: tl.constexpr, WIDE: tl.constexpr):
    e = load_elements(operands, index, mask, shape, strides, scales, WIDE)
    numbers = widen(loss_params, e.gap)
    slope = e.share * SLOPE(e.gap, numbers)
    if any_soft(e):
        slope -= e.other * SLOPE(-e.gap, numbers)
    return tl.where(e.likely, -slope, slope)


@triton.jit(do_not_specialize=["n"])
def sigmoid_kernel(
    operands, out_ptr, n, shape, strides, loss_params, scales,
    VALUE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Loss of each element of one tile."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:  # a mask would keep vectors apart
        loss = loss_of(operands, index, None, shape, strides, loss_params, scales, VALUE, WIDE)
        store(out_ptr, index, loss, None, shape, strides, 4, WIDE)
    else:
        loss = loss_of(operands, index, index < n, shape, strides, loss_params, scales, VALUE, WIDE)
        store(out_ptr, index, loss, index < n, shape, strides, 4, WIDE)


@triton.jit(do_not_specialize=["n"])
def sigmoid_sum_kernel(
    operands, sums_ptr, n, shape, strides, loss_params, scales,
    VALUE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum of the losses of TILES tiles, one number a program: added lane by lane, then across lanes."""
    first = tl.program_id(0) * TILES
    whole = (n // BLOCK).to(tl.int32) - first  # tiles from here on that no mask cuts
    index = first.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], sums_ptr.dtype.element_ty)
    for tile in range(0, tl.minimum(whole, TILES)):
        total += loss_of(operands, index + tile * BLOCK, None, shape, strides, loss_params, scales, VALUE, WIDE)
    if (whole < TILES) & (n % BLOCK > 0):
        index += whole * BLOCK
        loss = loss_of(operands, index, index < n, shape, strides, loss_params, scales, VALUE, WIDE)
        total += tl.where(index < n, loss, 0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def load_upstream(ptr, index, mask, shape, strides, WIDE: tl.constexpr, ONE: tl.constexpr):
    if ONE:
        return accumulable(tl.load(ptr))
    else:
        return load(ptr, index, mask, shape, strides, 5, WIDE)


@triton.jit(do_not_specialize=["n"])
def sigmoid_backward_kernel(
    operands, upstream_ptr, grad_ptr, n, shape, strides, loss_params, scales,
    SLOPE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ONE_UPSTREAM: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile from the upstream gradient: one number, or one for each element."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        upstream = load_upstream(upstream_ptr, index, None, shape, strides, WIDE, ONE_UPSTREAM)
        grad = gradient_of(operands, index, None, shape, strides, loss_params, scales, SLOPE, WIDE)
        store(grad_ptr, index, grad * upstream, None, shape, strides, 4, WIDE)
    else:
        upstream = load_upstream(upstream_ptr, index, index < n, shape, strides, WIDE, ONE_UPSTREAM)
        grad = gradient_of(operands, index, index < n, shape, strides, loss_params, scales, SLOPE, WIDE)
        store(grad_ptr, index, grad * upstream, index < n, shape, strides, 4, WIDE)


# --- launches ---------------------------------------------------------------------------------------------------------


def forward(of: Elements, reduce: bool, out: Tensor) -> Tensor:
    """Write the loss of each element into ``out`` and return it, or return their sum in the dtype of ``out``."""
    n = of.input.numel()
    if n == 0:
        return out.zero_()
    kernel, how = gap_kernel(of.loss), (launch.sigmoid_sum if reduce else launch.sigmoid)(n, WARP_SIZE)
    n_tiles = -(-n // how.block)
    with device_guard(of.input):
        if not reduce:
            sigmoid_kernel[(n_tiles,)](
                out_ptr=out, **_layout(of, out), loss_params=kernel.params, VALUE=kernel.value, BLOCK=how.block,
                num_warps=how.num_warps,
            )  # fmt: skip
            return out
        sums = out.new_empty(-(-n_tiles // how.tiles))
        sigmoid_sum_kernel[(len(sums),)](
            sums_ptr=sums, **_layout(of), loss_params=kernel.params, VALUE=kernel.value, BLOCK=how.block,
            TILES=how.tiles, num_warps=how.num_warps,
        )  # fmt: skip
    return sums.sum()


def backward(of: Elements, grad_loss: Tensor) -> Tensor:
    """Return the gradient of the input from that of the sum (0-d) or of each element."""
    grad = torch.empty_like(of.input)
    n = of.input.numel()
    if n == 0:
        return grad
    kernel, how = gap_kernel(of.loss), launch.sigmoid(n, WARP_SIZE)
    one = grad_loss.dim() == 0
    with device_guard(of.input):
        sigmoid_backward_kernel[(-(-n // how.block),)](
            upstream_ptr=grad_loss, grad_ptr=grad, **_layout(of, grad, None if one else grad_loss),
            loss_params=kernel.params, SLOPE=kernel.slope, BLOCK=how.block, ONE_UPSTREAM=one, num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _layout(of: Elements, *others: Tensor | None) -> dict[str, Any]:
    """Return the arguments of a kernel that say where elements lie."""
    expanded = [None if x is None else x.expand(of.input.shape) for x in (*of[:4], *others)]
    strides = [x.stride() for x in expanded if x is not None]
    shape, merged = common_axes(of.input.shape, strides)
    in_order = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    extents = [sum((n - 1) * s for n, s in zip(shape, m, strict=True)) for m in merged]
    no_strides = (None,) * len(shape)
    known = iter(no_strides if m == in_order else m for m in merged)
    n = of.input.numel()
    return {
        "operands": of[:4], "n": n, "shape": tuple(shape),
        "strides": tuple(s for x in expanded for s in (no_strides if x is None else next(known))),
        "scales": halved(of.scales), "WIDE": max(n, *extents) >= 2**31 - 2**16,
    }  # fmt: skip
