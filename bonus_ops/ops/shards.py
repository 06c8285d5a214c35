"""A shard of the classes: what the ranks of a group tell each other of a row, and what each makes of it.

Every rank sums up its own classes (`row_sums`) and sends three floats a row, six with scores. All merge the same parts
in the same order, so loss and scores have the same bits on every rank, and the gradient of its own logits needs no
further word:

    dL/dz_k = A exp(z_k - logsumexp(rest))        dL/dz_y = -A on the rank that holds the label

A smoothed cross-entropy, ``sum_k t_k (-log p_k)`` with ``t_k = weight_k ((1 - s) [k = y] + s / C)``, needs one float
more: the sum of ``weight_k z_k``. What a smoothed bonus pays, ``sum_k v_k b(p_k)``, no sum of logits tells: b is of the
probability, which is known once all ranks have told; nor what a `ClassLoss` does. Then they tell two floats a row more,
of the classes besides the label and the largest of the rest; of these two, one of which alone can have p > 1/2, every
rank knows the gap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import reference, row_sums
from ..logit_options import LogitOptions
from ..losses import ClassLoss, GapLoss
from ..number_checks import check_integer
from ..row_sums import NO_CLASS, RowSums
from ..soft_targets import Share, SoftTargets

__all__ = [
    "Facts",
    "Pull",
    "Saved",
    "Shard",
    "Smoothed",
    "Sums",
    "Terms",
    "check_facts",
    "facts_of",
    "facts_of_all",
    "faulty",
    "gather",
    "gradient",
    "ints_like",
    "local_sums",
    "merged",
    "message",
    "pull_of",
    "ranks_of",
    "saved_of",
    "shard_of",
    "smoothed",
    "smoothed_sums",
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
    """What a row pays: its label alone, or all classes by their shares."""

    loss: GapLoss | ClassLoss
    targets: SoftTargets | None  # of all classes, weights [C] in the accumulation dtype; None for the label alone
    label_weight: Tensor | None  # [N], of the label alone
    options: LogitOptions
    ignore_index: int
    n_weights: int | None  # of class weights, where there are any

    @property
    def weight(self) -> Tensor | None:
        """The class weights of what all classes pay."""
        return None if self.targets is None else self.targets.weight

    @property
    def spreads(self) -> bool:
        """Whether all classes pay cross-entropy."""
        return self.targets is not None and self.targets.smoothing > 0 and self.loss.adds_to_cross_entropy

    @property
    def spreads_bonus(self) -> bool:
        """Whether all classes pay what is not cross-entropy."""
        if self.targets is None or self.loss.is_cross_entropy():
            return False
        return self.targets.bonus_smoothing > 0 or isinstance(self.loss, ClassLoss)

    def of_rows(self, at: Any) -> Terms:
        """Return the terms of some of the rows."""
        return self if self.label_weight is None else self._replace(label_weight=self.label_weight[at])


class Sums(NamedTuple):
    """What is known of rows: sums of their classes, and more where all classes pay."""

    rest: RowSums
    spread: Tensor | None  # sum weight_k (z_k - max), for cross-entropy
    below: Tensor | None  # sum exp(z_k - max) of the rest but its largest, for what is not cross-entropy


class Smoothed(NamedTuple):
    """What is not cross-entropy, of a row that pays for all its classes."""

    top: Tensor  # [N] the largest of the rest, `NO_CLASS` without one
    top_gap: Tensor  # [N] its gap: less the logsumexp of all others
    value: Tensor  # [N] sum of `_value` of the classes besides label and top
    odds: Tensor  # [N] sum of `_slope` / (1 - p) of the same


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
    found, spreads, belows = [], [], []
    for rows in _blocks(*logits.shape):
        z = terms.options.applied(logits[rows].to(reference.accumulation_dtype(logits.dtype)))
        found.append(row_sums.of_logits(z, label[rows], shard.first))
        above = z - _finite(found[-1].max)[:, None]
        if terms.spreads_bonus:
            classes = torch.arange(shard.first, shard.stop, device=label.device)
            apart = (classes == label[rows, None]) | (classes == found[-1].argmax[:, None])
            belows.append(above.exp().masked_fill(apart, 0.0).sum(1))
        if terms.spreads:
            weight = _of_classes(terms.weight, shard)
            if weight is not None:  # a class without a weight costs nothing, whatever its logit
                above = weight * above.masked_fill(weight == 0, 0.0)
            spreads.append(above.sum(1))
    sums = RowSums._make(map(torch.cat, zip(*found, strict=True)))
    return Sums(sums, torch.cat(spreads) if spreads else None, torch.cat(belows) if belows else None)


def message(sums: Sums, shard: Shard, terms: Terms, scores: bool) -> Tensor:
    """Return what all ranks are told of rows: [1 + n_columns N]."""
    rest = sums.rest
    total = rest.max.new_full((1,), shard.stop - shard.first)
    if terms.spreads and terms.weight is not None:
        total = terms.weight[shard.first : shard.stop].sum()[None]
    # the class travels as the bits of an integer
    told = {**rest._asdict(), "argmax": rest.argmax.to(ints_like(rest.max)).view(rest.max.dtype),
            "spread": sums.spread, "below": sums.below}  # fmt: skip
    return torch.cat([total, *(told[name] for name in _told(terms, scores))])


def merged(parts: Tensor, terms: Terms, scores: bool) -> Sums:
    """Return the sums of all classes from what all ranks have told, [W, n]."""
    names = _told(terms, scores)
    n_rows = (parts.shape[1] - 1) // len(names)
    totals, columns = parts[:, 0], parts[:, 1:].reshape(len(parts), len(names), n_rows).unbind(1)
    told = dict(zip(names, columns, strict=True))
    zeros = torch.zeros_like(columns[0])
    argmax = torch.full_like(zeros, NO_CLASS, dtype=torch.int32)
    if "argmax" in told:
        argmax = told["argmax"].contiguous().view(ints_like(parts)).to(torch.int32)
    each = RowSums._make((*(told.get(name, zeros) for name in RowSums._fields[:-1]), argmax))
    rest = row_sums.merged([RowSums(*of_rank) for of_rank in zip(*each, strict=True)])
    shift = _finite(each.max) - _finite(rest.max)
    spread = below = None
    if "spread" in told:
        spread = (told["spread"] + totals[:, None] * shift).sum(0)
    if "below" in told:  # where the largest of a rank is not that of all, it is below
        is_top = (argmax == rest.argmax) | (argmax == NO_CLASS)
        scale = (each.max - _finite(rest.max)).exp()  # 0 for a rank without a class
        below = ((told["below"] + torch.where(is_top, 0.0, 1.0)) * scale).sum(0)
    return Sums(rest, spread, below)


def _told(terms: Terms, scores: bool) -> list[str]:
    """Return which columns of rows ranks tell each other."""
    asked = {"sum_exp2": scores, "sum_exp_z": scores, "argmax": scores or terms.spreads_bonus,
             "spread": terms.spreads, "below": terms.spreads_bonus}  # fmt: skip
    return ["z_target", "max", "sum_exp", *(name for name, wanted in asked.items() if wanted)]


def _of_classes(weight: Tensor | None, shard: Shard) -> Tensor | None:
    return None if weight is None else weight[shard.first : shard.stop]


# --- the second exchange: what is not cross-entropy, where all classes pay it -----------------------------------------


def smoothed_sums(logits: Tensor, label: Tensor, shard: Shard, terms: Terms, sums: Sums, n_classes: Tensor) -> Tensor:
    """Return what all ranks are told next, [2 N]: value and odds of this rank's classes, see `Smoothed`."""
    found, (maximum, top) = [], (_finite(sums.rest.max), sums.rest.argmax)
    lse = _lse_above(sums.rest)
    for rows in _blocks(*logits.shape):
        z = terms.options.applied(logits[rows].to(reference.accumulation_dtype(logits.dtype)))
        log_p = (z - maximum[rows, None]) - lse[rows, None]
        apart, share, gap, rest = _below_half(log_p, label[rows], top[rows], shard, terms, n_classes)
        value, slope = (f(terms.loss, share, gap, n_classes) for f in (_value, _slope))
        found.append(torch.stack([x.masked_fill(apart, 0.0).sum(1) for x in (value, slope / rest)]))
    return torch.cat(found, 1).flatten()


def smoothed(parts: Tensor, sums: Sums) -> Smoothed:
    """Return what is known of rows from what all ranks have told, [W, 2 N], after ``sums``."""
    rest, below = sums.rest, cast(Tensor, sums.below)
    others = torch.logaddexp(rest.z_target - _finite(rest.max), torch.log(below))
    top_gap = torch.where(rest.max == -math.inf, 0.0, -others)
    return Smoothed(rest.argmax, top_gap, *parts.sum(0).view(2, -1))


def _below_half(
    log_p: Tensor, label: Tensor, top: Tensor, shard: Shard, terms: Terms, n_classes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return which of a block's classes are the label or the largest of the rest; share, gap and 1 - p of the others.

    Of these p <= 1/2, so that 1 - p has all its digits.
    """
    classes = torch.arange(shard.first, shard.stop, device=label.device)
    apart = (classes == label[:, None]) | (classes == top[:, None])
    _, off, weight = _shares(cast(SoftTargets, terms.targets).of_bonus(1), n_classes, log_p.dtype)
    off = off if weight is None else off * weight[shard.first : shard.stop]
    log_p = log_p.masked_fill(apart, -1.0).clamp(max=-0.5)
    rest = -torch.expm1(log_p)
    return apart, off, log_p - torch.log(rest), rest


def _value(loss: GapLoss | ClassLoss, share: Tensor, gap: Tensor, n_classes: Tensor) -> Tensor:
    """Return what classes cost by their shares; cross-entropy is left out where the loss adds to it."""
    if isinstance(loss, GapLoss):
        return reference.share_times(share, loss.excess(gap))
    return loss.class_value(*_probability(gap), share) / n_classes


def _slope(loss: GapLoss | ClassLoss, share: Tensor, gap: Tensor, n_classes: Tensor) -> Tensor:
    """Return ``-d _value / d gap``."""
    if isinstance(loss, GapLoss):
        return share * loss.excess_slope(gap)
    with torch.enable_grad():
        p, rest, log_p = (x.detach().requires_grad_() for x in _probability(gap))
        total = loss.class_value(p, rest, log_p, share).sum() / n_classes
        by_p, by_rest, by_log_p = torch.autograd.grad(total, (p, rest, log_p), materialize_grads=True)
    return ((by_rest - by_p) * p - by_log_p).detach() * rest.detach()


def _probability(gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return p, 1 - p and log p: neither is a difference."""
    return torch.sigmoid(gap), torch.sigmoid(-gap), logsigmoid(gap)


def _of_largest(of: Any, terms: Terms, more: Smoothed, n_classes: Tensor) -> Tensor:
    """Return `_value` or `_slope` of the largest of the rest, 0 without one."""
    share = _own(
        cast(SoftTargets, terms.targets).of_bonus(1)._replace(keep=0.0), more.top, n_classes, more.top_gap.dtype
    )
    found: Tensor = of(terms.loss, share, more.top_gap, n_classes)
    return found.masked_fill(more.top == NO_CLASS, 0.0)


def _shares(share: Share, n_classes: Tensor, dtype: torch.dtype) -> tuple[float, Tensor, Tensor | None]:
    """Return what the label keeps, what every class gets, and what times it all, [C], for ``share`` of one class."""
    return share.keep, share.off / n_classes.to(dtype), share.weight  # of integers torch makes float32


def _own(share: Share, label: Tensor, n_classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the share [N] of the classes named, 0 for those that do not exist."""
    keep, off, weight = _shares(share, n_classes, dtype)
    inside = (label >= 0) & (label < n_classes)
    each = (keep + off).expand(label.shape) if weight is None else (keep + off) * weight[torch.where(inside, label, 0)]
    return torch.where(inside, each, 0.0)


def _lse_above(sums: RowSums) -> Tensor:
    """Return the logsumexp of all classes less the largest of the rest."""
    origin = _finite(sums.max)
    return reference.logsumexp_of_sums(sums._replace(z_target=sums.z_target - origin, max=sums.max - origin))


# --- what each makes of it --------------------------------------------------------------------------------------------


def value_of(
    sums: Sums, label: Tensor, terms: Terms, n_classes: Tensor, more: Smoothed | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and the logsumexp of its logits; rows that are ignored too."""
    gap = reference.gap_of_sums(sums.rest)
    lse, targets = reference.logsumexp_of_sums(sums.rest), terms.targets
    if targets is None:
        loss = cast(GapLoss, terms.loss).value(gap)
        return loss if terms.label_weight is None else loss * terms.label_weight, lse
    loss = _value(terms.loss, _own(targets.of_bonus(1), label, n_classes, gap.dtype), gap, n_classes)
    if more is not None:
        loss = loss + (_of_largest(_value, terms, more, n_classes) + more.value)
    if not terms.loss.adds_to_cross_entropy:
        return loss, lse
    keep, off, weight = _shares(targets.of_cross_entropy(1), n_classes, gap.dtype)
    own = _own(targets.of_cross_entropy(1)._replace(off=0.0), label, n_classes, gap.dtype)
    loss = loss + reference.share_times(own, -logsigmoid(gap))
    if terms.spreads:
        mass = off * (n_classes if weight is None else weight.sum())
        loss = loss + (mass * _lse_above(sums.rest) - off * cast(Tensor, sums.spread))
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
    """The gradient of rows, all [N]: ``rest exp(z_k - origin) - off weight_k``, at the label ``label``."""

    rest: Tensor
    origin: Tensor
    off: Tensor | None
    label: Tensor
    top: PullOfTop | None


class PullOfTop(NamedTuple):
    """What is added where all classes pay what is not cross-entropy, all [N].

    ``pull exp(z_k - origin)`` besides the largest of the rest, which gets ``-pull``, and ``-upstream odds_k`` for all
    but that and the label.
    """

    top: Tensor
    pull: Tensor
    gap: Tensor
    upstream: Tensor
    lse: Tensor  # less the largest of the rest


def pull_of(
    saved: Saved, label: Tensor, terms: Terms, n_classes: Tensor, more: Smoothed | None, grad_loss: Tensor,
    grad_lse: Tensor | None,
) -> Pull:  # fmt: skip
    """Return the gradient of ``sum grad_loss L + grad_lse logsumexp`` of what `value_of` returns."""
    gap, maximum, sum_exp = saved
    targets, u = terms.targets, torch.sigmoid(-gap)
    off, at_label, pull_of_top = None, torch.zeros_like(gap), None
    if targets is None:
        slope = cast(GapLoss, terms.loss).slope(gap)
        slope = slope if terms.label_weight is None else slope * terms.label_weight
    else:
        slope = _slope(terms.loss, _own(targets.of_bonus(1), label, n_classes, gap.dtype), gap, n_classes)
        if terms.loss.adds_to_cross_entropy:
            share = targets.of_cross_entropy(1)
            _, each, weight = _shares(share, n_classes, gap.dtype)
            others = each * (n_classes if weight is None else weight.sum())  # of all classes, by what all get
            slope = slope + (_own(share._replace(off=0.0), label, n_classes, gap.dtype) + others) * u
            if terms.spreads:
                off = grad_loss * each
                at_label = grad_loss * (others - _own(share._replace(keep=0.0), label, n_classes, gap.dtype))
    slope = slope * grad_loss
    slope = torch.where(sum_exp == 0, slope * 0.0, slope)  # a row with no rest teaches nothing
    at_label = at_label + (slope * 0.0 - slope)  # an infinite slope is NaN at the label, as torch's
    if more is not None:
        pull = grad_loss * _of_largest(_slope, terms, more, n_classes)
        label_above = gap + torch.log(torch.where(sum_exp == 0, 1.0, sum_exp))  # less the largest of the rest
        beside = torch.exp((label_above + more.top_gap).clamp(max=0.0))  # less the logsumexp of all but that
        at_label = at_label + torch.where(pull == 0, 0.0, pull * beside)
        of_odds = grad_loss * more.odds
        grad_lse = of_odds if grad_lse is None else grad_lse + of_odds
        lse = torch.logaddexp(label_above, torch.log(sum_exp))
        pull_of_top = PullOfTop(more.top, pull, more.top_gap.clamp(max=1e30), grad_loss, lse)
    if grad_lse is not None:
        slope = slope + grad_lse * u
        at_label = at_label + grad_lse * torch.sigmoid(gap)
    rest = slope / torch.where(sum_exp == 0, 1.0, sum_exp)
    return Pull(rest, _finite(maximum), off, at_label, pull_of_top)


def gradient(
    logits: Tensor, label: Tensor, shard: Shard, terms: Terms, n_classes: Tensor, pull: Pull, out: Tensor
) -> Tensor:
    """Write the gradient of this rank's logits [N, C_local] to ``out``, which may be the logits."""
    weight = _of_classes(terms.weight, shard)
    classes = torch.arange(shard.first, shard.stop, device=label.device)
    for rows in _blocks(*logits.shape):
        given = logits[rows].to(reference.accumulation_dtype(logits.dtype))
        z = terms.options.applied(given)
        above = z - pull.origin[rows, None]
        grad = torch.exp(above).mul_(pull.rest[rows, None])
        if pull.off is not None:
            off = pull.off[rows, None]
            grad -= off if weight is None else off * weight
        if pull.top is not None:
            grad += _of_top(above, label[rows], PullOfTop(*(x[rows] for x in pull.top)), shard, terms, n_classes)
        grad = torch.where(classes == label[rows, None], pull.label[rows, None], grad)
        grad *= terms.options.slope(given)
        out[rows] = grad.masked_fill_((label[rows] == terms.ignore_index)[:, None], 0.0)
    return out


def _of_top(above: Tensor, label: Tensor, of: PullOfTop, shard: Shard, terms: Terms, n_classes: Tensor) -> Tensor:
    """Return what `PullOfTop` says of a block's classes; ``above`` are logits less the largest of the rest."""
    apart, share, gap, rest = _below_half(above - of.lse[:, None], label, of.top, shard, terms, n_classes)
    odds = (_slope(terms.loss, share, gap, n_classes) / rest).masked_fill(apart, 0.0)
    pull = of.pull[:, None]
    is_top = torch.arange(shard.first, shard.stop, device=label.device) == of.top[:, None]
    return torch.where(is_top, -pull, pull * torch.exp(above + of.gap[:, None]) - of.upstream[:, None] * odds)


def _blocks(n_rows: int, n_classes: int) -> Iterator[slice]:
    size = max(BLOCK // max(n_classes, 1), 1)
    for first in range(0, max(n_rows, 1), size):
        yield slice(first, first + size)


def _finite(maximum: Tensor) -> Tensor:
    """Return 0 for -inf: the point to subtract."""
    return maximum.masked_fill(maximum == -math.inf, 0.0)


def ints_like(x: Tensor) -> torch.dtype:
    """Return the dtype of integers as wide as ``x``."""
    return torch.int64 if x.dtype == torch.float64 else torch.int32
