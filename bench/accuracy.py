"""Error against float64 truth of the same rounded inputs: ours, F.cross_entropy and the paper's eager formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import LogBonus, bonus_cross_entropy, difficulty_scores

from .command import Tell
from .measure import Effort
from .providers import BONUS, paper_formula, truth

N_CLASSES, N_ROWS = 1000, 64
OFFSETS = (0.0, 1e2, 1e4, 1e6, 1e8)
OURS, TORCH, PAPER, EAGER = "ours", "F.cross_entropy", "paper's formula", "sqrt(sum p^2 - 2p + 1)"


TABLE_GAPS = (-20, -10, 0, 3, 6, 9, 12, 15, 16, 20, 30, 60, 87, 90)


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    every = {Effort.QUICK: range(-20, 91, 20), Effort.SHORT: TABLE_GAPS, Effort.FULL: range(-20, 91)}
    gaps = [float(gap) for gap in every[effort]]
    tell(f"{len(gaps)} gaps, {len(OFFSETS)} offsets")
    n_rows = 8 if effort is Effort.QUICK else N_ROWS
    return {
        "n_classes": N_CLASSES,
        "n_rows": n_rows,
        "gaps": gaps,
        "by_gap": _series([errors(*rows_with_gap(n_rows, gap, 0.0)) for gap in gaps]),
        "offsets": list(OFFSETS),
        "by_offset": _series([errors(*rows_with_gap(n_rows, 2.0, offset)) for offset in OFFSETS]),
    }


def rows_with_gap(n_rows: int, gap: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return float32 logits [n_rows, N_CLASSES] whose gap is ``gap`` up to their own rounding, and labels."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(N_CLASSES, (n_rows,), generator=generator)
    logits = 2 * torch.randn(n_rows, N_CLASSES, generator=generator, dtype=torch.float64)
    rest = logits.scatter(1, target[:, None], -math.inf).logsumexp(1)
    logits[torch.arange(n_rows), target] = rest + gap
    return (logits + offset).float(), target


def errors(z: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Return {quantity: {provider: worst error over the rows}}."""
    exact = truth(z, y)

    def ours(z: Tensor, bonus: LogBonus | None) -> Tensor:
        return bonus_cross_entropy(z, y, reduction="none", bonus=bonus)

    def paper(z: Tensor, log_end: float) -> Tensor:
        return paper_formula(z, y, log_end, "none")

    plain = ours(z, None)
    cross_entropy = {OURS: plain, TORCH: F.cross_entropy(z, y, reduction="none")}
    # L = -log p + log(1 - p) at log_end=1; both as their users get them
    log_rest = {
        OURS: ours(z, LogBonus(1.0, clamp=None)).double() - plain.double(),
        PAPER: paper(z, 1.0).double() - F.nll_loss(F.log_softmax(z, 1), y, reduction="none").double(),
    }
    p = z.softmax(1)
    el2n_squared = (p * p).sum(1) - 2 * p.gather(1, y[:, None])[:, 0] + 1
    el2n = {OURS: difficulty_scores(z, y).el2n, EAGER: el2n_squared.clamp(min=0).sqrt()}
    slope = {
        OURS: _slope(lambda z: ours(z, None), z, y),
        TORCH: _slope(lambda z: F.cross_entropy(z, y, reduction="none"), z, y),
    }
    bonus_slope = {OURS: _slope(lambda z: ours(z, BONUS), z, y), PAPER: _slope(lambda z: paper(z, 0.75), z, y)}
    bonus_loss = {OURS: ours(z, BONUS), PAPER: paper(z, 0.75)}
    return {
        "cross-entropy, absolute": _worst(cross_entropy, exact.loss, relative=False),
        "cross-entropy, relative": _worst(cross_entropy, exact.loss, relative=True),
        "bonus loss, absolute": _worst(bonus_loss, exact.bonus_loss, relative=False),  # crosses 0: nothing relative
        "log(1-p), absolute": _worst(log_rest, exact.log_rest, relative=False),
        "target gradient of cross-entropy, relative": _worst(slope, exact.slope, relative=True),
        "target gradient of bonus loss, relative": _worst(bonus_slope, exact.bonus_slope, relative=True),
        "EL2N, relative": _worst(el2n, exact.scores["el2n"], relative=True),
    }


def _slope(loss: Callable[[Tensor], Tensor], z: Tensor, y: Tensor) -> Tensor:
    z = z.detach().clone().requires_grad_()
    loss(z).sum().backward()
    return -z.grad.gather(1, y[:, None])[:, 0]


def _worst(values: dict[str, Tensor], exact: Tensor, relative: bool) -> dict[str, float]:
    scale = exact.abs() if relative else 1.0
    return {name: float(((x.detach().double() - exact).abs() / scale).max()) for name, x in values.items()}


def _series(points: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Turn a list of points into one list of errors per quantity and provider."""
    return {
        quantity: {name: [point[quantity][name] for point in points] for name in points[0][quantity]}
        for quantity in points[0]
    }
