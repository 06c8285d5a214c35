"""The sigmoid family: exact, as torch where torch has it, any layout, by every implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bonus_ops
from bench import sigmoid as bench
from bonus_ops import (
    AbsoluteError,
    BonusBCEWithLogitsLoss,
    CrossEntropy,
    Focal,
    FocalStar,
    HaltedFocal,
    LogBonus,
    PositiveCount,
    PowerBonus,
    SoftmaxSquaredError,
    SquaredError,
    reference,
)
from bonus_ops import bonus_binary_cross_entropy_with_logits as bonus_bce
from bonus_ops.kernels.elements import common_axes
from tests.cases import LOSSES
from tests.conftest import INTERPRETED
from tests.threads import several_threads

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EVERY_LOSS = {name: loss or CrossEntropy() for name, loss in LOSSES.items()}
ONE_OF_EACH = {type(loss): name for name, loss in EVERY_LOSS.items()}.values()
REDUCTIONS = ("none", "sum", "mean")
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="the guard watches the interpreter")


@pytest.fixture(params=["numba", "triton", "reference"])
def how(request) -> tuple[str, str]:
    """Return (implementation, device)."""
    name = request.param
    if name == "numba":
        return name, "cpu"
    return name, request.getfixturevalue("kernel_device" if name == "triton" else "device")


@pytest.fixture
def shared(soft):
    """Run soft targets on several threads, a chunk of elements for each."""
    with several_threads(3 if soft else 1):
        yield


def draw(shape, dtype=torch.float32, soft=False, device="cpu") -> tuple[Tensor, Tensor]:
    """Return logits, some of them extreme, and targets of which a third are positive."""
    x = (4 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    t = (torch.rand(shape) < 0.3).to(dtype)
    if soft:
        t = torch.where(torch.rand(shape) < 0.5, torch.rand(shape).to(dtype), t)
    if x.numel() > 8:
        extreme = torch.tensor([30.0, -30.0, 100.0, -100.0, 1e4, -1e4, 0.0, -0.0], dtype=dtype)
        x.view(-1)[torch.randperm(x.numel())[:8]] = extreme
    return x.to(device).requires_grad_(), t.to(device)


def truth(x, t, loss, weight=None, pos_weight=None, scales=(1.0, 1.0)) -> tuple[Tensor, Tensor]:
    """Return losses and their gradient in float64, of the inputs as they were rounded."""
    wide = [None if w is None else w.detach().double().cpu() for w in (x, t, weight, pos_weight)]
    value = reference.elements(*wide, loss, scales)
    return value, reference.elements_gradient(*wide, loss, scales, torch.ones((), dtype=torch.float64))


def rewards(loss) -> bool:
    """Return whether the slope is a sum of positive terms, so that its error is relative."""
    return getattr(loss, "strength", 0) >= 0


def allowance(x, loss, true, relative) -> Tensor:
    """Return the error allowed in the dtype of ``x``: of its arithmetic, relative to the gap, and of its rounding.

    exp rounds relative to its argument, which powers multiply; a bonus is exact beside cross-entropy, not alone.
    A GPU's exp2 and division err by 2 units.
    """
    eps = torch.finfo(reference.accumulation_dtype(x.dtype)).eps
    power = max(1.0, getattr(loss, "gamma", 1.0))
    scale = true.abs() if relative else true.abs().clamp(min=1.0)
    # a float16 gradient below the smallest normal number rounds absolutely
    rounding = torch.finfo(x.dtype).eps * true.abs() + torch.finfo(x.dtype).tiny * (2 * torch.finfo(x.dtype).eps)
    gap = x.detach().double().cpu().abs().clamp(max=110.0)  # where float32's exp ends
    units = 8 if INTERPRETED else 12
    return eps * power * (units + 1.5 * gap) * scale + rounding + torch.finfo(torch.float32).tiny * (eps > 1e-10)


def assert_exact(x, loss, actual, true, relative, what):
    error = (actual.detach().double().cpu() - true).abs()
    allowed = allowance(x, loss, true, relative)
    bad = ~(error <= allowed)
    assert not bad.any(), f"{what}: {(error / allowed)[bad].max():.3g} times the budget at {x[bad][:3].tolist()}"


# --- values and gradients ---------------------------------------------------------------------------------------------


IN_LOOPS = [(name, torch.float32, soft) for name in LOSSES for soft in (False, True)] + [
    (name, dtype, soft)
    for dtype in (torch.float16, torch.bfloat16, torch.float64)
    for name, soft in (("log_bonus", False), ("focal", True), ("absolute_error_mirror", False))
]


@pytest.mark.parametrize(("loss", "dtype", "soft"), IN_LOOPS)
def test_every_loss_is_exact_in_the_loops(loss, dtype, soft, shared):
    loss = EVERY_LOSS[loss]
    x, t = draw((21, 31), dtype, soft)  # two chunks
    value, gradient = truth(x, t, loss)
    none = bonus_bce(x, t, bonus=loss, reduction="none", implementation="numba")
    assert none.dtype == dtype
    # a bonus and the step of HaltedFocal are taken off: the difference crosses zero
    relative = not soft and not hasattr(loss, "strength") and not isinstance(loss, HaltedFocal)
    assert_exact(x, loss, none, value, relative, "losses")
    (grad,) = torch.autograd.grad(none.sum(), x)
    assert_exact(x, loss, grad, gradient, not soft and rewards(loss), "gradient")
    # the visit uses terms that losses share
    total = bonus_bce(x, t, bonus=loss, reduction="sum", implementation="numba")
    (grad,) = torch.autograd.grad(total, x)
    assert_exact(x, loss, grad, gradient, False, "gradient of the sum")
    # each loss may be off by its own budget, a sum of one chunk by half a unit of each term
    budget = allowance(x, loss, value, False).sum() + 16 * torch.finfo(torch.float32).eps * value.abs().sum()
    assert abs(total.item() - value.sum()) <= budget + torch.finfo(dtype).eps * value.sum().abs()


@pytest.mark.parametrize("loss", ONE_OF_EACH)
def test_every_loss_is_exact_in_the_kernels(loss, kernel_device):
    """One tile and a part: hard targets in the first, soft ones in the second."""
    loss = EVERY_LOSS[loss]
    x, t = draw((1100,), device=kernel_device)
    t[1050:] = 0.3
    value, gradient = truth(x, t, loss)
    options = {"bonus": loss, "implementation": "triton"}
    none = bonus_bce(x, t, reduction="none", **options)
    assert_exact(x, loss, none, value, False, "losses")
    (grad,) = torch.autograd.grad(none.sum(), x)
    hard = torch.arange(1100) < 1050
    assert_exact(x[hard], loss, grad[hard], gradient[hard], rewards(loss), "gradient of hard targets")
    assert_exact(x[~hard], loss, grad[~hard], gradient[~hard], False, "gradient of soft targets")
    total = bonus_bce(x, t, reduction="sum", **options)
    budget = allowance(x, loss, value, False).sum() + 11 * torch.finfo(torch.float32).eps * value.abs().sum()
    assert abs(total.item() - value.sum()) <= budget
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "of_target"),
    [
        (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_kernels_take_every_dtype(dtype, of_target, kernel_device):
    x, t = draw((40,), dtype, soft=True, device=kernel_device)
    t = t.to(of_target)
    value, gradient = truth(x, t, LogBonus(), scales=(0.3, 0.7))
    none = bonus_bce(x, t, reduction="none", alpha=0.3, implementation="triton")
    assert none.dtype == t.dtype
    narrow = min(dtype, t.dtype, key=lambda d: d.itemsize)
    assert_exact(x.to(narrow), LogBonus(), none, value, False, "losses")
    (grad,) = torch.autograd.grad(none.sum(), x)
    assert grad.dtype == dtype
    assert_exact(x.to(narrow), LogBonus(), grad, gradient, False, "gradient")


NAIVE = {
    "focal": (Focal(2.0), lambda p, t, q: -((1 - q) ** 2) * q.log()),
    "focal_half": (Focal(0.5), lambda p, t, q: -((1 - q) ** 0.5) * q.log()),
    "focal_star": (FocalStar(2.0, 0.0), lambda p, t, q: F.softplus(-2 * q.logit()) / 2),
    "halted": (HaltedFocal(1.0), lambda p, t, q: torch.where(q > 0.5, -q.log() - math.log(2) / 2, (q - 1) * q.log())),
    "power": (PowerBonus(2.0), lambda p, t, q: -q.log() - q**2),
    "log": (LogBonus(1.0), lambda p, t, q: -q.log() + (1 - q).clamp(min=1e-5).log()),
    "squared": (SquaredError(), lambda p, t, q: (p - t) ** 2),
    "squared_mirror": (SquaredError(strength=1.0), lambda p, t, q: (p - t) ** 2 - t * p**2 - (1 - t) * (1 - p) ** 2),
    "absolute": (AbsoluteError(), lambda p, t, q: (p - t).abs()),
}


@pytest.mark.parametrize("name", NAIVE)
def test_the_formula_is_that_of_the_paper(name):
    """As detectors write it, from p, the target t and the probability q of the target."""
    loss, naive = NAIVE[name]
    x = torch.linspace(-8, 8, 33, dtype=torch.float64).repeat(2).requires_grad_()
    t = (torch.arange(66) < 33).double()
    p = torch.sigmoid(x)
    balance = 0.25 * t + 0.75 * (1 - t)
    theirs = balance * naive(p, t, p * t + (1 - p) * (1 - t))
    ours = bonus_bce(x, t, bonus=loss, alpha=0.25, reduction="none", implementation="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)), rtol=1e-8, atol=1e-11)
    mean = bonus_bce(x, t, bonus=loss, alpha=0.25, normalizer=7.0, implementation="numba")
    torch.testing.assert_close(mean, theirs.sum() / 7)


def test_a_soft_target_is_its_share_of_both(how):
    x = torch.linspace(-5, 5, 20, device=how[1], requires_grad=True)
    soft, one, zero = (
        bonus_bce(x, torch.full_like(x, t), reduction="none", implementation=how[0]) for t in (0.3, 1.0, 0.0)
    )
    torch.testing.assert_close(soft, 0.3 * one + 0.7 * zero)


def test_infinite_logits_cost_the_limit_and_nan_stays(how):
    inf = math.inf
    x = torch.tensor([inf, inf, -inf, -inf, math.nan, math.nan, inf, 1.0], device=how[1], requires_grad=True)
    t = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.5, math.nan], device=how[1])
    for reduction in ("none", "sum"):
        value = bonus_bce(x, t, bonus=None, reduction=reduction, implementation=how[0])
        (grad,) = torch.autograd.grad(value.sum(), x)
        # the gradient is torch's
        assert grad.tolist() == pytest.approx([0, 1, -1, 0, math.nan, math.nan, 0.5, math.nan], nan_ok=True)
    losses = bonus_bce(x, t, bonus=None, reduction="none", implementation=how[0]).tolist()
    assert losses == pytest.approx([0, inf, inf, 0, math.nan, math.nan, inf, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("implementation", "loss"), [*(("numba", name) for name in LOSSES), *(("triton", name) for name in ONE_OF_EACH)]
)
def test_every_loss_of_an_infinite_logit_is_the_limit(loss, implementation, request):
    device, loss = (
        request.getfixturevalue("kernel_device" if implementation == "triton" else "device"),
        EVERY_LOSS[loss],
    )
    x = torch.tensor([math.inf, math.inf, -math.inf, -math.inf], device=device, requires_grad=True)
    t = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    value, gradient = truth(x, t, loss)
    for i in range(4) if implementation == "numba" else (slice(4),):  # one infinite loss would hide the rest of a sum
        reduction = "sum" if implementation == "numba" else "none"
        found = bonus_bce(x[i], t[i], bonus=loss, reduction=reduction, implementation=implementation)
        torch.testing.assert_close(found.cpu(), value[i].float())
        (grad,) = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(grad[i].cpu(), gradient[i].float(), rtol=1e-6, atol=1e-30)


# --- as torch ---------------------------------------------------------------------------------------------------------


WEIGHTS = [(), (1,), (7,), (5, 1), (1, 7), (5, 7), (3, 1, 1), (3, 5, 7)]


@pytest.mark.parametrize(
    ("reduction", "weights", "soft"),
    [("none", "", False), ("mean", "weight", True), ("sum", "pos_weight", False), ("mean", "weight pos_weight", True)],
)
def test_without_bonus_it_is_torch(how, reduction, weights, soft):
    weights = weights.split()
    for shape in WEIGHTS if weights else WEIGHTS[:1]:
        x, t = draw((3, 5, 7), soft=soft, device=how[1])
        options = {name: torch.rand(shape, device=how[1]) * 2 for name in weights} | {"reduction": reduction}
        ours = bonus_bce(x, t, bonus=None, implementation=how[0], **options)
        wide = x.detach().double().requires_grad_()
        theirs = F.binary_cross_entropy_with_logits(wide, t.double(), **options)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)
        grad, true_grad = (torch.autograd.grad((y * 0.5).sum(), z)[0] for y, z in ((ours, x), (theirs, wide)))
        torch.testing.assert_close(grad.double(), true_grad, rtol=2e-6, atol=1e-7 if INTERPRETED else 2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reduction", "autocast"), [("none", False), ("sum", False), ("mean", True)])
def test_the_dtype_is_torchs(dtype, reduction, autocast):
    for target_dtype in {dtype, torch.float32, torch.bfloat16}:
        x, t = draw((4, 3), dtype)
        t, x = t.to(target_dtype), x.detach().clamp(-20, 20).requires_grad_()
        weight = torch.rand(3, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, theirs = (f(x, t, weight, reduction=reduction) for f in (plain, F.binary_cross_entropy_with_logits))
        assert ours.dtype == theirs.dtype
        eps = max(torch.finfo(d).eps for d in (dtype, target_dtype, ours.dtype))
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps)  # torch's own rounds in the narrower
        assert torch.autograd.grad(ours.sum(), x)[0].dtype == dtype


def plain(*args, **options):
    return bonus_bce(*args, bonus=None, **options)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_small_shapes_are_torchs(how, shape):
    x, t = draw(shape, device=how[1])
    for reduction in REDUCTIONS:
        ours = plain(x, t, reduction=reduction, implementation=how[0])
        theirs = F.binary_cross_entropy_with_logits(x, t, reduction=reduction)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs)))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 2),
    "permuted": lambda x: x.permute(1, 2, 0),
    "sliced": lambda x: x[:, 1:, ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
    "offset": lambda x: x.flatten()[3:].reshape(-1)[1:61].view(5, 12),
    "channels_last": lambda x: x[None].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize(
    ("reduction", "other", "layout"),
    [*(("none", "in order", layout) for layout in LAYOUTS), ("mean", "alike", "permuted"), ("mean", "alike", "sliced")],
)
def test_any_layout(how, layout, other, reduction):
    x, t = draw((6, 5, 8), soft=True, device=how[1])
    x, t = LAYOUTS[layout](x.detach()).requires_grad_(), LAYOUTS[layout](t)
    t = t if other == "alike" else t.contiguous()
    weight = torch.rand(x.shape[-1], device=how[1])
    ours = plain(x, t, weight, reduction=reduction, implementation=how[0])
    theirs = F.binary_cross_entropy_with_logits(x, t, weight, reduction=reduction)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.rand(ours.shape, device=how[1]).expand_as(ours)
    grad, true_grad = (torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs))
    torch.testing.assert_close(grad, true_grad)
    if layout != "expanded" and how[0] != "reference":
        assert grad.stride() == torch.empty_like(x).stride()


def test_axes_are_merged_where_all_tensors_step_alike():
    def merge(*tensors):
        return common_axes(tensors[0].shape, [t.stride() for t in tensors])

    x = torch.empty(2, 3, 4)
    assert merge(x, x) == ([24], [[1], [1]])
    assert merge(x.permute(2, 0, 1), x.permute(2, 0, 1)) == ([24], [[1], [1]])
    assert merge(x, torch.empty(4).expand(2, 3, 4)) == ([6, 4], [[4, 1], [0, 1]])
    assert merge(x, torch.empty(3, 1).expand(2, 3, 4)) == ([2, 3, 4], [[12, 4, 1], [0, 1, 0]])
    assert merge(torch.empty(1, 1)) == ([1], [[1]])


# --- errors -----------------------------------------------------------------------------------------------------------


X, T = torch.zeros(3, 4), torch.ones(3, 4)
BAD_CALLS = {
    "shape": ((X, torch.ones(4, 3)), {}),
    "fewer axes": ((X, torch.ones(4)), {}),
    "input list": (([1.0], T), {}),
    "target list": ((X, [1.0]), {}),
    "bool target": ((X, T.bool()), {}),
    "int target": ((X, T.long()), {}),
    "byte target": ((X, T.byte()), {}),
    "int input": ((X.long(), T), {}),
    "complex input": ((X + 0j, T), {}),
    "weight list": ((X, T, [1.0]), {}),
    "weight float": ((X, T, 2.0), {}),
    "pos_weight float": ((X, T), {"pos_weight": 2.0}),
    "weight shape": ((X, T, torch.ones(3)), {}),
    "weight axes": ((X, T, torch.ones(1, 3, 4)), {}),
    "pos_weight shape": ((X, T), {"pos_weight": torch.ones(5)}),
    "pos_weight axes": ((X, T), {"pos_weight": torch.ones(2, 3, 4)}),
    "weight gradient": ((X.clone().requires_grad_(), T, torch.ones(4, requires_grad=True)), {}),
    "pos_weight gradient": ((X.clone().requires_grad_(), T), {"pos_weight": torch.ones(4, requires_grad=True)}),
    "reduction": ((X, T), {"reduction": "average"}),
    "sparse": ((X.to_sparse(), T), {}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_raise_what_torch_raises(name):
    args, options = BAD_CALLS[name]
    with pytest.raises(Exception) as theirs:
        F.binary_cross_entropy_with_logits(*args, **options)
    with pytest.raises(type(theirs.value)) as ours:
        plain(*args, **options)
    assert str(ours.value).split("\n")[0] == str(theirs.value).split("\n")[0]
    assert "Expected" in str(ours.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bonus": 0.75}, TypeError, "bonus must be a GapLoss instance"),
        ({"bonus": LogBonus}, TypeError, "the class LogBonus"),
        ({"bonus": SoftmaxSquaredError()}, TypeError, r"not the ClassLoss SoftmaxSquaredError\nExpected one such"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\] or None, got 1.5"),
        ({"alpha": -1}, ValueError, r"alpha must be in \[0, 1\] or None, got -1"),
        ({"alpha": math.nan}, ValueError, r"alpha must be in \[0, 1\] or None, got nan"),
        ({"alpha": "0.25"}, TypeError, "alpha must be a number or None, got str"),
        ({"normalizer": 0.0}, ValueError, r"normalizer must be in \(0, inf\) or a 0-d tensor, got 0.0"),
        ({"normalizer": math.inf}, ValueError, r"normalizer must be in \(0, inf\) or a 0-d tensor, got inf"),
        ({"normalizer": torch.tensor(-1.0)}, ValueError, r"normalizer must be in \(0, inf\), got -1.0"),
        ({"normalizer": True}, TypeError, "normalizer must be a number or a 0-d tensor, got bool"),
        ({"normalizer": torch.ones(1)}, ValueError, r"a 0-d tensor, got shape \[1\]"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "got it with reduction='sum'"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None, 'triton', 'numba' or 'reference'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    for call in (lambda: bonus_bce(X, T, **options), lambda: BonusBCEWithLogitsLoss(**options)):
        with pytest.raises(error, match=message):
            call()


def test_a_loss_in_the_place_of_weights_is_told_where_to_go():
    with pytest.raises(TypeError, match="weight must be a Tensor or None, got Focal. A loss goes by keyword: bonus="):
        BonusBCEWithLogitsLoss(Focal())


def test_numbers_of_numpy_are_numbers():
    ours = bonus_bce(X, T, alpha=0.25, normalizer=3)
    assert torch.equal(bonus_bce(X, T, alpha=np.float32(0.25), normalizer=np.int64(3)), ours)


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "reduction"), [(LogBonus(), "none"), (PowerBonus(2.0), "mean"), (SquaredError(strength=0.5), "mean")]
)
def test_gradcheck_and_gradgradcheck(how, loss, reduction):
    x, t = draw((2, 4), torch.float64, soft=True, device=how[1])

    def f(x):
        return bonus_bce(x, t, t + 0.5, bonus=loss, alpha=0.3, reduction=reduction, implementation=how[0])

    assert torch.autograd.gradcheck(f, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


@pytest.mark.parametrize(
    ("loss", "reduction"), [(LogBonus(), "none"), (Focal(), "sum"), (Focal(0.5), "mean"), (SquaredError(), "mean")]
)
def test_gradcheck_of_hard_targets(loss, reduction, device):
    """The shared terms of a first backward; gradcheck asks a second one for the same bits."""
    x, t = draw((6, 8), torch.float64, device=device)
    x = x.detach().clamp(-5, 5).requires_grad_()

    def f(x):
        return bonus_bce(x, t, bonus=loss, alpha=0.3, reduction=reduction, implementation="numba")

    assert torch.autograd.gradcheck(f, x)
    loss = f(x.float()).sum()
    for upstream in (1.0, 0.37):
        first, second = (torch.autograd.grad(loss * upstream, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_target_has_a_gradient(reduction):
    x, t = draw((3, 4), torch.float64)
    t.requires_grad_()
    ours = plain(x, t, reduction=reduction)
    theirs = F.binary_cross_entropy_with_logits(x, t, reduction=reduction)
    for mine, torchs in zip(*(torch.autograd.grad(y.sum(), (x, t)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, torchs)


def test_transforms_fall_to_the_formula():
    x, t = draw((3, 4), torch.float64)
    x = x.detach()

    def f(x, t):
        return bonus_bce(x, t, bonus=Focal())

    wanted = torch.func.grad(lambda x: bonus_bce(x, t, bonus=Focal(), implementation="reference"))(x)
    torch.testing.assert_close(torch.func.grad(f)(x, t), wanted)
    torch.testing.assert_close(torch.func.vmap(f)(x, t), torch.stack([f(a, b) for a, b in zip(x, t, strict=True)]))
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), t)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, wanted.sum())
    hessian = torch.func.hessian(f)(x, t).reshape(12, 12)
    assert (hessian.diagonal() != 0).any() and (hessian - hessian.diagonal().diag()).abs().max() == 0


@pytest.mark.parametrize(
    ("upstream", "dtype"),
    [(0.5, torch.bfloat16), *((upstream, torch.float32) for upstream in (1.0, 0.0, math.nan, math.inf))],
)
def test_backward_twice_and_from_any_upstream(how, upstream, dtype):
    x, t = draw((3, 5), dtype, device=how[1])
    loss = bonus_bce(x, t, implementation=how[0])
    first, second = (torch.autograd.grad(loss * upstream, x, retain_graph=True)[0] for _ in range(2))
    assert first is not second
    if upstream == math.inf:
        assert not first.isfinite().any() and not second.isfinite().any()
        return
    # the first was made in forward
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    true = truth(x, t, LogBonus())[1] / 15 * upstream
    torch.testing.assert_close(first.double().cpu(), true, rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


def test_a_scaled_half_gradient_is_rounded_once():
    """The mean's gradient underflows float16; scaled as a gradient scaler does it must not."""
    x, t = torch.full((1 << 9,), 8.0, dtype=torch.float16, requires_grad=True), torch.ones(1 << 9)
    (grad,) = torch.autograd.grad(plain(x, t, implementation="numba") * 2.0**16, x)
    expected = -torch.sigmoid(torch.tensor(-8.0, dtype=torch.float64)).item() * 2**7
    assert grad[0].item() == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def other_defaults():
    """Make torch's defaults those of nothing in a call."""
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_a_soft_gradient_is_of_the_dtype_of_its_input():
    """A mean over no power of two: float32 would round 1 / 15."""
    x, t = draw((3, 5), torch.float64, soft=True)
    for options in ({}, {"pos_weight": torch.rand(5, dtype=torch.float64)}):
        true = truth(x, t, LogBonus(), **options)[1] / 15
        (grad,) = torch.autograd.grad(bonus_bce(x, t, implementation="numba", **options), x)
        torch.testing.assert_close(grad, true, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(
    ("dtype", "soft", "reduction"),
    [(torch.float64, True, "mean"), (torch.float32, False, "none"), (torch.bfloat16, False, "mean")],
)
def test_torchs_defaults_change_nothing(dtype, soft, reduction, request):
    x, t = draw((3, 5), dtype, soft)
    calls = [{}, {"pos_weight": torch.rand(5)}, {"alpha": 0.25, "bonus": Focal()}, {"bonus": LogBonus(0.5, start=0.1)}]

    def results():
        for options in calls:
            for implementation in ("numba", "reference"):
                loss = bonus_bce(x, t, reduction=reduction, implementation=implementation, **options)
                yield from (loss, *(torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for _ in range(2)))
        with torch.no_grad():
            yield bonus_bce(x, t, reduction=reduction, implementation="numba")

    expected = list(results())
    request.getfixturevalue("other_defaults")
    for actual, wanted in zip(results(), expected, strict=True):
        assert actual.device.type == "cpu" and torch.equal(actual, wanted)


def test_positive_count_is_float32():
    torch.set_default_dtype(torch.bfloat16)
    try:
        positives = PositiveCount(0.9, 1001.0)
        assert positives.average.dtype == torch.float32
        assert positives(torch.ones(1003)).item() == pytest.approx(1001.2, rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
    positives = PositiveCount(0.9, 1024.0).bfloat16()
    assert positives.eval()(torch.ones(3)).dtype == torch.float32
    assert positives.train()(torch.ones(1003)).item() == pytest.approx(1024 * 0.9 + 100.3, rel=1e-6)


def test_inputs_changed_before_backward_raise():
    x, t = draw((3, 5))
    loss = bonus_bce(x * 1.0, t, implementation="numba")
    t.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_whole_and_once_for_all_strengths(reduction):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def f(x, t, bonus):
        return bonus_bce(x, t, bonus=bonus, alpha=0.25, reduction=reduction)

    x, t = draw((6, 5))
    for strength in (0.1, 0.2, 0.3, 0.4):
        bonus = LogBonus(strength=strength)
        compiled, eager = f(x, t, bonus), bonus_bce(x, t, bonus=bonus, alpha=0.25, reduction=reduction)
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (compiled, eager)))
    assert len(graphs) <= 2  # the first and one with the numbers as inputs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("same", "reduction"),
    [("weights", "mean"), ("weights of a module", "mean"), ("target and weight", "none"), ("all", "mean")],
)
def test_one_tensor_for_two_arguments_compiles(same, reduction):
    torch._dynamo.reset()
    x, t = draw((6, 5))
    w = torch.rand(5)
    module = BonusBCEWithLogitsLoss(w, pos_weight=w, reduction=reduction)
    f = {
        "weights": lambda x, t: bonus_bce(x, t, w, pos_weight=w, reduction=reduction),
        "weights of a module": module,
        "target and weight": lambda x, t: bonus_bce(x, t, w, pos_weight=t, reduction=reduction),
        "all": lambda x, t: bonus_bce(x, t, t, pos_weight=t, reduction=reduction),
    }[same]
    results = [g(x, t) for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in results))


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [False, True])
def test_operators_pass_opcheck(how, reduce):
    if how[0] == "reference":
        pytest.skip("not an operator")
    x, t = draw((3, 4), device=how[1])
    x, numbers = x.detach(), torch.tensor([0.25, 0.75, 1.0, 0.0, 1.0, 0.75, 1e-5], dtype=torch.float64)
    name = LogBonus()._name
    args = (x, t, None, torch.rand(4, device=how[1]), name, numbers, reduce, torch.float32, how[0])
    torch.library.opcheck(torch.ops.bonus_ops.sigmoid_forward.default, args)
    upstream = torch.ones((), device=how[1]) if reduce else t
    args = (x, t, None, None, upstream, name, numbers, how[0])
    torch.library.opcheck(torch.ops.bonus_ops.sigmoid_backward.default, args)


# --- where and when ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_bits_every_run(how):
    x, t = draw((1500,), device=how[1])
    runs = [torch.autograd.grad(loss := bonus_bce(x, t, implementation=how[0]), x) + (loss,) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_nothing_is_written_to_the_inputs(how):
    x, t = draw((4, 9), soft=True, device=how[1])
    weight = torch.rand(9, device=how[1])
    before = [y.detach().clone() for y in (x, t, weight)]
    bonus_bce(x, t, weight, pos_weight=weight, implementation=how[0]).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, t, weight), strict=True))


# --- kernels ----------------------------------------------------------------------------------------------------------


@only_interpreted
@pytest.mark.parametrize(("n", "reduction"), [(1, "none"), (1024, "sum"), (2100, "none"), (2100, "sum")])
def test_each_element_is_read_once_a_sweep_and_written_once(n, reduction, kernel_device, poison):
    from tests.interpreter_guard import guard

    x, t = draw((n,), torch.bfloat16)
    t = t.float()
    with guard() as launches:
        loss = bonus_bce(x, t, reduction=reduction, implementation="triton")
        (grad,) = torch.autograd.grad(loss.sum(), x)
    forward, backward = launches
    assert forward.bytes_read() == {"operands[0]": 2 * n, "operands[1]": 4 * n}
    assert (forward.times_read("operands[0]") == 1).all() and (forward.times_read("operands[1]") == 1).all()
    written = {"out_ptr": 4 * n} if reduction == "none" else {"sums_ptr": 4 * -(-n // 256)}
    assert forward.bytes_written() == written
    # a sum's upstream gradient is one number, read once a program
    upstream = 4 * n if reduction == "none" else 4 * -(-n // 1024)
    assert backward.bytes_read() == {"operands[0]": 2 * n, "operands[1]": 4 * n, "upstream_ptr": upstream}
    assert (backward.times_written("grad_ptr") == 1).all()
    assert grad.isfinite().all() and loss.isfinite().all()


@only_interpreted
def test_a_program_of_a_sum_adds_up_several_tiles(kernel_device, monkeypatch):
    from bonus_ops.kernels.gpu import launch
    from tests.interpreter_guard import guard

    monkeypatch.setattr(launch, "sigmoid_sum", lambda n, warp_size: launch.SigmoidLaunch(32, 3, 1))
    for n in (31, 96, 97, 200, 288):
        x, t = draw((n,))
        with guard() as launches:
            total = plain(x, t, reduction="sum", implementation="triton")
        assert launches[0].bytes_written() == {"sums_ptr": 4 * -(-n // 96)}
        assert (launches[0].times_read("operands[0]") == 1).all()
        torch.testing.assert_close(total.double(), truth(x, t, CrossEntropy())[0].sum(), rtol=1e-6, atol=0)


@only_interpreted
def test_a_weight_is_read_where_it_lies(kernel_device):
    from tests.interpreter_guard import guard

    x, t = draw((30, 7))
    x, weight = x.detach().t().contiguous().t().requires_grad_(), torch.rand(7)
    with guard() as launches:
        loss = plain(x, t, weight, pos_weight=torch.rand(30, 1), reduction="none", implementation="triton")
        loss.sum().backward()
    for launched in launches:
        assert (launched.times_read("operands[0]") == 1).all() and (launched.times_read("operands[1]") == 1).all()
        assert (launched.times_read("operands[2]") == 30).all() and (launched.times_read("operands[3]") == 7).all()


# --- benchmark --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", bench.PAIRS)
def test_the_benchmark_compares_like_with_like(name, dtype):
    x, t = bench.inputs((16, 8, 16), dtype)
    bench._check(x, t, bench.PAIRS[name])
    wrong = bench.PAIRS[name]._replace(options={"bonus": PowerBonus(1.5)})
    with pytest.raises(bench.WrongResult):
        bench._check(x, t, wrong)


# --- module and normalizer --------------------------------------------------------------------------------------------


def test_the_module_is_the_function():
    x, t = draw((4, 3))
    weights = {"weight": torch.rand(3), "pos_weight": torch.rand(3)}
    module = BonusBCEWithLogitsLoss(**weights, bonus=Focal(), alpha=0.25, normalizer=3.0)
    torch.testing.assert_close(module(x, t), bonus_bce(x, t, **weights, bonus=Focal(), alpha=0.25, normalizer=3.0))
    torch.testing.assert_close(module(x, t, torch.tensor(6.0)), module(x, t) / 2)
    assert set(module.state_dict()) == set(torch.nn.BCEWithLogitsLoss(**weights).state_dict())
    assert module.to(torch.float64).weight.dtype == torch.float64
    assert "Focal(gamma=2.0)" in repr(module)
    theirs = torch.nn.BCEWithLogitsLoss(reduction="sum")
    torch.testing.assert_close(BonusBCEWithLogitsLoss(reduction="sum", bonus=None)(x, t), theirs(x, t))


def test_a_normalizer_may_need_a_gradient():
    x, t = draw((4, 3))
    count = torch.tensor(5.0, requires_grad=True)
    total, loss = bonus_bce(x, t, reduction="sum").detach(), bonus_bce(x, t, normalizer=count)
    torch.testing.assert_close(loss.detach(), total / 5)
    torch.testing.assert_close(torch.autograd.grad(loss, count)[0], -total / 25)


def test_positive_count_averages_and_is_kept_by_checkpoints():
    positives, t = PositiveCount(0.5, 10.0), torch.tensor([1.0, 0.0, 0.9, 0.4])
    first = positives(t)
    assert first.item() == 6 and positives(torch.zeros(4)).item() == 3.5  # at least one is counted
    assert first.item() == 6  # what a backward waits for does not change
    other = PositiveCount()
    other.load_state_dict(positives.state_dict())
    assert other.eval()(t).item() == 3.5
    x = torch.randn(4, requires_grad=True)
    bonus_bce(x, t.round(), normalizer=positives(t)).backward()
    with pytest.raises(ValueError, match=r"PositiveCount: momentum must be in \[0, 1\), got 1"):
        PositiveCount(1)
    with pytest.raises(ValueError, match=r"PositiveCount: initial must be in \(0, inf\), got 0"):
        PositiveCount(initial=0)
    with pytest.raises(TypeError, match="PositiveCount: momentum must be a number, got str"):
        PositiveCount("a")
    with pytest.raises(TypeError, match="PositiveCount: initial must be a number, got Tensor"):
        PositiveCount(initial=torch.ones(2))
    with pytest.raises(TypeError, match="PositiveCount: target must be a Tensor, got list"):
        positives([1.0])
    assert repr(PositiveCount(0.75)) == "PositiveCount(momentum=0.75)"


def test_the_prefix_of_the_signature_is_torchs():
    import inspect

    ours = list(inspect.signature(bonus_bce).parameters.values())
    theirs = list(inspect.signature(F.binary_cross_entropy_with_logits).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert bonus_ops.bonus_binary_cross_entropy_with_logits is bonus_bce
