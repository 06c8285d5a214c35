"""check_loss: every loss of the package passes, and each way to write one wrong is named."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

import bonus_ops
from bonus_ops import (
    CrossEntropy,
    Focal,
    GapLoss,
    Linear,
    LogBonus,
    LossCheck,
    Scheduled,
    SoftmaxSquaredError,
    check_loss,
)
from tests.cases import LOSSES as NAMED_LOSSES

LOSSES = [loss or CrossEntropy() for loss in NAMED_LOSSES.values()]
LOSSES += [Focal(0.5), Scheduled(LogBonus(0.5), strength=Linear(4))]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_loss_of_the_package_passes(loss):
    result = check_loss(loss)
    assert isinstance(result, LossCheck) and result.ok and len(result.passed) >= 3
    assert str(result).startswith(f"check of {loss!r}\nright:")


def test_every_loss_of_the_package_is_among_them():
    public = {x for x in vars(bonus_ops).values() if isinstance(x, type) and issubclass(x, GapLoss)} - {GapLoss}
    assert public == {type(loss) for loss in LOSSES}


@dataclass(frozen=True)
class Square(GapLoss):
    """(1 - p)^2, right in all."""

    def value(self, gap):
        return torch.sigmoid(-gap) ** 2

    def slope(self, gap):
        return 2 * torch.sigmoid(gap) * torch.sigmoid(-gap) ** 2


class UpsideDown(Square):
    def slope(self, gap):
        return -super().slope(gap)


class Scaled(Square):
    def slope(self, gap):
        return 2 * super().slope(gap)


class OffOnOneSide(Square):
    def slope(self, gap):
        return super().slope(gap) + 1e-4 * (gap > 5)


class Sum(Square):
    def value(self, gap):
        return super().value(gap).sum()


class Number(Square):
    def slope(self, gap):
        return 0.5


class Mixes(Square):
    def value(self, gap):
        return super().value(gap) - (gap.mean() if gap.numel() else 0.0)


class Narrow(Square):
    def value(self, gap):
        return super().value(gap).float()


class Overflows(Square):
    def value(self, gap):
        return torch.log(1 + torch.exp(-gap))

    def slope(self, gap):
        return torch.sigmoid(-gap)


class HidesNaN(Square):
    def value(self, gap):
        return super().value(gap).nan_to_num(0.0)


class Writes(Square):
    def value(self, gap):
        return gap.neg_().sigmoid() ** 2


class Detached(Square):
    def value(self, gap):
        return super().value(gap.detach())


class Unfinished(GapLoss):
    pass


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (UpsideDown, "slope has the wrong sign: expected -d value / d gap = 0.2485.*; this trains the wrong way"),
        (Scaled, r"slope is not -d value / d gap at \d+ of 1607 gaps: expected .* at gap .*, got"),
        (OffOnOneSide, r"slope is not -d value / d gap at 7\d\d of 1607 gaps"),
        (Sum, r"value of a gap \[0\] torch.float32 must have its shape and dtype, got \[\] torch.float32"),
        (Number, "slope must return a tensor shaped as the gap, got float"),
        (Mixes, "value of some gaps differs when they are alone"),
        (Narrow, r"value of a gap \[\] torch.float64 must have its shape and dtype, got \[\] torch.float32"),
        (Overflows, r"value is inf at gap -100 in torch.float32: expected a finite number"),
        (HidesNaN, "value of NaN must be NaN"),
        (Writes, "value writes the gap it is given"),
        (Detached, "value does not depend on the gap by torch's formulas"),
        (Unfinished, "value of a gap .* raises NotImplementedError: Unfinished does not define value"),
    ],
)
def test_a_wrong_loss_is_told_what_is_wrong(kind, problem):
    loss = kind()
    result = check_loss(loss, raise_exception=False)
    assert not result.ok and any(re.match(problem, found) for found in result.problems), result
    with pytest.raises(ValueError, match=f"^check of .*{kind.__name__}.*\\nwrong:     "):
        check_loss(loss)


@pytest.mark.parametrize(("kind", "name", "came"), [(Sum, "value", r"\[\]"), (Number, "slope", "float")])
def test_a_loss_whose_formula_has_another_shape_raises_where_it_is_used(kind, name, came):
    logits, message = torch.tensor([[2.0, 0.0, 1.0]]), rf"of a gap \[2\] {kind.__name__}.{name} is {came}\nExpected"
    for target in (torch.tensor([0]), logits.softmax(1)):
        with pytest.raises(RuntimeError, match=message):
            bonus_ops.bonus_cross_entropy(logits, target, bonus=kind())
    with pytest.raises(RuntimeError, match=message):
        bonus_ops.bonus_binary_cross_entropy_with_logits(logits, logits.sigmoid(), bonus=kind())
    with pytest.raises(RuntimeError, match=message):
        bonus_ops.linear_bonus_cross_entropy(logits, torch.eye(3), torch.tensor([0]), bonus=kind())


def test_a_right_loss_without_a_kernel_says_that_its_formulas_run():
    result = check_loss(Square())
    assert result.ok and "triton: the loss has no kernel, its formulas run" in result.skipped


@dataclass(frozen=True)
class WrongKernel(LogBonus):
    """Its kernel is that of the log bonus, its formulas are twice those."""

    kernel = "log_bonus"

    def value(self, gap):
        return 2 * super().value(gap)

    def slope(self, gap):
        return 2 * super().slope(gap)


@pytest.mark.parametrize(
    ("parent", "formulas", "own"),
    [
        (LogBonus, ("slope", "value"), "slope and value"),
        (CrossEntropy, ("value",), "value"),
        (Focal, ("slope",), "slope"),
        (SoftmaxSquaredError, ("error",), "error"),
    ],
)
def test_formulas_that_an_inherited_kernel_would_not_know_are_refused(parent, formulas, own):
    made = {name: lambda self, gap: 2 * gap for name in formulas}
    message = f"Mine defines {own}, but would run the kernel of {parent.__name__}, which knows nothing of it.\nExpected"
    with pytest.raises(TypeError, match=message):
        type("Mine", (parent,), made)


def test_a_subclass_that_defines_no_formula_keeps_the_kernel():
    @dataclass(frozen=True)
    class Paper(LogBonus):
        log_end: float = 0.5

    logits, target = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    assert Paper.kernel == "log_bonus"
    assert bonus_ops.bonus_cross_entropy(logits, target, bonus=Paper()) == bonus_ops.bonus_cross_entropy(
        logits, target, bonus=LogBonus(0.5)
    )


def test_a_kernel_that_differs_from_the_formulas_is_told():
    result = check_loss(WrongKernel(), raise_exception=False)
    kernels_ran = not any(line.startswith("triton") for line in check_loss(LogBonus()).skipped)
    found = [line for line in result.problems if line.startswith("triton: the loss of the kernel is not that")]
    assert bool(found) == kernels_ran


@pytest.mark.parametrize("loss", [None, LogBonus, "log", SoftmaxSquaredError(), torch.nn.CrossEntropyLoss()], ids=repr)
def test_only_a_gap_loss_is_taken(loss):
    with pytest.raises(TypeError, match="check_loss: loss must be a GapLoss instance such as LogBonus"):
        check_loss(loss)
