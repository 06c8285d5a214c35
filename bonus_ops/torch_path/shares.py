"""The fast torch path for targets that are shares of classes; blocks and sums are those of `labels`.

With ``T = sum t_k`` and ``pull_k`` of what the loss adds to cross-entropy, per row

    L = sum t_k (lse - z_k) + sum c(p_k)            dL/dz_j = p_j (T + sum pull_k) - (t_j + pull_j)

`visit` is the only entry: its gradient is made while a block is in cache. What the gradient does not need waits until
all blocks are done: a small operator costs what a thousand logits cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..losses import CrossEntropy, GapLoss, Loss
from ..reference import accumulation_dtype
from ..shares import Shares
from . import labels as torch_labels
from .block_share import BlockShare
from .block_sums import BlockSums, Paid
from .blocks import Blocks, as_rows, by_class
from .columns import Columns, RowOutputs, finish, repair
from .maximum import row_max
from .vectors import first

__all__ = ["visit"]

WORKSPACE_SHARE = 1.0  # of one gradient's bytes: up to four buffers, in blocks that are worth their operators


def visit(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, shares: Shares, scores: bool, grad_loss: Tensor | None
) -> tuple[RowOutputs, Tensor | None]:
    """Return loss, scores, and with ``grad_loss`` [N] or [1] the gradient, from one visit of each block of rows.

    The labels of probabilities are found on the way: ``label`` then only gives the shape.
    """
    grad = None if grad_loss is None else torch.empty_like(logits)
    if logits.numel() == 0:
        return torch_labels.visit(logits, label, ignore_index, CrossEntropy(), scores, None)[0], grad
    dtype = accumulation_dtype(logits.dtype)
    dense = shares.probabilities is not None
    index, counts = (label.reshape(-1, 1), None) if dense else torch_labels.gatherable(logits, label, ignore_index)
    t_share, v_share = shares.of_cross_entropy(logits.shape[2]), shares.of_bonus(logits.shape[2])
    both = loss.adds_to_cross_entropy and not t_share.is_as(v_share)
    by_row = grad is not None and grad.is_contiguous() and grad.shape[1] == 1 and not by_class(logits)
    in_place = by_row and logits.dtype == dtype  # the gradient holds the exponentials
    n_buffers = (1 if in_place else 2) + (1 + both if dense else 0)
    blocks = Blocks(logits, n_buffers, grad, WORKSPACE_SHARE, in_place)
    sources, labels = blocks.pieces(logits), index.split_with_sizes(blocks.sizes)
    given = None if shares.probabilities is None else blocks.pieces(shares.probabilities)
    keeps = None if counts is None else counts.split_with_sizes(blocks.sizes)
    if grad is not None and grad_loss is not None:
        grads = blocks.pieces(grad)
        weights = grad_loss[:, None].expand(len(index), 1).split_with_sizes(blocks.sizes)
    found, paid = [], []
    for i, source in enumerate(sources):
        z, *buffers = (first(blocks.buffer(k, i), blocks.sizes[i]) for k in range(n_buffers))
        as_rows(source, z).copy_(source)
        e = grads[i] if in_place else buffers.pop()
        row_label = labels[i]
        if given is None:
            v = BlockShare.of_labels(v_share, row_label, dtype)
            t = BlockShare.of_labels(t_share, row_label, dtype) if both else v
        else:
            for buffer in buffers:
                as_rows(given[i], buffer).copy_(given[i])
            row_label = row_max(buffers[0])[1]
            v = BlockShare.of_probabilities(v_share, row_label, buffers[0])
            t = BlockShare.of_probabilities(t_share, row_label, buffers[1]) if both else v
        block = BlockSums(z, e, row_label, loss, t if loss.adds_to_cross_entropy else None, v, scores)
        found.append((*block.columns, row_label))
        paid.append(block.paid)
        if grad is not None:
            block.gradient(weights[i])
            if keeps is not None:
                e.masked_fill_(~keeps[i][:, None], 0.0)
            if not in_place:
                grads[i].copy_(as_rows(grads[i], e))
    *sums, index = map(_joined, zip(*found, strict=True))
    columns = Columns(*sums)
    if scores:
        repair(logits, index, columns)
    out = finish(columns, counts, CrossEntropy(), scores)
    value = _value(Paid(*map(_joined, zip(*paid, strict=True))), columns.sum_exp, loss).squeeze(1)
    return out._replace(loss=value if counts is None else value.masked_fill_(~counts, 0.0)), grad


def _joined(parts: tuple[Any, ...]) -> Any:
    """Return the columns [n, 1] or [2, n, 1] of all blocks as one; a number is the same in all."""
    return torch.cat(parts, -2) if isinstance(parts[0], Tensor) and len(parts) > 1 else parts[0]


def _value(paid: Paid, sum_exp: Tensor, loss: Loss) -> Tensor:
    """Return the loss of every row, [N, 1]."""
    gap, value = paid.gaps[0], paid.classes + torch.zeros_like(sum_exp)
    if loss.adds_to_cross_entropy:
        lse = sum_exp.clamp(min=1.0).log() - logsigmoid(-gap)  # from the max of the rest
        of_others = paid.t_total * lse
        if isinstance(paid.t_total, Tensor):
            of_others.masked_fill_(paid.t_total == 0, 0.0)
        elif paid.t_total == 0:
            of_others = torch.zeros_like(lse)
        value = value + (of_others - paid.t[0] * logsigmoid(gap) - paid.share_of_z)
    if not loss.is_cross_entropy():
        if isinstance(loss, GapLoss):
            apart = paid.v * loss.excess(paid.gaps)  # the gap is exact where 1 - p underflows
        else:
            p, rest = torch.sigmoid(paid.gaps), torch.sigmoid(-paid.gaps)
            apart = loss.class_value(p, rest, p, paid.v)
        apart[1].masked_fill_(paid.absent, 0.0)
        value = value + apart.sum(0)
    return value
