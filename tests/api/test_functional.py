"""The public functions: a drop-in for `F.cross_entropy` without a bonus, the definition of each option with one."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonus_ops import (
    BonusCrossEntropyLoss,
    CrossEntropyWithSoftmax,
    Focal,
    LogBonus,
    PowerBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
)
from tests.cases import LAYOUTS, generator, typical

FUNCTIONS = (bonus_cross_entropy, bonus_cross_entropy_with_scores, bonus_cross_entropy_with_softmax)
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["numba", "reference", "triton"])
SHAPES = {
    "(C)": ((5,), ()),
    "(N, C)": ((4, 5), (4,)),
    "(N, C, d)": ((2, 5, 3), (2, 3)),
    "(N, C, d1, d2)": ((2, 5, 3, 4), (2, 3, 4)),
    "(N, C, d1, d2, d3)": ((2, 5, 1, 2, 3), (2, 1, 2, 3)),
    "no rows": ((0, 5), (0,)),
    "no positions": ((2, 5, 0), (2, 0)),
    "no rows, no classes": ((0, 0), (0,)),
}


@pytest.fixture
def place(implementation, request) -> str:
    """Return the device on which the implementation under test runs."""
    return request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"


def value_and_grad(function, logits: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of its sum, each row weighed differently where there are rows."""
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, logits, upstream)[0]


def assert_same_as_torch(logits, target, *, implementation, rtol=2e-6, atol=2e-6, **options):
    ours = value_and_grad(bonus_cross_entropy, logits, target, bonus=None, implementation=implementation, **options)
    if target.dtype == torch.uint8:
        target = target.long()  # on a CPU torch refuses uint8 beyond two dimensions
    theirs = value_and_grad(F.cross_entropy, logits, target, **options)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def spread_target(shape: tuple[int, ...], n_classes: int, device: str = "cpu") -> Tensor:
    return torch.arange(math.prod(shape), device=device).view(shape) * 7 % max(n_classes, 1)


# --- signature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_signature_starts_with_that_of_torch(function):
    theirs = list(inspect.signature(F.cross_entropy).parameters.values())
    ours = list(inspect.signature(function).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert ours == list(inspect.signature(bonus_cross_entropy).parameters.values())


def test_the_module_takes_the_same_options_but_the_tensors():
    theirs = inspect.signature(nn.CrossEntropyLoss).parameters
    ours = inspect.signature(BonusCrossEntropyLoss).parameters
    assert [(p.name, p.default) for p in list(ours.values())[: len(theirs)]] == [
        (p.name, p.default) for p in theirs.values()
    ]
    assert set(ours) == set(inspect.signature(bonus_cross_entropy).parameters) - {"input", "target"}


def test_the_default_is_the_conservative_log_bonus_of_the_paper():
    logits, target = typical(generator(), 9, 6, torch.float32)
    expected = bonus_cross_entropy(logits, target, bonus=LogBonus(log_end=0.5, strength=1.0, clamp=1e-5))
    assert bonus_cross_entropy(logits, target) == expected == BonusCrossEntropyLoss()(logits, target)
    assert expected != bonus_cross_entropy(logits, target, bonus=None)


# --- F.cross_entropy without a bonus ----------------------------------------------------------------------------------


@EVERY_REDUCTION
def test_probability_targets_get_their_gradient(reduction):
    logits = torch.randn(3, 4)
    grads = []
    for function in (F.cross_entropy, lambda *a, **k: bonus_cross_entropy(*a, **k, bonus=None)):
        # an exact 0 is a probability too, and learning to move it needs its gradient
        target = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
        grads.append(torch.autograd.grad(function(logits, target, reduction=reduction).sum(), target)[0])
    torch.testing.assert_close(*grads)


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(("layout", "reduction"), [*((layout, "mean") for layout in LAYOUTS), ("transposed", "none")])
def test_gradients_keep_the_strides_torch_gives_them(implementation, layout, reduction, place):
    logits = LAYOUTS[layout](torch.randn(4, 5, device=place))
    target = torch.tensor([0, 1, 2, 3], device=place)
    assert_same_as_torch(logits, target, reduction=reduction, implementation=implementation)
    strides = []
    for options in ({"implementation": implementation, "bonus": None}, None):
        leaf = logits.detach().requires_grad_()
        function = F.cross_entropy if options is None else bonus_cross_entropy
        function(leaf, target, reduction=reduction, **(options or {})).sum().backward()
        assert leaf.grad is not None
        strides.append(leaf.grad.stride())
    assert strides[0] == strides[1]


INF, NAN = math.inf, math.nan


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
def test_ignored_rows_cost_nothing_whatever_they_hold(implementation, reduction, place):
    """Unlike in torch, where their gradient is NaN: padding may be garbage."""
    logits = torch.tensor([[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF] * 3, [1.0, 2.0, 3.0]], device=place)
    target = torch.tensor([-100, -100, -100, 1], device=place)
    for bonus in (None, LogBonus(1.0, clamp=None), Focal()):
        options = {"reduction": reduction, "bonus": bonus, "implementation": implementation}
        value, grad = value_and_grad(bonus_cross_entropy, logits, target, **options)
        assert (grad[:3] == 0).all() and (grad[3] != 0).all()
        assert value.isfinite().all()
    _, grad = value_and_grad(bonus_cross_entropy, logits, target, label_smoothing=0.1, implementation=implementation)
    assert (grad[:3] == 0).all() and (grad[3] != 0).all()


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scaled_float16_loss_neither_overflows_nor_underflows(reduction):
    """What a gradient scaler relies on: the gradient is rounded after the scale, not before."""
    logits, target = typical(generator(5), 512, 100, torch.float16)
    scale = 65536.0 if reduction == "mean" else 128.0
    truth = logits.double().requires_grad_()
    (F.cross_entropy(truth, target, reduction=reduction) * scale).backward()
    with torch.autocast("cpu", dtype=torch.float16):
        leaf = logits.clone().requires_grad_()
        (bonus_cross_entropy(leaf, target, reduction=reduction, bonus=None) * scale).backward()
    assert leaf.grad is not None and truth.grad is not None and leaf.grad.isfinite().all()
    error = (leaf.grad.double() - truth.grad).abs()
    assert (error <= 2**-10 * truth.grad.abs() + 2**-24).all()


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_callers_tensors_are_never_written(implementation, reduction, place):
    logits, target = torch.randn(6, 40, device=place), torch.arange(6, device=place)
    target[2] = -100
    weight = torch.rand(40, device=place)
    before = [x.clone() for x in (logits, target, weight)]
    leaf = logits.clone().requires_grad_()
    loss, scores, probabilities = bonus_cross_entropy_with_softmax(
        leaf, target, weight, reduction=reduction, implementation=implementation
    )
    loss.sum().backward()
    kept = [x.clone() for x in (*scores, probabilities)]
    bonus_cross_entropy(leaf, target, weight, reduction=reduction, implementation=implementation).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((leaf, target, weight), before, strict=True))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((*scores, probabilities), kept, strict=True))


def test_with_softmax_is_a_named_tuple():
    out = bonus_cross_entropy_with_softmax(torch.randn(2, 3), torch.tensor([0, 1]))
    assert out._fields == ("loss", "scores", "softmax") and type(out) is CrossEntropyWithSoftmax
    assert torch.equal(out.softmax, out[2]) and out.scores.loss.shape == (2,)


def test_deterministic_mode_fills_nothing_that_is_read(poison):
    logits = torch.randn(6, 40, requires_grad=True)
    target = torch.tensor([0, 1, -100, 3, 4, 39])
    for reduction in ("mean", "none"):
        loss, scores, probabilities = bonus_cross_entropy_with_softmax(logits, target, reduction=reduction)
        assert loss.isfinite().all() and probabilities.isfinite().all()
        assert all(column.isfinite().sum() == 5 for column in scores[:5])
        for z in (loss.sum(), bonus_cross_entropy(logits, target, reduction=reduction).sum()):
            assert torch.autograd.grad(z, logits)[0].isfinite().all()


# --- the functions agree ----------------------------------------------------------------------------------------------


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(
    ("shape", "reduction", "weighted"),
    [("(C)", "none", True), ("(N, C)", "mean", False), ("(N, C, d)", "sum", True), ("no rows", "mean", False)],
)
def test_scores_and_softmax_do_not_change_the_loss(implementation, reduction, shape, weighted, place):
    input_shape, target_shape = SHAPES[shape]
    logits = torch.randn(input_shape, device=place)
    target = spread_target(target_shape, 5, place)
    if target.numel() > 2:
        target.view(-1)[1] = -100
    options = {"reduction": reduction, "implementation": implementation}
    options["weight"] = torch.linspace(0.5, 2, 5, device=place) if weighted else None
    plain = value_and_grad(bonus_cross_entropy, logits, target, **options)
    for function in FUNCTIONS[1:]:
        with_more = value_and_grad(lambda *a, f=function, **k: f(*a, **k)[0], logits, target, **options)
        for actual, expected in zip(with_more, plain, strict=True):
            torch.testing.assert_close(actual, expected, equal_nan=True)

    _, scores = bonus_cross_entropy_with_scores(logits, target, **options)
    _, same_scores, probabilities = bonus_cross_entropy_with_softmax(logits, target, **options)
    alone = difficulty_scores(logits, target, implementation=implementation)
    for a, b, c in zip(scores, same_scores, alone, strict=True):
        assert a.shape == target.shape
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(a, c, rtol=0, atol=0, equal_nan=True)
    assert not probabilities.requires_grad and probabilities.dtype == logits.dtype
    expected = logits.softmax(0 if logits.dim() == 1 else 1)
    expected = expected.movedim(0 if logits.dim() == 1 else 1, -1).masked_fill((target == -100)[..., None], 0.0)
    actual = probabilities.movedim(0 if logits.dim() == 1 else 1, -1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.slow
@EVERY_IMPLEMENTATION
def test_reductions_are_sums_of_the_rows(implementation, place):
    logits, target = torch.randn(6, 9, device=place, dtype=torch.float64), spread_target((6,), 9, place)
    target[3] = -100
    weight = torch.rand(9, dtype=torch.float64, device=place)
    options = {"implementation": implementation}
    counts = target != -100
    rows, _ = value_and_grad(bonus_cross_entropy, logits, target, reduction="none", **options)
    weighted, _ = value_and_grad(bonus_cross_entropy, logits, target, weight, reduction="none", **options)
    row_weight = torch.where(counts, weight[target.clamp(min=0)], 0.0)
    torch.testing.assert_close(weighted, rows * row_weight)
    for w, row in ((None, counts.double()), (weight, row_weight)):
        total = (rows * row).sum()
        for reduction, divisor in (("sum", 1.0), ("mean", row.sum())):
            value, grad = value_and_grad(bonus_cross_entropy, logits, target, w, reduction=reduction, **options)
            torch.testing.assert_close(value, total / divisor)
            leaf = logits.clone().requires_grad_()
            by_hand = bonus_cross_entropy(leaf, target, reduction="none", **options)
            (expected,) = torch.autograd.grad(by_hand, leaf, row / divisor * 0.5)
            torch.testing.assert_close(grad, expected)


# --- module -----------------------------------------------------------------------------------------------------------


def test_the_module_is_the_function():
    logits, target = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, -1, 3])
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    options = {"ignore_index": -1, "reduction": "sum", "label_smoothing": 0.1, "bonus": LogBonus(0.5)}
    module = BonusCrossEntropyLoss(weight, **options, implementation="reference")
    assert module(logits, target) == bonus_cross_entropy(logits, target, weight, **options, implementation="reference")
    plain = BonusCrossEntropyLoss(bonus=None)
    torch.testing.assert_close(plain(logits, target.abs()), nn.CrossEntropyLoss()(logits, target.abs()))
    with pytest.raises(IndexError):
        plain(logits, target)


def test_the_module_holds_its_weight_as_torch_does():
    module, theirs = BonusCrossEntropyLoss(torch.ones(5)), nn.CrossEntropyLoss(torch.ones(5))
    assert [name for name, _ in module.named_buffers()] == [name for name, _ in theirs.named_buffers()] == ["weight"]
    assert module.double().weight.dtype == torch.float64 and not list(module.parameters())
    theirs.load_state_dict(module.state_dict())
    assert BonusCrossEntropyLoss().weight is None and not BonusCrossEntropyLoss().state_dict()


def test_the_module_copies_pickles_and_shows_what_it_does():
    module = BonusCrossEntropyLoss(
        torch.arange(5.0), ignore_index=3, reduction="sum", label_smoothing=0.1, bonus=PowerBonus(2.0)
    )
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin(logits, target) == module(logits, target) and repr(twin) == repr(module)
    for shown in ("BonusCrossEntropyLoss", "PowerBonus", "gamma=2.0", "reduction='sum'", "ignore_index=3"):
        assert shown in repr(module)
    assert "label_smoothing=0.1" in repr(module)


def test_the_module_trains():
    layer, module = nn.Linear(6, 4), BonusCrossEntropyLoss()
    x, y = torch.randn(64, 6), torch.randint(0, 4, (64,))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2 and losses[-1] == min(losses)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"label_smoothing": 0.1}, {"bonus_smoothing": 0.2}, {"bonus": LogBonus(start=0.2)},
        {"weight": torch.rand(5), "label_smoothing": 0.1}, {"bonus_weight": torch.rand(5)}, {"probabilities": True},
    ],
    ids=["plain", "smoothing", "bonus_smoothing", "window", "weight", "bonus_weight", "probabilities"],
)  # fmt: skip
def test_the_default_device_is_not_asked(options):
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 4])
    options = dict(options)
    if options.pop("probabilities", False):
        target = torch.rand(3, 5)
    expected = bonus_cross_entropy(logits, target, **options)
    torch.set_default_device("meta")  # as a cuda default, for tensors that are on the CPU
    try:
        loss = bonus_cross_entropy(logits, target, **options)
        loss.backward()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(loss, expected)
    assert logits.grad is not None
