"""What kernels return, on GPU and CPU alike, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LabelResult(NamedTuple):
    """Per-row results; ``scores``, ``runner_up`` and ``softmax`` have no elements where they were not asked for."""

    loss: Tensor  # [N]
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    saved: Tensor  # [3, N] gap, max and sum_exp of the rest
    softmax: Tensor  # as the logits


class SoftResult(NamedTuple):
    """Per-row results; ``scores`` and ``lse`` have no elements where they were not asked for."""

    loss: Tensor  # [N]
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    # max of the rest, scale of exp(z - max), mass, gradient at label and at runner-up; with ``lse`` also p of the two
    saved: Tensor  # [5, N] or [7, N]
    lse: Tensor  # [N] logsumexp of the logits, 0 where ignored


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_labels(logits: Tensor, scores: bool, softmax: bool, save: bool = True) -> LabelResult:
    """Return the memory of the results of rows [outer, inner, C]; ``saved`` has no elements without ``save``."""
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = accumulation_dtype(logits.dtype)
    return LabelResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows if scores else 0, dtype=torch.int32),
        logits.new_empty((3, n_rows) if save else (0,), dtype=dtype),
        torch.empty_like(logits) if softmax else logits.new_empty(0),
    )


def empty_soft(logits: Tensor, scores: bool, lse: bool) -> SoftResult:
    """Return the memory of the results of rows [outer, inner, C]."""
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = accumulation_dtype(logits.dtype)
    return SoftResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows, dtype=torch.int32),
        logits.new_empty((7 if lse else 5, n_rows), dtype=dtype),
        logits.new_empty(n_rows if lse else 0, dtype=dtype),
    )


def fill_ignored(result: Any) -> None:
    """Write what rows give that are ignored, as all must be where there are no classes."""
    result.loss.zero_()
    for column, nothing in ((result.scores, torch.nan), (result.runner_up, -1), (result.saved, 0), (result.lse, 0)):
        if column is not None:
            column.fill_(nothing)


def empty_at_phase(logits: Tensor) -> Tensor:
    """Return memory like the logits' where every row starts as far from a 16-byte boundary as theirs.

    Then vectors of both can be walked from one common head. Less than 16 bytes lie between rows, or before the first.
    """
    at, size = logits.storage_offset(), logits.itemsize
    if at * size % 16 == 0 and logits.is_contiguous():
        return torch.empty_like(logits)
    shape, strides = logits.shape, torch.empty_like(logits).stride()
    if strides != logits.stride():  # rows with gaps between them
        if logits.stride(2) != 1:
            return torch.empty_like(logits)
        inner = _at_least(shape[2], logits.stride(1), 16 // size)
        strides = _at_least(shape[1] * inner, logits.stride(0), 16 // size), inner, 1
    before = at % (16 // size)
    n = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if logits.numel() else 0
    return logits.new_empty(before + n).as_strided(shape, strides, before)


# what each implementation makes of the gradient of logits
MEMORY_OF_GRADIENT: dict[str, Callable[[Tensor], Tensor]] = {"triton": empty_at_phase, "numba": torch.empty_like}


def _at_least(least: int, like: int, vector: int) -> int:
    """Return the smallest stride from ``least`` on that leaves a boundary as ``like`` does."""
    return least + (like - least) % vector
