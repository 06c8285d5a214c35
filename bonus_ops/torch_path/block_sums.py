"""One block of rows whose targets are shares of the classes: its sums, and its gradient while it is in cache.

Label and runner-up are apart: kept out of every sum over classes and added from their gaps, as [2, n, 1]. Only they
can be near p = 1, where 1 - p must not be a difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..losses import LogBonus, Loss
from .block_share import BlockShare
from .columns import Columns
from .maximum import origin, row_max
from .sums import moments, row_sum
from .vectors import LOG2_E, exp_

__all__ = ["BlockSums", "Paid"]


class Paid(NamedTuple):
    """What the losses of rows are made of, [n, 1] or [2, n, 1]; `shares.visit` adds it up for all blocks at once."""

    gaps: Tensor  # of label and runner-up
    absent: Tensor  # where there is no runner-up: its index is the label's
    share_of_z: Tensor | float  # sum of t (z - max) but for the label
    t_total: Tensor | float  # sum of t but for the label
    t: Tensor  # of label and runner-up
    v: Tensor  # the same
    classes: Tensor | float  # what the loss adds for classes that are not apart


class BlockSums:
    """Sums of ``z`` [n, C], a buffer; ``e`` becomes exp(z - max), 0 for those apart, then the gradient."""

    def __init__(
        self, z: Tensor, e: Tensor, label: Tensor, loss: Loss, t: BlockShare | None, v: BlockShare, scores: bool
    ) -> None:
        z_target = z.gather(1, label)
        z_target.masked_fill_(z_target == torch.inf, torch.nan)
        z.scatter_(1, label, -torch.inf)
        maximum, runner_up = row_max(z)
        shift = origin(maximum)
        z.sub_(shift).scatter_(1, label, 0.0)
        share_of_z = 0.0 if t is None else _share_of_z(t, z)
        self.e, self.apart = e, torch.cat([label, runner_up], 1)
        _exp_of(z, e)
        sum_exp = row_sum(e.scatter_(1, label, 0.0))
        # NaN if a logit is -inf: `columns.repair`
        sum_exp_z, sum_exp2 = moments(z, e) if scores else (sum_exp, sum_exp)
        others = row_sum(e.scatter_(1, runner_up, 0.0))
        gap = (z_target - maximum).sub_(sum_exp.log())
        self.columns = Columns(gap, maximum, sum_exp, z_target, sum_exp2, sum_exp_z, runner_up)

        gaps = torch.stack([gap, (maximum - shift) - torch.logaddexp(others.log(), z_target - shift)])
        self.p, self.rest = torch.sigmoid(gaps), torch.sigmoid(-gaps)
        self.scale = self.rest[0] / sum_exp.clamp(min=1.0)  # of e, to probabilities
        self.absent = runner_up == label
        self.any_absent = bool(self.absent.any())
        self.paid = self._pulled(gaps, z, label, share_of_z, loss, t, v)

    def _pulled(
        self, gaps: Tensor, z: Tensor, label: Tensor, share_of_z: Tensor | float, loss: Loss, t: BlockShare | None,
        v: BlockShare,
    ) -> Paid:  # fmt: skip
        """Add up what pulls at the logits; ``z`` is a buffer."""
        self.mass: Tensor | float = 0.0  # the pulls of all classes that are not apart
        self.others: list[tuple[Tensor | float, float]] = []  # pulls [n, C] of those that are not, and a factor
        t_total: Tensor | float = 0.0
        if t is None:
            t_apart = torch.zeros_like(gaps)
        else:
            t_total, t_apart = t.total(z.shape[1], label), self._apart(t)
            self.mass = t_total - t_apart[1]
            self.others = [(t.off, 1.0)]
        self.pulls = v_apart = t_apart  # of those that are
        classes: Tensor | float = 0.0
        if not loss.is_cross_entropy():
            v_apart = t_apart if t is v else self._apart(v)
            rest = self.rest.clamp(min=torch.finfo(gaps.dtype).tiny)
            log_p = logsigmoid(gaps)
            self.pulls = loss.class_pull(self.p, rest, log_p, v_apart) + t_apart
            if isinstance(loss, LogBonus) and loss.is_logarithm_below_half():
                classes = self._logarithms(z, loss, v, t is v)
            else:
                classes = self._class_terms(z, loss, v)
        return Paid(gaps, self.absent, share_of_z, t_total, t_apart, v_apart, classes)

    def _apart(self, share: BlockShare) -> Tensor:
        """Return the shares of label and runner-up, 0 for one that is absent."""
        both = share.apart(self.apart[:, 1:], self.e.dtype)
        if self.any_absent:
            both = torch.stack([both[0], both[1].masked_fill(self.absent, 0.0)])
        return both

    def _logarithms(self, rest: Tensor, loss: LogBonus, v: BlockShare, is_t: bool) -> Tensor:
        """Add the pulls ``v p / (1 - p)``; return the sum of ``v log(1 - p)``. ``rest`` is a buffer."""
        strength, uniform = loss.strength, isinstance(v.off, float)
        off = v.off if isinstance(v.off, float) else 1.0
        inverted = is_t and strength == 1  # then t + v p / (1 - p) = v / (1 - p), which saves a pass
        if not inverted:
            self.e.mul_(self.scale)
            self.scale = torch.ones_like(self.scale)
        torch.mul(self.e, -self.scale, out=rest).add_(1.0)
        value = v.dot_log(rest)
        if inverted:
            pull = rest.reciprocal_() if uniform else torch.div(v.off, rest, out=rest)
            self.others, self.mass = [(pull.scatter_(1, self.apart, 0.0), off)], 0.0
        else:
            pull = torch.div(self.e, rest, out=rest)
            pull = pull if uniform else pull.mul_(v.off)
            self.others.append((pull, off * strength))
        self.mass = row_sum(pull).mul_(off * strength).add_(self.mass)
        return value if strength == 1 else value.mul_(strength)

    def _class_terms(self, rest: Tensor, loss: Loss, v: BlockShare) -> Tensor:
        """Add the pulls of any loss; return the sum of what it adds. ``rest`` is a buffer."""
        p, self.scale = self.e.mul_(self.scale), torch.ones_like(self.scale)
        torch.neg(p, out=rest).add_(1.0)
        log_p = torch.log(p)
        value, pull = loss.class_value(p, rest, log_p, v.off), loss.class_pull(p, rest, log_p, v.off)
        value.scatter_(1, self.apart, 0.0)
        pull.scatter_(1, self.apart, 0.0)
        self.others.append((pull, 1.0))
        self.mass = self.mass + pull.sum(1, keepdim=True)
        return value.sum(1, keepdim=True)

    def gradient(self, grad_loss: Tensor) -> None:
        """Turn ``e`` into the gradient for the upstream gradient [n, 1]."""
        pulls, mass = self.pulls, self.mass
        self.e.mul_((self.scale * (mass + pulls.sum(0))).mul_(grad_loss))
        for share, factor in self.others:
            if isinstance(share, Tensor):
                self.e.addcmul_(share.expand_as(self.e), grad_loss * factor, value=-1)
            elif share * factor != 0:
                self.e.sub_(grad_loss * (share * factor))
        # from the pulls of all other classes: a difference with its own would cancel
        at = (self.p * (mass + pulls.flip(0))).sub_(self.rest * pulls).mul_(grad_loss)
        if self.any_absent:
            at[1] = torch.where(self.absent, at[0], at[1])
        self.e.scatter_(1, self.apart, at.squeeze(2).t())


def _share_of_z(t: BlockShare, z: Tensor) -> Tensor | float:
    """Return the sum [n, 1] of share times ``z`` [n, C], which is 0 at the label."""
    if not isinstance(t.off, Tensor):
        return t.dot(z) if t.off != 0 else 0.0
    total = t.dot(z)
    spoilt = total.isnan()[:, 0]
    if spoilt.any():  # a class at -inf without a share costs nothing
        off = t.off.expand_as(z)[spoilt]
        total[spoilt] = torch.where(off == 0, 0.0, off * z[spoilt]).sum(1, keepdim=True)
    return total


def _exp_of(shifted: Tensor, out: Tensor) -> Tensor:
    """Return e^shifted; class-major blocks have no padding here, so torch may take scalar functions for the last."""
    if shifted.stride(1) == 1:
        return exp_(shifted, out)
    return torch.mul(shifted, LOG2_E, out=out).exp2_()
