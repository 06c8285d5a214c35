"""What tiles of classes and shards of a vocabulary know of a row, and what they know together.

The monoid of ``kernels/formulas/rest.py`` in plain torch, with the label's logit: a sum over some of the classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NO_CLASS", "RowSums", "merged", "of_logits", "of_nothing"]

NO_CLASS = 2**31 - 1
LOWEST = -1000.0  # e^d d is 0 below: bounding d keeps 0 * -inf from becoming NaN


class RowSums(NamedTuple):
    """Sums of some classes of every row, all [N]: over all but the label, with ``e = exp(z - max)``."""

    z_target: Tensor  # the label's logit, -inf where it is not among the classes
    max: Tensor
    sum_exp: Tensor
    sum_exp2: Tensor
    sum_exp_z: Tensor  # of e (z - max)
    argmax: Tensor  # int32, the first of all classes; `NO_CLASS` where there is none


def of_nothing(n_rows: int, dtype: torch.dtype, device: torch.device) -> RowSums:
    """Return the sums of no classes, which `merged` with any others are these."""
    lowest, zero = (torch.full((2, n_rows), x, dtype=dtype, device=device) for x in (-math.inf, 0.0))
    argmax = torch.full((n_rows,), NO_CLASS, dtype=torch.int32, device=device)
    return RowSums(lowest[0], lowest[1], zero[0], zero[1], zero.new_zeros(n_rows), argmax)


def of_logits(logits: Tensor, label: Tensor, first_class: int) -> RowSums:
    """Return the sums of logits [N, C], classes from ``first_class`` on; ``label`` [N] may lie outside of them."""
    n_classes = logits.shape[1]
    is_label = torch.arange(n_classes, device=logits.device) + first_class == label[:, None]
    here = is_label.any(1)
    z_target = torch.where(is_label, logits, 0.0).sum(1).masked_fill(~here, -math.inf)
    rest = logits.masked_fill(is_label, -math.inf)
    if n_classes == 0:
        maximum, argmax = z_target, torch.full_like(label, NO_CLASS)
    else:
        maximum, argmax = rest.max(1)
        argmax = torch.where(maximum == -math.inf, NO_CLASS, argmax + first_class)
    d = rest - _origin(maximum)[:, None]
    e = d.exp()
    d = d.clamp(min=LOWEST)
    return RowSums(z_target, maximum, e.sum(1), (e * e).sum(1), (e * d).sum(1), argmax.to(torch.int32))


def merged(parts: Sequence[RowSums]) -> RowSums:
    """Return the sums of all classes; in the order given, so that all who merge the same get the same bits."""
    stacked = RowSums._make(torch.stack(columns) for columns in zip(*parts, strict=True))
    maximum = stacked.max.amax(0)
    d = stacked.max - _origin(maximum)
    scale, d = d.exp(), d.clamp(min=LOWEST)
    return RowSums(
        stacked.z_target.amax(0),
        maximum,
        (stacked.sum_exp * scale).sum(0),
        (stacked.sum_exp2 * scale * scale).sum(0),
        ((stacked.sum_exp_z + stacked.sum_exp * d) * scale).sum(0),
        torch.where(stacked.max == maximum, stacked.argmax, NO_CLASS).amin(0),
    )


def _origin(maximum: Tensor) -> Tensor:
    """Return the point to subtract: the max, but 0 where it is -inf, since -inf - -inf is NaN."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)
