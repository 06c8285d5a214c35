"""What kernels return, on GPU and CPU alike, and its memory."""

from __future__ import annotations

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
    """Per-row results; ``scores`` has no elements where it was not asked for."""

    loss: Tensor  # [N]
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    saved: Tensor  # [5, N] max of the rest, scale of exp(z - max), mass, gradient at label and at runner-up


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


def empty_soft(logits: Tensor, scores: bool) -> SoftResult:
    """Return the memory of the results of rows [outer, inner, C]."""
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = accumulation_dtype(logits.dtype)
    return SoftResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows, dtype=torch.int32),
        logits.new_empty((5, n_rows), dtype=dtype),
    )


def fill_ignored(result: Any) -> None:
    """Write what rows give that are ignored, as all must be where there are no classes."""
    result.loss.zero_()
    for column, nothing in ((result.scores, torch.nan), (result.runner_up, -1), (result.saved, 0)):
        if column is not None:
            column.fill_(nothing)
