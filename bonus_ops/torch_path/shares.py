"""The fast torch path for targets that are shares of classes; blocks and buffers are those of `fallback`.

With ``T = sum t_k`` and ``pull_k`` of what the loss adds to cross-entropy, per row

    L = sum t_k (lse - z_k) + sum c(p_k)            dL/dz_j = p_j (T + sum pull_k) - (t_j + pull_j)

The label and the runner-up are kept out of every sum over classes and added from their gaps: only they can be near
p = 1, where 1 - p must not be a difference. `visit` is the only entry: its gradient is made while a block is in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..losses import CrossEntropy, GapLoss, LogBonus, Loss
from ..reference import accumulation_dtype
from ..shares import BlockShare, Shares
from . import labels as fallback
from .labels import LOWEST, RowOutputs
from .sums import dot, row_sum

__all__ = ["visit"]

WORKSPACE_SHARE = 1.0  # of one gradient's bytes: up to five buffers, in blocks that are worth their operators


def visit(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, shares: Shares, scores: bool, grad_loss: Tensor | None
) -> tuple[RowOutputs, Tensor | None]:
    """Return loss, scores, and with ``grad_loss`` [N] or [1] the gradient, from one visit of each block of rows.

    The labels of probabilities are found on the way: ``label`` then only gives the shape.
    """
    grad = None if grad_loss is None else torch.empty_like(logits)
    if logits.numel() == 0:
        return fallback.visit(logits, label, ignore_index, CrossEntropy(), scores, None)[0], grad
    dtype = accumulation_dtype(logits.dtype)
    dense = shares.probabilities is not None
    index, counts = (label.reshape(-1, 1), None) if dense else fallback._labels(logits, label, ignore_index)
    t_share, v_share = shares.of_cross_entropy(logits.shape[2]), shares.of_bonus(logits.shape[2])
    both = loss.adds_to_cross_entropy and not t_share.is_as(v_share)
    by_row = grad is not None and grad.is_contiguous() and grad.shape[1] == 1 and not fallback._by_class(logits)
    in_place = by_row and logits.dtype == dtype  # the gradient holds the exponentials
    n_buffers = (1 if in_place else 2) + (2 + both if dense else 0)
    elements = fallback.BLOCK_ELEMENTS // 2 if dense else fallback.BLOCK_ELEMENTS  # what stays in cache
    plan = fallback._Plan(logits, n_buffers, grad, WORKSPACE_SHARE, elements)
    sources, labels = plan.pieces(logits), index.split_with_sizes(plan.sizes)
    given = None if shares.probabilities is None else plan.pieces(shares.probabilities)
    keeps = None if counts is None else counts.split_with_sizes(plan.sizes)
    if grad is not None and grad_loss is not None:
        grads = plan.pieces(grad)
        weights = grad_loss[:, None].expand(len(index), 1).split_with_sizes(plan.sizes)
    found, values, found_labels = [], [], []
    for i, source in enumerate(sources):
        z, *buffers = (plan.buffer(k, i)[: plan.sizes[i]] for k in range(n_buffers))
        fallback._as_rows(source, z).copy_(source)
        e = grads[i] if in_place else buffers.pop(0)
        row_label = labels[i]
        if given is None:
            v = v_share.in_block(row_label, None, None, dtype)
            t = t_share.in_block(row_label, None, None, dtype) if both else v
        else:
            scratch, *hard = buffers
            for buffer in hard:
                fallback._as_rows(given[i], buffer).copy_(given[i])
            row_label = fallback._max(hard[0])[1]
            v = v_share.in_block(row_label, hard[0], scratch, dtype)
            t = t_share.in_block(row_label, hard[1], scratch, dtype) if both else v
        block = _Block(z, e, row_label, loss, t if loss.adds_to_cross_entropy else None, v, scores)
        found.append(block.columns)
        found_labels.append(row_label)
        values.append(block.value)
        if grad is not None:
            block.gradient(weights[i])
            if keeps is not None:
                e.masked_fill_(~keeps[i][:, None], 0.0)
            if not in_place:
                grads[i].copy_(fallback._as_rows(grads[i], e))
    columns = fallback._Columns(*map(torch.cat, zip(*found, strict=True)))
    if scores:
        fallback._repair(logits, torch.cat(found_labels), columns)
    out = fallback._finish(columns, counts, CrossEntropy(), scores)
    value = torch.cat(values)[:, 0]
    return out._replace(loss=value if counts is None else value.masked_fill_(~counts, 0.0)), grad


class _Block:
    """One block of rows: ``z`` [n, C], overwritten; ``e`` becomes exp(z - max), then the gradient."""

    def __init__(
        self, z: Tensor, e: Tensor, label: Tensor, loss: Loss, t: BlockShare | None, v: BlockShare, scores: bool
    ) -> None:
        self.label, self.t, self.e = label, t, e
        z_target = z.gather(1, label)
        z_target.masked_fill_(z_target == torch.inf, torch.nan)
        z.scatter_(1, label, -torch.inf)
        maximum, self.runner_up = fallback._max(z)
        origin = fallback._origin(maximum)
        z.sub_(origin).scatter_(1, label, 0.0)
        share_of_z = 0.0 if t is None else _share_of_z(t, z)
        z.scatter_(1, label, LOWEST)
        _exp_(z, e)
        sum_exp = row_sum(e)
        moments = (sum_exp, sum_exp)
        if scores:
            sum_exp_z = dot(z, e, z)  # NaN if a logit is -inf: `fallback._repair`
            moments = dot(e, e, z), sum_exp_z
        gap = (z_target - maximum) - sum_exp.log()
        self.columns = fallback._Columns(gap, maximum, sum_exp, z_target, *moments, self.runner_up)
        self.gaps, self.apart = gap, label  # of the label, and of the runner-up where it is taken apart: [n, 1 or 2]
        self.scale = torch.sigmoid(-gap) / sum_exp.clamp(min=1.0)  # of e, to probabilities

        self.value: Tensor = torch.zeros_like(gap)
        self.mass: Tensor | float = 0.0  # the pulls of all classes that are not taken apart
        self.pulls: Tensor | float = 0.0  # of those that are, [n, 1 or 2]
        self.others: list[tuple[Tensor | float, float]] = []  # pulls [n, C] of the others, and a factor
        if t is not None:
            self.mass = t.total(z.shape[1], label)
            lse = sum_exp.clamp(min=1.0).log() - logsigmoid(-gap)  # from the max of the rest
            self.value = t.label * -logsigmoid(gap) + _paid(self.mass, lse) - share_of_z
            self.pulls = t.label
        if loss.is_cross_entropy():
            self.others = [] if t is None else [(t.off, 1.0)]
            return
        # the runner-up has exp(0) where there is one; an empty rest has none: its index is the label's
        others = row_sum(e.scatter_(1, self.runner_up, 0.0))
        next_gap = (maximum - origin) - torch.logaddexp(others.log(), z_target - origin)
        self.absent = self.runner_up == label
        self.gaps, self.apart = torch.cat([gap, next_gap], 1), torch.cat([label, self.runner_up], 1)
        if t is not None:
            self.pulls = self._shares_apart(t)
            self.mass = self.mass - self.pulls[:, 1:]
        if isinstance(loss, LogBonus) and loss.is_logarithm_below_half():
            self._add_logarithm(z, loss, v)
        else:
            self._add_terms(z, loss, v)
        self._add_apart(loss, v)

    def _shares_apart(self, share: BlockShare) -> Tensor:
        """Return the shares [n, 2] of label and runner-up, 0 for a runner-up that is absent."""
        both = self.gaps.new_empty(self.gaps.shape)
        both[:, :1], both[:, 1:] = share.label, share.at(self.runner_up)
        both[:, 1:].masked_fill_(self.absent, 0.0)
        return both

    def _add_logarithm(self, rest: Tensor, loss: LogBonus, v: BlockShare) -> None:
        """Add ``v log(1 - p)``, whose pull is ``v p / (1 - p)``; ``rest`` is a buffer."""
        off, strength = v.off, loss.strength
        uniform = isinstance(off, float)
        inverted = self.t is v and strength == 1  # then t + v p / (1 - p) = v / (1 - p), which saves a pass
        if not inverted:
            self.e.mul_(self.scale)
            self.scale = torch.ones_like(self.scale)
        torch.mul(self.e, -self.scale, out=rest).add_(1.0)
        self.value = self.value + v.dot_log(rest).mul_(strength)
        pull = rest.reciprocal_() if inverted and uniform else torch.div(off if inverted else self.e, rest, out=rest)
        if not (inverted or uniform):
            pull.mul_(off)
        factor = off * strength if isinstance(off, float) else strength
        if inverted:
            self.others = [(pull.scatter_(1, self.label, 0.0).scatter_(1, self.runner_up, 0.0), factor)]
            self.mass = row_sum(pull).mul_(factor)
        else:
            self.others = [(pull, factor)] if self.t is None else [(pull, factor), (self.t.off, 1.0)]
            self.mass = self.mass + row_sum(pull).mul_(factor)

    def _add_terms(self, rest: Tensor, loss: Loss, v: BlockShare) -> None:
        """Add what any loss adds for the classes that are not taken apart; ``rest`` is a buffer."""
        p, self.scale = self.e.mul_(self.scale), torch.ones_like(self.scale)
        torch.neg(p, out=rest).add_(1.0)
        log_p = torch.log(p)
        value, pull = loss.class_value(p, rest, log_p, v.off), loss.class_pull(p, rest, log_p, v.off)
        for index in (self.runner_up, self.label):
            value.scatter_(1, index, 0.0)
            pull.scatter_(1, index, 0.0)
        self.others = [(pull, 1.0)] if self.t is None else [(pull, 1.0), (self.t.off, 1.0)]
        self.mass = self.mass + pull.sum(1, keepdim=True)
        self.value = self.value + value.sum(1, keepdim=True)

    def _add_apart(self, loss: Loss, v: BlockShare) -> None:
        """Add what the loss adds for label and runner-up, from their gaps."""
        share, gaps = self._shares_apart(v), self.gaps
        p, rest = torch.sigmoid(gaps), torch.sigmoid(-gaps).clamp(min=torch.finfo(gaps.dtype).tiny)
        # the gap is exact where 1 - p underflows
        value = share * loss.excess(gaps) if isinstance(loss, GapLoss) else loss.class_value(p, rest, p, share)
        pull = loss.class_pull(p, rest, logsigmoid(gaps), share)
        value[:, 1:].masked_fill_(self.absent, 0.0)
        pull[:, 1:].masked_fill_(self.absent, 0.0)
        self.value = self.value + value.sum(1, keepdim=True)
        self.pulls = pull + self.pulls

    def gradient(self, grad_loss: Tensor) -> None:
        """Turn ``e`` into the gradient for the upstream gradient [n, 1]."""
        pulls = torch.broadcast_to(torch.as_tensor(self.pulls, dtype=self.e.dtype, device="cpu"), self.gaps.shape)
        self.e.mul_(self.scale * (self.mass + pulls.sum(1, keepdim=True)) * grad_loss)
        for share, factor in self.others:
            if isinstance(share, Tensor):
                self.e.addcmul_(share.expand_as(self.e), grad_loss * factor, value=-1)
            elif share * factor != 0:
                self.e.sub_(grad_loss * (share * factor))
        # from the pulls of all other classes: a difference with its own would cancel
        mass = self.mass + pulls.flip(1) if pulls.shape[1] == 2 else self.mass
        at = (torch.sigmoid(self.gaps) * mass - torch.sigmoid(-self.gaps) * pulls) * grad_loss
        if pulls.shape[1] == 2:
            at[:, 1:] = torch.where(self.absent, at[:, :1], at[:, 1:])
        self.e.scatter_(1, self.apart, at)


def _paid(mass: Tensor | float, lse: Tensor) -> Tensor | float:
    """Return the product, 0 where there is no mass."""
    if isinstance(mass, Tensor):
        return (mass * lse).masked_fill_(mass == 0, 0.0)
    return mass * lse if mass != 0 else 0.0


def _share_of_z(t: BlockShare, z: Tensor) -> Tensor | float:
    """Return the sum [n, 1] of share times ``z`` [n, C], which is 0 at the label."""
    if isinstance(t.off, float):
        return t.dot(z) if t.off != 0 else 0.0
    total = t.dot(z)
    spoilt = total.isnan()[:, 0]
    if spoilt.any():  # a class at -inf without a share costs nothing
        off = t.off.expand_as(z)[spoilt]
        total[spoilt] = torch.where(off == 0, 0.0, off * z[spoilt]).sum(1, keepdim=True)
    return total


def _exp_(shifted: Tensor, out: Tensor) -> Tensor:
    """Return e^shifted; of a class-major block cut from its padding the last rows by torch's own ways."""
    if shifted.stride(1) == 1:
        return fallback._exp_(shifted, out)
    return torch.mul(shifted, fallback.LOG2_E, out=out).exp2_()
