"""A shard of the classes: what the ranks of a group tell each other of a row, and what each makes of it.

Every rank sums up its own classes (`row_sums`) and sends three floats a row, six with scores. All merge the same parts
in the same order, so loss and scores have the same bits on every rank, and the gradient of its own logits needs no
further word:

    dL/dz_k = A exp(z_k - logsumexp(rest))        dL/dz_y = -A on the rank that holds the label

A smoothed cross-entropy, ``sum_k t_k (-log p_k)`` with ``t_k = weight_k ((1 - s) [k = y] + s / C)``, needs one float
more: the sum of ``weight_k z_k``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import reference, row_sums
from ..logit_options import LogitOptions
from ..losses import GapLoss
from ..number_checks import check_integer
from ..row_sums import NO_CLASS, RowSums

__all__ = [
    "Facts",
    "Pull",
    "Saved",
    "Shard",
    "Sums",
    "Terms",
    "check_facts",
    "facts_of",
    "facts_of_all",
    "faulty",
    "gather",
    "gradient",
    "local_sums",
    "merged",
    "message",
    "pull_of",
    "ranks_of",
    "saved_of",
    "shard_of",
    "value_of",
]

BLOCK = 1 << 20  # logits that are looked at at once: 4 MiB a temporary
RAISED = -1  # in place of the number of classes: the rank found a fault in its own arguments


class Shard(NamedTuple):
    """The classes of this rank, ``first`` to ``stop``."""

    group: Any
    first: int
    stop: int


class Terms(NamedTuple):
    """What a row pays."""

    loss: GapLoss
    smoothing: float | None  # of cross-entropy; None for a loss of the gap alone
    weight: Tensor | None  # [C] of all classes, in the accumulation dtype
    label_weight: Tensor | None  # [N] of them the label's
    options: LogitOptions
    ignore_index: int

    def mean_weight(self, n_classes: Tensor) -> Tensor | float:
        """Return the mean of the class weights."""
        return 1.0 if self.weight is None else self.weight.sum() / n_classes

    def of_rows(self, at: Any) -> Terms:
        """Return the terms of some of the rows."""
        return self if self.label_weight is None else self._replace(label_weight=self.label_weight[at])


class Sums(NamedTuple):
    """What is known of rows: sums of their classes, and ``sum weight_k (z_k - max)`` where they are smoothed."""

    rest: RowSums
    spread: Tensor | None


def ranks_of(group: Any) -> int:
    """Return how many ranks the group has, or raise ValueError where this process is none of them."""
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not among its ranks")
    return dist.get_world_size(group)


def shard_of(group: Any, class_range: Any, n_local: int) -> Shard:
    """Return the shard of this rank; ``class_range=None`` is that of equal shards in the order of the ranks."""
    if class_range is None:
        rank = dist.get_rank(group)
        return Shard(group, rank * n_local, (rank + 1) * n_local)
    if not isinstance(class_range, (tuple, list)) or len(class_range) != 2:
        raise TypeError(f"class_range must be (first, stop) or None, got {class_range!r}")
    first, stop = class_range
    check_integer("vocab_parallel", "class_range[0]", first, 0, NO_CLASS)
    check_integer("vocab_parallel", "class_range[1]", stop, first, NO_CLASS)
    return Shard(group, int(first), int(stop))


# --- facts that all ranks must agree on -------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What ranks tell of their arguments; each [W] once all are together."""

    first: Any
    stop: Any
    n_local: Any  # classes of the logits, or `RAISED`
    n_rows: Any
    labels: Any  # a sum that differs where labels do
    chunk_rows: Any  # of the linear form


def facts_of(shard: Shard, n_local: int, label: Tensor, chunk_rows: int = 0) -> Tensor:
    """Return the facts of this rank, int64."""
    place = torch.arange(1, label.numel() + 1, device=label.device)
    labels = (place * (label.reshape(-1) + 1)).sum() % NO_CLASS
    known = torch.tensor([shard.first, shard.stop, n_local, label.numel()], device=label.device)
    return torch.cat([known, labels[None], known.new_full((1,), chunk_rows)])


def facts_of_all(group: Any, facts: Tensor | None, device: torch.device) -> Facts:
    """Return the facts of all ranks; None says that this one is about to raise."""
    mine = torch.full((len(Facts._fields),), RAISED, device=device) if facts is None else facts
    work, parts = gather(group, mine)
    work.wait()
    return Facts(*parts.unbind(1))


def faulty(facts: Facts, n_weights: int | None) -> Tensor:
    """Return whether shards of some rank leave a gap, overlap or do not fit its logits, without a wait."""
    size = facts.stop - facts.first
    rank = torch.arange(len(size), device=size.device)
    first = facts.first
    before = (first < first[:, None]) | ((first == first[:, None]) & (rank < rank[:, None]))
    bad = (size > 0) & ((before * size).sum(1) != first) | (size != facts.n_local)
    found: Tensor = bad.any() | (facts.n_rows != facts.n_rows[0]).any() | (facts.labels != facts.labels[0]).any()
    return found if n_weights is None else found | (size.sum() != n_weights)


def check_facts(facts: Facts, n_weights: int | None) -> None:
    """Raise, on every rank alike, for what `faulty` finds."""
    first, stop, n_local, n_rows, labels, _ = (x.tolist() for x in facts)
    each = range(len(first))
    for i in each:
        if n_local[i] == RAISED:
            raise RuntimeError(f"rank {i} of the group raised an error about its own arguments; see there")
    if len(set(n_rows)) > 1:
        raise RuntimeError(f"expected the same rows on all ranks of the group, got {_listed(n_rows)} rows")
    for i in each:
        if stop[i] - first[i] != n_local[i]:
            raise ValueError(
                f"class_range of rank {i} has {stop[i] - first[i]} classes, [{first[i]}, {stop[i]}), but its shard has "
                f"{n_local[i]}"
            )
    at = 0
    for start, end in sorted((first[i], stop[i]) for i in each if stop[i] > first[i]):
        if start != at:
            what = f"overlap at class {start}" if start < at else f"leave out classes {at} to {start - 1}"
            ranges = [f"[{a}, {b})" for a, b in zip(first, stop, strict=True)]
            raise ValueError(
                f"the class ranges of the ranks {what}.\nExpected every class from 0 on in one of them, got "
                f"{_listed(ranges)}. class_range=None stands for equal shards in the order of the ranks."
            )
        at = end
    if n_weights is not None and n_weights != at:
        raise RuntimeError(
            f"expected weight of shape [{at}], one number for each class of all ranks, got [{n_weights}]"
        )
    if len(set(labels)) > 1:
        raise RuntimeError("expected the same target on all ranks of the group, got targets that differ")


def _listed(values: Any) -> str:
    return ", ".join(f"rank {i}: {x}" for i, x in enumerate(values))


# --- the exchange -----------------------------------------------------------------------------------------------------

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.12


def gather(group: Any, x: Tensor) -> tuple[Any, Tensor]:
    """Send [n] to all; return the work to wait for, and what will then hold [W, n]."""
    n_ranks = dist.get_world_size(group)
    out = x.new_empty(n_ranks * len(x))
    return _all_gather(out, x, group=group, async_op=True), out.view(n_ranks, len(x))


def local_sums(logits: Tensor, label: Tensor, shard: Shard, terms: Terms) -> Sums:
    """Return the sums of this rank's logits [N, C_local], in the accumulation dtype."""
    weight = None if terms.weight is None else terms.weight[shard.first : shard.stop]
    found, spreads = [], []
    for rows in _blocks(*logits.shape):
        z = terms.options.applied(logits[rows].to(reference.accumulation_dtype(logits.dtype)))
        found.append(row_sums.of_logits(z, label[rows], shard.first))
        if terms.smoothing is not None:
            above = z - _finite(found[-1].max)[:, None]
            if weight is not None:  # a class without a weight costs nothing, whatever its logit
                above = weight * above.masked_fill(weight == 0, 0.0)
            spreads.append(above.sum(1))
    sums = RowSums._make(map(torch.cat, zip(*found, strict=True)))
    return Sums(sums, torch.cat(spreads) if spreads else None)


def message(sums: Sums, shard: Shard, terms: Terms, scores: bool) -> Tensor:
    """Return what all ranks are told of rows, [1 + 3 N] and more with scores and smoothing."""
    rest = sums.rest
    columns = [rest.z_target, rest.max, rest.sum_exp]
    if scores:  # the class travels as the bits of an integer
        columns += [rest.sum_exp2, rest.sum_exp_z, rest.argmax.to(_ints(rest.max)).view(rest.max.dtype)]
    total = rest.max.new_full((1,), shard.stop - shard.first)
    if sums.spread is not None:
        columns.append(sums.spread)
        if terms.weight is not None:
            total = terms.weight[shard.first : shard.stop].sum()[None]
    return torch.cat([total, *columns])


def merged(parts: Tensor, scores: bool, smoothed: bool) -> Sums:
    """Return the sums of all classes from what all ranks have told, [W, n]."""
    n_columns = (6 if scores else 3) + smoothed
    n_rows = (parts.shape[1] - 1) // n_columns
    totals, columns = parts[:, 0], parts[:, 1:].reshape(len(parts), n_columns, n_rows).transpose(0, 1)
    z_target, maximum, sum_exp = columns[:3]
    sum_exp2 = sum_exp_z = torch.zeros_like(sum_exp)
    argmax = torch.full_like(sum_exp, NO_CLASS, dtype=torch.int32)
    if scores:
        sum_exp2, sum_exp_z = columns[3:5]
        argmax = columns[5].contiguous().view(_ints(parts)).to(torch.int32)
    each = RowSums(z_target, maximum, sum_exp, sum_exp2, sum_exp_z, argmax)
    rest = row_sums.merged([RowSums(*of_rank) for of_rank in zip(*each, strict=True)])
    if not smoothed:
        return Sums(rest, None)
    shift = _finite(maximum) - _finite(rest.max)
    return Sums(rest, (columns[-1] + totals[:, None] * shift).sum(0))


# --- what each makes of it --------------------------------------------------------------------------------------------


def value_of(sums: Sums, terms: Terms, n_classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and the logsumexp of its logits; rows that are ignored too."""
    gap = reference.gap_of_sums(sums.rest)
    lse = reference.logsumexp_of_sums(sums.rest)
    loss = terms.loss.value(gap) if terms.smoothing is None else (1 - terms.smoothing) * -logsigmoid(gap)
    if terms.label_weight is not None:
        loss = loss * terms.label_weight
    if terms.smoothing:
        assert sums.spread is not None
        origin = _finite(sums.rest.max)
        above = reference.logsumexp_of_sums(
            sums.rest._replace(z_target=sums.rest.z_target - origin, max=sums.rest.max - origin)
        )
        share = terms.smoothing / n_classes.to(lse.dtype)  # of integers torch makes float32
        loss = loss + (terms.smoothing * terms.mean_weight(n_classes)) * above - share * sums.spread
    return loss, lse


class Saved(NamedTuple):
    """What the gradient of rows follows from, all [N]."""

    gap: Tensor
    max: Tensor  # of the rest, as the next
    sum_exp: Tensor


def saved_of(sums: RowSums) -> Saved:
    """Return what the gradient of rows follows from."""
    return Saved(reference.gap_of_sums(sums), sums.max, sums.sum_exp)


class Pull(NamedTuple):
    """The gradient of rows: ``rest exp(z_k - origin) - off weight_k``, at the label ``label``; all [N]."""

    rest: Tensor
    origin: Tensor
    off: Tensor | None
    label: Tensor


def pull_of(saved: Saved, terms: Terms, n_classes: Tensor, grad_loss: Tensor, grad_lse: Tensor | None) -> Pull:
    """Return the gradient of ``sum grad_loss L + grad_lse logsumexp`` of what `value_of` returns."""
    gap, maximum, sum_exp = saved
    own = 1.0 if terms.label_weight is None else terms.label_weight
    off, at_label = None, torch.zeros_like(gap)
    if terms.smoothing is None:
        slope = terms.loss.slope(gap) * own * grad_loss
    else:
        smoothing, mean = terms.smoothing, terms.mean_weight(n_classes)
        slope = ((1 - smoothing) * own + smoothing * mean) * torch.sigmoid(-gap) * grad_loss
        n = n_classes.to(gap.dtype)
        off = grad_loss * (smoothing / n)
        at_label = grad_loss * (smoothing * (mean - own / n))
    slope = torch.where(sum_exp == 0, slope * 0.0, slope)  # a row with no rest teaches nothing
    at_label = at_label + (slope * 0.0 - slope)  # an infinite slope is NaN at the label, as torch's
    if grad_lse is not None:
        slope = slope + grad_lse * torch.sigmoid(-gap)
        at_label = at_label + grad_lse * torch.sigmoid(gap)
    return Pull(slope / torch.where(sum_exp == 0, 1.0, sum_exp), _finite(maximum), off, at_label)


def gradient(logits: Tensor, label: Tensor, shard: Shard, terms: Terms, pull: Pull, out: Tensor) -> Tensor:
    """Write the gradient of this rank's logits [N, C_local] to ``out``, which may be the logits."""
    weight = None if terms.weight is None else terms.weight[shard.first : shard.stop]
    classes = torch.arange(shard.first, shard.stop, device=label.device)
    for rows in _blocks(*logits.shape):
        given = logits[rows].to(reference.accumulation_dtype(logits.dtype))
        z = terms.options.applied(given)
        grad = torch.exp(z - pull.origin[rows, None]).mul_(pull.rest[rows, None])
        if pull.off is not None:
            off = pull.off[rows, None]
            grad -= off if weight is None else off * weight
        grad = torch.where(classes == label[rows, None], pull.label[rows, None], grad)
        grad *= terms.options.slope(given)
        out[rows] = grad.masked_fill_((label[rows] == terms.ignore_index)[:, None], 0.0)
    return out


def _blocks(n_rows: int, n_classes: int) -> Iterator[slice]:
    size = max(BLOCK // max(n_classes, 1), 1)
    for first in range(0, max(n_rows, 1), size):
        yield slice(first, first + size)


def _finite(maximum: Tensor) -> Tensor:
    """Return 0 for -inf: the point to subtract."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def _ints(x: Tensor) -> torch.dtype:
    """Return the dtype of integers as wide as ``x``."""
    return torch.int64 if x.dtype == torch.float64 else torch.int32
