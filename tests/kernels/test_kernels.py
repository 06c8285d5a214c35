"""The kernels against the reference in float64 of the rounded inputs: interpreted, or compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import bonus_ops
from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores, reference
from bonus_ops.kernels.gpu import labels, launch
from bonus_ops.logit_options import PLAIN
from tests import cases
from tests.budget import assert_within_budget
from tests.conftest import INTERPRETED

if INTERPRETED:
    from tests.interpreter_guard import guard as watched
else:
    from contextlib import nullcontext as watched

# an output that no program writes shows as NaN
pytestmark = pytest.mark.usefixtures("kernel_device", "poison")

IDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
over_dtypes = pytest.mark.parametrize("dtype", cases.FLOATS, ids=IDS.get)
COLUMNS = ("loss", "el2n", "margin", "entropy", "energy")


def epsilon(dtype):
    """Return the spacing of the arithmetic behind a dtype; loss parameters reach a kernel with 48 bits."""
    return 2.0**-45 if dtype == torch.float64 else 2.0**-23


def rounding(dtype):
    """Return the relative error of the last cast to ``dtype``; the interpreter truncates bfloat16."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return torch.finfo(dtype).eps
    return 0.505 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0


def check(logits, target, bonus=None, softmax=False, ignore_index=-100):
    """Compare loss, scores, gradient (and probabilities) of one call with the float64 truth of its inputs."""
    dtype, loss_of = logits.dtype, bonus or bonus_ops.CrossEntropy()
    logits = logits.detach().requires_grad_()
    call = bonus_ops.bonus_cross_entropy_with_softmax if softmax else bonus_cross_entropy_with_scores
    loss, scores, *rest = call(
        logits, target, ignore_index=ignore_index, reduction="none", bonus=bonus, implementation="triton"
    )
    grad_loss = torch.tensor([1.0, -0.5, 2.0, 0.25], device=logits.device)[torch.arange(loss.numel()) % 4]
    grad_loss = grad_loss.view(loss.shape).to(loss.dtype)
    loss.backward(grad_loss)

    rows = logits.detach().movedim(1, -1) if logits.dim() > 1 else logits.detach()
    exact = rows.double()
    true_scores = reference.scores(exact, target, ignore_index, torch.float64)
    true_loss = reference.rows(exact, target, ignore_index, loss_of)
    eager_loss = reference.rows(rows, target, ignore_index, loss_of)
    # e^x by exp2 rounds relative to x: where it counts, x is the distance to the row's max or the gap
    spread = (exact - exact.amax(-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0).abs()
    gap = true_scores.margin.nan_to_num(0.0, 0.0, 0.0).abs()
    row_slack, slack = 8 + 1.5 * gap, 8 + 1.5 * (gap[..., None] + spread)

    # a GPU's exp2 and division err by 2 units, the interpreter's by 1/2
    units = 2 if INTERPRETED else 6
    assert_within_budget(loss, true_loss, eager_loss, floor=units * epsilon(dtype) + rounding(dtype), what="loss")
    for name in COLUMNS:
        # confident rows keep their relative accuracy in loss and el2n, the rest holds to one nat
        relative = name in ("loss", "el2n")
        assert_within_budget(
            getattr(scores, name), getattr(true_scores, name), None, what=name, unit=1e-30 if relative else 1.0,
            floor=row_slack * 2.0**-23 if relative else 8 * 2.0**-23,
        )  # fmt: skip
    assert torch.equal(scores.runner_up, true_scores.runner_up)
    assert torch.equal(scores.prediction(target), true_scores.prediction(target))

    floor = slack * epsilon(dtype) + rounding(dtype)
    unit = torch.finfo(dtype).tiny if dtype == torch.float16 else 1e-30
    gradient = reference.gradient(exact, target, ignore_index, loss_of, grad_loss.double())
    ours = logits.grad.movedim(1, -1) if logits.dim() > 1 else logits.grad
    assert_within_budget(ours, gradient, None, floor=floor, unit=unit, what="gradient")
    if softmax:
        ours = rest[0].movedim(1, -1) if logits.dim() > 1 else rest[0]
        assert_within_budget(
            ours, reference.softmax(exact, target, ignore_index), None, floor=floor, unit=unit, what="softmax"
        )
    return loss, scores, logits.grad


def draw(regime, n_classes, dtype, device):
    # interpreted, a program takes milliseconds: where it has a row of its own, three rows only where rows are unlike
    n_rows = 6 if n_classes < 100 else 3 if n_classes < 2000 or regime == "masked" and n_classes < 10000 else 2
    return cases.REGIMES[regime](cases.generator(), n_rows, n_classes, dtype, device)


CLASS_COUNTS = (*cases.CLASS_COUNTS, cases.MULTI_TILE, cases.SPLIT_FORWARD)


def counts_of(dtype, regime):
    """Return the paths a regime takes: one code for all dtypes and numbers, so only float32 takes them all."""
    if dtype != torch.float32:
        return {
            "typical": (10, 1000) if dtype == torch.bfloat16 else (10,),
            "masked": (65,),
            "confident": (10,),
            "shifted": (10,),
        }.get(regime, ())
    # where classes are dropped, a row of each kind is a case of its own; ties also meet across programs
    if regime == "typical":
        return CLASS_COUNTS
    more = {"ties": [1003, cases.SPLIT_FORWARD], "masked": [65, 1003, 2056, cases.SPLIT_FORWARD], "wrong": [1003]}
    return (10, *more.get(regime, []))


PATHS = [
    pytest.param(dtype, regime, n_classes, id=f"{IDS[dtype]}-{regime}-{n_classes}")
    for dtype in cases.FLOATS
    for regime in cases.regimes_of(dtype)
    for n_classes in counts_of(dtype, regime)
]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "regime", "n_classes"), PATHS)
def test_every_regime_and_path(kernel_device, dtype, regime, n_classes):
    check(*draw(regime, n_classes, dtype, kernel_device), LogBonus())


@pytest.mark.slow
def test_rows_are_split(kernel_device):
    n_classes = cases.EMPTY_PART
    assert launch.forward(1, n_classes).parts > 1
    assert launch.backward(1, n_classes).parts > 1
    assert launch.forward(600, n_classes) == launch.forward(1, n_classes)
    logits, target = draw("masked", n_classes, torch.float32, kernel_device)
    check(logits[:1], target[:1], LogBonus())


LOSSES = [
    pytest.param(name, dtype, id=f"{name}-{IDS[dtype]}")
    for dtype in cases.FLOATS
    for name in (cases.LOSSES if dtype == torch.float32 else ("log_bonus_half", "focal"))
]


@pytest.mark.parametrize(("name", "dtype"), LOSSES)
def test_every_loss(kernel_device, name, dtype):
    """Gaps from -40 to 60 in one program; the probability windows end between two of them."""
    gap = torch.cat([torch.linspace(-20, 30, 30, dtype=torch.float64), torch.tensor([-40.0, 60.0])])
    rest = torch.tensor([0.0, -1.0, -3.0], dtype=torch.float64)
    logits = torch.cat([(gap + rest.logsumexp(0))[:, None], rest.expand(32, 3)], 1).to(dtype).to(kernel_device)
    check(logits, torch.zeros(32, dtype=torch.int64, device=kernel_device), cases.LOSSES[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "n_classes"),
    [
        pytest.param(dtype, n_classes, id=f"{IDS[dtype]}-{n_classes}")
        for dtype in cases.FLOATS
        for n_classes in ((3, 65, 2056) if dtype == torch.float32 else (65,))
    ],
)
def test_softmax_from_the_same_kernel(kernel_device, dtype, n_classes):
    logits, target = draw("masked", n_classes, dtype, kernel_device)
    target[-1] = -100
    check(logits, target, LogBonus(), softmax=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "dtype", "n_classes"),
    [
        pytest.param(layout, dtype, n_classes, id=f"{layout}-{dtype}-{n_classes}")
        for layout in cases.LAYOUTS
        for dtype, n_classes in ((torch.float32, 1003), (torch.bfloat16, 10))
        if (n_classes == 1003) == (layout in ("transposed", "column_slice", "padded_rows", "offset_3"))
    ],
)
def test_every_layout(kernel_device, dtype, layout, n_classes):
    logits, target = draw("typical", n_classes, dtype, kernel_device)
    check(cases.LAYOUTS[layout](logits), target, LogBonus(), softmax=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_classes_in_the_middle(kernel_device, dtype):
    logits = torch.randn(2, 3, 5, 11).to(dtype).to(kernel_device).permute(0, 3, 1, 2)
    target = torch.randint(0, 11, (2, 3, 5), device=kernel_device)
    check(logits, target, LogBonus(), softmax=True)
    check(logits.contiguous()[:, :, 1:, ::2], target[:, 1:, ::2], LogBonus(), softmax=True)


def test_one_unbatched_row(kernel_device):
    check(torch.randn(10, device=kernel_device), torch.tensor(3, device=kernel_device), LogBonus(), softmax=True)


def test_target_strides_and_dtypes(kernel_device):
    logits, target = draw("typical", 10, torch.float32, kernel_device)
    wide = target.new_full((12,), 10**6)
    wide[::2] = target
    check(logits, wide[::2])
    check(logits, target.to(torch.uint8), ignore_index=9)
    check(logits, target[:1].expand(6))


@pytest.mark.parametrize("n_classes", [5, cases.SPLIT_FORWARD])
def test_zero_rows(kernel_device, n_classes):
    logits = torch.empty(0, n_classes, device=kernel_device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=kernel_device)
    loss, scores = bonus_cross_entropy_with_scores(logits, target, reduction="sum", implementation="triton")
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, n_classes)
    assert all(column.shape == (0,) for column in scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "n_classes"),
    [*((torch.float32, n) for n in (1, 10, cases.SPLIT_FORWARD)), (torch.bfloat16, 10)], ids=str,
)  # fmt: skip
def test_ignored_rows_teach_nothing_whatever_they_hold(kernel_device, dtype, n_classes):
    logits, target = draw("typical", n_classes, dtype, kernel_device)
    logits[1] = math.nan
    target[1] = -100
    loss, scores, grad = check(logits, target, LogBonus(), softmax=n_classes < 2000)
    assert loss[1] == 0
    assert (grad[1] == 0).all()
    assert all(getattr(scores, name)[1].isnan() for name in COLUMNS)
    assert scores.runner_up[1] == -1 and scores.prediction(target)[1] == -1
    if n_classes == 10:
        loss, _, grad = check(logits, torch.full_like(target, -100), LogBonus())
        assert (loss == 0).all() and (grad == 0).all()


def test_a_class_can_be_the_ignore_index(kernel_device):
    logits, target = draw("typical", 10, torch.float32, kernel_device)
    target[2] = 0
    check(logits, target, LogBonus(), ignore_index=0, softmax=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_are_those_of_torch(kernel_device, reduction, weighted):
    logits, target = draw("typical", 10, torch.float32, kernel_device)
    target[3] = -100
    weight = torch.rand(10, device=kernel_device) if weighted else None
    ours, theirs = logits.clone().requires_grad_(), logits.clone().double().requires_grad_()
    loss = bonus_cross_entropy(ours, target, weight, reduction=reduction, bonus=None, implementation="triton")
    truth = F.cross_entropy(theirs, target, weight.double() if weighted else None, reduction=reduction)
    (3 * loss).backward()
    (3 * truth).backward()
    assert_within_budget(loss, truth, None, floor=2.0**-21, what="loss")
    assert_within_budget(ours.grad, theirs.grad, None, floor=(4 if INTERPRETED else 8) * 2.0**-23, what="gradient")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("label", "n_classes"),
    [(label, 10) for label in (-1, -101, 2**31, 2**32 + 1)] + [(2**32 + 1, 1003)],
)
def test_a_label_out_of_range_makes_its_row_nan(kernel_device, n_classes, label):
    """What a GPU does; below the check that a CPU gets."""
    logits, target = draw("typical", n_classes, torch.float32, kernel_device)
    good = target.clone()
    target[1] = label
    logits = logits[:, None]
    out = labels.forward(logits, target, -100, LogBonus(), True, False, PLAIN)
    expected = labels.forward(logits, good, -100, LogBonus(), True, False, PLAIN)
    grad = labels.backward(logits, target, out.saved, torch.ones_like(out.loss), None, -100, LogBonus(), PLAIN)
    softmax = labels.forward(logits, target, -100, LogBonus(), True, True, PLAIN).softmax
    others = torch.arange(len(target), device=kernel_device) != 1
    assert out.loss[1].isnan() and out.scores[:, 1].isnan().all() and grad[1].isnan().all()
    assert out.runner_up[1] == -1
    assert softmax.isnan().all(2)[:, 0].tolist() == [not x for x in others]
    assert torch.equal(out.loss[others], expected.loss[others])
    assert not grad[others].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "value", "n_classes"),
    [("label", math.inf, 10), ("label", -math.inf, 10), ("label", math.nan, 10), ("rest", math.nan, 10),
     ("rest", math.nan, 1003), ("label", math.inf, cases.SPLIT_FORWARD)],
)  # fmt: skip
def test_a_bad_logit_spoils_its_row_alone(kernel_device, n_classes, at, value):
    logits, target = draw("typical", n_classes, torch.float32, kernel_device)
    label = int(target[1])
    logits[1, label if at == "label" else label + 1] = value
    ours = logits.clone().requires_grad_()
    loss, scores = bonus_cross_entropy_with_scores(ours, target, reduction="none", bonus=None, implementation="triton")
    loss.sum().backward()
    truth = F.cross_entropy(logits.double(), target, reduction="none")
    assert_within_budget(loss, truth, None, what="loss")
    assert scores.loss.isnan().tolist() == truth.isnan().tolist()
    assert ours.grad.isnan().any(1).tolist() == truth.isnan().tolist()


def test_confident_rows_stay_ordered(kernel_device):
    """Where torch says 0.0 the loss of easy rows still tells them apart."""
    gap = torch.arange(5.0, 85.0, device=kernel_device)
    logits = torch.stack([gap, torch.zeros_like(gap)], 1)
    target = torch.zeros_like(gap, dtype=torch.int64)
    loss = bonus_cross_entropy(logits, target, reduction="none", bonus=None, implementation="triton")
    assert (loss[1:] < loss[:-1]).all() and (loss > 0).all()
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-gap.double())), rtol=1e-5, atol=0)


def test_offsets_pass_int32(kernel_device):
    """A row, and a class, 2^31 elements from the first; untouched pages of the storage cost no memory on a CPU."""
    torch.use_deterministic_algorithms(False)  # no fill
    storage = torch.empty(2**31 + 16, dtype=torch.float16, device=kernel_device)
    for strides in ((2**30, 1), (1, 2**30)):
        logits = storage.as_strided((3, 3), strides)
        logits.copy_(torch.randn(3, 3))
        with watched():
            check(logits, torch.tensor([0, 1, 2], device=kernel_device), LogBonus())


@pytest.mark.slow
def test_arguments_are_not_written(kernel_device):
    logits, target = draw("typical", 1003, torch.float32, kernel_device)
    weight = torch.rand(1003, device=kernel_device)
    given = (logits.requires_grad_(), target, weight)
    before = [(x.detach().clone(), x._version) for x in given]
    loss, _, _ = bonus_ops.bonus_cross_entropy_with_softmax(*given, implementation="triton")
    loss.backward()
    for x, (values, version) in zip(given, before, strict=True):
        assert torch.equal(x, values) and x._version == version


def test_poison_is_on():
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("warp_size", [32, 64])
def test_a_lane_is_a_thread(warp_size):
    """Otherwise chunks spread over threads, or threads repeat loads; sizes are powers of two, as Triton wants."""
    for n_classes in (1, 8, 10, 63, 64, 1000, 2047, 2048, 4096, 8191, 8192, 50257, 65536, 262144, 2**24):
        for shape in (launch.forward, launch.backward):
            for n_rows in (1, 64, 65536):
                how = shape(n_rows, n_classes, warp_size)
                two = 1 + (shape is launch.backward and n_classes >= 2048)  # chunks a thread
                assert how.rows * how.lanes == two * how.num_warps * warp_size, (shape, n_classes, how)
                apart = shape(n_rows, n_classes, warp_size, 0)
                assert apart.rows == warp_size and apart.lanes == apart.num_warps
                assert all(x & (x - 1) == 0 for x in (how.rows, how.lanes, how.num_warps))
                assert how.parts >= 1 and (how.rows == 1 or how.parts == 1)
