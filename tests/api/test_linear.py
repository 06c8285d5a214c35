"""The linear form: it is the loss of the layer's logits, which nobody makes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import bonus_ops
from bonus_ops import (
    Focal,
    LinearBonusCrossEntropyLoss,
    LinearScores,
    LogBonus,
    PowerBonus,
    SoftmaxSquaredError,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    linear_bonus_cross_entropy,
    linear_bonus_cross_entropy_with_scores,
    linear_difficulty_scores,
)
from bonus_ops.ops import chunks
from tests.budget import FLOAT32_FLOOR, assert_within_budget
from tests.cases import LOSSES
from tests.conftest import INTERPRETED

N, H, C = 11, 6, 83  # 83 classes: rows of a chunk are padded
ROW = 4 * 128  # bytes of a row of logits in a chunk
EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


class Layer:
    """What a call is of, each tensor a leaf."""

    def __init__(self, dtype: torch.dtype = torch.float32, n: int = N, h: int = H, c: int = C, scale: float = 1.0):
        draw = torch.Generator().manual_seed(n + c)
        self.hidden, self.weight, self.bias = (
            (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
            for shape in ((n, h), (c, h), (c,))
        )
        self.target = torch.randint(0, c, (n,), generator=draw)
        self.target[1:2] = -100
        self.row_weight = (torch.rand(n, generator=draw, dtype=torch.float64) * 2).to(dtype).requires_grad_()
        self.class_weight = (torch.rand(c, generator=draw, dtype=torch.float64) + 0.5).to(dtype)

    def to(self, dtype: torch.dtype) -> Layer:
        other = Layer.__new__(Layer)
        for name, x in vars(self).items():
            x = x.detach().to(dtype) if x.is_floating_point() else x
            setattr(other, name, x.requires_grad_(getattr(self, name).requires_grad) if x.is_floating_point() else x)
        return other

    def parameters(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias]

    def loss(self, **options: Any) -> Tensor:
        return linear_bonus_cross_entropy(
            self.hidden, self.weight, self.target, linear_bias=self.bias, **self._own(options)
        )

    def with_scores(self, **options: Any) -> tuple[Tensor, LinearScores]:
        return linear_bonus_cross_entropy_with_scores(
            self.hidden, self.weight, self.target, linear_bias=self.bias, **self._own(options)
        )

    def _own(self, options: dict[str, Any]) -> dict[str, Any]:
        for name, own in (("row_weight", self.row_weight), ("weight", self.class_weight)):
            if options.get(name) is True:
                options[name] = own
        return options

    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight, self.bias)

    def gradients(self, loss: Tensor, *others: Tensor) -> list[Tensor]:
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
        return list(torch.autograd.grad(loss, [*self.parameters(), *others], upstream))


def assert_budget(actual: Any, truth: Any, eager: Any, floor: float = 2 * FLOAT32_FLOOR) -> None:
    """Sums of products are as exact as their largest."""
    for what, a, b, c in zip(("loss", "hidden", "weight", "bias", "row_weight"), actual, truth, eager, strict=False):
        unit = float(b.detach().abs().nan_to_num().max()) if b.numel() else 1.0
        assert_within_budget(a, b.double(), c, floor=floor, unit=max(unit, 1e-30), what=what)


def outcome(layer: Layer, *others: Tensor, **options: Any) -> list[Tensor]:
    loss = layer.loss(**options)
    return [loss.detach(), *layer.gradients(loss, *others)]


def assert_right(layer: Layer, floor: float = 2 * FLOAT32_FLOOR, **options: Any) -> None:
    """Compare with float64 of the rounded inputs, by the reference, which `test_the_reference...` compares."""
    plain = {name: x for name, x in options.items() if name not in ("implementation", "budget")}
    plain["implementation"] = "reference"
    assert_budget(outcome(layer, **options), outcome(layer.to(torch.float64), **plain), outcome(layer, **plain), floor)


# --- the same loss ----------------------------------------------------------------------------------------------------


@EVERY_REDUCTION
@pytest.mark.parametrize(("smoothing", "weight", "bonus"), [(0.0, None, LogBonus()), (0.1, True, Focal(2.0))])
def test_the_reference_is_the_loss_of_the_logits(reduction, smoothing, weight, bonus):
    layer = Layer(torch.float64)
    options = dict(reduction=reduction, label_smoothing=smoothing, bonus=bonus)
    found = outcome(layer, implementation="reference", weight=weight, **options)
    weight = None if weight is None else layer.class_weight
    loss = bonus_cross_entropy(layer.logits(), layer.target, weight, implementation="reference", **options)
    for x, y in zip(found, [loss, *layer.gradients(loss)], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


@EVERY_REDUCTION
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("weight", "row_weight"), [(None, None), (None, True), (True, None), (True, True)])
def test_chunks_are_right(reduction, smoothing, weight, row_weight):
    assert_right(
        Layer(), reduction=reduction, label_smoothing=smoothing, weight=weight, row_weight=row_weight,
        budget=4 * ROW, implementation="numba",
    )  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_gap(name):
    assert_right(Layer(), bonus=LOSSES[name], budget=4 * ROW, implementation="numba")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_of_all_classes(reduction):
    assert_right(Layer(), bonus=SoftmaxSquaredError(strength=1.0), reduction=reduction, budget=4 * ROW)


@pytest.mark.parametrize("weight", [None, True])
def test_a_bonus_of_its_own(weight):
    layer = Layer()
    own = layer.class_weight.flip(0)
    for dtype in (torch.float32, torch.float64):
        of = layer.to(dtype)
        options = dict(label_smoothing=0.1, bonus_smoothing=0.3, bonus_weight=own.to(dtype), weight=weight)
        loss = of.loss(budget=8 * ROW, **options)
        options["weight"] = None if weight is None else of.class_weight
        other = bonus_cross_entropy(of.logits(), of.target, **options)
        assert_budget([loss, *of.gradients(loss)], [x.double() for x in (other, *of.gradients(other))], [None] * 4,
              floor=1e-5 if dtype == torch.float32 else 1e-13)  # fmt: skip


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "floor"),
    [(torch.float64, 1e-13), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)],  # of one rounding
)
def test_every_dtype_is_rounded_once(dtype, floor, scale):
    layer = Layer(dtype, scale=scale)
    truth = outcome(layer.to(torch.float64), implementation="reference")
    for x, y in zip(outcome(layer, budget=8 * ROW), truth, strict=True):
        assert x.dtype == dtype
        # fp16 has nothing below 6e-8
        small = 3e-8 if dtype == torch.float16 else 1e-7 * float(y.abs().max())
        assert ((x.double() - y).abs() <= floor * y.abs() + small + 1e-6 * float(y.abs().max())).all()


def test_a_weight_in_halves_is_widened_by_tiles(monkeypatch):
    layer = Layer(torch.bfloat16)
    whole = outcome(layer, budget=4 * ROW)
    monkeypatch.setattr(chunks, "WEIGHT_TILE", 4 * H * 10)  # of ten classes
    for x, y in zip(outcome(layer, budget=4 * ROW), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=2.0**-7, atol=1e-6)  # the same but for a last bit


@pytest.mark.parametrize("n_classes", [1, 2, 10, 64, 2500])
def test_few_classes_and_many(n_classes):
    assert_right(Layer(c=n_classes), budget=2 * 4 * max(n_classes + 63, 64), implementation="numba")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_what_torch_computes(reduction):
    ours, theirs = Layer(), Layer()
    options = dict(reduction=reduction, label_smoothing=0.1)
    loss = ours.loss(bonus=None, weight=ours.class_weight, **options)
    other = F.linear_cross_entropy(
        theirs.hidden, theirs.weight, theirs.target, linear_bias=theirs.bias, weight=theirs.class_weight, **options
    )
    for x, y in zip([loss, *ours.gradients(loss)], [other, *theirs.gradients(other)], strict=True):
        torch.testing.assert_close(x, y)


# --- rows and chunks --------------------------------------------------------------------------------------------------


def test_any_budget_gives_the_same_to_rounding_and_one_the_same_bits():
    layer = Layer()
    whole = outcome(layer)
    for n_rows in range(1, N + 2):
        found, again = (outcome(layer, budget=n_rows * ROW + 1) for _ in range(2))
        for x, y, z in zip(found, again, whole, strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=2e-6, atol=1e-6)


def test_a_budget_bounds_the_rows_of_a_chunk(monkeypatch):
    sizes = []
    monkeypatch.setattr(chunks.Products, "logits", lambda self, x, out: sizes.append(len(x)) or out.zero_())
    layer = Layer()
    layer.loss(budget=4 * ROW)
    assert sizes == [4, 4, 2]  # of ten rows that count


def test_ignored_rows_may_hold_anything():
    layer, clean = Layer(), Layer()
    with torch.no_grad():
        layer.hidden[1] = math.nan
    for x, y in zip(outcome(layer, budget=4 * ROW), outcome(clean, budget=4 * ROW), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(layer.gradients(layer.loss())[0][1], torch.zeros(H))


@EVERY_REDUCTION
@pytest.mark.parametrize(("poison", "frozen"), [("upstream", True), ("row_weight", True), ("row_weight", False)])
@pytest.mark.parametrize(
    ("implementation", "value"), [("numba", math.inf), ("numba", math.nan), ("reference", math.nan)]
)
def test_nothing_leaks_from_ignored_rows(reduction, poison, frozen, implementation, value):
    """Not from a hidden state of NaN, nor where its upstream gradient or its row_weight is no number."""
    found = []
    for poisoned in (True, False):
        layer = Layer()
        weight, upstream = torch.ones(N), torch.tensor(2.0)
        if reduction == "none":
            upstream = torch.linspace(0.5, 1.5, N)
        if poisoned:
            with torch.no_grad():
                layer.hidden[1] = math.nan
            if poison == "row_weight":
                weight[1] = value
            elif reduction == "none":
                upstream[1] = value
            else:
                upstream = torch.tensor(value)
        for x in layer.parameters()[1:]:
            x.requires_grad_(not frozen)
        weight.requires_grad_()
        loss = layer.loss(reduction=reduction, row_weight=weight, implementation=implementation)
        loss.backward(upstream)
        found.append((loss.detach(), *(x.grad for x in (layer.hidden, weight, *layer.parameters()[1:]))))
    (loss, hidden, of_weight, *others), truth = found
    assert torch.equal(hidden[1], torch.zeros(H)) and of_weight[1] == 0
    assert torch.equal(loss, truth[0])
    if poison == "upstream" and reduction != "none":
        assert not hidden[[0, *range(2, N)]].isfinite().any()  # as the upstream gradient
        return
    for x, y in zip((hidden, of_weight, *others), truth[1:], strict=True):
        assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("implementation", ["numba", "reference"])
@pytest.mark.parametrize("n_rows", [3, 0])
def test_an_upstream_gradient_of_nothing_teaches_nothing(implementation, n_rows):
    layer = Layer(n=n_rows)
    layer.target.fill_(-100)
    loss = layer.loss(reduction="sum", implementation=implementation)
    for x in torch.autograd.grad(loss, layer.parameters(), torch.tensor(math.nan)):
        assert (x == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_classes_without_a_weight(reduction):
    layer = Layer()
    loss = layer.loss(weight=torch.zeros(C), reduction=reduction)
    other = bonus_cross_entropy(layer.logits(), layer.target, torch.zeros(C), reduction=reduction)
    torch.testing.assert_close([loss, *layer.gradients(loss)], [other, *layer.gradients(other)], equal_nan=True)


@EVERY_REDUCTION
@pytest.mark.parametrize(("implementation", "scores"), [("numba", False), ("numba", True), ("reference", False)])
def test_rows_all_ignored_and_no_rows(reduction, scores, implementation):
    for n_rows in (3, 0):
        layer = Layer(n=n_rows)
        layer.target.fill_(-100)
        options = dict(reduction=reduction, implementation=implementation)
        loss = layer.with_scores(**options)[0] if scores else layer.loss(**options)
        expected = bonus_cross_entropy(layer.logits(), layer.target, reduction=reduction)
        assert torch.equal(loss.isnan(), expected.isnan()) and loss.shape == expected.shape
        for x, y in zip(layer.gradients(loss), layer.gradients(expected), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())  # nothing but zeros
            assert (x == 0).all() or reduction == "mean"


def test_any_shape_of_rows():
    layer = Layer(n=12)
    hidden, target = layer.hidden.view(3, 4, H), layer.target.view(3, 4)
    loss, scores = linear_bonus_cross_entropy_with_scores(hidden, layer.weight, target, reduction="none")
    assert loss.shape == scores.el2n.shape == scores.last_layer_grad_norm.shape == (3, 4)
    assert scores.target is target and scores.select(0).last_layer_grad_norm.shape == (4,)
    flat = linear_bonus_cross_entropy(layer.hidden, layer.weight, layer.target, reduction="none")
    assert torch.equal(loss.flatten(), flat)
    one = linear_bonus_cross_entropy(layer.hidden[0], layer.weight, layer.target[0])
    assert one.shape == () and torch.allclose(one, flat[0])


def test_strides_do_not_matter_and_nothing_is_written():
    layer = Layer()
    strided = Layer()
    strided.hidden = torch.empty(N, 2 * H)[:, ::2].copy_(layer.hidden.detach()).requires_grad_()
    strided.weight = layer.weight.detach().t().contiguous().t().requires_grad_()
    kept = [x.detach().clone() for x in strided.parameters()]
    versions = [x._version for x in strided.parameters()]
    for x, y in zip(outcome(strided), outcome(layer), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(kept, strided.parameters(), strict=True))
    assert versions == [x._version for x in strided.parameters()]


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.fixture
def products(monkeypatch):
    """Count the products of a call by their kinds."""
    counts = dict.fromkeys(("tile", "to_hidden", "to_weight", "to_bias"), 0)

    def counted(name: str) -> Any:
        whole = getattr(chunks.Products, name)

        def product(self, *args):
            counts[name] += 1
            return whole(self, *args)

        return product

    for name in counts:
        monkeypatch.setattr(chunks.Products, name, counted(name))
    return counts


@pytest.mark.parametrize("required", ["hidden", "weight", "bias", "weight bias", ""])
def test_only_what_requires_a_gradient_is_computed(required, products):
    layer = Layer()
    for name in ("hidden", "weight", "bias"):
        getattr(layer, name).requires_grad_(name in required.split())
    loss = layer.loss()
    if required:
        loss.backward()
    asked = {f"to_{name}": int(name in required.split()) for name in ("hidden", "weight", "bias")}
    assert products == {"tile": products["tile"], **asked}
    whole = Layer()
    whole.loss().backward()
    for name in required.split():
        torch.testing.assert_close(getattr(layer, name).grad, getattr(whole, name).grad)


def test_a_gradient_that_is_not_wanted_costs_nothing(products):
    with torch.no_grad():
        Layer().loss()
    assert products["to_hidden"] == products["to_weight"] == products["to_bias"] == 0


def test_none_makes_the_logits_again_for_the_weight_alone(products):
    layer = Layer()
    layer.gradients(layer.loss(reduction="none"))
    assert products["tile"] == 2 and products["to_weight"] == 1
    for x in (layer.weight, layer.bias):
        x.requires_grad_(False)
    products["tile"] = 0
    layer.loss(reduction="none").square().sum().backward()
    assert products["tile"] == 1


def test_rows_weighted_in_forward_are_made_once(products):
    layer, later = Layer(), Layer()
    layer.loss(reduction="sum", row_weight=layer.row_weight.detach()).backward()
    assert products["tile"] == 1
    (later.loss(reduction="none") * later.row_weight.detach()).sum().backward()
    for x, y in zip(layer.parameters(), later.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@EVERY_REDUCTION
def test_the_weight_of_a_row_has_a_gradient(reduction):
    layer, plain = Layer(), Layer()
    found = outcome(layer, layer.row_weight, reduction=reduction, row_weight=True, weight=True)
    rows = bonus_cross_entropy(plain.logits(), plain.target, plain.class_weight, reduction="none") * plain.row_weight
    if reduction != "none":
        rows = rows.sum()
    if reduction == "mean":
        rows = rows / torch.where(plain.target >= 0, plain.class_weight[plain.target.clamp(min=0)], 0.0).sum()
    for x, y in zip(found, [rows, *plain.gradients(rows, plain.row_weight)], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_memory_is_that_of_the_gradients_and_the_budget():
    from bench.measure import Step, peak_bytes

    layer = Layer(n=256, h=64, c=40_000)
    budget = 2 << 20
    layer.loss(budget=budget)  # loads what it needs
    peak = peak_bytes(Step(lambda: None, lambda: layer.loss(budget=budget).backward()))
    gradients = sum(4 * x.numel() for x in layer.parameters())
    assert gradients < peak <= gradients + budget + (16 << 20)
    assert gradients + budget + (16 << 20) < 4 * 256 * 40_000  # what the logits alone would take


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["numba", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_are_those_of_the_logits(implementation, smoothing):
    layer = Layer()
    options = dict(implementation=implementation, label_smoothing=smoothing)
    _, scores = layer.with_scores(**options, **({} if implementation == "reference" else {"budget": 4 * ROW}))
    _, truth = bonus_cross_entropy_with_scores(layer.to(torch.float64).logits(), layer.target)
    for name, x, y in zip(scores._fields, scores, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-6, equal_nan=True, msg=name)
    assert scores.accuracy() == truth.accuracy()


@pytest.mark.parametrize("implementation", ["numba", "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bonus": None}, {"label_smoothing": 0.1}, {"weight": True, "row_weight": True},
     {"bonus": SoftmaxSquaredError(strength=1.0)}, {"bias": False}, {"grad": False, "label_smoothing": 0.1}],
    ids=str,
)  # fmt: skip
def test_the_norm_of_the_last_layers_gradient_is_exact(implementation, options):
    options = dict(options)
    layer = Layer()
    if not options.pop("bias", True):
        layer.bias = torch.zeros(C)
        layer.bias = None
    with torch.set_grad_enabled(options.pop("grad", True)):
        _, scores = layer.with_scores(implementation=implementation, **options)
    true = layer if layer.bias is None else layer.to(torch.float64)
    small = 3e-8  # float32 of differences of terms of 1 / C
    rows = true.loss(reduction="none", implementation="reference", **options)
    parameters = [x for x in true.parameters()[1:] if x is not None]
    for i in range(N):
        grads = torch.autograd.grad(rows[i], parameters, retain_graph=True)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        found = scores.last_layer_grad_norm[i]
        assert found.isnan() if i == 1 else torch.isclose(found, norm.float(), rtol=4e-6, atol=small), i


def test_scores_with_norms_keep_them():
    _, scores = Layer().with_scores()
    rows = scores.hardest(3)
    assert torch.equal(scores.select(rows).last_layer_grad_norm, scores.last_layer_grad_norm[rows])
    assert scores._replace(loss=scores.loss + 1).last_layer_grad_norm is scores.last_layer_grad_norm
    both = LinearScores.cat([scores, scores])
    assert both.last_layer_grad_norm.shape == (2 * N,) and both.target is not None


# --- every derivative -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_and_their_gradients_are_right(reduction):
    layer = Layer(torch.float64, n=4, h=3, c=5)

    def loss(*parameters):
        hidden, weight, bias, row_weight = parameters
        return linear_bonus_cross_entropy(
            hidden, weight, layer.target, linear_bias=bias, row_weight=row_weight, reduction=reduction, bonus=Focal(2.0)
        )

    inputs = (*layer.parameters(), layer.row_weight)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_transforms_of_functions_are_right(smoothing):
    layer = Layer(torch.float64)

    def linear(hidden, weight):
        return linear_bonus_cross_entropy(hidden, weight, layer.target, label_smoothing=smoothing)

    def plain(hidden, weight):
        logits = F.linear(hidden, weight)
        return bonus_cross_entropy(logits, layer.target, label_smoothing=smoothing, implementation="reference")

    hidden, weight = layer.hidden.detach(), layer.weight.detach()
    several = torch.stack([hidden, hidden.flip(0), hidden * 2])
    for transform in (
        lambda f: grad(f, argnums=(0, 1))(hidden, weight),
        lambda f: vmap(f, in_dims=(0, None))(several, weight),
        lambda f: vmap(grad(f, argnums=1), in_dims=(0, None))(several, weight),
        lambda f: jvp(f, (hidden, weight), (hidden.flip(0), weight.flip(1))),
    ):
        torch.testing.assert_close(transform(linear), transform(plain), rtol=1e-9, atol=1e-11)


def test_a_named_implementation_refuses_transforms():
    layer = Layer()
    with pytest.raises(NotImplementedError, match="torch.func"):
        grad(lambda h: linear_bonus_cross_entropy(h, layer.weight, layer.target, implementation="numba"))(layer.hidden)


@pytest.mark.parametrize("factors", [(1, 3), (3, 1), (3, 3)])
def test_a_graph_may_be_used_twice(factors):
    layer, once = Layer(), Layer()
    loss = layer.loss()
    truth = torch.autograd.grad(once.loss(), once.parameters())
    for factor, keep in zip(factors, (True, False), strict=True):
        found = torch.autograd.grad(factor * loss, layer.parameters(), retain_graph=keep)
        for x, y in zip(found, truth, strict=True):
            torch.testing.assert_close(x, factor * y)


def test_batched_upstream_gradients():
    layer = Layer()
    loss = layer.loss(reduction="none")
    each = torch.autograd.grad(loss, layer.hidden, torch.eye(N), is_grads_batched=True, retain_graph=True)[0]
    one = torch.autograd.grad(loss[3], layer.hidden)[0]
    torch.testing.assert_close(each[3], one, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "scores"), [("mean", True), ("none", False)])
def test_it_compiles_as_one_graph(reduction, scores):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    layer, eager = Layer(), Layer()

    def step(hidden, weight, target):
        if not scores:
            return linear_bonus_cross_entropy(hidden, weight, target, reduction=reduction), ()
        loss, found = linear_bonus_cross_entropy_with_scores(hidden, weight, target, reduction=reduction)
        return loss, (*found, found.last_layer_grad_norm)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for n_rows in (N, N - 2):
        results = []
        for function, of in ((compiled, layer), (step, eager)):
            hidden, target = of.hidden[:n_rows], of.target[:n_rows]
            for x in (hidden, target):
                torch._dynamo.mark_dynamic(x, 0)
            loss, columns = function(hidden, of.weight, target)
            results.append((loss, columns, torch.autograd.grad(loss.square().sum(), [of.hidden, of.weight])))
        torch.testing.assert_close(*results, equal_nan=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("implementation", "soft"), [("numba", False), ("numba", True), ("triton", True)])
def test_the_operator_keeps_its_contract(implementation, soft, request):
    if implementation == "triton":
        request.getfixturevalue("kernel_device")
    from bonus_ops.losses import encode
    from bonus_ops.ops import linear as operators

    layer = Layer(n=3, c=9)
    name, fields = encode(LogBonus())
    for scores, gradients in ((False, [True] * 3), (True, [False, True, False])):
        smoothing = 0.1 if soft else 0.0
        parameters = (x.detach() for x in layer.parameters())
        args = (*parameters, None, None, layer.target, None, None, torch.tensor(2.0), fields, name, -100, soft,
                smoothing, smoothing, 1.0, None, scores, scores, gradients, torch.float32, 0,
                implementation)  # fmt: skip
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operators.forward, args, test_utils=checks)


def test_autocast_rounds_as_it_does_a_linear_layer():
    layer = Layer()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer.loss()
    rounded = layer.to(torch.bfloat16).to(torch.float64)
    found, true = [loss, *layer.gradients(loss)], outcome(rounded, implementation="reference")
    assert all(x.dtype == torch.float32 for x in found)  # and nothing is rounded on its way back
    assert_budget(found, true, [x.float() for x in true])


def test_checkpointing_gives_the_same_bits():
    layer, again = Layer(), Layer()
    layer.loss().backward()
    loss = checkpoint(
        lambda h: linear_bonus_cross_entropy(h, again.weight, again.target, linear_bias=again.bias),
        again.hidden, use_reentrant=False,
    )  # fmt: skip
    loss.backward()
    for x, y in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(x.grad, y.grad)


def test_a_gradient_scaler_finds_what_float16_cannot_hold():
    layer = Layer(torch.float16, n=64, c=4000, scale=2.0)
    true = layer.to(torch.float64)
    factor = 2.0**10
    loss = layer.loss() * factor
    found = torch.autograd.grad(loss, layer.parameters())
    for x, y in zip(found, torch.autograd.grad(true.loss(), true.parameters()), strict=True):
        torch.testing.assert_close(x.double() / factor, y, rtol=2.0**-10, atol=1e-6 * float(y.abs().max()))
        assert (x[y.abs() > 1e-10] != 0).all()
    assert ((y.abs() < 2e-8) & (y != 0)).any()  # such as float16 does not have


def test_a_tied_weight_gets_both_gradients():
    torch.manual_seed(1)
    tokens, target = torch.arange(6), torch.arange(6) + 1
    embedding = torch.nn.Embedding(C, H)
    head = LinearBonusCrossEntropyLoss(H, C, bias=False)
    head.linear_weight = embedding.weight
    head(embedding(tokens), target).backward()
    weight = embedding.weight.detach().double().requires_grad_()
    bonus_cross_entropy(F.linear(weight[tokens], weight), target).backward()
    torch.testing.assert_close(embedding.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)


# --- the module -------------------------------------------------------------------------------------------------------


def test_the_module_is_the_function():
    layer = Layer()
    head = LinearBonusCrossEntropyLoss(H, C, weight=layer.class_weight, bonus=PowerBonus(), label_smoothing=0.1)
    assert set(head.state_dict()) == {"linear_weight", "linear_bias", "weight"}
    linear = torch.nn.Linear(H, C)
    head.load_state_dict({"linear_weight": linear.weight, "linear_bias": linear.bias, "weight": layer.class_weight})
    loss = head(layer.hidden, layer.target)
    other = bonus_cross_entropy(
        linear(layer.hidden), layer.target, layer.class_weight, bonus=PowerBonus(), label_smoothing=0.1
    )
    torch.testing.assert_close(loss, other)
    assert "in_features=6, out_features=83" in repr(head)


def test_the_module_draws_as_a_linear_layer_does():
    torch.manual_seed(3)
    head = LinearBonusCrossEntropyLoss(H, C)
    torch.manual_seed(3)
    linear = torch.nn.Linear(H, C)
    assert torch.equal(head.linear_weight, linear.weight) and torch.equal(head.linear_bias, linear.bias)


# --- scores alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "n_classes"),
    [(torch.float32, 1), (torch.float64, 5), (torch.bfloat16, 83), (torch.float32, 5000)],
)
def test_scores_alone_are_those_of_the_logits(dtype, n_classes):
    layer = Layer(dtype, c=n_classes)
    scores = linear_difficulty_scores(layer.hidden, layer.weight, layer.target, linear_bias=layer.bias)
    _, truth = bonus_cross_entropy_with_scores(layer.to(torch.float64).logits(), layer.target)
    for name, x, y in zip(scores._fields, scores, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=4e-6, equal_nan=True, msg=name)
    assert not scores.loss.requires_grad


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="the products of a GPU are tested where there is one")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "row_weight": True}], ids=str)
def test_kernels_write_the_gradient_over_the_logits(options):
    assert_right(Layer(n=6), budget=4 * ROW, implementation="triton", **options)


# --- bad input --------------------------------------------------------------------------------------------------------


def faults() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    return {
        "sizes": (dict(linear_weight=torch.zeros(C, H + 1)), RuntimeError, r"mat1 and mat2 shapes .*\n.*one H"),
        "dtypes": (dict(linear_weight=torch.zeros(C, H).double()), RuntimeError, "same dtype\n.*float32, got .*64"),
        "devices": (dict(linear_weight=torch.zeros(C, H, device="meta")), RuntimeError, "of input, cpu, got meta"),
        "bias": (dict(linear_bias=torch.zeros(C + 1)), RuntimeError, r"linear_bias \[83\].*got \[84\]"),
        "three axes": (dict(linear_weight=torch.zeros(C, 2, H)), RuntimeError, r"linear_weight \[C, H\]"),
        "no tensor": (dict(linear_weight=[1.0]), TypeError, "linear_weight to be a Tensor, got list"),
        "rows": (dict(target=torch.zeros(N + 1).long()), ValueError, r"batch_size .*\n.*\[11\].*got \[12\]"),
        "label": (dict(target=torch.full((N,), C)), IndexError, "Target 83 is out of bounds"),
        "probabilities": (dict(target=torch.zeros(N, C)), RuntimeError, "class indices as target, got probabilities"),
        "int32": (dict(target=torch.zeros(N, dtype=torch.int32)), RuntimeError, "int64 or uint8, got torch.int32"),
        "class weight": (dict(weight=torch.zeros(C - 1)), RuntimeError, r"weight of shape \[83\]"),
        "row weight": (dict(row_weight=torch.zeros(N, 1)), RuntimeError, r"shaped like target, \[11\].*got \[11, 1\]"),
        "row weight of ints": (dict(row_weight=torch.ones(N, dtype=torch.int64)), RuntimeError, "floating point"),
        "row weight no tensor": (dict(row_weight=1.0), TypeError, "row_weight must be a Tensor or None, got float"),
        "budget": (dict(budget=C * 4 - 1), ValueError, "budget must hold the logits of one row, 332 bytes, got 331"),
        "budget of a string": (dict(budget="1 GiB"), TypeError, "budget must be an int, got str"),
        "bonus": (dict(bonus=0.5), TypeError, "bonus must be a GapLoss"),
        "reduction": (dict(reduction="avg"), ValueError, "avg is not a valid value for reduction"),
        "implementation": (dict(implementation="cuda"), ValueError, "implementation must be None"),
    }


@pytest.mark.parametrize("name", faults())
def test_a_fault_says_what_was_expected_and_what_came(name):
    given, error, words = faults()[name]
    layer = Layer()
    call = dict(input=layer.hidden, linear_weight=layer.weight, target=layer.target) | given
    with pytest.raises(error, match=words):
        linear_bonus_cross_entropy(**call)


def test_the_public_names_are_exported():
    for name in bonus_ops.linear.__all__:
        assert name in bonus_ops.__all__
