"""The fast torch path: blocks of rows that stay in cache, a few passes each, where Triton cannot run.

Same quantities as ``kernels/``: logits [outer, inner, C] in, one number a row out, rows counted outer * inner.
`forward` and `backward` are the pair the kernels have; `visit` makes the gradient while a block is in cache, for an
upstream gradient known in advance.

A row's results do not depend, to the bit, on the rows around it. torch sees to that but for three things, met here: the
last few elements of a loop it computes by other functions than whole vectors (`_exp_`, `_by_vectors`), the last few
rows of a class-major block it adds up in another order (`_Plan.buffer`), and a single long row it splits over threads
(`_row_sum`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..losses import GapLoss
from ..reference import accumulation_dtype, check_target
from .sums import moments, row_sum, threads

try:
    import numpy
except ImportError:  # an optional extra
    numpy = None  # type: ignore[assignment]

__all__ = ["RowOutputs", "backward", "forward", "softmax", "visit"]

LOG2_E = math.log2(math.e)
LOWEST = -1000.0  # exp of this is 0 in any dtype, and 0 * LOWEST is not NaN
# Tuned by `python -m bench speed` on a 2-core AVX-512 server with 1 MiB of L2 a core, one thread.
BLOCK_ELEMENTS = 1 << 20  # at most: larger leaves the last level of cache, smaller pays its 50 operators too often
SMALLEST_BLOCK = 1 << 16  # at least, whatever share that is
WORKSPACE_SHARE = 0.15  # of one gradient's bytes, for all buffers of a call
WORKSPACE_SHARE_ALONE = 0.5  # where no gradient is made
CHUNK = 32  # classes that `_max` reduces together: amax gets cheaper as it grows, argmax dearer
NUMPY_THREADS = 4  # up to here numpy's argmax on one of them is faster than chunks on all
COLUMN_CLASSES = 64  # up to here a class-major block is faster: torch reduces a short last axis element by element
COLUMN_CLASSES_APART = 1024  # and up to here where classes lie apart; beyond, `VECTOR` rows of them would cost too much
VECTOR = 64  # elements that torch's loops take whole: a multiple of their step in any dtype and on any CPU


class RowOutputs(NamedTuple):
    """Per-row results: loss [N], scores [5, N] (or None), runner_up [N] (or None), saved (gap, max, sum_exp) [3, N]."""

    loss: Tensor
    scores: Tensor | None
    runner_up: Tensor | None
    saved: Tensor


class _Plan:
    """How the rows of one call are cut into blocks, and the buffers that blocks work in.

    Buffers hold [rows, C] in the accumulation dtype, class-major where that is faster, and take a share of the bytes of
    the logits: ``share`` beside an output ``unwritten`` of that size, else `WORKSPACE_SHARE_ALONE`. The output
    is filled in order: while the part of it behind a block offers more room, the buffers lie there.
    """

    def __init__(
        self, logits: Tensor, n_buffers: int, unwritten: Tensor | None = None, share: float = WORKSPACE_SHARE
    ) -> None:
        n_outer, n_inner, n_classes = logits.shape
        dtype = accumulation_dtype(logits.dtype)
        ratio = n_buffers * dtype.itemsize / logits.element_size()  # bytes of buffers to bytes of logits
        self.n_classes, self.by_class = n_classes, _by_class(logits)
        largest = min(max(BLOCK_ELEMENTS // n_classes, 1), n_outer * n_inner)
        share = WORKSPACE_SHARE_ALONE if unwritten is None else share
        n_elements = max(int(logits.numel() * share / ratio), SMALLEST_BLOCK)
        n_own = _whole_rows(min(max(n_elements // n_classes, 1), largest))
        self.own = logits.new_empty(n_buffers * self.padded(n_own) * n_classes, dtype=dtype)
        self.tail = None
        if unwritten is not None and not self.by_class and n_inner == 1 and unwritten.is_contiguous():
            whole = unwritten.numel() * unwritten.element_size() // dtype.itemsize * dtype.itemsize
            self.tail = unwritten.view(-1)[: whole // unwritten.element_size()].view(dtype)
        self.indices: list[tuple[slice, slice]] = []
        self.sizes: list[int] = []
        o = 0
        while o < n_outer:
            behind = int((n_outer - o - 1) / (1 + ratio)) if self.tail is not None else 0
            n_rows = _whole_rows(min(max(behind, n_own), largest))
            o_end = min(o + max(n_rows // n_inner, 1), n_outer)
            for i in range(0, n_inner, n_rows):
                i_end = min(i + n_rows, n_inner)
                self.indices.append((slice(o, o_end), slice(i, i_end)))
                self.sizes.append((o_end - o) * (i_end - i))
            o = o_end
        self.n_own = n_own

    def pieces(self, x: Tensor) -> Sequence[Tensor]:
        """Return the blocks of ``x`` [outer, inner, C], [rows, C] where there is one inner row."""
        if x.shape[1] == 1:
            return x.squeeze(1).split_with_sizes(self.sizes)
        return [x[index] for index in self.indices]

    def padded(self, n_rows: int) -> int:
        """Return how many rows a buffer for so many has."""
        return -(-n_rows // VECTOR) * VECTOR if self.by_class else n_rows

    def buffer(self, which: int, block: int) -> Tensor:
        """Return buffer number ``which`` for a block, [rows, C], class-major with rows up to a whole `VECTOR`."""
        n_rows = self.padded(self.sizes[block])
        size = n_rows * self.n_classes
        if self.by_class:
            return self.own.as_strided((n_rows, self.n_classes), (1, n_rows), which * size)
        if n_rows <= self.n_own or self.tail is None:
            return self.own.as_strided((n_rows, self.n_classes), (self.n_classes, 1), which * size)
        first = self.tail.numel() - (which + 1) * size
        return self.tail.as_strided((n_rows, self.n_classes), (self.n_classes, 1), first)


def _whole_rows(n: int) -> int:
    """Return up to ``n`` rows, if possible so many that they are whole vectors for every thread."""
    step = VECTOR * torch.get_num_threads()
    return n - n % step if n >= step else n


def _by_class(logits: Tensor) -> bool:
    return logits.shape[2] <= (COLUMN_CLASSES if logits.stride(2) == 1 else COLUMN_CLASSES_APART)


def _as_rows(piece: Tensor, rows: Tensor) -> Tensor:
    """Return the first rows of the buffer ``rows`` [N, C] shaped like a piece, which may be [outer, inner, C]."""
    if piece.dim() == 2:
        return _first(rows, piece.shape[0])
    return rows.as_strided(piece.shape, (rows.stride(0) * piece.shape[1], *rows.stride()), rows.storage_offset())


def _first(x: Tensor, n_rows: int) -> Tensor:
    """Return ``x`` [N, ...] without padding."""
    return x if x.shape[0] == n_rows else x[:n_rows]


def _fill(rows: Tensor, piece: Tensor) -> None:
    """Copy a piece into the buffer ``rows``, whose other rows become 0."""
    n_rows = piece.shape[:-1].numel()
    if n_rows < rows.shape[0]:
        rows[n_rows:].zero_()
    _as_rows(piece, rows).copy_(piece)


def _max(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the max of each row and its first index, [N, 1] each.

    torch's indexed max reads one element at a time. numpy's reads vectors, on one thread; without it or with many
    threads a long row is first reduced by chunks, whose last one reaches back into its neighbour.
    """
    n_rows, n_classes = z.shape
    if z.stride(1) != 1 or n_classes < 4 * CHUNK:
        return z.max(1, keepdim=True)
    if numpy is not None and torch.get_num_threads() <= NUMPY_THREADS:
        index = torch.from_numpy(z.numpy().argmax(1, keepdims=True))
        return z.gather(1, index), index
    whole = n_classes // CHUNK
    maxima = z.as_strided((n_rows, whole, CHUNK), (n_classes, CHUNK, 1)).amax(2)
    if whole * CHUNK < n_classes:
        last = z.as_strided((n_rows, CHUNK), (n_classes, 1), z.storage_offset() + n_classes - CHUNK)
        maxima = torch.cat([maxima, last.amax(1, keepdim=True)], 1)
    maximum, chunk = maxima.max(1, keepdim=True)
    first = chunk.mul_(CHUNK)
    if whole * CHUNK < n_classes:
        first.clamp_(max=n_classes - CHUNK)
    return maximum, first + z.gather(1, first + torch.arange(CHUNK, device=z.device)).argmax(1, keepdim=True)


class _Columns(NamedTuple):
    """What a sweep gathers of each row, [N, 1]; the last three only for scores."""

    gap: Tensor
    maximum: Tensor
    sum_exp: Tensor
    z_target: Tensor
    sum_exp2: Tensor
    sum_exp_z: Tensor
    runner_up: Tensor


def _origin(maximum: Tensor) -> Tensor:
    """Return the point to subtract: the max, but finite where it is -inf, since -inf - -inf is NaN."""
    return maximum.clamp(min=torch.finfo(maximum.dtype).min)


def _whole(n: int) -> int:
    """Return how many of ``n`` elements make whole vectors for every thread."""
    n_threads = threads(n)
    whole = n - n % (VECTOR * n_threads)
    return whole if threads(whole) == n_threads else _whole(whole)


def _exp_(shifted: Tensor, out: Tensor) -> Tensor:
    """Return e^shifted by exp2: on CPUs several times faster than exp, as accurate once the max is subtracted."""
    torch.mul(shifted, LOG2_E, out=out)
    n = out.numel()
    whole = _whole(n)
    if whole == n:
        return out.exp2_()
    flat = out.as_strided((n,), (1,), out.storage_offset())
    flat[:whole].exp2_()
    last = flat[whole:]
    last.copy_(_by_vectors(torch.exp2, last))
    return out


def _by_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the elementwise ``function`` of ``x`` [N] or [N, 1], by whole vectors: no bits tell a place."""
    return _first(function(_padded(x)), x.shape[0])


def _padded(x: Tensor) -> Tensor:
    """Return ``x`` [N] or [N, 1] with zeros up to whole vectors for every thread."""
    missing = -x.numel() % (VECTOR * threads(x.numel()))
    return torch.constant_pad_nd(x, (0, missing) if x.dim() == 1 else (0, 0, 0, missing)) if missing else x


def _target_logits(logits: Tensor, label: Tensor) -> Tensor:
    """Return the label's logit of every row [N, 1]; +inf becomes the NaN it makes of its row."""
    z_target = logits.gather(2, label.view(*logits.shape[:2], 1)).view(-1, 1).to(accumulation_dtype(logits.dtype))
    return z_target.masked_fill_(z_target == math.inf, math.nan)


def _sweep(z: Tensor, label: Tensor, z_target: Tensor, e: Tensor, scores: bool) -> _Columns:
    """Summarise the rows ``z`` [N, C], which are overwritten; leave exp(z - max), 0 at the label, in ``e``.

    Rows of ``z`` and ``e`` beyond the labels are padding.
    """
    z.scatter_(1, label, -math.inf)
    maximum, runner_up = _max(z) if scores else (z.amax(1, keepdim=True), label)
    z.sub_(_origin(maximum))
    z.scatter_(1, label, LOWEST)
    sum_exp = row_sum(_exp_(z, e))
    n_rows = label.shape[0]
    maximum, runner_up, sum_exp = (_first(x, n_rows) for x in (maximum, runner_up, sum_exp))
    gap = (z_target - maximum).sub_(sum_exp.log())
    if not scores:
        return _Columns(gap, maximum, sum_exp, z_target, sum_exp, sum_exp, runner_up)
    sum_exp_z, sum_exp2 = (_first(x, n_rows) for x in moments(z, e))  # NaN if a logit is -inf: `_repair`
    return _Columns(gap, maximum, sum_exp, z_target, sum_exp2, sum_exp_z, runner_up)


def _repair(logits: Tensor, label: Tensor, columns: _Columns) -> None:
    """Recompute sum_exp_z of rows where a -inf logit made 0 * -inf, a block at a time."""
    spoilt = columns.sum_exp_z.isnan()
    if not spoilt.any():
        return
    spoilt = (spoilt & ~columns.sum_exp.isnan())[:, 0].nonzero()[:, 0]
    n_inner = logits.shape[1]
    for index in torch.split(spoilt, max(BLOCK_ELEMENTS // (8 * logits.shape[2]), 1)):
        z = logits[index // n_inner, index % n_inner].to(columns.gap.dtype).contiguous()
        z = (z - _origin(columns.maximum[index])).clamp_(min=LOWEST).scatter_(1, label[index], LOWEST)
        columns.sum_exp_z[index] = row_sum(z.mul_(_exp_(z, torch.empty_like(z))))


def _finish(columns: _Columns, counts: Tensor | None, loss: GapLoss, scores: bool) -> RowOutputs:
    """Turn a sweep's columns into loss and scores, once for all rows."""
    gap, maximum, sum_exp, z_target, sum_exp2, sum_exp_z, runner_up = (c.squeeze(1) for c in columns)
    n_rows = gap.shape[0]
    value = _by_vectors(loss.value, gap)
    value = value.clone() if counts is None else value.masked_fill(~counts, 0.0)  # no view leaves an operator
    saved = torch.stack([gap, maximum, sum_exp])
    if not scores:
        return RowOutputs(value, None, None, saved)
    five = gap.new_empty(5, n_rows)
    plain, el2n, margin, entropy, energy = five.unbind()
    total = sum_exp.clamp(min=1.0)  # a rest that is not empty holds exp(0)
    rest_lse = total.log()
    both = _padded(torch.cat([gap, -gap]))
    p, u = _first(torch.sigmoid(both), 2 * n_rows).view(2, -1)
    minus_logs = _first(logsigmoid(both).neg_(), 2 * n_rows)
    minus_log_p, minus_log_u = minus_logs.view(2, -1)
    plain.copy_(minus_log_p)
    torch.div(sum_exp2, total * total, out=el2n).add_(1.0).sqrt_().mul_(u)
    torch.sub(z_target, maximum, out=margin)
    torch.maximum(z_target, rest_lse + maximum, out=energy).add_(torch.minimum(minus_log_p, minus_log_u)).neg_()
    minus_logs.clamp_(max=-LOWEST)  # an infinite logarithm stands behind a factor of 0
    torch.mul(p, minus_log_p, out=entropy).add_(minus_log_u.add_(rest_lse).sub_(sum_exp_z / total).mul_(u))
    five = five.to(torch.float32)
    unknown = gap.isnan() if counts is None else gap.isnan() | ~counts
    if unknown.any():
        five.masked_fill_(unknown, math.nan)
    runner_up = runner_up.to(torch.int32).masked_fill_(unknown | (maximum == -math.inf), -1)
    return RowOutputs(value, five, runner_up, saved)


def _labels(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
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
    e = _first(e, len(label))
    e.mul_(slope / sum_exp.clamp(min=1.0))
    pull = slope * sum_exp.clamp(max=1.0)
    e.scatter_(1, label, pull * 0.0 - pull)
    return e if counts is None else e.masked_fill_(~counts[:, None], 0.0)


def forward(logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool) -> RowOutputs:
    """One read of the logits: loss, scores and what `backward` needs."""
    return visit(logits, target, ignore_index, loss, scores, None)[0]


def visit(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, grad_loss: Tensor | None
) -> tuple[RowOutputs, Tensor | None]:
    """As `forward`; with ``grad_loss`` [N] or [1] also the gradient, made while each block is in cache."""
    grad = None if grad_loss is None else torch.empty_like(logits)
    if logits.numel() == 0:  # no rows, or rows without classes, which can only be ignored
        nothing = logits.new_full((target.numel(), 1), math.nan, dtype=accumulation_dtype(logits.dtype))
        columns = _Columns(*(nothing,) * 6, torch.zeros_like(nothing, dtype=torch.int64))
        return _finish(columns, torch.zeros_like(target.reshape(-1), dtype=torch.bool), loss, scores), grad
    label, counts = _labels(logits, target, ignore_index)
    columns = _blocks(logits, label, counts, loss, scores, grad_loss, grad)
    if scores:
        _repair(logits, label, columns)
    return _finish(columns, counts, loss, scores), grad


def _blocks(
    logits: Tensor, label: Tensor, counts: Tensor | None, loss: GapLoss, scores: bool, grad_loss: Tensor | None,
    grad: Tensor | None,
) -> _Columns:  # fmt: skip
    """Sweep block after block and fill ``grad``; the buffers are free again on return."""
    by_row = grad is not None and grad.is_contiguous() and grad.shape[1] == 1 and not _by_class(logits)
    in_place = by_row and logits.dtype == accumulation_dtype(logits.dtype)  # the gradient holds the exponentials
    plan = _Plan(logits, 1 if in_place else 2, grad)
    sources, labels = plan.pieces(logits), label.split_with_sizes(plan.sizes)
    z_targets = _target_logits(logits, label).split_with_sizes(plan.sizes)
    keeps = None if counts is None else counts.split_with_sizes(plan.sizes)
    found = []
    if grad is not None and grad_loss is not None:
        grads = plan.pieces(grad)
        weights = grad_loss[:, None].expand(len(label), 1).split_with_sizes(plan.sizes)
    for i, source in enumerate(sources):
        z = plan.buffer(0, i)
        e = grads[i] if in_place else plan.buffer(1, i)
        _fill(z, source)
        found.append(_sweep(z, labels[i], z_targets[i], e, scores))
        if grad is not None:
            slope = _by_vectors(loss.slope, found[i].gap) * weights[i]
            _spread(e, slope, found[i].sum_exp, labels[i], None if keeps is None else keeps[i])
            if not in_place:
                grads[i].copy_(_as_rows(source, e))
    return found[0] if len(found) == 1 else _Columns(*map(torch.cat, zip(*found, strict=True)))


def backward(
    logits: Tensor, target: Tensor, saved: Tensor, grad_loss: Tensor, ignore_index: int, loss: GapLoss
) -> Tensor:
    """Return the gradient from the saved columns [3, N] and the upstream gradient [N]: one read, one write."""
    slope = _by_vectors(loss.slope, saved[0]) * grad_loss.to(saved.dtype)
    return _second_sweep(logits, target, ignore_index, saved, slope, None)


def softmax(logits: Tensor, target: Tensor, saved: Tensor, ignore_index: int) -> Tensor:
    """Return the probabilities in the dtype of the logits, 0 where ignored; the label's is sigmoid(gap)."""
    gap = saved[0]
    return _second_sweep(
        logits, target, ignore_index, saved, _by_vectors(torch.sigmoid, -gap), _by_vectors(torch.sigmoid, gap)
    )


def _second_sweep(
    logits: Tensor, target: Tensor, ignore_index: int, saved: Tensor, scale: Tensor, at_label: Tensor | None
) -> Tensor:
    """Return scale exp(z - max) / sum_exp, with ``at_label`` (by default -scale) at the label, 0 where ignored."""
    out = torch.empty_like(logits)
    if logits.numel() == 0:
        return out
    label, counts = _labels(logits, target, ignore_index)
    _, maximum, sum_exp = saved
    plan = _Plan(logits, 1, out)
    sources, outs = plan.pieces(logits), plan.pieces(out)
    row = 0
    for i, n_rows in enumerate(plan.sizes):
        rows = slice(row, row + n_rows)
        row += n_rows
        e = plan.buffer(0, i)
        _fill(e, sources[i])
        _first(e, n_rows).sub_(_origin(maximum[rows, None]))
        _exp_(e, e)
        _spread(e, scale[rows, None], sum_exp[rows, None], label[rows], None if counts is None else counts[rows])
        if at_label is not None:
            keep = at_label[rows] if counts is None else at_label[rows].masked_fill(~counts[rows], 0.0)
            e.scatter_(1, label[rows], keep[:, None])
        outs[i].copy_(_as_rows(outs[i], e))
    return out
