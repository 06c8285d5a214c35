"""The sigmoid family beside its eager formulas and torch's binary cross-entropy: forward and backward, one thread."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import Focal, LogBonus, PowerBonus, bonus_binary_cross_entropy_with_logits

from . import measure
from .bounds import bound
from .command import Tell, counted
from .intervals import ratio, summary
from .measure import Effort
from .providers import DTYPES, TOLERANCE, WrongResult

ALPHA, NORMALIZER = 0.25, 100.0
SHAPES = {"multi-label": (4096, 1000), "detection": (32, 80, 6400)}
AT_LEAST = 6.0  # times faster than the eager formula, from these shapes up


# --- what users write -------------------------------------------------------------------------------------------------


def eager_focal(x: Tensor, t: Tensor, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(x)
    plain = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_target = p * t + (1 - p) * (1 - t)
    balance = ALPHA * t + (1 - ALPHA) * (1 - t)
    return (balance * plain * (1 - p_target) ** gamma).sum() / NORMALIZER


def eager_power(x: Tensor, t: Tensor, gamma: float = 2.0) -> Tensor:
    p = torch.sigmoid(x)
    plain = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_target = p * t + (1 - p) * (1 - t)
    return (plain - p_target**gamma).sum() / NORMALIZER


def eager_log(x: Tensor, t: Tensor, log_end: float = 0.75) -> Tensor:
    p = torch.sigmoid(x)
    plain = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_target = p * t + (1 - p) * (1 - t)
    bonus = torch.log(1 - p_target.clamp(max=log_end)) - (p_target - log_end).clamp(min=0) / (1 - log_end)
    return (plain + bonus).sum() / NORMALIZER


def eager_plain(x: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, t, reduction="sum") / NORMALIZER


class Pair(NamedTuple):
    eager: Callable[[Tensor, Tensor], Tensor]
    options: dict[str, Any]


PAIRS = {
    "Focal(2), alpha": Pair(eager_focal, {"bonus": Focal(2.0), "alpha": ALPHA}),
    "PowerBonus(2)": Pair(eager_power, {"bonus": PowerBonus(2.0)}),
    "LogBonus(0.75)": Pair(eager_log, {"bonus": LogBonus(0.75)}),
    "None": Pair(eager_plain, {"bonus": None}),  # beside torch's own fused operator: no bound
}


# --- measuring --------------------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return logits as of a partly trained detector and targets of which one in twenty is positive."""
    generator = torch.Generator().manual_seed(0)
    t = (torch.rand(shape, generator=generator) < 0.05).float()
    x = 2.0 * torch.randn(shape, generator=generator) - 3.0 + 5.0 * t
    return x.to(dtype).requires_grad_(), t.to(dtype)


def ours(x: Tensor, t: Tensor, pair: Pair) -> Tensor:
    return bonus_binary_cross_entropy_with_logits(x, t, normalizer=NORMALIZER, **pair.options)


def cases() -> list[tuple[str, str, str]]:
    return list(itertools.product(DTYPES, SHAPES, PAIRS))


def names(*_: str) -> list[str]:
    return ["ours", "eager"]


def steps(dtype: str, shape: str, loss: str, effort: Effort) -> dict[str, measure.Step]:
    """Return the step of ours and of the eager formula, checked first."""
    pair, (x, t) = PAIRS[loss], inputs(_shape(shape, effort), DTYPES[dtype])
    _check(x, t, pair)

    def prepare() -> None:
        x.grad = None

    return {
        "ours": measure.Step(prepare, lambda: ours(x, t, pair).backward()),
        "eager": measure.Step(prepare, lambda: pair.eager(x, t).backward()),
    }


def _shape(shape: str, effort: Effort) -> tuple[int, ...]:
    n, *more = SHAPES[shape]
    return (max(n // 64, 1) if effort is Effort.QUICK else n, *more)


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    """Measure every pair at every shape and dtype; ratios are medians over interleaved rounds."""
    some = (case for case in cases() if not effort.leaves_out(math.prod(SHAPES[case[1]])))
    found = [_measure(*case, effort) for case in counted(some, tell)]
    return {"cases": found, "bounds": [] if effort is Effort.QUICK else list(verdicts(found))}


def _measure(dtype: str, shape: str, loss: str, effort: Effort) -> dict[str, Any]:
    made, sizes = steps(dtype, shape, loss, effort), _shape(shape, effort)
    gradient = math.prod(sizes) * DTYPES[dtype].itemsize
    peaks = {f"{name}_peak_gradients": measure.peak_bytes(step) / gradient for name, step in made.items()}
    times = measure.interleave(made, *effort.rounds(1.5, (3, 11)))
    return {
        "case": shape, "shape": list(sizes), "dtype": dtype, "loss": loss,
        "eager / ours": ratio(times["eager"], times["ours"]),
        "ours_ms": summary(times["ours"]), "eager_ms": summary(times["eager"]), **peaks,
    }  # fmt: skip


def _check(x: Tensor, t: Tensor, pair: Pair) -> None:
    """Raise `WrongResult` where loss or gradient differ from those of the eager formula in float64."""
    x, t = x.detach().flatten()[:2048].clone().requires_grad_(), t.flatten()[:2048]
    wide = x.detach().double().requires_grad_()
    loss, true = ours(x, t, pair), pair.eager(wide, t.double())
    grad, true_grad = (torch.autograd.grad(y, z)[0].double() for y, z in ((loss, x), (true, wide)))
    loss, true = loss.detach().double(), true.detach()
    error = max((loss - true).abs() / (1 + true.abs()), (grad - true_grad).abs().max() * NORMALIZER)
    if not error <= TOLERANCE[x.dtype]:
        raise WrongResult(f"off by {float(error):.1e}")


def verdicts(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return what is required beside eager formulas; torch's own operator, None, is none."""
    gains = {(c["dtype"], c["case"], c["loss"]): c["eager / ours"]["median"] for c in found}
    for dtype, shape, loss in cases():
        if loss != "None":
            gain = gains.get((dtype, shape, loss))
            yield bound(f"eager {loss} / ours", gain, at_least=AT_LEAST, case=shape, dtype=dtype)
