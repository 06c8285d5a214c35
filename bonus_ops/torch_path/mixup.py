"""The fast torch path for two labels a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import GapLoss
from .blocks import Blocks, as_rows
from .labels import target_logits
from .maximum import origin
from .vectors import LOG2_E

__all__ = ["backward", "forward"]


def _labels(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return gatherable labels [2, N, 1] and which of them count [2, N]."""
    counts = (targets != ignore_index).reshape(2, -1)
    return torch.where(counts, targets.reshape(2, -1), 0)[:, :, None], counts


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, loss: GapLoss, values: Tensor, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill losses and saved columns: one read of the logits."""
    labels, counts = _labels(targets, ignore_index)
    z_a, z_b = (target_logits(logits, label)[:, 0].masked_fill(~c, -torch.inf) for label, c in
                zip(labels, counts, strict=True))  # fmt: skip
    blocks = Blocks(logits, 1)
    found = []
    row = 0
    for i, source in enumerate(blocks.pieces(logits)):
        n_rows = blocks.sizes[i]
        z = blocks.buffer(0, i)[:n_rows]
        as_rows(source, z).copy_(source)
        for label, c in zip(labels, counts, strict=True):
            here = label[row : row + n_rows]
            z.scatter_(1, here, z.gather(1, here).masked_fill_(c[row : row + n_rows, None], -torch.inf))
        maximum = z.amax(1, keepdim=True)
        z.sub_(origin(maximum))
        found.append(torch.cat([maximum, z.mul_(LOG2_E).exp2_().sum(1, keepdim=True)], 1))
        row += n_rows
    maximum, sum_exp = torch.cat(found).unbind(1)
    same = (labels[0, :, 0] == labels[1, :, 0]) & counts[0] & counts[1]
    others = z_b.masked_fill(same, -torch.inf), z_a.masked_fill(same, -torch.inf)
    saved[2] = maximum
    for i, (z_label, other) in enumerate(zip((z_a, z_b), others, strict=True)):
        highest = torch.maximum(maximum, other)
        shift = origin(highest)
        total = sum_exp * torch.exp(maximum - shift) + torch.exp(other - shift)
        empty = total == 0
        log_total = torch.where(empty, 1.0, total).log()
        gap = torch.where(empty, torch.inf, (z_label - shift) - log_total)
        gap = gap + torch.where(z_label.isnan() | (empty & (z_label == -torch.inf) & counts[i]), torch.nan, 0.0)
        saved[i], values[i] = gap, loss.value(gap).masked_fill_(~counts[i], 0.0)
        saved[3 + i] = torch.where(empty, -torch.inf, (maximum - shift) - log_total)
        saved[6 - i] = torch.where(empty, -torch.inf, (other - shift) - log_total)
    return values, saved


def backward(
    logits: Tensor, targets: Tensor, ignore_index: int, loss: GapLoss, saved: Tensor, grad_loss: Tensor, grad: Tensor
) -> Tensor:
    """Fill the gradient: one read of the logits, one write."""
    labels, counts = _labels(targets, ignore_index)
    slopes = loss.slope(saved[:2]) * grad_loss.to(saved.dtype)
    slopes = slopes.masked_fill_(~counts | (saved[:2] == torch.inf), 0.0)
    a, b = slopes
    scale = a * torch.exp(saved[3]) + b * torch.exp(saved[4])
    same = (labels[0, :, 0] == labels[1, :, 0]) & counts[0] & counts[1]
    at_a = torch.where(same, -b, b * torch.exp(saved[5])) - a
    at_b = torch.where(same, -a, a * torch.exp(saved[6])) - b
    blocks = Blocks(logits, 1, grad)
    row = 0
    for i, (source, out) in enumerate(zip(blocks.pieces(logits), blocks.pieces(grad), strict=True)):
        rows = slice(row, row + blocks.sizes[i])
        row = rows.stop
        e = blocks.buffer(0, i)[: blocks.sizes[i]]
        as_rows(source, e).copy_(source)
        e.sub_(origin(saved[2, rows, None])).mul_(LOG2_E).exp2_().mul_(scale[rows, None])
        for label, c, at in ((labels[0], counts[0], at_a), (labels[1], counts[1], at_b)):
            here = label[rows]
            e.scatter_(1, here, torch.where(c[rows, None], at[rows, None], e.gather(1, here)))
        e.masked_fill_(~(counts[0] | counts[1])[rows, None], 0.0)
        out.copy_(as_rows(out, e))
    return grad
