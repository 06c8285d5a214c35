"""Cases, providers (name -> callable) and the float64 truth a provider must meet before it is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores, difficulty_scores

LOG_END = 0.75
BONUS = LogBonus(LOG_END)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCORE_NAMES = ("loss", "el2n", "margin", "entropy", "energy")


class Case(NamedTuple):
    n_classes: int
    n_rows: int
    inner: tuple[int, ...] = ()  # further axes, of pixels: logits [N, C, height, width]

    def shape(self, quick: bool) -> tuple[int, ...]:
        """Return the shape of the logits; a quick run has few of them."""
        inner = tuple(x // 8 for x in self.inner) if quick else self.inner
        return (max(self.n_rows // 64, 2) if quick else self.n_rows, self.n_classes, *inner)


CASES = {
    "one-batch": Case(10, 64),  # what a call costs however little it computes
    "small-batch": Case(1000, 128),
    "ten-classes": Case(10, 65536),
    "imagenet-1k": Case(1000, 4096),
    "llama2-vocab": Case(32000, 1024),
    "llama3-vocab": Case(128256, 128),
    "street-scenes": Case(19, 8, (256, 256)),
    "foreground": Case(2, 8, (256, 256)),
}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits [N, C, d1, ...], as of a partly trained classifier, and labels: gaps from -4 to 10."""
    n_rows, n_classes = math.prod(shape) // shape[1], shape[1]
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    logits = torch.randn(n_rows, n_classes, generator=generator)
    rest = logits.scatter(1, target[:, None], -math.inf).logsumexp(1)
    gap = torch.rand(n_rows, generator=generator) * 14 - 4
    logits[torch.arange(n_rows), target] = rest + gap
    target = target.reshape(shape[0], *shape[2:])
    logits = logits.reshape(*target.shape, n_classes).movedim(-1, 1).contiguous()
    return logits.to(dtype).requires_grad_(), target


def rows(x: Tensor) -> Tensor:
    """Return [N, C, d1, ...] as [rows, C]."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


# --- providers --------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    loss: Tensor | None
    scores: Sequence[Tensor] | None = None  # loss, el2n, margin, entropy, energy, runner_up


class Provider(NamedTuple):
    run: Callable[[Tensor, Tensor], Outcome]
    bonus: bool = False  # the loss is the bonus loss, else plain cross-entropy
    trains: bool = True  # forward and backward, else forward alone without autograd
    upstream: float = 1.0  # what backward starts from


def paper_terms(logits: Tensor, log_end: float = LOG_END) -> tuple[Tensor, Tensor]:
    """Return log p and the bonus as the paper's code computes them: every step a tensor as large as the logits."""
    # float32 as under autocast: in bfloat16 1 - p is 0 from p = 0.998 on
    log_p = F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))
    p = log_p.exp()
    bonus = torch.log(torch.clamp(1 - p, min=1e-5))
    if log_end < 1:
        tangent = math.log(1 - log_end) - (p - log_end) / (1 - log_end)
        bonus = torch.where(p > log_end, tangent, bonus)
    return log_p, bonus


def paper_formula(logits: Tensor, target: Tensor, log_end: float = LOG_END, reduction: str = "mean") -> Tensor:
    """Return the loss as the paper's code computes it."""
    log_p, bonus = paper_terms(logits, log_end)
    return F.nll_loss(log_p - bonus, target, reduction=reduction)


@torch.no_grad()
def eager_scores(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return the six scores by the eager torch a user would write."""
    label = target[:, None]
    log_p = F.log_softmax(logits, 1, dtype=torch.float32)
    p = log_p.exp()
    loss = -log_p.gather(1, label)[:, 0]
    error = p.scatter_add(1, label, -torch.ones_like(label, dtype=p.dtype))  # softmax - onehot
    other, runner_up = logits.scatter(1, label, -math.inf).max(1)
    margin = logits.gather(1, label)[:, 0].float() - other.float()
    return loss, error.norm(dim=1), margin, -(p * log_p).sum(1), -logits.float().logsumexp(1), runner_up


def _ours(logits: Tensor, target: Tensor) -> Outcome:
    return Outcome(*bonus_cross_entropy_with_scores(logits, target, bonus=BONUS))


PROVIDERS = {
    "ours": Provider(_ours, bonus=True),
    # loops by Numba make their gradient in forward: another upstream gradient than 1 costs them a pass
    "ours, upstream 1/2": Provider(_ours, bonus=True, upstream=0.5),
    "ours, loss only": Provider(lambda z, y: Outcome(bonus_cross_entropy(z, y, bonus=BONUS)), bonus=True),
    "F.cross_entropy": Provider(lambda z, y: Outcome(F.cross_entropy(z, y))),
    "paper's formula": Provider(lambda z, y: Outcome(paper_formula(z, y)), bonus=True),
    "eager loss and scores": Provider(lambda z, y: Outcome(paper_formula(z, y), eager_scores(z, y)), bonus=True),
    "difficulty_scores": Provider(lambda z, y: Outcome(None, difficulty_scores(z, y)), trains=False),
    "F.cross_entropy, forward": Provider(lambda z, y: Outcome(F.cross_entropy(z, y)), trains=False),
}


def call(provider: Provider, logits: Tensor, target: Tensor) -> Outcome:
    """Run one step of a provider; the gradient is left in ``logits.grad``."""
    if not provider.trains:
        with torch.no_grad():
            return provider.run(logits, target)
    outcome = provider.run(logits, target)
    if provider.upstream == 1:
        outcome.loss.backward()
    else:
        outcome.loss.backward(torch.full_like(outcome.loss, provider.upstream))
    return outcome


# --- truth ------------------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """Float64 columns, a number a row, of logits as given, without a difference that could cancel."""

    loss: Tensor
    bonus_loss: Tensor
    log_rest: Tensor  # log(1 - p)
    slope: Tensor  # -dL/dz_y of cross-entropy
    bonus_slope: Tensor
    direction: Tensor  # [n_rows, n_classes]: dL/dz = slope * direction
    scores: dict[str, Tensor]


def truth(logits: Tensor, target: Tensor) -> Truth:
    z, label = rows(logits.detach()).double(), target.reshape(-1, 1)
    others = z.scatter(1, label, -math.inf)
    other = others.amax(1)
    z_target = z.gather(1, label)[:, 0]
    gap = (z_target - other) - (others - other[:, None]).exp().sum(1).log()
    p, rest, zero = torch.sigmoid(gap), torch.sigmoid(-gap), torch.zeros_like(gap)
    loss, log_rest = torch.logaddexp(zero, -gap), -torch.logaddexp(zero, gap)
    tangent = math.log(1 - LOG_END) - 1 + rest / (1 - LOG_END)
    bonus_slope = rest + p * (rest / (1 - LOG_END)).clamp(max=1)
    direction = others.softmax(1).scatter(1, label, -1.0)
    log_p = z.log_softmax(1)
    scores = (loss, rest * direction.norm(dim=1), z_target - other, -(log_p.exp() * log_p).sum(1), -z.logsumexp(1))
    bonus_loss = loss + torch.where(p <= LOG_END, log_rest, tangent)
    named = dict(zip(SCORE_NAMES, scores, strict=True))
    return Truth(loss, bonus_loss, log_rest, rest, bonus_slope, direction, named)


class WrongResult(Exception):
    """A provider's result is not the quantity it is compared on."""


# room for the least exact: the paper's 1 - p, torch's bfloat16 log_softmax; `accuracy` tells how exact each is
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def check(provider: Provider, logits: Tensor, target: Tensor, exact: Truth) -> None:
    """Run a provider; raise `WrongResult` where loss, scores or gradient miss the truth by more than rounding."""
    tolerance = TOLERANCE[logits.dtype]
    logits = logits.detach().clone().requires_grad_()
    values = logits.detach().clone()
    outcome = call(provider, logits, target)
    if outcome.loss is not None:
        close("loss", outcome.loss, (exact.bonus_loss if provider.bonus else exact.loss).mean(), tolerance)
    if provider.trains:
        slope = (exact.bonus_slope if provider.bonus else exact.slope) * provider.upstream / target.numel()
        largest = provider.upstream / target.numel()  # that the gradient of a row can be
        close(
            "gradient",
            rows(logits.grad).double() / largest,
            slope[:, None] * exact.direction / largest,
            tolerance,
        )
    if outcome.scores is not None:
        for name, score in zip(SCORE_NAMES, outcome.scores, strict=False):
            close(name, score.flatten(), exact.scores[name], 1e-4)
        check_runner_up(rows(values), target.flatten(), outcome.scores[5].flatten(), exact.scores["margin"])


def check_runner_up(logits: Tensor, target: Tensor, runner_up: Tensor, margin: Tensor) -> None:
    """Check by value: in bfloat16 the runner-up is often tied."""
    both = logits.detach().double().gather(1, torch.stack([target, runner_up.long()], 1))
    close("runner_up", both[:, 0] - both[:, 1], margin, 0.0)


def close(name: str, x: Tensor, true: Tensor, tolerance: float) -> None:
    """Raise `WrongResult` where ``x`` is off by more than ``tolerance`` of 1 + |true|."""
    error = ((x.detach().double() - true).abs() / (1 + true.abs())).max()
    if not error <= tolerance:
        raise WrongResult(f"{name} is off by {error:.1e}, more than {tolerance:.0e}")
