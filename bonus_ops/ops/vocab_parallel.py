"""A loss of logits, or of a last layer, whose classes are spread over ranks: with its gradient, by `shards`.

Logits: one all-gather in forward, a second of two floats a row where a bonus is smoothed or a loss is of all classes,
nothing in backward. A layer:
chunks of rows as in `chunks`; while a chunk's sums travel, the next chunk's logits are made, so two chunks share the
budget. Gradients of a reduced loss are made in
forward; those of reduction "none" wait, and make the logits again from the sums that are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..call import Call, as_rows
from ..linear_call import LinearCall
from ..losses import CrossEntropy
from ..row_sums import RowSums
from ..scores import Scores
from ..soft_targets import SoftTargets
from . import shards
from .chunks import Layer, Products, row_bytes, rows_of_chunk
from .shards import Facts, Saved, Shard, Smoothed, Sums, Terms

__all__ = ["LinearResult", "OfRows", "chunk_rows", "rows_of", "run", "run_linear"]


def terms_of(call: Call) -> Terms:
    """Return what the rows of a call pay; `Call.n_classes` is that of all ranks where there are class weights."""
    dtype = reference.accumulation_dtype(call.input.dtype)
    row_weight = call.row_weight()
    n_weights = None if call.weight is None and call.bonus_weight is None else call.n_classes
    loss = call.loss.current
    loss = CrossEntropy() if loss.is_cross_entropy() else loss
    if call.kind == "labels":
        label_weight = None if row_weight is None else row_weight.to(dtype)
        return Terms(loss, None, label_weight, call.options, call.ignore_index, n_weights)
    weight, bonus_weight = (None if x is None else x.detach().to(dtype) for x in (call.weight, call.bonus_weight))
    if bonus_weight is not None and call.reduction == "mean" and row_weight is not None:
        # a weighted cross-entropy is divided by its weights, the bonus by the number of rows
        bonus_weight = bonus_weight * (call.divisor(row_weight) / call.divisor(None))
    targets = SoftTargets(None, weight, bonus_weight, call.smoothing, call.bonus_smoothing)
    return Terms(loss, targets, None, call.options, call.ignore_index, n_weights)


# --- logits -----------------------------------------------------------------------------------------------------------


def run(call: Call, input: Tensor, shard: Shard, validate: bool) -> tuple[Tensor, Scores | None]:
    """Return loss and scores of this rank's logits; ``call`` is of the logits of all ranks."""
    rows = as_rows(input)
    logits, label = rows.flatten(0, 1), call.target.reshape(-1)
    loss, lse, *others = _OfLogits.apply(  # type: ignore[no-untyped-call]
        logits, label, terms_of(call), shard, call.scores, validate
    )
    weight = call.row_weight()
    divisor = call.divisor(weight) if call.reduction == "mean" else None
    loss = call.reduced(loss, divisor, lse if call.options.z_loss else None)
    loss = (call.shaped(loss) if call.reduction == "none" else loss).to(call.dtype)
    return loss, call.scores_of((*others[0].unbind(), others[1])) if call.scores else None


def _check_once() -> None:
    """Raise where the gradient is to be differentiated again, which would be without the other ranks' part."""
    if torch.is_grad_enabled():
        raise RuntimeError("classes spread over ranks: no second derivative; expected backward without create_graph")


class OfRows(NamedTuple):
    """What all ranks know of rows, each [N]; where ignored, 0 for the loss and its logsumexp."""

    loss: Tensor
    lse: Tensor
    sums: RowSums
    n_classes: Tensor
    more: Smoothed | None


def rows_of(logits: Tensor, label: Tensor, shard: Shard, terms: Terms, scores: bool, validate: bool) -> OfRows:
    """Return what follows from one all-gather, or two, of this rank's logits [N, C_local]."""
    sums = shards.local_sums(logits, label, shard, terms)
    floats = shards.message(sums, shard, terms, scores)
    facts = shards.facts_of(shard, logits.shape[1], label)
    ints, n = torch.int64 if floats.dtype == torch.float64 else torch.int32, len(facts)
    work, parts = shards.gather(shard.group, torch.cat([facts.to(ints).view(floats.dtype), floats]))
    work.wait()
    known = Facts(*parts[:, :n].contiguous().view(ints).long().unbind(1))
    merged = shards.merged(parts[:, n:], terms, scores)
    n_classes = (known.stop - known.first).sum()
    if logits.device.type == "cpu" or validate:
        shards.check_facts(known, terms.n_weights)
        reference.check_target(label, int(n_classes), terms.ignore_index)
    counts = label != terms.ignore_index
    bad = counts & ((label < 0) | (label >= n_classes)) | shards.faulty(known, terms.n_weights)
    rest = merged.rest._replace(z_target=merged.rest.z_target.masked_fill(bad, torch.nan))
    merged = merged._replace(rest=rest)
    more = second_of(logits, label, shard, terms, merged, n_classes)
    loss, lse = (x.masked_fill(~counts, 0.0) for x in shards.value_of(merged, label, terms, n_classes, more))
    return OfRows(loss, lse, rest, n_classes, more)


def second_of(
    logits: Tensor, label: Tensor, shard: Shard, terms: Terms, sums: Sums, n_classes: Tensor
) -> Smoothed | None:
    """Return what a second all-gather tells, where all classes pay what is not cross-entropy."""
    if not terms.spreads_bonus:
        return None
    work, parts = shards.gather(shard.group, shards.smoothed_sums(logits, label, shard, terms, sums, n_classes))
    work.wait()
    return shards.smoothed(parts, sums)


class _OfLogits(torch.autograd.Function):
    """``apply(logits, label, terms, shard, scores, validate)``: loss and logsumexp of rows, and their scores."""

    @staticmethod
    def forward(ctx, logits, label, terms, shard, scores, validate):  # type: ignore[no-untyped-def]
        loss, lse, sums, n_classes, more = rows_of(logits, label, shard, terms, scores, validate)
        ctx.save_for_backward(logits, label, n_classes, *shards.saved_of(sums), *(more or ()))
        ctx.terms, ctx.shard = terms, shard
        ctx.set_materialize_grads(False)
        if not scores:
            return loss, lse
        *columns, runner_up = reference.scores_of_sums(sums, label != terms.ignore_index)
        others = torch.stack(columns), runner_up
        ctx.mark_non_differentiable(*others)
        return loss, lse, *others

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, *_):  # type: ignore[no-untyped-def]
        _check_once()
        if grad_loss is None and grad_lse is None:
            return (None,) * 6
        logits, label, n_classes, *saved = ctx.saved_tensors
        grad_loss = torch.zeros_like(grad_lse) if grad_loss is None else grad_loss
        more = Smoothed(*saved[3:]) if saved[3:] else None
        pull = shards.pull_of(Saved(*saved[:3]), label, ctx.terms, n_classes, more, grad_loss, grad_lse)
        grad = shards.gradient(logits, label, ctx.shard, ctx.terms, n_classes, pull, torch.empty_like(logits))
        return grad, *(None,) * 5


# --- a last layer -----------------------------------------------------------------------------------------------------


class LinearResult(NamedTuple):
    """What a call of the linear form returns."""

    loss: Tensor
    scores: Scores | None
    norm: Tensor | None  # of the gradient of each row's loss for the whole last layer


class _Options(NamedTuple):
    shard: Shard
    scores: bool
    reduced: bool
    dtype: torch.dtype  # of products
    rows: int  # of a chunk
    reduce_input_grad: bool


def chunk_rows(call: LinearCall) -> int:
    """Return the rows of a chunk that this rank has room for: two chunks exist at once."""
    device = call.hidden.device
    n_bytes = 2 * row_bytes(call.linear_weight.shape[0], call.product_dtype, device)
    return rows_of_chunk(len(call.hidden), n_bytes, call.budget or 0, device)


def run_linear(call: LinearCall, shard: Shard, n_classes: int, rows: int, reduce_input_grad: bool) -> LinearResult:
    """Return loss and scores of this rank's part of a layer; ``rows`` of a chunk must be alike on all ranks."""
    terms = terms_of(call)
    divisor = call.divisor(call.row_weight()) if call.reduction == "mean" else None
    of = _Options(shard, call.scores, call.reduction != "none", call.product_dtype, rows, reduce_input_grad)
    parameters = call.hidden, call.linear_weight, call.linear_bias, call.row_weight_given
    total = torch.tensor(n_classes, device=call.hidden.device)
    loss, *others = _OfLayer.apply(  # type: ignore[no-untyped-call]
        *parameters, call.target, terms, divisor, call.n_counted(), total, of, torch.is_grad_enabled()
    )
    loss = (call.shaped(loss) if call.reduction == "none" else loss).to(call.dtype)
    if not call.scores:
        return LinearResult(loss, None, None)
    columns, runner_up, norm = others
    hidden = call.hidden.detach().to(norm.dtype).square().sum(1)
    norm = norm * torch.sqrt(hidden if call.linear_bias is None else hidden + 1.0)
    scores = call.scores_of((*columns.unbind(), runner_up))
    return LinearResult(loss, scores, call.shaped(norm.to(torch.float32)))


class _OfLayer(torch.autograd.Function):
    """``apply(hidden, weight, bias, row_weight, label, terms, divisor, n_counted, n_classes, options, grad_mode)``.

    Returns the loss and, with scores, columns [5, N], runner-up [N] and the norm of each row's dL/dlogits [N].
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, row_weight, label, terms, divisor, n_counted, n_classes, of, grad_mode
    ):
        wanted = [grad_mode and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        layer = Layer(hidden, weight, bias, of.dtype)
        counts = label != terms.ignore_index
        mean = divisor is not None
        own = torch.ones_like(label, dtype=reference.accumulation_dtype(hidden.dtype))
        own = own if row_weight is None else row_weight.detach()
        upstream = own / divisor if mean else own
        of_z = 2 * terms.options.z_loss * (own / n_counted if mean else own)
        visit = _Visit(layer, label, terms, n_classes, of)
        made = visit.gradients(wanted if of.reduced else [False] * 3)
        found, more = visit.forward(upstream, of_z, own, made)
        loss, lse = shards.value_of(found, label, terms, n_classes, more)
        loss, lse = loss.masked_fill(~counts, 0.0), lse.masked_fill(~counts, 0.0)
        z = terms.options.z_loss * lse.square()
        # of each row, what its row_weight multiplies
        each = loss / divisor + z / n_counted if mean else loss + z
        if of.reduced and of.reduce_input_grad and wanted[0]:
            dist.all_reduce(made[0], group=of.shard.group)
        kept = (*found.rest, *made, *(more or ()))
        ctx.save_for_backward(hidden, weight, bias, row_weight, label, each, n_classes, *kept)
        ctx.terms, ctx.of, ctx.wanted = terms, of, wanted
        ctx.set_materialize_grads(False)
        total = each if row_weight is None else each * row_weight
        total = total.sum() if of.reduced else total
        if not of.scores:
            return (total,)
        *columns, runner_up = reference.scores_of_sums(found.rest, counts)
        norm = visit.norm(found.rest, own).masked_fill(~counts, torch.nan)
        others = torch.stack(columns), runner_up, norm
        ctx.mark_non_differentiable(*others)
        return total, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        _check_once()
        if grad_loss is None:
            return (None,) * 11
        hidden, weight, bias, row_weight, label, each, n_classes, *others = ctx.saved_tensors
        terms, of, rest, made = ctx.terms, ctx.of, RowSums(*others[:6]), others[6:9]
        factor = grad_loss.to(each.dtype)
        if not of.reduced and any(ctx.wanted):
            own = factor if row_weight is None else factor * row_weight
            visit = _Visit(Layer(hidden, weight, bias, of.dtype), label, terms, n_classes, of)
            made = visit.gradients(ctx.wanted)
            more = Smoothed(*others[9:]) if others[9:] else None
            visit.backward(rest, more, own, 2 * terms.options.z_loss * own, made)
            if of.reduce_input_grad and ctx.wanted[0]:
                dist.all_reduce(made[0], group=of.shard.group)
        if of.reduced:  # what ignored rows add is 0 whatever the upstream gradient
            counts = label != terms.ignore_index
            of_rows, of_all = (torch.where(x, factor, 0.0) for x in (counts[:, None], counts.any()))
            made = [x * y if x.numel() else x for x, y in zip(made, (of_rows, of_all, of_all), strict=True)]
        grads = [
            x.to(like.dtype) if wanted else None
            for wanted, x, like in zip(ctx.wanted, made, (hidden, weight, bias), strict=True)
        ]
        grad_row_weight = each * factor if ctx.needs_input_grad[3] else None
        return *grads, grad_row_weight, *(None,) * 7


class _Visit:
    """Chunks of rows of a layer: their logits, sums and gradients."""

    def __init__(self, layer: Layer, label: Tensor, terms: Terms, n_classes: Tensor, of: _Options) -> None:
        self.layer, self.label, self.terms, self.n_classes, self.of = layer, label, terms, n_classes, of
        self.products = Products(layer, 1.0, 1.0)  # whose scale is taken with the cap
        self.dtype = reference.accumulation_dtype(layer.hidden.dtype)
        counts = label != terms.ignore_index
        self.masks = layer.hidden.device.type != "cpu"
        # rows that teach nothing cost nothing, where to find them is no wait
        self.kept = None if self.masks or counts.all() else counts.nonzero()[:, 0]
        n_rows, n_local = len(label) if self.kept is None else len(self.kept), len(layer.weight)
        self.chunks = [slice(i, min(i + of.rows, n_rows)) for i in range(0, n_rows, of.rows)]
        width = row_bytes(n_local, self.products.dtype, layer.hidden.device) // self.products.dtype.itemsize
        shape = min(len(self.chunks), 2), min(of.rows, n_rows), width
        self.buffers = layer.hidden.new_empty(shape, dtype=self.products.dtype)
        # of softcap and soft targets, whose gradient no sums tell
        self.squares = None
        if of.scores and (terms.options.softcap is not None or terms.targets is not None):
            self.squares = layer.hidden.new_zeros(len(label), dtype=self.dtype)

    def gradients(self, wanted: list[bool]) -> list[Tensor]:
        """Return zeros for the gradients wanted, of hidden, weight and bias, and no elements for the others."""
        (n_local, size), n_rows = self.layer.weight.shape, len(self.label)
        shapes = ((n_rows, size), (n_local, size), (n_local,))
        zeros = self.layer.hidden.new_zeros
        return [zeros(s if w else (0,), dtype=self.dtype) for s, w in zip(shapes, wanted, strict=True)]

    def forward(self, upstream: Tensor, of_z: Tensor, own: Tensor, made: list[Tensor]) -> tuple[Sums, Smoothed | None]:
        """Return the sums of all rows; add their gradients for ``upstream`` of the loss and ``of_z lse`` of the lse."""
        n_rows, shard, scores, terms = len(self.label), self.of.shard, self.of.scores, self.terms
        zeros, ones = upstream.new_zeros(n_rows), upstream.new_ones(n_rows)
        argmax = torch.full_like(self.label, -1, dtype=torch.int32)
        rest = RowSums(zeros, zeros.clone(), ones, ones.clone(), zeros.clone(), argmax)
        found = Sums(rest, zeros.clone() if terms.spreads else None, None)
        more = None
        if terms.spreads_bonus:
            more = Smoothed(argmax.clone(), zeros.clone(), zeros.clone(), zeros.clone())

        def finish(at: Any, x: Tensor, z: Tensor, work: Any, parts: Tensor) -> None:
            work.wait()
            of_rows = terms.of_rows(at)
            sums = shards.merged(parts, of_rows, scores)
            second = second_of(z, self.label[at], shard, of_rows, sums, self.n_classes)
            for whole, part in zip((*found.rest, *(more or ())), (*sums.rest, *(second or ())), strict=True):
                whole[at] = part
            if found.spread is not None:
                found.spread[at] = cast(Tensor, sums.spread)
            if self.squares is not None:
                of_lse = 2 * terms.options.z_loss * own
                self.squares[at] = self._gradient(at, z, sums.rest, second, own, of_lse)
            self._add(at, x, z, sums.rest, second, upstream, of_z, made)

        pending: Any = None
        for i, chunk in enumerate(self.chunks):
            at, x, z = self._logits(i, chunk)
            sums = shards.local_sums(z, self.label[at], shard, terms)
            sent = shards.gather(shard.group, shards.message(sums, shard, terms, scores))
            if pending is not None:
                finish(*pending)
            pending = at, x, z, *sent
        if pending is not None:
            finish(*pending)
        return found, more

    def backward(
        self, rest: RowSums, more: Smoothed | None, upstream: Tensor, of_z: Tensor, made: list[Tensor]
    ) -> None:
        """Add the gradients of all rows whose sums are known."""
        for i, chunk in enumerate(self.chunks):
            at, x, z = self._logits(i, chunk)
            second = None if more is None else Smoothed(*(column[at] for column in more))
            self._add(at, x, z, RowSums(*(column[at] for column in rest)), second, upstream, of_z, made)

    def norm(self, rest: RowSums, own: Tensor) -> Tensor:
        """Return ``||dL/dlogits||`` of each row, ``own`` times its loss; without another word where sums tell it."""
        if self.squares is not None:
            dist.all_reduce(self.squares, group=self.of.shard.group)
            return self.squares.sqrt()
        lse = reference.logsumexp_of_sums(rest)
        of_lse = 2 * self.terms.options.z_loss * own * lse
        pull = shards.pull_of(shards.saved_of(rest), self.label, self.terms, self.n_classes, None, own, of_lse)
        norm = torch.sqrt(pull.label.square() + pull.rest.square() * rest.sum_exp2)
        return norm * self.terms.options.scale

    def _logits(self, i: int, chunk: slice) -> tuple[Any, Tensor, Tensor]:
        at = chunk if self.kept is None else self.kept[chunk]
        x = self.products.rows(at)
        if self.masks:  # whatever an ignored row holds: 0 times NaN would reach the weight
            x = torch.where((self.label[at] != self.terms.ignore_index)[:, None], x, 0.0)
        z = self.buffers[i % 2, : len(x), : len(self.layer.weight)]
        self.products.logits(x, z)
        return at, x, z

    def _add(
        self, at: Any, x: Tensor, z: Tensor, rest: RowSums, more: Smoothed | None, upstream: Tensor, of_z: Tensor,
        made: list[Tensor],
    ) -> None:  # fmt: skip
        grad_hidden, grad_weight, grad_bias = made
        if not any(x.numel() for x in made):
            return
        self._gradient(at, z, rest, more, upstream, of_z, out=z)
        if grad_hidden.numel():
            self.products.to_hidden(z, grad_hidden, at)
        if grad_weight.numel():
            self.products.to_weight(z, x, grad_weight, False)
        if grad_bias.numel():
            self.products.to_bias(z, grad_bias, False)

    def _gradient(
        self, at: Any, z: Tensor, rest: RowSums, more: Smoothed | None, upstream: Tensor, of_z: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Write the gradient of a chunk's logits to ``out``; without it return the squares of the rows' norms."""
        terms, label = self.terms.of_rows(at), self.label[at]
        grad_lse = of_z[at] * reference.logsumexp_of_sums(rest) if terms.options.z_loss else None
        pull = shards.pull_of(shards.saved_of(rest), label, terms, self.n_classes, more, upstream[at], grad_lse)
        into = torch.empty_like(z) if out is None else out
        grad = shards.gradient(z, label, self.of.shard, terms, self.n_classes, pull, into)
        return grad.to(self.dtype).square().sum(1) if out is None else grad
