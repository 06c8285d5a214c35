"""Losses of the gap: slope is the derivative of value, limits hold, both ends are finite, and the jit pairs agree."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
)
from bonus_ops.losses import decode, encode, logit
from tests.cases import LOSSES as NAMED_LOSSES

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOSSES = [loss or CrossEntropy() for loss in NAMED_LOSSES.values()]
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=list(NAMED_LOSSES))
# steps of 1/4 plus an irrational shift: no kink of any loss is hit
GAPS = torch.arange(-40, 40, 0.25, dtype=torch.float64) + math.sqrt(2) / 100


def value(loss: GapLoss, gap: float) -> float:
    return loss.value(torch.tensor(gap, dtype=torch.float64)).item()


def slope(loss: GapLoss, gap: float) -> float:
    return loss.slope(torch.tensor(gap, dtype=torch.float64)).item()


# --- value and slope --------------------------------------------------------------------------------------------------


@EVERY_LOSS
def test_slope_is_minus_the_derivative_of_value(loss):
    gap = GAPS.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(loss.value(gap).sum(), gap)
    torch.testing.assert_close(loss.slope(gap), -derivative, rtol=1e-9, atol=1e-15)


@EVERY_LOSS
def test_slope_is_differentiable_as_value_twice(loss):
    gap = GAPS.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(loss.value(gap).sum(), gap, create_graph=True)
    (second,) = torch.autograd.grad(derivative.sum(), gap)
    (ours,) = torch.autograd.grad(loss.slope(gap).sum(), gap)
    torch.testing.assert_close(ours, -second, rtol=1e-7, atol=1e-12)


@EVERY_LOSS
def test_every_step_of_the_gap_is_rewarded(loss):
    assert (loss.slope(GAPS) >= 0).all()
    steps = loss.value(GAPS).diff()
    if getattr(loss, "abrupt", 1) < 1:  # the paper's ablation takes the bonus away at once
        steps[(GAPS[:-1] < logit(loss.abrupt)) & (GAPS[1:] > logit(loss.abrupt))] = 0
    assert (steps <= 1e-15).all()


@EVERY_LOSS
def test_value_and_slope_are_finite_in_float32(loss):
    for found in (f(torch.tensor([200.0, -200.0, 0.0])) for f in (loss.value, loss.slope)):
        assert found.dtype == torch.float32 and found.isfinite().all()


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_gaps_are_the_limit(loss, dtype):
    for sign in (-1, 1):
        far, limit = torch.tensor(sign * 2000.0, dtype=dtype), torch.tensor(sign * math.inf, dtype=dtype)
        torch.testing.assert_close(loss.slope(limit), loss.slope(far))
        # an unbounded value is near 2000 nats by now, a bounded one below 100
        expected = loss.value(far)
        torch.testing.assert_close(loss.value(limit), expected * math.inf if expected.abs() > 100 else expected)


@EVERY_LOSS
def test_a_nan_gap_stays_nan(loss):
    assert math.isnan(value(loss, math.nan)) and math.isnan(slope(loss, math.nan))


@pytest.mark.parametrize("log_end", [0.1, 0.5, 0.75, 0.99])
def test_log_bonus_is_smooth_at_log_end(log_end):
    loss, end = LogBonus(log_end), logit(log_end)
    assert value(loss, end - 1e-9) == pytest.approx(value(loss, end + 1e-9), abs=1e-8)
    assert slope(loss, end - 1e-9) == pytest.approx(slope(loss, end + 1e-9), abs=1e-7)
    assert slope(loss, end - 1) == pytest.approx(1) and slope(loss, end + 1) < 0.99  # it did turn


@pytest.mark.parametrize("bonus", [LogBonus, PowerBonus, CosineBonus, SubDataBonus])
@pytest.mark.parametrize("start", [0.2, 0.8])
def test_a_bonus_starts_from_zero(bonus, start):
    loss, plain = bonus(start=start), CrossEntropy()
    below, above = logit(start) - 1e-9, logit(start) + 1e-9
    assert value(loss, below) == value(plain, below)
    assert value(loss, above) == pytest.approx(value(plain, above), abs=1e-7)
    assert slope(loss, above) > slope(plain, above) + 0.01


@pytest.mark.parametrize("clamp", [1e-5, 0.01])
@pytest.mark.parametrize("bonus", [lambda c: LogBonus(1.0, c), lambda c: SubDataBonus(0.9999999, c)])
def test_the_clamp_stops_the_bonus_without_a_jump(bonus, clamp):
    loss, end = bonus(clamp), logit(1 - clamp)
    assert value(loss, end - 0.02) == pytest.approx(value(loss, end + 0.02), abs=0.03)
    assert slope(loss, end - 0.02) > 0.9 and slope(loss, end + 0.02) < 2 * clamp


# --- one loss is another ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "other", "difference"),
    [
        (LogBonus(strength=0.0), CrossEntropy(), 0.0),
        (Poly1(0.0), CrossEntropy(), 0.0),
        (Focal(0.0), CrossEntropy(), 0.0),
        (PowerBonus(1.0), Poly1(1.0), -1.0),
        (LogBonus(0.0), Poly1(1.0), -1.0),
        (SubDataBonus(1.0), LogBonus(1.0), 0.0),
        (FocalStar(1.0), CrossEntropy(), 0.0),
        (HaltedFocal(0.0), CrossEntropy(), 0.0),
        (SubDataBonus(1.0, clamp=None), LogBonus(1.0, clamp=None), 0.0),
        (LogBonus(1.0, clamp=None, start=0.0, abrupt=1.0), LogBonus(1.0, clamp=1e-300), 0.0),
    ],
    ids=repr,
)
def test_limits_of_the_family(loss, other, difference):
    torch.testing.assert_close(loss.value(GAPS), other.value(GAPS) + difference, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss.slope(GAPS), other.slope(GAPS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_end_one_without_clamp_is_the_negative_gap(dtype):
    loss, gap = LogBonus(log_end=1.0, clamp=None), GAPS.to(dtype)
    torch.testing.assert_close(loss.value(gap), -gap)
    torch.testing.assert_close(loss.slope(gap), torch.ones_like(gap))


@pytest.mark.parametrize("loss", [SquaredError(strength=1.0, gamma=2.0), AbsoluteError(strength=1.0, gamma=1.0)])
def test_a_mirrored_error_is_twice_the_absolute_error_less_one(loss):
    plain = AbsoluteError()
    torch.testing.assert_close(loss.value(GAPS), 2 * plain.value(GAPS) - 1, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss.slope(GAPS), 2 * plain.slope(GAPS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_halted_focal_halts_without_a_jump(gamma):
    loss = HaltedFocal(gamma)
    assert value(loss, -1e-9) == pytest.approx(value(loss, 1e-9), abs=1e-8)
    assert slope(loss, -1.0) == slope(Focal(gamma), -1.0) and slope(loss, 1.0) == slope(CrossEntropy(), 1.0)


@pytest.mark.parametrize("q", [1e-3, 1e-6])
def test_generalized_cross_entropy_tends_to_cross_entropy(q):
    gap = GAPS[GAPS.abs() < 10]
    torch.testing.assert_close(GeneralizedCrossEntropy(q).value(gap), CrossEntropy().value(gap), rtol=10 * q, atol=0)


@pytest.mark.parametrize("clamp", [None, 1e-5])
@pytest.mark.parametrize("bonus", [LogBonus, lambda **o: LogBonus(1.0, **o), SubDataBonus], ids=["log", "1", "sub"])
def test_a_bonus_without_strength_is_cross_entropy_bit_by_bit(bonus, clamp):
    loss, gap = bonus(clamp=clamp, strength=0.0), torch.cat([GAPS.float(), torch.tensor([math.inf, -math.inf])])
    assert torch.equal(loss.value(gap), CrossEntropy().value(gap))
    assert torch.equal(loss.slope(gap), CrossEntropy().slope(gap))


def test_conservative_bonus_pulls_with_full_strength_up_to_log_end():
    loss = LogBonus(0.75)
    full = loss.slope(GAPS[logit(0.75) > GAPS])
    torch.testing.assert_close(full, torch.ones_like(full))
    # beyond, the factor on the slope of cross-entropy tends to 1 + 1 / (1 - log_end)
    assert slope(loss, 30.0) / slope(CrossEntropy(), 30.0) == pytest.approx(5)


# --- the jit pairs ----------------------------------------------------------------------------------------------------


def through_the_kernel(loss: GapLoss, gap: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Return value and slope of the jit pair, from two classes with logits (gap, 0): their gap is exactly ``gap``."""
    logits = torch.stack([gap, torch.zeros_like(gap)], 1).to(device).requires_grad_()
    target = torch.zeros(len(gap), dtype=torch.int64, device=device)
    loss_of_row = bonus_cross_entropy(logits, target, reduction="none", bonus=loss, implementation="triton")
    (grad,) = torch.autograd.grad(loss_of_row.sum(), logits)
    torch.testing.assert_close(grad[:, 1], -grad[:, 0], rtol=1e-5, atol=1e-30)
    return loss_of_row.detach().cpu(), -grad[:, 0].cpu()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in NAMED_LOSSES]
    + [(name, torch.float64) for name in ("log_bonus", "power_bonus_window", "focal_star")],
)
def test_the_jit_pair_repeats_the_torch_formulas(name, dtype, kernel_device):
    loss = NAMED_LOSSES[name] or CrossEntropy()
    # 180 / 95 is no multiple of a power of two: float32 sees a rounded gap, and so does the truth
    gap = torch.linspace(-90, 90, 96, dtype=torch.float64).to(dtype)
    actual, actual_slope = through_the_kernel(loss, gap, kernel_device)
    truth, true_slope = loss.value(gap.double()), loss.slope(gap.double())
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # exp rounds relative to the gap, and powers of p multiply that
    power = max(1.0, getattr(loss, "gamma", 1.0))
    allowed = eps * power * (8 + 1.5 * gap.double().abs())
    # where a value may cross 0 it is absolute, else relative; a GPU flushes what is below the smallest normal number
    scale = truth.abs().clamp(min=1.0) if hasattr(loss, "strength") or (truth < 0).any() else truth.abs()
    assert ((actual.double() - truth).abs() <= allowed * scale + 4 * tiny).all()
    assert ((actual_slope.double() - true_slope).abs() <= allowed * true_slope.abs() + 4 * tiny).all()


@EVERY_LOSS
def test_the_jit_pair_agrees_at_infinite_gaps(loss, kernel_device):
    gap = torch.tensor([math.inf, -math.inf])
    logits = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], device=kernel_device, requires_grad=True)
    target = torch.zeros(2, dtype=torch.int64, device=kernel_device)
    actual = bonus_cross_entropy(logits, target, reduction="none", bonus=loss, implementation="triton")
    (grad,) = torch.autograd.grad(actual.sum(), logits)
    torch.testing.assert_close(actual.detach().cpu(), loss.value(gap))
    # no rest: nothing to learn; no label: all of the slope
    limit = slope(loss, -2000.0)
    assert grad.cpu().tolist() == [[0, 0], [pytest.approx(-limit), pytest.approx(limit)]]


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LogBonus(1.5), ValueError, r"LogBonus: log_end must be in \[0, 1\], got 1.5"),
        (lambda: LogBonus(-0.1), ValueError, r"LogBonus: log_end must be in \[0, 1\], got -0.1"),
        (lambda: LogBonus(math.nan), ValueError, r"LogBonus: log_end must be in \[0, 1\], got nan"),
        (lambda: LogBonus("0.75"), TypeError, "LogBonus: log_end must be a number, got str"),
        (lambda: LogBonus(None), TypeError, "LogBonus: log_end must be a number, got NoneType"),
        (lambda: LogBonus(True), TypeError, "LogBonus: log_end must be a number, got bool"),
        (lambda: LogBonus(torch.tensor(0.5)), TypeError, "LogBonus: log_end must be a number, got Tensor"),
        (lambda: LogBonus(clamp=0.0), ValueError, r"LogBonus: clamp must be in \(0, 1\) or None, got 0.0"),
        (lambda: LogBonus(clamp=1.0), ValueError, r"LogBonus: clamp must be in \(0, 1\) or None, got 1.0"),
        (lambda: LogBonus(strength=math.inf), ValueError, r"LogBonus: strength must be in \(-inf, inf\), got inf"),
        (lambda: LogBonus(strength=math.nan), ValueError, r"LogBonus: strength must be in \(-inf, inf\), got nan"),
        (lambda: LogBonus(start=1.0), ValueError, r"LogBonus: start must be in \[0, 1\), got 1.0"),
        (lambda: CosineBonus(start=-0.1), ValueError, r"CosineBonus: start must be in \[0, 1\), got -0.1"),
        (lambda: LogBonus(abrupt=0.0), ValueError, r"LogBonus: abrupt must be in \(0, 1\], got 0.0"),
        (lambda: PowerBonus(0.0), ValueError, r"PowerBonus: gamma must be in \(0, inf\), got 0.0"),
        (lambda: PowerBonus(-1.0), ValueError, r"PowerBonus: gamma must be in \(0, inf\), got -1.0"),
        (lambda: PowerBonus(math.inf), ValueError, r"PowerBonus: gamma must be in \(0, inf\), got inf"),
        (lambda: SubDataBonus(0.0), ValueError, r"SubDataBonus: k must be in \(0, 1\], got 0.0"),
        (lambda: SubDataBonus(1.1), ValueError, r"SubDataBonus: k must be in \(0, 1\], got 1.1"),
        (lambda: Focal(-1.0), ValueError, r"Focal: gamma must be in \[0, inf\), got -1.0"),
        (lambda: Focal(math.nan), ValueError, r"Focal: gamma must be in \[0, inf\), got nan"),
        (lambda: HaltedFocal(-1.0), ValueError, r"HaltedFocal: gamma must be in \[0, inf\), got -1.0"),
        (lambda: FocalStar(0.0), ValueError, r"FocalStar: gamma must be in \(0, inf\), got 0.0"),
        (lambda: FocalStar(1.0, math.inf), ValueError, r"FocalStar: beta must be in \(-inf, inf\), got inf"),
        (lambda: SquaredError(gamma=0.0), ValueError, r"SquaredError: gamma must be in \(0, inf\), got 0.0"),
        (
            lambda: SquaredError(strength=math.nan),
            ValueError,
            r"SquaredError: strength must be in \(-inf, inf\), .* nan",
        ),
        (lambda: AbsoluteError(gamma="2"), TypeError, "AbsoluteError: gamma must be a number, got str"),
        (lambda: Poly1(-1.1), ValueError, r"Poly1: epsilon must be in \[-1, inf\), got -1.1"),
        (lambda: GeneralizedCrossEntropy(0.0), ValueError, r"GeneralizedCrossEntropy: q must be in \(0, 1\], got 0.0"),
        (lambda: GeneralizedCrossEntropy([1]), TypeError, "GeneralizedCrossEntropy: q must be a number, got list"),
    ],
)
def test_a_bad_parameter_names_class_field_range_and_value(make, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        make()


@pytest.mark.parametrize("bonus", [PowerBonus, CosineBonus])
def test_strength_and_window_are_keyword_only(bonus):
    with pytest.raises(TypeError):
        bonus(1.0, 2.0)


# --- plain data -------------------------------------------------------------------------------------------------------


@EVERY_LOSS
def test_a_loss_is_plain_frozen_data(loss):
    assert pickle.loads(pickle.dumps(loss)) == copy.deepcopy(loss) == loss
    assert hash(copy.copy(loss)) == hash(loss)
    assert eval(repr(loss), vars(bonus_ops)) == loss
    for field in dataclasses.fields(loss):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(loss, field.name, 0.5)


@EVERY_LOSS
def test_encode_and_decode_are_inverse(loss):
    name, fields = encode(loss)
    assert fields.dtype == torch.float64 and fields.device.type == "cpu" and fields.dim() == 1
    assert decode(name, fields) == loss and type(decode(name, fields)) is type(loss)


def test_a_loss_without_formulas_says_so():
    @dataclasses.dataclass(frozen=True)
    class Bare(GapLoss):
        pass

    with pytest.raises(NotImplementedError, match="Bare does not define value"):
        bonus_cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]), bonus=Bare(), implementation="reference")


# --- a loss of one's own ----------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def softplus(x):
        return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))

    @triton.jit
    def tempered_value(gap, params):
        return softplus(-params[0] * gap) / params[0]

    @triton.jit
    def tempered_slope(gap, params):
        return 1.0 / (1.0 + tl.exp(params[0] * gap))


@dataclasses.dataclass(frozen=True)
class Tempered(GapLoss):
    """Cross-entropy of two classes at a temperature: ``softplus(-k gap) / k``."""

    kernel = (tempered_value, tempered_slope) if triton is not None else None
    k: float = 2.0

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(self.k * gap) / self.k

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-self.k * gap)


@pytest.mark.parametrize("implementation", ["numba", "triton", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_defined_by_a_user_runs(implementation, reduction, request):
    device = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    logits = torch.randn(6, 9, device=device, requires_grad=True)
    target = torch.arange(6, device=device)
    options = {"reduction": reduction, "bonus": Tempered(1.7)}
    loss = bonus_cross_entropy(logits, target, **options, implementation=implementation)
    wide = logits.detach().double().requires_grad_()
    truth = bonus_cross_entropy(wide, target, **options, implementation="reference")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)
    (grad,), (true_grad,) = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(truth.sum(), wide)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["triton", "numba"])
def test_a_loss_without_a_jit_pair_runs_by_its_formulas(implementation, request):
    class NoPair(Tempered):
        kernel = None

    device = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    logits, target = torch.randn(2, 3, device=device), torch.tensor([0, 1], device=device)
    found = [bonus_cross_entropy(logits, target, bonus=NoPair(), implementation=name) for name in (None, "reference")]
    torch.testing.assert_close(*found)
    with pytest.raises(NotImplementedError, match="NoPair has no kernel"):
        bonus_cross_entropy(logits, target, bonus=NoPair(), implementation=implementation)


@dataclasses.dataclass(frozen=True)
class Squared(GapLoss):
    """``-gap^2 / 2``: its slope is the very tensor it was given."""

    def value(self, gap: Tensor) -> Tensor:
        return -gap * gap / 2

    def slope(self, gap: Tensor) -> Tensor:
        return gap


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_formula_may_return_its_argument(implementation):
    logits, target = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, -100, 3, 2])
    options = {"bonus": Squared(), "implementation": implementation}
    rows = bonus_cross_entropy(logits, target, reduction="none", **options)
    mean = bonus_cross_entropy(logits, target, **options)
    torch.testing.assert_close(mean, rows.sum() / 4)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (mean, rows.sum() / 4)))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_two_losses_of_one_name_stay_apart(reduction):
    def scaled(factor: float) -> GapLoss:
        @dataclasses.dataclass(frozen=True)
        class Scaled(GapLoss):
            def value(self, gap: Tensor) -> Tensor:
                return -factor * gap

            def slope(self, gap: Tensor) -> Tensor:
                return torch.full_like(gap, factor)

        return Scaled()

    once, twice = scaled(1.0), scaled(2.0)
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    options = {"reduction": reduction}
    one, two = (bonus_cross_entropy(logits, target, bonus=loss, **options) for loss in (once, twice))
    torch.testing.assert_close(two, 2 * one)


def test_kernels_that_differ_by_a_number_alone_are_compiled_apart():
    """Machine code is kept on disk under what describes a body: what it closes over, its defaults, what it names."""
    from bonus_ops.kernels.cpu.losses import described

    def closing(factor):
        def value(gap, params):
            return factor * gap

        return value

    def defaulting(factor):
        def value(gap, params, factor=factor):
            return factor * gap

        return value

    for make in (closing, defaulting):
        assert described(make(1.0)) == described(make(1.0)) != described(make(2.0))
