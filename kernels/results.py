"""What kernels and loops return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LabelResult(NamedTuple):
    """Per-row tensors of class indices; what was not asked for is empty."""

    loss: Tensor  # [N]
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    saved: Tensor  # [3, N] gap, max and sum_exp of the rest
    softmax: Tensor  # as the logits


def empty_labels(logits: Tensor, scores: bool, save: bool) -> LabelResult:
    """Return what kernels fill for logits [outer, inner, C], without probabilities."""
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return LabelResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows if scores else 0, dtype=torch.int32),
        logits.new_empty((3, n_rows) if save else (0,), dtype=dtype),
        logits.new_empty(0),
    )


class SoftResult(NamedTuple):
    """Per-row tensors of soft targets; ``scores`` is empty where it was not asked for."""

    loss: Tensor  # [N]
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    saved: Tensor  # [5, N] max of the rest, scale of exp(z - max), mass, gradient at label and at runner-up


def empty_soft(logits: Tensor, scores: bool) -> SoftResult:
    """Return what kernels fill for logits [outer, inner, C]."""
    n_rows = logits.shape[0] * logits.shape[1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return SoftResult(
        logits.new_empty(n_rows, dtype=dtype),
        logits.new_empty((5, n_rows) if scores else (0,), dtype=torch.float32),
        logits.new_empty(n_rows, dtype=torch.int32),
        logits.new_empty((5, n_rows), dtype=dtype),
    )
