"""The specification: equal to torch without a bonus, to the paper's formulas with one, to numbers worked by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import bonus_ops
from bonus_ops import (
    AbsoluteError,
    CosineBonus,
    CrossEntropy,
    Focal,
    FocalStar,
    GapLoss,
    GeneralizedCrossEntropy,
    HaltedFocal,
    LogBonus,
    Poly1,
    PowerBonus,
    SquaredError,
    SubDataBonus,
    bonus_cross_entropy,
    reference,
)
from bonus_ops.soft_targets import SoftTargets
from tests.cases import generator, masked, typical


def conservative(p, log_end):
    return torch.log(1 - p.clamp(max=log_end)) - (p - log_end).clamp(min=0) / (1 - log_end)


# Every variant as its paper writes it, a function of p alone, in float64: the naive form is the point.
FORMULAS = [
    (CrossEntropy(), lambda p: -p.log()),
    (LogBonus(), lambda p: -p.log() + conservative(p, 0.5)),
    (LogBonus(0.0), lambda p: -p.log() + conservative(p, 0.0)),
    (LogBonus(0.5, strength=0.3), lambda p: -p.log() + 0.3 * conservative(p, 0.5)),
    (LogBonus(1.0), lambda p: -p.log() + (1 - p).clamp(min=1e-5).log()),
    (LogBonus(1.0, clamp=0.2), lambda p: -p.log() + (1 - p).clamp(min=0.2).log()),
    (LogBonus(1.0, clamp=None), lambda p: -p.log() + (1 - p).log()),
    (LogBonus(0.75, start=0.4), lambda p: -p.log() + (conservative(p, 0.75) - math.log(0.6)) * (p >= 0.4)),
    (LogBonus(1.0, start=0.5), lambda p: -p.log() + ((1 - p).clamp(min=1e-5).log() - math.log(0.5)) * (p >= 0.5)),
    (LogBonus(0.75, abrupt=0.6), lambda p: -p.log() + conservative(p, 0.75) * (p <= 0.6)),
    (PowerBonus(2.0), lambda p: -p.log() - p**2),
    (PowerBonus(0.5, strength=2.0), lambda p: -p.log() - 2 * p**0.5),
    (PowerBonus(3.0, start=0.3, abrupt=0.8), lambda p: -p.log() - (p**3 - 0.3**3) * (p >= 0.3) * (p <= 0.8)),
    (CosineBonus(), lambda p: -p.log() + (math.pi * p).cos() - 1),
    (CosineBonus(start=0.25), lambda p: -p.log() + ((math.pi * p).cos() - math.sqrt(0.5)) * (p >= 0.25)),
    (SubDataBonus(0.6), lambda p: -p.log() + (1 - 0.6 * p).log()),
    (SubDataBonus(0.6, clamp=0.7), lambda p: -p.log() + (1 - 0.6 * p).clamp(min=0.7).log()),
    (SubDataBonus(1.0), lambda p: -p.log() + (1 - p).clamp(min=1e-5).log()),
    (Focal(2.0), lambda p: -((1 - p) ** 2) * p.log()),
    (Focal(0.5), lambda p: -((1 - p) ** 0.5) * p.log()),
    (
        HaltedFocal(2.0),
        lambda p: -p.log() * torch.where(p > 0.5, 1, (1 - p) ** 2) - 0.75 * math.log(2) * (p > 0.5).to(p),
    ),
    (FocalStar(3.0, 0.5), lambda p: -torch.sigmoid(3 * p.logit() + 0.5).log() / 3),
    (SquaredError(), lambda p: (1 - p) ** 2),
    (SquaredError(strength=0.7, gamma=3.0), lambda p: (1 - p) ** 2 - 0.7 * p**3),
    (AbsoluteError(strength=1.0, gamma=2.0), lambda p: 1 - p - p**2),
    (Poly1(-0.5), lambda p: -p.log() - 0.5 * (1 - p)),
    (GeneralizedCrossEntropy(0.7), lambda p: (1 - p**0.7) / 0.7),
]
LOSSES = [loss for loss, _ in FORMULAS]


def batch(n_rows=12, n_classes=5):
    return typical(generator(3), n_rows, n_classes, torch.float64)


def test_every_loss_has_a_formula_here():
    exported = {x for x in map(bonus_ops.__dict__.get, bonus_ops.__all__) if isinstance(x, type)}
    losses = {x for x in exported if issubclass(x, GapLoss) and dataclasses.is_dataclass(x)}
    assert {type(loss) for loss in LOSSES} == losses


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=[repr(loss) for loss in LOSSES])
def test_rows_and_gradient_follow_the_formula_of_p(loss, formula):
    logits, target = batch(60)
    logits.requires_grad_()
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    assert ((p > 0.9).sum() > 3) and ((p < 0.1).sum() > 3)  # both sides of every window

    ours, theirs = reference.rows(logits, target, -100, loss), formula(p)

    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_without_a_bonus_it_is_torch_cross_entropy(reduction, weighted, ignore_index):
    logits, target = batch()
    target[3] = ignore_index
    options = {
        "weight": torch.linspace(0.5, 2, 5, dtype=torch.float64) if weighted else None,
        "ignore_index": ignore_index,
        "reduction": reduction,
    }
    logits.requires_grad_()
    ours = bonus_cross_entropy(logits, target, **options, bonus=None, implementation="reference")
    theirs = F.cross_entropy(logits, target, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)), rtol=1e-12, atol=0)


# Odds of 6 : 3 : 1, so p = (.6, .3, .1) and the gap is log 1.5; worked by hand.
@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [
        (CrossEntropy(), -math.log(0.6), 0.4),
        (LogBonus(0.75), -math.log(1.5), 1.0),
        (LogBonus(0.5), -math.log(0.6) + math.log(0.5) - 0.1 / 0.5, 0.4 + 0.6 * 0.8),
        (LogBonus(1.0, clamp=None), -math.log(1.5), 1.0),
        (PowerBonus(2.0), -math.log(0.6) - 0.36, 0.4 * 1.72),
        (Focal(2.0), -0.16 * math.log(0.6), 0.16 * (0.4 - 1.2 * math.log(0.6))),
        (Poly1(1.0), -math.log(0.6) + 0.4, 0.4 * 1.6),
        (GeneralizedCrossEntropy(1.0), 0.4, 0.24),
    ],
    ids=repr,
)
def test_three_classes_by_hand(loss, value, slope):
    logits, target = torch.tensor([[6.0, 3.0, 1.0]], dtype=torch.float64).log(), torch.tensor([0])
    assert reference.rows(logits, target, -100, loss).item() == pytest.approx(value, rel=1e-14)
    grad = reference.gradient(logits, target, -100, loss, torch.ones(1, dtype=torch.float64))
    assert grad[0].tolist() == pytest.approx([-slope, slope * 3 / 4, slope / 4], rel=1e-14)


def test_three_scores_by_hand():
    logits, target = torch.tensor([[6.0, 3.0, 1.0]], dtype=torch.float64).log(), torch.tensor([0])
    scores = reference.scores(logits, target, -100, torch.float64)
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    expected = [-math.log(0.6), math.sqrt(0.26), math.log(2), entropy, -math.log(10), 1]
    assert [column.item() for column in scores] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradcheck_and_gradgradcheck(loss):
    logits, target = batch(4, 3)
    target[1] = -100
    logits = (logits / 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference.rows(z, target, -100, loss), logits, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda z: reference.rows(z, target, -100, loss), logits, fast_mode=True)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("n_classes", [1, 2, 7])
def test_closed_form_gradient_is_autograd_of_rows(loss, n_classes):
    logits, target = masked(generator(1), 9, n_classes, torch.float64)
    target[4] = -100
    logits.requires_grad_()
    grad_loss = torch.linspace(-1, 2, 9, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.rows(logits, target, -100, loss), logits, grad_loss)
    actual = reference.gradient(logits, target, -100, loss, grad_loss)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_closed_form_gradient_differentiates_as_autograd_twice(loss):
    logits, target = batch(4, 3)
    logits.requires_grad_()
    grad_loss = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = (logits, grad_loss)
    closed = reference.gradient(logits, target, -100, loss, grad_loss)
    (twice,) = torch.autograd.grad(reference.rows(logits, target, -100, loss), logits, grad_loss, create_graph=True)
    direction = torch.randn(closed.shape, dtype=torch.float64)
    for ours, theirs in zip(*(torch.autograd.grad(x, inputs, direction) for x in (closed, twice)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", [[math.nan] * 3, [math.inf, 0, 1], [-math.inf] * 3, [math.inf, math.nan, -math.inf]])
def test_an_ignored_row_costs_nothing_whatever_it_holds(row):
    logits = torch.tensor([row, [1.0, 2.0, 3.0]], requires_grad=True)
    target = torch.tensor([-100, 0])
    value = reference.rows(logits, target, -100, LogBonus())
    assert value[0] == 0
    value.sum().backward()
    assert logits.grad is not None and (logits.grad[0] == 0).all() and (logits.grad[1] != 0).all()
    closed = reference.gradient(logits.detach(), target, -100, LogBonus(), torch.tensor([math.nan, 1.0]))
    assert (closed[0] == 0).all()
    assert (reference.softmax(logits, target, -100)[0] == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_one_class_leaves_nothing_to_learn(loss):
    logits = torch.tensor([[-3.0], [5.0]], dtype=torch.float64, requires_grad=True)
    value = reference.rows(logits, torch.tensor([0, 0]), -100, loss)
    assert not value.isnan().any()
    assert (value == loss.value(torch.tensor(math.inf, dtype=torch.float64))).all()
    value.sum().backward()
    assert logits.grad is not None and (logits.grad == 0).all()


def test_a_label_out_of_range_makes_its_row_nan_where_it_cannot_raise():
    logits = torch.randn(3, 4)
    target = torch.tensor([1, 4, -1])
    assert reference.rows(logits, target, -100, LogBonus()).isnan().tolist() == [False, True, True]
    assert reference.scores(logits, target, -100).loss.isnan().tolist() == [False, True, True]
    assert reference.softmax(logits, target, -100).isnan().any(1).tolist() == [False, True, True]
    grad = reference.gradient(logits, target, -100, LogBonus(), torch.ones(3))
    assert grad.isnan().all(1).tolist() == [False, True, True] and not grad[0].isnan().any()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_certain_target_distribution_is_its_label(loss):
    logits, target = batch(30)
    one_hot = (torch.arange(5) == target[:, None]).double()
    targets = SoftTargets(one_hot, None, None, 0.0, 0.0)
    soft, hard = reference.soft_rows(logits, target, -100, loss, targets), reference.rows(logits, target, -100, loss)
    torch.testing.assert_close(soft, hard, rtol=1e-10, atol=1e-10)
