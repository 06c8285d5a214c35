"""What a loss of single elements is of, and the axes along which its tensors are walked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .results import accumulation_dtype


class Elements(NamedTuple):
    """What a loss is of."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    loss: Any  # of the gap
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
