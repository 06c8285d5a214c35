"""Targets that are shares of classes against the master formula, written out here once more in float64.

Every class k pays a function of its gap for its shares t_k of cross-entropy and v_k of the bonus; with
``A_k = -dL_k/dgap_k`` the gradient is ``dL/dz_j = -A_j + p_j sum_{k != j} A_k / (1 - p_k)``, no term of which cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import logsigmoid

import bonus_ops
from bonus_ops import (
    BonusCrossEntropyLoss,
    CosineBonus,
    Focal,
    GeneralizedCrossEntropy,
    Linear,
    LogBonus,
    Poly1,
    PowerBonus,
    Scheduled,
    SoftmaxAbsoluteError,
    SoftmaxSquaredError,
    SubDataBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
)
from tests import cases
from tests.budget import assert_within_budget
from tests.conftest import ACCELERATOR

IDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
over_dtypes = pytest.mark.parametrize("dtype", cases.FLOATS, ids=IDS.get)

# --- the master formula -----------------------------------------------------------------------------------------------


def prob(gap: Tensor) -> Tensor:
    """Return the sigmoid, whose derivative is here no p (1 - p) that loses 1 - p."""
    return torch.exp(logsigmoid(gap))


def log_bonus(log_end: float) -> Callable[[Tensor], Tensor]:
    def b(gap):
        p, rest = prob(gap), prob(-gap)
        linear = math.log(1 - log_end) - (1 - log_end - rest) / (1 - log_end)
        return torch.where(p <= log_end, logsigmoid(-gap), linear)

    return b


def windowed(b: Callable[[Tensor], Tensor], start: float, abrupt: float) -> Callable[[Tensor], Tensor]:
    """Return strength-1 ``(b(p) - b(start)) [start <= p <= abrupt]``."""

    def inside(gap):
        p = prob(gap)
        begin = b(torch.tensor(math.log(start) - math.log1p(-start), dtype=gap.dtype)) if start else 0.0
        return torch.where((p >= start) & (p <= abrupt), b(gap) - begin, 0.0)

    return inside


def clamped(gap: Tensor) -> Tensor:
    return torch.where(prob(-gap) >= 1e-5, logsigmoid(-gap), math.log(1e-5))


def generalized(gap: Tensor) -> Tensor:
    """Return (1 - p^.7) / .7: the value keeps its digits as p -> 1, the derivative as p -> 0."""
    power = torch.exp(0.7 * logsigmoid(gap))
    return (-torch.expm1(0.7 * logsigmoid(gap.detach())) - power + power.detach()) / 0.7


def mirrored(power: int, strength: float, gamma: float) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Return ``|p - e|^power`` and the mirror bonus."""

    def c(gap, e):
        p, rest = prob(gap), prob(-gap)
        distance = torch.where(e == 1, -rest, p - e)
        return distance.abs() ** power, -strength * e * p**gamma, -strength * (1 - e) * rest**gamma

    return c


class Row(NamedTuple):
    """How a loss is stated here: a bonus beside cross-entropy, a loss paid by shares, or one of distances to them."""

    loss: Any
    bonus: Callable[[Tensor], Tensor] | None = None
    paid: Callable[[Tensor], Tensor] | None = None
    of_share: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None


LOSSES = {
    "cross_entropy": Row(None, lambda gap: 0 * gap),
    "log_bonus": Row(LogBonus(), log_bonus(0.75)),
    "log_bonus_0": Row(LogBonus(0.0), lambda gap: -prob(gap)),
    "log_bonus_.3": Row(LogBonus(0.3, strength=0.7), lambda gap: 0.7 * log_bonus(0.3)(gap)),
    "log_bonus_.5": Row(LogBonus(0.5), log_bonus(0.5)),
    "log_bonus_1": Row(LogBonus(1.0), clamped),
    "log_bonus_exact": Row(LogBonus(1.0, clamp=None), lambda gap: logsigmoid(-gap)),
    "log_bonus_window": Row(LogBonus(start=0.2, abrupt=0.8), windowed(log_bonus(0.75), 0.2, 0.8)),
    "log_bonus_.3_start": Row(LogBonus(0.3, start=0.1), windowed(log_bonus(0.3), 0.1, 1.0)),
    "power_bonus": Row(PowerBonus(2.5, strength=-0.5), lambda gap: 0.5 * torch.exp(2.5 * logsigmoid(gap))),
    "power_bonus_.5": Row(PowerBonus(0.5), lambda gap: -torch.exp(0.5 * logsigmoid(gap))),
    "power_bonus_abrupt": Row(
        PowerBonus(2.0, abrupt=0.9), windowed(lambda gap: -torch.exp(2 * logsigmoid(gap)), 0.0, 0.9)
    ),
    "cosine_bonus": Row(CosineBonus(), lambda gap: -2 * torch.sin(math.pi / 2 * prob(gap)) ** 2),
    "sub_data_bonus": Row(SubDataBonus(0.6), lambda gap: torch.log(0.4 + 0.6 * prob(-gap))),
    "sub_data_bonus_1": Row(SubDataBonus(1.0), clamped),
    "focal": Row(Focal(2.0), paid=lambda gap: -torch.exp(2 * logsigmoid(-gap)) * logsigmoid(gap)),
    "poly1": Row(Poly1(1.5), paid=lambda gap: -logsigmoid(gap) + 1.5 * prob(-gap)),
    "gce": Row(GeneralizedCrossEntropy(0.7), paid=generalized),
    "gap_squared_error": Row(bonus_ops.SquaredError(), paid=lambda gap: prob(-gap) ** 2),
    "focal_star": Row(bonus_ops.FocalStar(2.0, 1.0), paid=lambda gap: -logsigmoid(2 * gap + 1) / 2),
    "squared_error": Row(SoftmaxSquaredError(), of_share=mirrored(2, 0.0, 2.0)),
    "squared_error_mirror": Row(SoftmaxSquaredError(1.0, 2.0), of_share=mirrored(2, 1.0, 2.0)),
    "absolute_error_mirror": Row(SoftmaxAbsoluteError(0.7, 3.0), of_share=mirrored(1, 0.7, 3.0)),
}
BONUSES = [name for name, row in LOSSES.items() if row.bonus is not None]
NO_KERNEL = ("gap_squared_error", "focal_star")


class Exact(NamedTuple):
    """Per row: the loss, the sum of what it is made of; per class: the gradient and the sum of its terms."""

    loss: Tensor
    loss_terms: Tensor
    grad: Tensor
    grad_terms: Tensor


def shares(h: Tensor, smoothing: float, weight: Tensor | None) -> Tensor:
    h = (1 - smoothing) * h + smoothing / h.shape[-1]
    return h if weight is None else h * weight.double()


def exact(row: Row, z: Tensor, t: Tensor, v: Tensor) -> Exact:
    """Return the master formula for float64 logits and shares [N, C]."""
    others = z[:, None, :].masked_fill(torch.eye(z.shape[1], dtype=torch.bool), -math.inf)
    gap = (z - others.logsumexp(-1)).clamp(max=700.0).requires_grad_()  # of a lone class: all there is
    if row.bonus is not None:
        terms = [-t * logsigmoid(gap), v * row.bonus(gap)]
    elif row.paid is not None:
        terms = [v * row.paid(gap)]
    else:
        terms = [x / z.shape[1] for x in row.of_share(gap, v)]
    loss = sum(terms)
    slopes = [-torch.autograd.grad(x.sum(), gap, retain_graph=True)[0] for x in terms]
    gap = gap.detach()
    p, rest = prob(gap), prob(-gap)
    slope, size = sum(slopes), sum(x.abs() for x in slopes)

    def of_others(a):
        pull = a / rest
        return (pull[:, None, :] * (1 - torch.eye(z.shape[1]))).sum(-1)

    grad, grad_terms = p * of_others(slope) - slope, p * of_others(size) + size
    if z.shape[1] == 1:
        grad, grad_terms = grad * 0, grad_terms * 0
    return Exact(loss.sum(-1).detach(), sum(x.detach().abs() for x in terms).sum(-1), grad, grad_terms)


# --- targets ----------------------------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A target: whether probabilities, and options of the call."""

    probabilities: str | None  # which
    options: dict[str, Any]


W, B = "weight", "bonus_weight"
TARGETS = {
    "smoothing": Target(None, {"label_smoothing": 0.1}),
    "all smoothing": Target(None, {"label_smoothing": 1.0}),
    "smoothing of cross-entropy alone": Target(None, {"label_smoothing": 0.1, "bonus_smoothing": 0.0}),
    "smoothing of the bonus alone": Target(None, {"bonus_smoothing": 0.3}),
    "weight": Target(None, {"label_smoothing": 0.1, W: True}),
    "bonus_weight": Target(None, {B: True}),
    "both weights and smoothings": Target(None, {"label_smoothing": 0.1, "bonus_smoothing": 0.3, W: True, B: True}),
    "probabilities": Target("soft", {}),
    "one-hot": Target("one-hot", {}),
    "probabilities with zeros": Target("zeros", {"label_smoothing": 0.1, "bonus_smoothing": 0.0, B: True}),
    "any sum": Target("any sum", {W: True}),
}
OF_A_BONUS = [name for name, target in TARGETS.items() if {"bonus_smoothing", B} & set(target.options)]
PAIRS = [
    (loss, target)
    for loss, row in LOSSES.items()
    for target, what in TARGETS.items()
    if (isinstance(row.loss, bonus_ops.losses.Bonus) or target not in OF_A_BONUS) and not (row.of_share and W in what.options)
]


def logits_and_label(n_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows of every kind: flat, typical, peaked; the label leads by 5, 15, 40; another class does."""
    rng = cases.generator(n_classes)
    z = torch.randn(9, n_classes, generator=rng, dtype=torch.float64)
    z *= torch.tensor([0.1, 1, 3, 10, 1, 1, 1, 1, 1], dtype=torch.float64)[:, None]
    label = torch.randint(0, n_classes, (9,), generator=rng)
    label[0], label[1] = 0, n_classes - 1
    for row, lead in ((4, 5), (5, 15), (6, 40)):
        z[row, label[row]] += lead
    for row, lead in ((7, 10), (8, 30)):
        z[row, (label[row] + 1) % n_classes] += lead
    few = torch.tensor([3, 5, 8]) if n_classes >= 1000 else torch.arange(9)  # the formula takes C^2 a row
    return z[few].to(dtype), label[few]


def given_probabilities(kind: str, label: Tensor, n_classes: int, dtype: torch.dtype) -> Tensor:
    rng = cases.generator(7)
    h = torch.softmax(3 * torch.randn(len(label), n_classes, generator=rng, dtype=torch.float64), 1)
    if kind == "one-hot":
        h = F.one_hot(label, n_classes).double()
    elif kind == "zeros":
        h = torch.where(h < h.median(1, keepdim=True).values, 0.0, h)
        h[torch.arange(len(label)), label] = 1.0
    elif kind == "any sum":
        h = 2 * torch.rand(len(label), n_classes, generator=rng, dtype=torch.float64)
    return h.to(dtype)


def rounding(dtype: torch.dtype, implementation: str | None) -> float:
    """Return the relative error of the last cast to ``dtype``; the interpreter truncates bfloat16."""
    if dtype == torch.bfloat16 and implementation == "triton" and ACCELERATOR is None:
        return torch.finfo(dtype).eps
    return 0.505 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0


def check(
    loss: str, target: str, dtype: torch.dtype, implementation: str | None, n_classes: int = 10,
    layout: Callable[[Tensor], Tensor] = torch.clone, given_dtype: torch.dtype | None = None, place: str = "cpu",
) -> None:  # fmt: skip
    """Compare the loss of each row and its gradient with the exact one, within what their terms can round to."""
    row, (kind, options) = LOSSES[loss], TARGETS[target]
    z, label = logits_and_label(n_classes, dtype)
    z = layout(z)
    options = dict(options)
    for i, name in enumerate((W, B)):
        if name in options:
            options[name] = torch.rand(n_classes, generator=cases.generator(i)).to(dtype) + 0.25
    h = F.one_hot(label, n_classes).double()
    given = label
    if kind is not None:
        given = layout(given_probabilities(kind, label, n_classes, given_dtype or dtype))
        h = given.double()
    smoothing = options.get("label_smoothing", 0.0)
    weight = options.get(W)
    t = shares(h, smoothing, weight)
    v = shares(h, options.get("bonus_smoothing", smoothing), options.get(B, weight))
    truth = exact(row, z.double(), t, v)

    on = {name: x.to(place) if isinstance(x, Tensor) else x for name, x in options.items()}
    leaf = z.to(place).detach().requires_grad_()
    value = bonus_cross_entropy(
        leaf, given.to(place), **on, bonus=row.loss, reduction="none", implementation=implementation
    )
    upstream = torch.tensor([1.0, -0.5, 2.0, 0.25, 1, 1, -3, 1, 1], dtype=value.dtype, device=place)[: len(label)]
    value.backward(upstream)

    # the numbers of a loss reach a kernel with 48 bits
    wide = dtype == torch.float64
    epsilon = (2.0**-45 if implementation == "triton" else 2.0**-50) if wide else 2.0**-23
    # e^x rounds relative to x: the distance from the largest logit, or from all others
    z = z.double()
    far = z.amax(1, keepdim=True) - z
    slack = 8 + 1.5 * (far + far.amax(1, keepdim=True).clamp(max=50)) + math.sqrt(n_classes)
    last, size = rounding(dtype, implementation), upstream.cpu().double().abs()
    what = f"{loss}, {target}"
    tiny = torch.finfo(torch.float32).tiny * 10 if dtype != torch.float16 else 2.0**-24
    allowed = epsilon * slack.amax(1) * truth.loss_terms + last * truth.loss.abs() + tiny
    assert_within(value, truth.loss, allowed, what)
    terms = truth.grad_terms
    if implementation == "reference" or (implementation is None and row.paid is not None):
        # autograd of the formula: the derivative p (1 - p) of a sigmoid has lost 1 - p, which counts as a share does
        terms = terms + torch.maximum(t.abs(), v.abs()).amax(1, keepdim=True)
    allowed = (epsilon * slack * terms + last * truth.grad.abs()) * size[:, None] + tiny
    assert_within(leaf.grad, truth.grad * upstream.cpu().double()[:, None], allowed, f"gradient of {what}")


def assert_within(actual: Tensor, truth: Tensor, allowed: Tensor, what: str) -> None:
    assert_within_budget(actual, truth, None, floor=allowed / truth.abs().clamp(min=1e-300), unit=1e-300, what=what)


@pytest.mark.parametrize(("loss", "target"), PAIRS)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(None, torch.float32), (None, torch.float64), ("reference", torch.float64)],
    ids=["torch-fp32", "torch-fp64", "reference-fp64"],
)
def test_every_loss_and_target(loss, target, implementation, dtype):
    check(loss, target, dtype, implementation)


@over_dtypes
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_and_dtype(target, dtype):
    for loss in ("log_bonus", "log_bonus_window"):
        check(loss, target, dtype, None)


COUNTS = (1, 2, 3, 9, 64, 65, 137, 1000)


@pytest.mark.parametrize("n_classes", COUNTS)
@pytest.mark.parametrize("target", ["both weights and smoothings", "probabilities", "any sum"])
def test_every_number_of_classes(n_classes, target):
    for loss in ("cross_entropy", "log_bonus", "power_bonus", "squared_error_mirror"):
        if (loss, target) in PAIRS:
            check(loss, target, torch.float32, None, n_classes)
            check(loss, target, torch.float64, "reference", n_classes)


@pytest.mark.parametrize("layout", [f for f in cases.LAYOUTS.values() if f is not cases.expanded_rows])
@pytest.mark.parametrize("target", ["both weights and smoothings", "probabilities"])
def test_every_layout(layout, target):
    for dtype in (torch.float32, torch.bfloat16):
        check("log_bonus", target, dtype, None, 65, layout)


@pytest.mark.parametrize(
    ("dtype", "given_dtype"),
    [
        (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
        (torch.float64, torch.float32), (torch.float32, torch.float64),
    ],
)  # fmt: skip
def test_probabilities_of_another_dtype(dtype, given_dtype):
    check("log_bonus", "probabilities", dtype, None, 65, given_dtype=given_dtype)


# Interpreted, a case takes some 30 ms; compiled on a GPU they could all be run.
IN_KERNELS = [
    *((loss, "both weights and smoothings" if loss in BONUSES[1:] else "smoothing", torch.float32, 10)
      for loss in LOSSES if loss not in NO_KERNEL),
    *((loss, "probabilities", torch.float64, 9) for loss in LOSSES if loss not in NO_KERNEL),
    *(("log_bonus", target, torch.float32, 9) for target in TARGETS),
    *(("power_bonus", target, torch.float32, 9) for target in TARGETS),
    *(("log_bonus", target, dtype, 65) for target in ("smoothing", "any sum") for dtype in cases.FLOATS),
    *(("power_bonus", "both weights and smoothings", dtype, 65) for dtype in cases.FLOATS),
    *(("log_bonus", "both weights and smoothings", torch.float32, n) for n in (*COUNTS, 2061)),
    *(("power_bonus", "probabilities", torch.float32, n) for n in COUNTS),
    *(("squared_error_mirror", "one-hot", torch.float32, n) for n in (1, 2, 137)),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "target", "dtype", "n_classes"), IN_KERNELS, ids=str)
def test_kernels(loss, target, dtype, n_classes, kernel_device, poison):
    check(loss, target, dtype, "triton", n_classes, place=kernel_device)


@pytest.mark.parametrize("layout", [f for f in cases.LAYOUTS.values() if f is not cases.expanded_rows])
def test_every_layout_in_kernels(layout, kernel_device, poison):
    for dtype, given_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        check("log_bonus", "any sum", dtype, "triton", 137, layout, given_dtype, kernel_device)
