"""Soft targets, a share of every class, against the master formula, written out here once more in float64.

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
    LogBonus,
    Poly1,
    PowerBonus,
    SoftmaxAbsoluteError,
    SoftmaxSquaredError,
    SubDataBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
)
from tests import cases
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED
from tests.threads import several_threads

IDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", [None, "reference", "triton"])


@pytest.fixture
def place(implementation, request) -> str:
    return request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"


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
    return (-torch.expm1(0.7 * logsigmoid(gap.detach())) + (power.detach() - power)) / 0.7


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
    "log_bonus": Row(LogBonus(0.75), log_bonus(0.75)),
    "log_bonus_0": Row(LogBonus(0.0), lambda gap: -prob(gap)),
    "log_bonus_.3": Row(LogBonus(0.3, strength=0.7), lambda gap: 0.7 * log_bonus(0.3)(gap)),
    "log_bonus_.5": Row(LogBonus(0.5), log_bonus(0.5)),
    "log_bonus_1": Row(LogBonus(1.0), clamped),
    "log_bonus_exact": Row(LogBonus(1.0, clamp=None), lambda gap: logsigmoid(-gap)),
    "log_bonus_window": Row(LogBonus(0.75, start=0.2, abrupt=0.8), windowed(log_bonus(0.75), 0.2, 0.8)),
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


def of_others(x: Tensor) -> Tensor:
    """Return for every class the sum over all others, by sums from either end: nothing is taken away again."""
    before, after = F.pad(x, (1, -1)).cumsum(-1), F.pad(x, (-1, 1)).flip(-1).cumsum(-1).flip(-1)
    return before + after


def exact(row: Row, z: Tensor, t: Tensor, v: Tensor) -> Exact:
    """Return the master formula for float64 logits and shares [N, C]."""
    d = z - z.amax(-1, keepdim=True)
    gap = (d - of_others(d.exp()).log()).clamp(max=700.0).requires_grad_()  # of a lone class: all there is
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
    grad, grad_terms = p * of_others(slope / rest) - slope, p * of_others(size / rest) + size
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


def allowed(loss: str, target: str) -> bool:
    row = LOSSES[loss]
    if target in OF_A_BONUS and not isinstance(row.loss, bonus_ops.losses.Bonus):
        return False
    return not (row.of_share and W in TARGETS[target].options)


EVERY_LOSS = [(loss, target) for loss in LOSSES for target in ("smoothing", "probabilities")]
EVERY_TARGET = [("log_bonus", target) for target in TARGETS]
PAIRS = EVERY_LOSS + [
    (loss, target)
    for loss in ("log_bonus", "log_bonus_window", "power_bonus", "focal", "squared_error_mirror")
    for target in TARGETS
    if allowed(loss, target) and (loss, target) not in EVERY_LOSS
]
IN_LOOPS = [
    *(("loops", torch.float32, *pair) for pair in PAIRS),
    *(("loops", torch.float64, *pair) for pair in EVERY_LOSS[::2] + EVERY_TARGET[1:]),
    *(("reference", torch.float64, *pair) for pair in EVERY_LOSS + EVERY_TARGET if pair[1] != "smoothing"),
    *(("loops", dtype, *pair) for dtype in (torch.bfloat16, torch.float16) for pair in EVERY_TARGET[:8:3]),
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
    few = torch.tensor([2, 5, 8]) if n_classes > 64 else torch.arange(9)  # a program of kernels for each
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
    if dtype == torch.bfloat16 and implementation == "triton" and INTERPRETED:
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
    if implementation == "reference" or (implementation is None and loss in NO_KERNEL):
        # autograd of the formula: the derivative p (1 - p) of a sigmoid has lost 1 - p, which counts as a share does
        terms = terms + torch.maximum(t.abs(), v.abs()).amax(1, keepdim=True)
    allowed = (epsilon * slack * terms + last * truth.grad.abs()) * size[:, None] + tiny
    assert_within(leaf.grad, truth.grad * upstream.cpu().double()[:, None], allowed, f"gradient of {what}")


def assert_within(actual: Tensor, truth: Tensor, allowed: Tensor, what: str) -> None:
    assert_within_budget(actual, truth, None, floor=allowed / truth.abs().clamp(min=1e-300), unit=1e-300, what=what)


@pytest.mark.parametrize(
    ("how", "dtype", "loss", "target"), IN_LOOPS, ids=[f"{how}-{IDS[dtype]}-{x}-{y}" for how, dtype, x, y in IN_LOOPS]
)
def test_every_loss_and_target(how, dtype, loss, target):
    check(loss, target, dtype, None if how == "loops" else how)


@pytest.mark.parametrize("n_classes", [1, 2, 65, 1000, 9001])
@pytest.mark.parametrize("target", ["both weights and smoothings", "any sum", "probabilities"])
def test_every_number_of_classes_by_several_threads(n_classes, target):
    for loss in ("cross_entropy", "log_bonus", "power_bonus", "squared_error_mirror"):
        if allowed(loss, target):
            with several_threads():
                check(loss, target, torch.float32, None, n_classes)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_one_heavy_class_leaves_the_others_their_shares(implementation):
    """Their sum must not be a difference: 1e5 less 1e5."""
    weight = torch.ones(10)
    weight[0] = 1e5
    logits = torch.zeros(1, 10)
    logits[0, 0] = 25.0
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "none", "bonus": None}
    value = bonus_cross_entropy(logits, torch.zeros(1, dtype=torch.int64), **options, implementation=implementation)
    t = shares(F.one_hot(torch.zeros(1, dtype=torch.int64), 10).double(), 0.1, weight)
    exactly = (t * -logits.double().log_softmax(1)).sum(1)
    torch.testing.assert_close(value.double(), exactly, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ["transposed", "column_slice", "padded_rows", "offset_1"])
def test_every_layout(layout):
    check("log_bonus", "probabilities", torch.float32, None, 65, cases.LAYOUTS[layout])


@pytest.mark.parametrize(
    ("implementation", "dtype", "given_dtype"),
    [
        (None, torch.float32, torch.bfloat16), (None, torch.float16, torch.float32),
        (None, torch.float64, torch.float32), ("triton", torch.bfloat16, torch.float32),
        ("triton", torch.float64, torch.float32),
    ],
)  # fmt: skip
def test_probabilities_of_another_dtype(implementation, dtype, given_dtype, place):
    check("log_bonus", "probabilities", dtype, implementation, 65, given_dtype=given_dtype, place=place)


# interpreted, a case takes a tenth of a second
IN_KERNELS = [
    *((loss, "both weights and smoothings" if loss in BONUSES[1:] else "smoothing", torch.float32, 10)
      for loss in LOSSES if loss not in NO_KERNEL),
    *((loss, "probabilities", torch.float64, 9) for loss in ("log_bonus", "focal", "squared_error_mirror")),
    *(("log_bonus", target, torch.float32, 9) for target in TARGETS),
    *(("power_bonus", target, torch.float32, 9) for target in ("any sum", "probabilities with zeros")),
    *(("log_bonus", "smoothing", dtype, 65) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
    ("power_bonus", "both weights and smoothings", torch.bfloat16, 65),
    *(("log_bonus", "both weights and smoothings", torch.float32, n) for n in (1, 2, 137)),
    *(("squared_error_mirror", "one-hot", torch.float32, n) for n in (1, 137)),
    # tiles without a mask, where the classes have one share and where each has its own
    *(("log_bonus", target, torch.float32, 1000) for target in ("smoothing", "probabilities")),
    *((loss, "probabilities", torch.float32, 1000) for loss in ("power_bonus", "cosine_bonus", "squared_error_mirror")),
    ("power_bonus", "both weights and smoothings", torch.float32, 4101),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "target", "dtype", "n_classes"), IN_KERNELS, ids=str)
def test_kernels(loss, target, dtype, n_classes, kernel_device, poison):
    check(loss, target, dtype, "triton", n_classes, place=kernel_device)


@pytest.mark.slow
def test_label_and_runner_up_anywhere_among_whole_tiles(kernel_device, poison):
    """In one tile, in two, the first and the last, the edge; a tie over three tiles; an ignored row."""
    places = [(0, 1), (300, 5), (255, 256), (700, 770), (770, 3), (0, 767), (520, 530)]
    logits = torch.randn(len(places) + 1, 771, generator=cases.generator(3))
    label = torch.tensor([y for y, _ in places] + [-100])
    for row, (y, second) in enumerate(places):
        logits[row, second] = logits[row].amax() + 3
        logits[row, y] += 4
    logits[1, 6] = logits[1, 700] = logits[1, 5]
    logits[3, 600], logits[3, 601] = logits[3, 770] - 0.5, logits[3, 770] - 0.7  # neither 1 - p near 1
    found = []
    for implementation, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x = logits.clone().to(kernel_device if implementation == "triton" else "cpu", dtype).requires_grad_()
        loss, scores = bonus_cross_entropy_with_scores(
            x, label.to(x.device), label_smoothing=0.5, reduction="none", implementation=implementation
        )
        loss.sum().backward()
        found.append((loss.detach().cpu().double(), x.grad.cpu().double(), scores.runner_up.cpu()))
    (loss, grad, runner_up), (exact_loss, exact_grad, exact_runner_up) = found
    torch.testing.assert_close(loss, exact_loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=2e-5, atol=1e-9)
    assert torch.equal(runner_up, exact_runner_up) and not grad[-1].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bonus", "n_rows", "n_classes"),
    [(None, 3, 10), (PowerBonus(2.0), 3, 10), (LogBonus(), 3, 10), (LogBonus(), 1, 521)], ids=str,
)  # fmt: skip
def test_a_shift_changes_no_bit_in_kernels(bonus, n_rows, n_classes, kernel_device, poison):
    """Eighths stay exact, so differences of logits do: with all of them far below 0 too."""
    logits = (8 * torch.randn(n_rows, n_classes, generator=cases.generator(4))).round() / 8
    label = torch.tensor([0, n_classes - 1, n_classes // 2], device=kernel_device)[:n_rows]
    found = []
    for shift in (0.0, -200.0, -1e4, 1e4):
        x = (logits + shift).to(kernel_device).requires_grad_()
        loss = bonus_cross_entropy(
            x, label, label_smoothing=0.1, bonus=bonus, reduction="none", implementation="triton"
        )
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    for loss, grad in found:
        assert loss.isfinite().all() and torch.equal(loss, found[0][0]) and torch.equal(grad, found[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transposed", "column_slice", "padded_rows", "offset_1"])
def test_every_layout_in_kernels(layout, kernel_device, poison):
    check("log_bonus", "any sum", torch.float32, "triton", 65, cases.LAYOUTS[layout], None, kernel_device)


def loss_and_grad(function, logits, target, *args, **options) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of half its sum."""
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, target, *args, **options)
    (loss.sum() * 0.5).backward()
    return loss.detach(), leaf.grad


def widened(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


# --- the papers' forms ------------------------------------------------------------------------------------------------


def papers_bonus(p: Tensor, log_end: float) -> Tensor:
    return torch.log(1 - p.clamp(max=log_end)) - (p - log_end).clamp(min=0) / (1 - log_end)


def test_the_form_of_image_classification_smooths_both_alike():
    """timm's: mean over rows of sum_k t_k (-log p_k + b(p_k)), t = (1 - a) onehot + a / C, a = .1, log_end = .75."""
    logits, label = logits_and_label(10, torch.float64)
    p = torch.softmax(logits, 1)
    t = 0.9 * F.one_hot(label, 10) + 0.1 / 10
    truth = (t * (papers_bonus(p, 0.75) - torch.log_softmax(logits, 1))).sum(1).mean()
    torch.testing.assert_close(bonus_cross_entropy(logits, label, label_smoothing=0.1, bonus=LogBonus(0.75)), truth)


def test_the_form_of_translation_smooths_each_by_its_own():
    """fairseq's: summed over tokens that are no padding, bonus shares (1 - a') rho onehot + a' rho / C."""
    logits, label = logits_and_label(10, torch.float64)
    label[2] = pad = 1
    p = torch.softmax(logits, 1)
    hot = F.one_hot(label, 10)
    for smoothing, bonus_smoothing, strength in ((0.1, 0.1, 1.0), (0.1, 0.0, 0.5)):
        t = (1 - smoothing) * hot + smoothing / 10
        v = strength * ((1 - bonus_smoothing) * hot + bonus_smoothing / 10)
        rows = (v * papers_bonus(p, 0.5) - t * torch.log_softmax(logits, 1)).sum(1)
        loss = bonus_cross_entropy(
            logits, label, ignore_index=pad, reduction="sum", label_smoothing=smoothing,
            bonus_smoothing=bonus_smoothing, bonus=LogBonus(0.5, strength=strength),
        )  # fmt: skip
        torch.testing.assert_close(loss, rows[label != pad].sum())


def test_the_mean_of_a_weighted_bonus_is_over_rows():
    """Class weights for cross-entropy and bonus apart: the first is divided by its weights, the second by the rows."""
    logits, label = logits_and_label(10, torch.float64)
    label[3] = -100
    counts = label != -100
    p = torch.softmax(logits, 1)[counts]
    hot = F.one_hot(label[counts], 10)
    weight, bonus_weight = (torch.rand(10, dtype=torch.float64) + 0.5 for _ in range(2))
    bonus = (hot * bonus_weight * papers_bonus(p, 0.5)).sum(1)
    for own_weight in (None, weight):
        truth = F.cross_entropy(logits, label, own_weight) + bonus.sum() / counts.sum()
        loss = bonus_cross_entropy(logits, label, own_weight, bonus=LogBonus(0.5), bonus_weight=bonus_weight)
        torch.testing.assert_close(loss, truth)
        total = F.cross_entropy(logits, label, own_weight, reduction="sum") + bonus.sum()
        for implementation in (None, "reference"):
            loss = bonus_cross_entropy(
                logits, label, own_weight, bonus=LogBonus(0.5), bonus_weight=bonus_weight, reduction="sum",
                implementation=implementation,
            )  # fmt: skip
            torch.testing.assert_close(loss, total)


def test_the_squared_error_with_its_mirror_is_twice_the_absolute_one_less_one():
    logits, label = logits_and_label(10, torch.float64)
    p = torch.softmax(logits, 1)
    hot = F.one_hot(label, 10).double()
    truth = ((p - hot) ** 2 - hot * p**2 - (1 - hot) * (1 - p) ** 2).mean()
    torch.testing.assert_close(bonus_cross_entropy(logits, label, bonus=SoftmaxSquaredError(1.0, 2.0)), truth)
    absolute = bonus_cross_entropy(logits, label, bonus=SoftmaxAbsoluteError())
    torch.testing.assert_close(absolute, (p - hot).abs().mean())
    torch.testing.assert_close(truth, 2 * absolute - 1)
    torch.testing.assert_close(
        bonus_cross_entropy(logits, label, bonus=SoftmaxSquaredError()), F.mse_loss(torch.softmax(logits, 1), hot)
    )


# --- rows that are none -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("implementation", "bonus"),
    [(None, None), (None, SoftmaxSquaredError(1.0)), *((how, LogBonus()) for how in (None, "reference", "triton"))],
    ids=repr,
)
def test_ignored_rows_teach_nothing_whatever_they_hold(implementation, bonus, place):
    logits, label = logits_and_label(9, torch.float32)
    logits[1], logits[2] = math.nan, math.inf
    label[1:3] = -100
    options = {"label_smoothing": 0.1, "bonus": bonus, "implementation": implementation, "reduction": "none"}
    loss, grad = loss_and_grad(bonus_cross_entropy, logits.to(place), label.to(place), **options)
    assert (loss[1:3] == 0).all() and (grad[1:3] == 0).all()
    others = [0, *range(3, 9)]
    alone = loss_and_grad(bonus_cross_entropy, logits[others].to(place), label[others].to(place), **options)
    torch.testing.assert_close(loss[others], alone[0])
    torch.testing.assert_close(grad[others], alone[1], rtol=1e-5, atol=1e-7)
    options["reduction"] = "mean"
    mean, grad = loss_and_grad(bonus_cross_entropy, logits.to(place), label.to(place), **options)
    torch.testing.assert_close(mean, alone[0].mean())
    assert (grad[1:3] == 0).all()
    label[:] = -100
    mean, grad = loss_and_grad(bonus_cross_entropy, logits.to(place), label.to(place), **options)
    assert mean.isnan() and not (grad[[1, 2]].isfinite() & (grad[[1, 2]] != 0)).any()
    options["reduction"] = "sum"
    total, grad = loss_and_grad(bonus_cross_entropy, logits.to(place), label.to(place), **options)
    assert total == 0 and (grad == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("bonus", [None, LogBonus(), PowerBonus(2.0), SoftmaxSquaredError()], ids=repr)
def test_a_class_at_minus_infinity_without_a_share_is_not_there(implementation, bonus, place):
    logits, label = logits_and_label(9, torch.float64)
    given = given_probabilities("soft", label, 9, torch.float64)
    wide, shares_of = (F.pad(x, (2, 3), value=v) for x, v in ((logits, -math.inf), (given, 0.0)))
    options = {"reduction": "none", "bonus": bonus, "implementation": implementation}
    truth, true_grad = loss_and_grad(bonus_cross_entropy, logits, given, **options | {"implementation": "reference"})
    loss, grad = loss_and_grad(bonus_cross_entropy, wide.to(place), shares_of.to(place), **options)
    if isinstance(bonus, SoftmaxSquaredError):
        truth, true_grad = truth * 9 / 14, true_grad * 9 / 14
    torch.testing.assert_close(loss.cpu(), truth, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad[:, 2:11].cpu(), true_grad, rtol=1e-9, atol=1e-12)
    assert (grad[:, :2] == 0).all() and (grad[:, 11:] == 0).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("target", ["label", "probabilities"])
def test_a_bad_logit_spoils_its_row_alone(implementation, target, place):
    logits, label = logits_and_label(9, torch.float32)
    given = label if target == "label" else given_probabilities("soft", label, 9, torch.float32)
    logits[3, 4], logits[6, 0] = math.nan, math.inf
    options = {"label_smoothing": 0.1, "reduction": "none", "implementation": implementation}
    for bonus in (None, LogBonus()):
        loss, grad = loss_and_grad(bonus_cross_entropy, logits.to(place), given.to(place), bonus=bonus, **options)
        for bad in (loss.isnan(), grad.isnan().any(1)):
            assert bad.nonzero().flatten().tolist() == [3, 6]


@IMPLEMENTATIONS
def test_scores_are_those_of_the_first_of_the_largest_probabilities(implementation, place):
    logits, label = logits_and_label(9, torch.float32)
    given = given_probabilities("soft", label, 9, torch.float32)
    given[2] = 1 / 9
    label = given.argmax(1)
    assert label[2] == 0
    loss, scores, softmax = bonus_cross_entropy_with_softmax(
        logits.to(place), given.to(place), reduction="none", implementation=implementation
    )
    expected = difficulty_scores(logits.double(), label, implementation="reference")
    torch.testing.assert_close([x.cpu() for x in scores], list(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(softmax.cpu(), torch.softmax(logits, 1))
    alone = bonus_cross_entropy(logits.to(place), given.to(place), reduction="none", implementation=implementation)
    torch.testing.assert_close(loss, alone)


# --- autograd ---------------------------------------------------------------------------------------------------------


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "apart": {"label_smoothing": 0.1, "bonus_smoothing": 0.3, "weight": True, "bonus_weight": True},
    "probabilities": {"probabilities": True},
}
over_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def problem(options: dict[str, Any], dtype=torch.float64, place="cpu", n_rows=3, n_classes=4):
    """Return logits, target and options of a call."""
    options = dict(options)
    logits = (2 * torch.randn(n_rows, n_classes, dtype=torch.float64)).to(dtype).to(place).requires_grad_()
    target = torch.arange(n_rows, device=place) % n_classes
    if options.pop("probabilities", False):
        target = torch.softmax(torch.randn(n_rows, n_classes, dtype=torch.float64), 1).to(dtype).to(place)
    for name in (W, B):
        if name in options:
            options[name] = torch.linspace(0.5, 2, n_classes, dtype=dtype, device=place)
    return logits, target, options


SMOOTH_LOSSES = (LogBonus(), LogBonus(0.3), PowerBonus(2.5), CosineBonus(), SubDataBonus(0.6))


@pytest.mark.parametrize(
    ("implementation", "reduction", "options", "losses"),
    [
        (None, "mean", "smoothing", (LogBonus(), None, SoftmaxSquaredError(0.7), Focal())),
        (None, "none", "apart", SMOOTH_LOSSES), (None, "mean", "probabilities", SMOOTH_LOSSES[:2]),
        ("reference", "none", "apart", SMOOTH_LOSSES[:2]), ("triton", "none", "apart", SMOOTH_LOSSES[:1]),
    ],
)  # fmt: skip
def test_first_and_second_derivatives_are_right(implementation, reduction, options, losses, place):
    logits, target, options = problem(OPTIONS[options], place=place)
    for bonus in losses:

        def loss(z, bonus=bonus):
            return bonus_cross_entropy(
                z, target, **options, bonus=bonus, reduction=reduction, implementation=implementation
            )

        assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)


@over_options
def test_transforms_take_the_formula(options):
    from torch.func import grad, hessian, jvp, vmap

    logits, target, options = problem(options)
    logits = logits.detach()

    def ours(z, reduction="mean", implementation=None):
        return bonus_cross_entropy(z, target, **options, reduction=reduction, implementation=implementation)

    def plain(z, reduction="mean"):
        return ours(z, reduction, "reference")

    torch.testing.assert_close(grad(ours)(logits), loss_and_grad(lambda z, _: plain(z), logits, None)[1] * 2)
    both = torch.stack([logits, 2 * logits])
    torch.testing.assert_close(vmap(lambda z: ours(z, "none"))(both), torch.stack([plain(z, "none") for z in both]))
    torch.testing.assert_close(vmap(grad(ours))(both), torch.stack([grad(plain)(z) for z in both]))
    value, tangent = jvp(ours, (logits,), (logits.cos(),))
    torch.testing.assert_close((value, tangent), (plain(logits), (grad(plain)(logits) * logits.cos()).sum()))
    torch.testing.assert_close(hessian(ours)(logits), torch.autograd.functional.hessian(plain, logits))


@pytest.mark.parametrize("implementation", [None, "reference"])  # no kernel makes it: `test_contract`
@pytest.mark.parametrize("bonus", [None, LogBonus()], ids=repr)
def test_probabilities_have_a_gradient(implementation, bonus, place):
    logits, given, _ = problem(OPTIONS["probabilities"], place=place)
    weight = torch.rand(4, dtype=torch.float64, device=place)
    given.requires_grad_()
    options = {"label_smoothing": 0.1, "weight": weight, "bonus": bonus, "implementation": implementation}
    assert torch.autograd.gradcheck(lambda z, t: bonus_cross_entropy(z, t, **options), (logits, given), fast_mode=True)
    if bonus is None:
        ours = torch.autograd.grad(bonus_cross_entropy(logits, given, **options), (logits, given))
        theirs = torch.autograd.grad(F.cross_entropy(logits, given, weight, label_smoothing=0.1), (logits, given))
        torch.testing.assert_close(ours, theirs)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("reduction", "options"), [("mean", "smoothing"), ("none", "probabilities")])
def test_upstream_gradients(implementation, reduction, options, place):
    """Any, twice with retain_graph, zero, NaN in a row."""
    logits, target, options = problem(OPTIONS[options], place=place)
    options |= {"reduction": reduction, "implementation": implementation}
    loss = bonus_cross_entropy(logits, target, **options)
    rows = torch.autograd.grad(bonus_cross_entropy(logits, target, **options | {"reduction": "none"}).sum(), logits)[0]
    one = rows / 3 if reduction == "mean" else rows
    shape = loss.shape
    for upstream in (1.0, -2.5, 0.0):
        given = torch.full(shape, upstream, dtype=loss.dtype, device=place)
        (grad,) = torch.autograd.grad(loss, logits, given, retain_graph=True)
        torch.testing.assert_close(grad, one * upstream)
    given = torch.ones(shape, dtype=loss.dtype, device=place)
    given.view(-1)[0] = math.nan
    (grad,) = torch.autograd.grad(loss, logits, given)
    assert grad[0].isnan().all()
    if reduction == "none":
        torch.testing.assert_close(grad[1:], rows[1:])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, logits, given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [OPTIONS["apart"], OPTIONS["probabilities"]], ids=["apart", "probabilities"])
def test_a_half_is_rounded_after_it_is_scaled(dtype, options):
    """What a gradient scaler relies on."""
    logits, target, options = problem(options, dtype, n_rows=64, n_classes=50)
    (bonus_cross_entropy(logits, target, **options) * 1024).backward()
    exactly = logits.detach().double().requires_grad_()
    wide = {name: widened(x) for name, x in options.items()}
    (bonus_cross_entropy(exactly, widened(target), **wide, implementation="reference") * 1024).backward()
    # rounded before the scale, an element would be off by half of fp16's smallest number times 1024, 3e-5
    floor = 0.51 * torch.finfo(dtype).eps
    assert_within_budget(logits.grad, exactly.grad, None, floor=floor, unit=2.0**-6, what="gradient")


@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize(("reduction", "options"), [("mean", "smoothing"), ("none", "probabilities")])
def test_a_change_in_place_before_backward_is_noticed(implementation, reduction, options, place):
    for changed in range(2):
        logits, target, more = problem(OPTIONS[options], place=place)
        z = logits * 1  # a leaf cannot be changed
        loss = bonus_cross_entropy(z, target, **more, reduction=reduction, implementation=implementation).sum()
        with torch.no_grad():
            (z, target)[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", [W, B])
def test_a_weight_changed_before_backward_changes_no_gradient(name, reduction):
    """Where the gradient is made again, for a half here, the change is noticed or the weight was a copy."""
    logits, target, options = problem({"label_smoothing": 0.1, W: True, B: True}, torch.bfloat16)
    (bonus_cross_entropy(logits, target, **options, reduction=reduction).sum() / 2).backward()
    expected, logits.grad = logits.grad, None
    loss = bonus_cross_entropy(logits, target, **options, reduction=reduction).sum() / 2
    options[name].zero_()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(logits.grad, expected) and (name, reduction) == (B, "mean")


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "options"), [("numba", "apart"), ("numba", "probabilities"), ("triton", "apart")]
)
def test_the_operators_keep_their_contract(implementation, options, place):
    from bonus_ops.losses import encode
    from bonus_ops.ops import soft as operators

    logits, target, options = problem(OPTIONS[options], torch.float32, place)
    given = target[:, None] if target.is_floating_point() else None
    label = (target if given is None else target.argmax(1))[:, None]
    smoothings = options.get("label_smoothing", 0.0), options.get("bonus_smoothing", 0.0)
    name, fields = encode(LogBonus())
    tensors = (logits.detach()[:, None], label, given, options.get(W), options.get(B), fields)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (*tensors, *smoothings, -100, name, 1.0, None, True, True, implementation)
    torch.library.opcheck(operators.forward, args, test_utils=checks)
    _, _, runner_up, saved, _ = operators.forward(*args)
    upstream = torch.rand(2, 3, device=place).unbind()
    args = (*tensors, saved, runner_up, *upstream, *smoothings, -100, name, 1.0, None, implementation)
    torch.library.opcheck(operators.backward, args, test_utils=checks)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["apart", "probabilities"])
def test_it_is_one_graph_for_any_number_of_rows(options):
    """`test_the_operators_keep_their_contract` traces kernels."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bonus_cross_entropy_with_scores, fullgraph=True, backend=counter)
    for n_rows in (3, 7):
        logits, target, more = problem(OPTIONS[options], torch.float32, n_rows=n_rows)
        for x in (logits, target):
            torch._dynamo.mark_dynamic(x, 0)
        (loss, scores), (expected, same) = (
            f(logits, target, **more) for f in (compiled, bonus_cross_entropy_with_scores)
        )
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(tuple(scores), tuple(same))
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))
    assert counter.frame_count == 1


# --- module -----------------------------------------------------------------------------------------------------------


def test_the_module_holds_the_weight_of_the_bonus():
    logits, target, options = problem(OPTIONS["apart"])
    module = BonusCrossEntropyLoss(**options)
    assert module(logits, target) == bonus_cross_entropy(logits, target, **options)
    assert list(module.state_dict()) == ["weight", "bonus_weight"] and not list(module.parameters())
    assert module.float().bonus_weight.dtype == torch.float32
    other = BonusCrossEntropyLoss(torch.zeros(4), label_smoothing=0.1, bonus_smoothing=0.3, bonus_weight=torch.zeros(4))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.bonus_weight, module.bonus_weight)
    assert not BonusCrossEntropyLoss(label_smoothing=0.1, bonus_smoothing=0.3).state_dict()


def test_the_module_shows_what_differs():
    shown = repr(BonusCrossEntropyLoss(label_smoothing=0.1, bonus_smoothing=0.3, bonus_weight=torch.ones(4)))
    for part in ("label_smoothing=0.1", "bonus_smoothing=0.3"):
        assert part in shown
    shown = repr(BonusCrossEntropyLoss(implementation="numba", validate=True))
    assert shown.endswith("label_smoothing=0.0, implementation='numba', validate=True)")
    assert not any(name in repr(BonusCrossEntropyLoss()) for name in ("bonus_smoothing", "implementation", "validate"))
