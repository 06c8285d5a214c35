"""The fast torch path: blocks of rows that stay in cache, a few passes each, where Triton cannot run.

Same quantities as ``kernels/``: logits [outer, inner, C] in, one number a row out, rows counted outer * inner.
`visit` and `backward` are the pair the kernels have; for an upstream gradient known in advance `visit` makes the
gradient too, while a block is in cache.

A row's results do not depend, to the bit, on the rows around it. torch sees to that but for three things, met here: the
last few elements of a loop it computes by other functions than whole vectors (`vectors`), the last few rows of a
class-major block it adds up in another order (`Blocks.buffer`), and a single long row it splits over threads
(`sums.row_sum`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..losses import GapLoss
from ..reference import accumulation_dtype, check_target
from .blocks import Blocks, as_rows, by_class, fill
from .columns import Columns, RowOutputs, finish, repair
from .maximum import origin, row_max
from .sums import moments, row_sum
from .vectors import LOWEST, by_vectors, exp_, first

__all__ = ["backward", "gatherable", "softmax", "target_logits", "visit"]


def target_logits(logits: Tensor, label: Tensor) -> Tensor:
    """Return the label's logit of every row [N, 1]; +inf becomes the NaN it makes of its row."""
    z_target = logits.gather(2, label.view(*logits.shape[:2], 1)).view(-1, 1)
    return _or_nan(z_target.to(accumulation_dtype(logits.dtype)))


def _or_nan(z_target: Tensor) -> Tensor:
    return z_target.nan_to_num_(nan=math.nan, posinf=math.nan, neginf=-math.inf)


def _sweep(z: Tensor, label: Tensor, e: Tensor, scores: bool) -> Columns:
    """Summarise the rows ``z`` [N, C], which are overwritten; leave exp(z - max), 0 at the label, in ``e``.

    Rows of ``z`` and ``e`` beyond the labels are padding.
    """
    z_target = _or_nan(z.gather(1, label))
    z.scatter_(1, label, -math.inf)
    maximum, runner_up = row_max(z) if scores else (z.amax(1, keepdim=True), label)
    z.sub_(origin(maximum))
    z.scatter_(1, label, LOWEST)
    sum_exp = row_sum(exp_(z, e))
    n_rows = label.shape[0]
    maximum, runner_up, sum_exp = (first(x, n_rows) for x in (maximum, runner_up, sum_exp))
    gap = (z_target - maximum).sub_(sum_exp.log())
    if not scores:
        return Columns(gap, maximum, sum_exp, z_target, sum_exp, sum_exp, runner_up)
    sum_exp_z, sum_exp2 = (first(x, n_rows) for x in moments(z, e))  # NaN if a logit is -inf: `repair`
    return Columns(gap, maximum, sum_exp, z_target, sum_exp2, sum_exp_z, runner_up)


def gatherable(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Return a gatherable label for every row [N, 1] and which rows count [N], None if all do."""
    target = target.reshape(-1)
    n_classes = logits.shape[2]
    lowest, highest = (x.item() for x in target.aminmax())
    if lowest >= 0 and highest < n_classes and not 0 <= ignore_index < n_classes:
        return target.long()[:, None], None
    check_target(target, n_classes, ignore_index)
    counts = target != ignore_index
    return torch.where(counts, target.long(), 0)[:, None], counts


def _spread(e: Tensor, slope: Tensor, sum_exp: Tensor, label: Tensor, counts: Tensor | None) -> Tensor:
    """Turn exp(z - max) into the gradient: slope / sum_exp times it, -slope at the label, 0 where ignored.

    A sum below 1 is 0: a row with no rest, which teaches nothing. At the label an infinite slope is NaN, as torch's.
    """
    e = first(e, len(label))
    e.mul_(slope / sum_exp.clamp(min=1.0))
    pull = slope * sum_exp.clamp(max=1.0)
    e.scatter_(1, label, pull * 0.0 - pull)
    return e if counts is None else e.masked_fill_(~counts[:, None], 0.0)


def visit(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, grad_loss: Tensor | None
) -> tuple[RowOutputs, Tensor | None]:
    """Return loss, scores and what `backward` needs; with ``grad_loss`` [N] or [1] the gradient too, else None."""
    grad = None if grad_loss is None else torch.empty_like(logits)
    if logits.numel() == 0:  # no rows, or rows without classes, which can only be ignored
        nothing = logits.new_full((target.numel(), 1), math.nan, dtype=accumulation_dtype(logits.dtype))
        columns = Columns(*(nothing,) * 6, torch.zeros_like(nothing, dtype=torch.int64))
        return finish(columns, torch.zeros_like(target.reshape(-1), dtype=torch.bool), loss, scores), grad
    label, counts = gatherable(logits, target, ignore_index)
    columns = Columns.joined(_blocks(logits, label, counts, loss, scores, grad_loss, grad))
    if scores:
        repair(logits, label, columns)
    return finish(columns, counts, loss, scores), grad


def _blocks(
    logits: Tensor, label: Tensor, counts: Tensor | None, loss: GapLoss, scores: bool, grad_loss: Tensor | None,
    grad: Tensor | None,
) -> list[Columns]:  # fmt: skip
    """Sweep block after block and fill ``grad``; the buffers are free again on return."""
    by_row = grad is not None and grad.is_contiguous() and grad.shape[1] == 1 and not by_class(logits)
    in_place = by_row and logits.dtype == accumulation_dtype(logits.dtype)  # the gradient holds the exponentials
    blocks = Blocks(logits, 1 if in_place else 2, grad, in_place=in_place)
    sources, labels = blocks.pieces(logits), label.split_with_sizes(blocks.sizes)
    keeps = None if counts is None else counts.split_with_sizes(blocks.sizes)
    found = []
    if grad is not None and grad_loss is not None:
        grads = blocks.pieces(grad)
        weights = grad_loss[:, None].expand(len(label), 1).split_with_sizes(blocks.sizes)
    for i, source in enumerate(sources):
        z = blocks.buffer(0, i)
        e = grads[i] if in_place else blocks.buffer(1, i)
        fill(z, source)
        found.append(_sweep(z, labels[i], e, scores))
        if grad is not None:
            slope = by_vectors(loss.slope, found[i].gap) * weights[i]
            _spread(e, slope, found[i].sum_exp, labels[i], None if keeps is None else keeps[i])
            if not in_place:
                grads[i].copy_(as_rows(source, e))
    return found


def backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: GapLoss
) -> Tensor:
    """Return the gradient from the saved columns [3, N] and the upstream gradient [N]: one read, one write."""
    slope = by_vectors(loss.slope, saved[0]) * grad_loss.to(saved.dtype)
    return _second_sweep(logits, target, ignore_index, saved, slope, None)


def softmax(logits: Tensor, target: Tensor, saved: Tensor, ignore_index: int) -> Tensor:
    """Return the probabilities in the dtype of the logits, 0 where ignored; the label's is sigmoid(gap)."""
    gap = saved[0]
    return _second_sweep(
        logits, target, ignore_index, saved, by_vectors(torch.sigmoid, -gap), by_vectors(torch.sigmoid, gap)
    )


def _second_sweep(
    logits: Tensor, target: Tensor, ignore_index: int, saved: Tensor, scale: Tensor, at_label: Tensor | None
) -> Tensor:
    """Return scale exp(z - max) / sum_exp, with ``at_label`` (by default -scale) at the label, 0 where ignored."""
    out = torch.empty_like(logits)
    if logits.numel() == 0:
        return out
    label, counts = gatherable(logits, target, ignore_index)
    _, maximum, sum_exp = saved
    blocks = Blocks(logits, 1, out)
    sources, outs = blocks.pieces(logits), blocks.pieces(out)
    row = 0
    for i, n_rows in enumerate(blocks.sizes):
        rows = slice(row, row + n_rows)
        row += n_rows
        e = blocks.buffer(0, i)
        fill(e, sources[i])
        first(e, n_rows).sub_(origin(maximum[rows, None]))
        exp_(e, e)
        _spread(e, scale[rows, None], sum_exp[rows, None], label[rows], None if counts is None else counts[rows])
        if at_label is not None:
            keep = at_label[rows] if counts is None else at_label[rows].masked_fill(~counts[rows], 0.0)
            e.scatter_(1, label[rows], keep[:, None])
        outs[i].copy_(as_rows(outs[i], e))
    return out
