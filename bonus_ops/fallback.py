"""The fast torch path: blocks of rows that stay in cache, a few passes each, where Triton cannot run.

Same quantities as ``kernels/``: logits [outer, inner, C] in, one number a row out, rows counted outer * inner.
`forward` and `backward` are the pair the kernels have; `visit` makes the gradient while a block is in cache, for an
upstream gradient known in advance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .losses import GapLoss
from .reference import accumulation_dtype, check_target

__all__ = ["RowOutputs", "backward", "forward", "softmax", "visit"]

LOG2_E = math.log2(math.e)
LOWEST = -1000.0  # exp of this is 0 in any dtype, and 0 * LOWEST is not NaN
BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: measured best of 2^16..2^20 on 1000 and 32000 classes, 1 MiB of L2
COLUMN_CLASSES = 64  # up to here a class-major block is faster: torch reduces a short last axis element by element


class RowOutputs(NamedTuple):
    """Per-row results: loss [N], scores [5, N] (or None), runner_up [N] (or None), saved (gap, max, sum_exp) [3, N]."""

    loss: Tensor
    scores: Tensor | None
    runner_up: Tensor | None
    saved: Tensor


class _Block(NamedTuple):
    """A block of rows: where it lies in the logits and in the flat count of rows."""

    outer: slice
    inner: slice
    rows: slice


def _blocks(logits: Tensor) -> Iterator[_Block]:
    n_outer, n_inner, n_classes = logits.shape
    n_rows = max(BLOCK_ELEMENTS // max(n_classes, 1), 1)
    per_outer = min(n_inner, n_rows)
    per_block = max(n_rows // max(n_inner, 1), 1) if per_outer == n_inner else 1
    for o in range(0, n_outer, per_block):
        o_end = min(o + per_block, n_outer)
        for i in range(0, n_inner, max(per_outer, 1)):
            i_end = min(i + per_outer, n_inner)
            first = o * n_inner + i
            yield _Block(slice(o, o_end), slice(i, i_end), slice(first, first + (o_end - o) * (i_end - i)))


class _Workspace:
    """Buffers in the accumulation dtype that every block of one call uses again."""

    def __init__(self, logits: Tensor, n_buffers: int) -> None:
        self.by_class = logits.shape[-1] <= COLUMN_CLASSES or logits.stride(-1) != 1
        self.n_classes = logits.shape[-1]
        largest = max((b.rows.stop - b.rows.start for b in _blocks(logits)), default=0)
        dtype = accumulation_dtype(logits.dtype)
        self.buffers = [logits.new_empty(largest * self.n_classes, dtype=dtype) for _ in range(n_buffers)]

    def rows(self, which: int, n_rows: int) -> Tensor:
        """Return a [n_rows, C] view of a buffer, class-major where that is faster."""
        flat = self.buffers[which][: n_rows * self.n_classes]
        return flat.view(self.n_classes, n_rows).t() if self.by_class else flat.view(n_rows, self.n_classes)


def _load(logits: Tensor, block: _Block, out: Tensor) -> Tensor:
    source = logits[block.outer, block.inner]
    _split(out, source).copy_(source)
    return out


def _store(values: Tensor, out: Tensor, block: _Block) -> None:
    destination = out[block.outer, block.inner]
    destination.copy_(_split(values, destination))


def _split(rows: Tensor, like: Tensor) -> Tensor:
    """Return [N, C] rows as [outer, inner, C]."""
    n_inner = like.shape[1]
    return rows.as_strided(like.shape, (rows.stride(0) * n_inner, *rows.stride()), rows.storage_offset())


def _max(z: Tensor, with_index: bool) -> tuple[Tensor, Tensor | None]:
    """Return the max of each row [N, 1] and its first index: chunk by chunk, since torch's indexed max is scalar."""
    n_rows, n_classes = z.shape
    if not with_index:
        return z.amax(1, keepdim=True), None
    chunk = 64
    whole = n_classes // chunk * chunk
    if z.stride(1) != 1 or whole < 4 * chunk:
        maximum, index = z.max(1, keepdim=True)
        return maximum, index
    chunks = z[:, :whole].view(n_rows, -1, chunk)
    maximum, which = chunks.amax(2).max(1, keepdim=True)
    best = chunks[torch.arange(n_rows, device=z.device), which[:, 0]]
    index = which * chunk + best.argmax(1, keepdim=True)
    if whole < n_classes:
        tail, tail_index = z[:, whole:].max(1, keepdim=True)
        index = torch.where(tail > maximum, tail_index + whole, index)
        maximum = torch.maximum(maximum, tail)
    return maximum, index


def _weighted_sum(e: Tensor, z: Tensor, sum_exp: Tensor) -> Tensor:
    """Return sum e z over each row, overwriting z; 0 where e is 0."""
    total = z.mul_(e).sum(1)
    spoilt = total.isnan() & ~sum_exp.isnan()
    if spoilt.any():  # a -inf logit made 0 * -inf
        total = z.nan_to_num_(nan=0.0).sum(1).masked_fill_(sum_exp.isnan(), math.nan)
    return total


class _Columns(NamedTuple):
    """What a sweep gathers, [N] each."""

    z_target: Tensor
    maximum: Tensor
    sum_exp: Tensor
    sum_exp2: Tensor
    sum_exp_z: Tensor
    runner_up: Tensor
    gap: Tensor


def _no_columns(logits: Tensor) -> _Columns:
    n_rows = logits.shape[0] * logits.shape[1]
    floats = logits.new_zeros(6, n_rows, dtype=accumulation_dtype(logits.dtype))
    z_target, maximum, sum_exp, sum_exp2, sum_exp_z, gap = floats.unbind()
    runner_up = logits.new_zeros(n_rows, dtype=torch.int64)
    return _Columns(z_target, maximum, sum_exp, sum_exp2, sum_exp_z, runner_up, gap)


def _gap(z_target: Tensor, maximum: Tensor, sum_exp: Tensor) -> Tensor:
    gap = (z_target - maximum) - sum_exp.log()
    nothing = sum_exp == 0
    gap = gap.masked_fill(nothing, math.inf)
    return gap.masked_fill(nothing & (z_target == -math.inf) | (z_target == math.inf) | z_target.isnan(), math.nan)


def _sweep(logits: Tensor, block: _Block, label: Tensor, z: Tensor, e: Tensor, to: _Columns, scores: bool) -> None:
    """Fill ``to`` for one block, leaving exp(logits - max), 0 at the label, in ``e``."""
    rows = block.rows
    _load(logits, block, z)
    z_target = z.gather(1, label)
    z.scatter_(1, label, -math.inf)
    maximum, index = _max(z, scores)
    origin = maximum.masked_fill(maximum == -math.inf, 0.0)
    z.sub_(origin)
    z.scatter_(1, label, LOWEST)
    torch.mul(z, LOG2_E, out=e)
    e.exp2_()  # several times faster than exp on CPUs, same accuracy once the max is subtracted
    sum_exp = torch.sum(e, 1)
    to.z_target[rows] = z_target[:, 0]
    to.maximum[rows] = maximum[:, 0]
    to.sum_exp[rows] = sum_exp
    to.gap[rows] = _gap(z_target[:, 0], maximum[:, 0], sum_exp)
    if scores:
        to.sum_exp2[rows] = torch.linalg.vector_norm(e, 2, 1).square_()
        to.sum_exp_z[rows] = _weighted_sum(e, z, sum_exp)
        assert index is not None
        to.runner_up[rows] = index[:, 0]


def _finish(columns: _Columns, counts: Tensor | None, loss: GapLoss, scores: bool) -> RowOutputs:
    """Turn a sweep's columns into loss and scores, once for all rows."""
    gap, total = columns.gap, columns.sum_exp.clamp(min=torch.finfo(columns.gap.dtype).tiny)
    value = loss.value(gap)
    if counts is not None:
        value = value.masked_fill_(~counts, 0.0)
    saved = torch.stack([gap, columns.maximum, columns.sum_exp])
    if not scores:
        return RowOutputs(value, None, None, saved)
    p, u = torch.sigmoid(gap), torch.sigmoid(-gap)
    plain, log_odds_loss = -logsigmoid(gap), -logsigmoid(-gap)
    log_total = total.log()
    rest_entropy = log_total - columns.sum_exp_z / total
    entropy = (p * plain).masked_fill_(p == 0, 0.0)
    entropy += (u * (log_odds_loss + rest_entropy)).masked_fill_(u == 0, 0.0)
    energy = -torch.where(gap > 0, columns.z_target + plain, columns.maximum + log_total + log_odds_loss)
    el2n = u * torch.sqrt(1 + columns.sum_exp2 / (total * total))
    margin = columns.z_target - columns.maximum
    known = (columns.maximum > -math.inf) & ~gap.isnan()
    five = torch.stack([plain, el2n, margin, entropy, energy])
    five = five.masked_fill_(gap.isnan(), math.nan)
    if counts is not None:
        five = five.masked_fill_(~counts, math.nan)
        known = known & counts
    runner_up = columns.runner_up.masked_fill(~known, -1)
    return RowOutputs(value, five.to(torch.float32), runner_up.to(torch.int32), saved)


def _labels(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Return a gatherable label for every row [N, 1] and which rows count, None if all do."""
    target = target.reshape(-1)
    n_classes = logits.shape[-1]
    lowest, highest = target.aminmax() if target.numel() else (target.sum(), target.sum())
    if lowest >= 0 and highest < n_classes and not 0 <= ignore_index < n_classes:
        return target.long()[:, None], None
    check_target(target, n_classes, ignore_index)
    counts = target != ignore_index
    return torch.where(counts, target.long(), 0)[:, None], counts


def forward(logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool) -> RowOutputs:
    """One read of the logits: loss, scores and what `backward` needs."""
    return visit(logits, target, ignore_index, loss, scores, None)[0]


def visit(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, grad_loss: Tensor | None
) -> tuple[RowOutputs, Tensor | None]:
    """As `forward`; with ``grad_loss`` [N] or [1] also the gradient, made while each block is in cache."""
    columns = _no_columns(logits)
    grad = None if grad_loss is None else torch.empty_like(logits)
    if logits.numel() == 0:
        return _finish(columns, None, loss, scores), grad
    label, counts = _labels(logits, target, ignore_index)
    # a float32 gradient takes the exponentials in place of a buffer
    in_place = grad is not None and grad.dtype == columns.gap.dtype and grad.shape[1] == 1 and grad.stride(2) == 1
    space = _Workspace(logits, 2)
    in_place = in_place and not space.by_class
    for block in _blocks(logits):
        rows = block.rows
        n_rows = rows.stop - rows.start
        z = space.rows(0, n_rows)
        e = grad[rows, 0] if in_place and grad is not None else space.rows(1, n_rows)
        _sweep(logits, block, label[rows], z, e, columns, scores)
        if grad is not None and grad_loss is not None:
            slope = loss.slope(columns.gap[rows]) * (grad_loss[rows] if grad_loss.numel() > 1 else grad_loss)
            _spread(e, slope, columns.sum_exp[rows], label[rows], None if counts is None else counts[rows])
            if not in_place:
                _store(e, grad, block)
    return _finish(columns, counts, loss, scores), grad


def _spread(e: Tensor, slope: Tensor, sum_exp: Tensor, label: Tensor, counts: Tensor | None) -> None:
    """Turn exp(logits - max) into the gradient: slope / sum_exp times it, -slope at the label, 0 where ignored."""
    empty = sum_exp == 0
    slope = torch.where(empty, slope * 0.0, slope)  # a row with no rest teaches nothing
    e.mul_((slope / sum_exp.masked_fill(empty, 1.0))[:, None])
    e.scatter_(1, label, -slope[:, None])
    if counts is not None:
        e.masked_fill_(~counts[:, None], 0.0)


def backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: GapLoss
) -> Tensor:
    """Return the gradient from the saved columns [3, N] and the upstream gradient [N]: one read, one write."""
    grad = torch.empty_like(logits)
    if logits.numel() == 0:
        return grad
    label, counts = _labels(logits, target, ignore_index)
    gap, maximum, sum_exp = saved
    slope = loss.slope(gap) * grad_loss.to(gap.dtype)
    origin = maximum.masked_fill(maximum == -math.inf, 0.0)
    space = _Workspace(logits, 1)
    for block in _blocks(logits):
        rows = block.rows
        e = _load(logits, block, space.rows(0, rows.stop - rows.start))
        e.sub_(origin[rows, None]).mul_(LOG2_E).exp2_()
        _spread(e, slope[rows], sum_exp[rows], label[rows], None if counts is None else counts[rows])
        _store(e, grad, block)
    return grad


def softmax(logits: Tensor, target: Tensor, saved: Tensor, ignore_index: int) -> Tensor:
    """Return the probabilities in the dtype of the logits, 0 where ignored; the label's is sigmoid(gap)."""
    out = torch.empty_like(logits)
    if logits.numel() == 0:
        return out
    label, counts = _labels(logits, target, ignore_index)
    gap, maximum, sum_exp = saved
    origin = maximum.masked_fill(maximum == -math.inf, 0.0)
    space = _Workspace(logits, 1)
    for block in _blocks(logits):
        rows = block.rows
        e = _load(logits, block, space.rows(0, rows.stop - rows.start))
        e.sub_(origin[rows, None]).mul_(LOG2_E).exp2_()
        scale = torch.sigmoid(-gap[rows]) / sum_exp[rows].masked_fill(sum_exp[rows] == 0, 1.0)
        e.mul_(scale[:, None]).scatter_(1, label[rows], torch.sigmoid(gap[rows])[:, None])
        if counts is not None:
            e.masked_fill_(~counts[rows, None], 0.0)
        _store(e, out, block)
    return out
