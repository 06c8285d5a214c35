"""A check of one's own loss: does its slope belong to its value, and do its kernels say what its formulas say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import bonus_cross_entropy
from .losses import GapLoss
from .schedules import Scheduled

__all__ = ["LossCheck", "check_loss"]

KERNELS = ("triton", "numba")  # implementations that may run formulas of their own
RTOL, ATOL = 1e-5, 1e-9  # of two formulas in float64
KERNEL_RTOL, KERNEL_ATOL = 2e-5, 2e-6  # of float32 kernels against them
# off the round numbers, where kinks are
EVEN = torch.linspace(-40.0, 40.0, 1601, dtype=torch.float64, device="cpu") + 0.0123
FAR = torch.tensor([-100.0, -88.0, -60.0, 60.0, 88.0, 100.0], dtype=torch.float64, device="cpu")


class LossCheck(NamedTuple):
    """What `check_loss` found.

    Attributes:
        loss: the loss as it shows itself.
        problems: what is wrong, a sentence each; empty where nothing is.
        passed: what was found right.
        skipped: what could not be tried here, and why.
    """

    loss: str
    problems: tuple[str, ...]
    passed: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        """Return the report, a line a finding."""
        kinds = (("wrong", self.problems), ("right", self.passed), ("not tried", self.skipped))
        lines = [f"{kind + ':':11}{finding}" for kind, findings in kinds for finding in findings]
        return "\n".join([f"check of {self.loss}", *lines])


def check_loss(loss: GapLoss, *, raise_exception: bool = True) -> LossCheck:
    """Check that a loss of your own is what the library takes it for.

    - ``value`` and ``slope`` return tensors shaped as the gap and of its dtype, element by element, and leave it alone.
    - ``slope`` is ``-d value / d gap``, by autograd in float64 at 1601 gaps from -40 to 40 and out to 100. Where the
      value has a kink or a jump, the two may differ at that very gap only.
    - Neither is NaN or infinite at a finite gap, in float32 too; NaN stays NaN.
    - Kernels, where the loss has them and they run here, give the loss and the gradient that the formulas give.

    Args:
        loss: an instance of a `GapLoss`; of a `Scheduled` one its present loss is checked.
        raise_exception: raise for what is wrong, as `torch.autograd.gradcheck`; False only reports.

    Returns:
        A `LossCheck`; print it to read it.

    Raises:
        TypeError: ``loss`` is no `GapLoss` instance.
        ValueError: something is wrong; the message is the report.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from bonus_ops import GapLoss, check_loss
        >>> @dataclass(frozen=True)
        ... class Upside(GapLoss):
        ...     def value(self, gap):
        ...         return torch.sigmoid(-gap)
        ...     def slope(self, gap):
        ...         return -torch.sigmoid(gap) * torch.sigmoid(-gap)
        >>> print(check_loss(Upside(), raise_exception=False).problems[0])
        slope has the wrong sign: expected -d value / d gap = 0.25 at gap 0.0123, got -0.25; this trains the wrong way
    """
    if not isinstance(loss, GapLoss):
        came = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(f"check_loss: loss must be a GapLoss instance such as LogBonus(log_end=0.75), got {came}")
    present = loss.current if isinstance(loss, Scheduled) else loss
    problems: list[str] = []
    passed: list[str] = []
    skipped: list[str] = []
    checks: list[tuple[str, Callable[[GapLoss], Iterator[str]]]] = [
        ("value and slope keep shape and dtype, and leave the gap alone", _forms),
        ("value and slope are finite at finite gaps, NaN at NaN", _numbers),
        ("slope is -d value / d gap", _slope),
    ]
    for claim, check in checks:
        found = list(check(present))
        problems += found
        passed += [] if found else [claim]
        if found and check is _forms:
            break  # what follows needs tensors of the right shape
    if not problems:
        for name in KERNELS:
            _kernels(present, name, problems, passed, skipped)
    result = LossCheck(repr(loss), tuple(problems), tuple(passed), tuple(skipped))
    if problems and raise_exception:
        raise ValueError(str(result))
    return result


def _formulas(loss: GapLoss) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    return [("value", loss.value), ("slope", loss.slope)]


def _forms(loss: GapLoss) -> Iterator[str]:
    for name, formula in _formulas(loss):
        for shape in ((), (0,), (5,), (2, 3), (2, 1, 3)):
            for dtype in (torch.float32, torch.float64):
                gap = torch.linspace(-3, 3, math.prod(shape), dtype=dtype, device="cpu").reshape(shape)
                before = gap.clone()
                try:
                    result = formula(gap)
                except Exception as error:
                    yield f"{name} of a gap {list(shape)} {dtype} raises {type(error).__name__}: {error}"
                    return
                if not isinstance(result, Tensor):
                    yield f"{name} must return a tensor shaped as the gap, got {type(result).__name__}"
                    return
                if result.shape != gap.shape or result.dtype != dtype:
                    came = f"{list(result.shape)} {result.dtype}"
                    yield f"{name} of a gap {list(shape)} {dtype} must have its shape and dtype, got {came}"
                    return
                if not torch.equal(gap, before):
                    yield f"{name} writes the gap it is given"
                    return
        gap = torch.linspace(-8, 8, 33, dtype=torch.float64, device="cpu")
        if not torch.allclose(formula(gap)[5:9], formula(gap[5:9]), rtol=1e-12, atol=1e-12, equal_nan=True):
            yield f"{name} of some gaps differs when they are alone: each element must depend on its own gap only"


def _numbers(loss: GapLoss) -> Iterator[str]:
    for name, formula in _formulas(loss):
        for dtype in (torch.float64, torch.float32):
            gap = torch.cat([EVEN, FAR]).to(dtype)
            result = formula(gap)
            if len(wrong := (~result.isfinite()).nonzero()[:, 0]):
                at = min(wrong.tolist(), key=lambda i: abs(float(gap[i])))
                yield f"{name} is {float(result[at])} at gap {float(gap[at]):.4g} in {dtype}: expected a finite number"
                break
        if not formula(torch.full((1,), math.nan, device="cpu")).isnan().all():
            yield f"{name} of NaN must be NaN: a broken model would look well"


def _slope(loss: GapLoss) -> Iterator[str]:
    gap = torch.cat([EVEN, FAR]).requires_grad_()
    value = loss.value(gap)
    if not value.requires_grad:
        yield "value does not depend on the gap by torch's formulas: autograd cannot derive it"
        return
    (derivative,) = torch.autograd.grad(value.sum(), gap)
    expected, slope = -derivative, loss.slope(gap.detach())
    gap = gap.detach()
    off = (slope - expected).abs() - (ATOL + RTOL * expected.abs())
    off = torch.where(expected.isfinite() & slope.isfinite(), off, -1.0)  # those not finite are told of elsewhere
    wrong = (off > 0).nonzero()[:, 0]
    if not len(wrong):
        return
    upside_down = torch.allclose(slope, -expected, rtol=RTOL, atol=ATOL, equal_nan=True)
    at = min(wrong.tolist(), key=lambda i: abs(float(gap[i]))) if upside_down else int(off.argmax())
    numbers = f"{float(expected[at]):.4g} at gap {float(gap[at]):.4g}, got {float(slope[at]):.4g}"
    if upside_down:
        yield f"slope has the wrong sign: expected -d value / d gap = {numbers}; this trains the wrong way"
    else:
        yield f"slope is not -d value / d gap at {len(wrong)} of {len(gap)} gaps: expected {numbers}"


def _kernels(loss: GapLoss, name: str, problems: list[str], passed: list[str], skipped: list[str]) -> None:
    """Compare a kernel's loss and gradient with the formulas, by the logits [gap, 0] of two classes."""
    if loss.kernel is None:
        skipped.append(f"{name}: the loss has no kernel, its formulas run")
        return
    gap = torch.cat([EVEN[::16], FAR]).to(torch.float32)
    logits = torch.stack([gap, torch.zeros_like(gap)], 1).requires_grad_()
    target = torch.zeros(len(gap), dtype=torch.int64, device="cpu")
    try:
        losses = bonus_cross_entropy(logits, target, bonus=loss, reduction="none", implementation=name)
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        skipped.append(f"{name}: {str(error).splitlines()[0]}")
        return
    for what, actual, formula in (("loss", losses.detach(), loss.value), ("gradient", -gradient[:, 0], loss.slope)):
        expected = formula(gap.double())
        off = (actual.double() - expected).abs() - (KERNEL_ATOL + KERNEL_RTOL * expected.abs())
        if not (off <= 0).all():
            at = int(off.nan_to_num(math.inf).argmax())
            numbers = f"{float(expected[at]):.6g} at gap {float(gap[at]):.4g}, got {float(actual[at]):.6g}"
            problems.append(f"{name}: the {what} of the kernel is not that of the formulas: expected {numbers}")
            return
    passed.append(f"{name}: loss and gradient of the kernel are those of the formulas")
