"""The sigmoid family beside its eager formulas and torch's binary cross-entropy: forward and backward, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import Focal, LogBonus, PowerBonus, bonus_binary_cross_entropy_with_logits

from . import measure
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


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return logits as of a partly trained detector and targets of which one in twenty is positive."""
    generator = torch.Generator().manual_seed(0)
    t = (torch.rand(shape, generator=generator) < 0.05).float()
    x = 2.0 * torch.randn(shape, generator=generator) - 3.0 + 5.0 * t
    return x.to(device, dtype).requires_grad_(), t.to(device, dtype)


def ours(x: Tensor, t: Tensor, pair: Pair) -> Tensor:
    return bonus_binary_cross_entropy_with_logits(x, t, normalizer=NORMALIZER, **pair.options)


def run(quick: bool, device: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every pair at every shape and dtype; ratios are medians over interleaved rounds."""
    on_gpu = device == "cuda"
    kept = on_gpu or measure.keep_memory()
    if not on_gpu:
        torch.set_num_threads(1)
    cases = []
    for dtype in DTYPES:
        for shape_name, shape in SHAPES.items():
            shape = (max(shape[0] // 64, 1), *shape[1:]) if quick else shape
            x, t = inputs(shape, DTYPES[dtype], device)
            for name, pair in PAIRS.items():
                progress(f"sigmoid: {dtype} {shape_name} {name}")
                case = {"case": shape_name, "shape": list(shape), "dtype": dtype, "loss": name}
                cases.append(case | _measure(x, t, pair, quick, on_gpu))
    return {
        "memory_kept": kept, "threads": None if on_gpu else 1, "cases": cases,
        "bounds": [] if on_gpu or quick else list(map(_verdict, (c for c in cases if c["loss"] != "None"))),
    }  # fmt: skip


def _measure(x: Tensor, t: Tensor, pair: Pair, quick: bool, on_gpu: bool) -> dict[str, Any]:
    _check(x, t, pair)

    def prepare() -> None:
        x.grad = None

    steps = {
        "ours": measure.Step(prepare, lambda: ours(x, t, pair).backward()),
        "eager": measure.Step(prepare, lambda: pair.eager(x, t).backward()),
    }
    gradient = x.numel() * x.element_size()
    peaks = {f"{name}_peak_gradients": measure.peak_bytes(step, on_gpu) / gradient for name, step in steps.items()}
    times = measure.interleave(steps, on_gpu, 0.0 if quick else 1.5, (2, 2) if quick else (3, 11))
    return {
        "eager / ours": measure.ratio(times["eager"], times["ours"]),
        "ours_ms": measure.summary(times["ours"]), "eager_ms": measure.summary(times["eager"]), **peaks,
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


def _verdict(case: dict[str, Any]) -> dict[str, Any]:
    value = case["eager / ours"]["median"]
    return {
        "bound": f"eager {case['loss']} / ours >= {AT_LEAST:g}", "case": case["case"], "dtype": case["dtype"],
        "value": value, "passed": math.isfinite(value) and value >= AT_LEAST,
    }  # fmt: skip
