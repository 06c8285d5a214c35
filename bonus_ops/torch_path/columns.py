"""From the sums of every row to its loss and scores, once for all rows: a small operator costs what a block's does."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..losses import GapLoss
from .maximum import origin
from .sums import row_sum
from .vectors import LOWEST, by_vectors, exp_, first, padded

__all__ = ["Columns", "RowOutputs", "finish", "repair"]

REPAIRED = 1 << 17  # elements at a time


class Columns(NamedTuple):
    """What a sweep gathers of each row, [N, 1]; the last three only for scores."""

    gap: Tensor
    maximum: Tensor
    sum_exp: Tensor
    z_target: Tensor
    sum_exp2: Tensor
    sum_exp_z: Tensor
    runner_up: Tensor

    @classmethod
    def joined(cls, blocks: list[Columns]) -> Columns:
        """Return those of all blocks."""
        return blocks[0] if len(blocks) == 1 else cls(*map(torch.cat, zip(*blocks, strict=True)))


class RowOutputs(NamedTuple):
    """Per-row results: loss [N], scores [5, N] (or None), runner_up [N] (or None), saved (gap, max, sum_exp) [3, N]."""

    loss: Tensor
    scores: Tensor | None
    runner_up: Tensor | None
    saved: Tensor


def finish(columns: Columns, counts: Tensor | None, loss: GapLoss, scores: bool) -> RowOutputs:
    """Turn a sweep's columns into loss and scores, once for all rows."""
    columns = Columns(*(c.squeeze(1) for c in columns))
    gap, maximum = columns.gap, columns.maximum
    value = by_vectors(loss.value, gap)
    value = value.clone() if counts is None else value.masked_fill(~counts, 0.0)  # forward mode fails at a view
    five = runner_up = None
    if scores:
        five = _scores(columns).to(torch.float32)
        unknown = gap.isnan() if counts is None else gap.isnan() | ~counts
        if unknown.any():
            five.masked_fill_(unknown, math.nan)
        runner_up = columns.runner_up.to(torch.int32).masked_fill_(unknown | (maximum == -math.inf), -1)
    return RowOutputs(value, five, runner_up, torch.stack([gap, maximum, columns.sum_exp]))


def _scores(columns: Columns) -> Tensor:
    """Return loss, el2n, margin, entropy and energy [5, N] from columns [N]."""
    gap, maximum, sum_exp, z_target, sum_exp2, sum_exp_z, _ = columns
    n_rows = gap.shape[0]
    five = gap.new_empty(5, n_rows)
    loss, el2n, margin, entropy, energy = five.unbind()
    total = sum_exp.clamp(min=1.0)  # a rest that is not empty holds exp(0)
    rest_lse = total.log()
    both = padded(torch.cat([gap, -gap]))
    logs = first(logsigmoid(both), 2 * n_rows)
    log_p, log_u = logs.view(2, -1)
    p, u = first(both.sigmoid_(), 2 * n_rows).view(2, -1)
    torch.neg(log_p, out=loss)
    torch.div(sum_exp2, total * total, out=el2n).add_(1.0).sqrt_().mul_(u)
    torch.sub(z_target, maximum, out=margin)
    torch.maximum(z_target, rest_lse + maximum, out=energy).sub_(torch.maximum(log_p, log_u)).neg_()
    logs.clamp_(min=LOWEST)  # an infinite logarithm stands behind a factor of 0
    torch.mul(u, rest_lse.sub_(log_u).sub_(sum_exp_z / total), out=entropy).sub_(p * log_p)
    return five


def repair(logits: Tensor, label: Tensor, columns: Columns) -> None:
    """Recompute sum_exp_z of rows where a -inf logit made 0 * -inf, a block at a time."""
    spoilt = columns.sum_exp_z.isnan()
    if not spoilt.any():
        return
    spoilt = (spoilt & ~columns.sum_exp.isnan())[:, 0].nonzero()[:, 0]
    n_inner = logits.shape[1]
    for index in torch.split(spoilt, max(REPAIRED // logits.shape[2], 1)):
        z = logits[index // n_inner, index % n_inner].to(columns.gap.dtype).contiguous()
        z = (z - origin(columns.maximum[index])).clamp_(min=LOWEST).scatter_(1, label[index], LOWEST)
        columns.sum_exp_z[index] = row_sum(z.mul_(exp_(z, torch.empty_like(z))))
