"""The fast torch path of the sigmoid family: blocks that stay in cache, a few passes each.

Any layout: the axes of all tensors are merged where they lie alike, and blocks are cut from what remains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .losses import GapLoss
from .reference import accumulation_dtype

__all__ = ["Elements", "backward", "common_axes", "forward", "visit"]

# Tuned by `python -m bench elementwise` on a 2-core AVX-512 server with 1 MiB of L2 a core, one thread.
BLOCK_ELEMENTS = 1 << 15


class Elements(NamedTuple):
    """What a loss is of; see `reference.elements`."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    loss: GapLoss
    scales: tuple[float, float]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that losses are computed in."""
        return accumulation_dtype(torch.promote_types(self.input.dtype, self.target.dtype))


def common_axes(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Return shape and strides with the axes in the order of the first tensor's memory and as few as serve all.

    Axes of one are dropped; two are merged where every tensor steps through them as through one.
    """
    axes = [d for d in range(len(shape)) if shape[d] > 1]
    axes.sort(key=lambda d: -strides[0][d])
    merged_shape: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for d in axes:
        if merged_shape and all(m[-1] == s[d] * shape[d] for m, s in zip(merged, strides, strict=True)):
            merged_shape[-1] *= shape[d]
            for m, s in zip(merged, strides, strict=True):
                m[-1] = s[d]
        else:
            merged_shape.append(shape[d])
            for m, s in zip(merged, strides, strict=True):
                m.append(s[d])
    return merged_shape or [1], [m or [1] for m in merged]


def _blocks(shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Return the indices of blocks of at most `BLOCK_ELEMENTS` that cover ``shape``, slowest axis first."""
    inner, axis = 1, len(shape) - 1
    while axis > 0 and inner * shape[axis] <= BLOCK_ELEMENTS:
        inner *= shape[axis]
        axis -= 1
    step = max(BLOCK_ELEMENTS // inner, 1)
    for outer in itertools.product(*map(range, shape[:axis])):
        for first in range(0, shape[axis], step):
            yield (*outer, slice(first, first + step))


class _Block:
    """One block: its logits as gaps, where all targets are hard, and its weights."""

    def __init__(self, of: Elements, x: Tensor, t: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> None:
        self.loss, self.scales, self.weight, self.pos_weight = of.loss, of.scales, weight, pos_weight
        self.x, self.t = x.to(of.dtype), t.to(of.dtype)
        self.sign = self.t.mul(2.0).sub_(1.0)
        low, high = self.sign.abs().aminmax()
        self.hard = bool(low == 1.0) and bool(high == 1.0)

    def value(self) -> Tensor:
        return self._value(self.loss.value(self.x * self.sign) if self.hard else None)

    def gradient(self, factor: float = 1.0) -> Tensor:
        return self._gradient(self.loss.slope(self.x * self.sign) if self.hard else None, factor)

    def value_and_gradient(self, factor: float) -> tuple[Tensor, Tensor]:
        if not self.hard:
            return self.value(), self.gradient(factor)
        value, slope = self.loss.value_and_slope(self.x * self.sign)
        return self._value(value), self._gradient(slope, factor)

    def _value(self, value: Tensor | None) -> Tensor:
        if value is None:
            one, zero = (_times(share, x) for share, x in zip(self._shares(), self._both(self.loss.value), strict=True))
            return one + zero
        if self._plain():
            return value if self.scales == (1.0, 1.0) else value * self._by_target(*self.scales)
        one, zero = self._shares()
        return value * (one + zero)

    def _gradient(self, slope: Tensor | None, factor: float) -> Tensor:
        if slope is None:
            one, zero = (share * x for share, x in zip(self._shares(), self._both(self.loss.slope), strict=True))
            return (zero - one).mul_(factor)
        if self._plain():
            return slope * self._by_target(-self.scales[0] * factor, self.scales[1] * factor)
        one, zero = self._shares()
        return slope * (zero - one).mul_(factor)

    def _plain(self) -> bool:
        return self.weight is None and self.pos_weight is None

    def _by_target(self, one: float, zero: float) -> Tensor:
        """Return ``one`` where a hard target is 1, ``zero`` where it is 0."""
        return torch.add(torch.tensor(zero, dtype=self.t.dtype), self.t, alpha=one - zero)

    def _shares(self) -> tuple[Tensor, Tensor]:
        """Return the weight of the positive and of the negative term."""
        one, zero = self.t * self.scales[0], self.t.neg().add_(1.0).mul_(self.scales[1])
        if self.pos_weight is not None:
            one = one * self.pos_weight
        if self.weight is not None:
            one, zero = one * self.weight, zero * self.weight
        return one, zero

    def _both(self, formula: Any) -> tuple[Tensor, Tensor]:
        return formula(self.x), formula(-self.x)


def _times(share: Tensor, value: Tensor) -> Tensor:
    """Return the product; no share costs nothing, even where the loss is infinite."""
    return torch.where((share == 0) & value.isinf(), 0.0, share * value)


def _walk(of: Elements, *outputs: Tensor) -> Iterator[tuple[Any, ...]]:
    """Return blocks, each with its part of the outputs."""
    optional = [None if x is None else x.expand(of.input.shape) for x in (of.weight, of.pos_weight)]
    tensors = [of.input, of.target, *(x for x in optional if x is not None), *outputs]
    shape, strides = common_axes(of.input.shape, [x.stride() for x in tensors])
    views = [x.as_strided(shape, s) for x, s in zip(tensors, strides, strict=True)]
    for index in _blocks(shape):
        parts = iter([view[index] for view in views])
        x, t = next(parts), next(parts)
        weights = [None if w is None else next(parts) for w in optional]
        yield _Block(of, x, t, *weights), *parts


def visit(of: Elements, factor: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the losses and, with ``factor``, the gradient of ``factor`` times that sum."""
    grad = None if factor is None else torch.empty_like(of.input)
    sums = []
    if of.input.numel():
        for block, *out in _walk(of, *(() if grad is None else (grad,))):
            if factor is None:
                sums.append(block.value().sum())
                continue
            value, gradient = block.value_and_gradient(factor)
            total = value.sum()
            if not total.isfinite():  # shared terms are for finite gaps
                total, gradient = block.value().sum(), block.gradient(factor)
            sums.append(total)
            out[0].copy_(gradient)
    total = torch.stack(sums).sum() if sums else of.input.new_zeros((), dtype=of.dtype)
    return total, grad


def forward(of: Elements, out: Tensor) -> Tensor:
    """Write the loss of each element into ``out``."""
    if out.numel():
        for block, part in _walk(of, out):
            part.copy_(block.value())
    return out


def backward(of: Elements, grad_loss: Tensor) -> Tensor:
    """Return the gradient from the upstream gradient, one number or one for each element."""
    grad = torch.empty_like(of.input)
    if not grad.numel():
        return grad
    if grad_loss.dim() == 0:
        factor = float(grad_loss)
        for block, part in _walk(of, grad):
            part.copy_(block.gradient(factor))
    else:
        for block, part, upstream in _walk(of, grad, grad_loss.expand(grad.shape)):
            part.copy_(block.gradient() * upstream)
    return grad
