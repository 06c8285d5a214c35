"""Logit scale, softcap and z-loss against their definitions in float64."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import bonus_ops
from bonus_ops import (
    BonusCrossEntropyLoss,
    LogBonus,
    PowerBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
    mixup_cross_entropy,
)
from bonus_ops.causal_lm import causal_lm_loss
from tests.cases import SPLIT_FORWARD
from tests.conftest import INTERPRETED

OPTIONS = [
    {"logit_scale": 0.5},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"logit_scale": 0.25, "softcap": 10.0, "z_loss": 1e-3},
]
names = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
TARGETS = ["labels", "smoothing", "probabilities"]


def z_of(input, logit_scale=1.0, softcap=None, z_loss=0.0):
    z = input.double() * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def case(kind, shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input = (torch.randn(shape, generator=generator, dtype=torch.float64) * 5).to(dtype)
    if kind == "probabilities":
        return input, torch.randn(shape, generator=generator).softmax(1).to(dtype), {}
    target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    target.view(-1)[0] = -100
    return input, target, {"label_smoothing": 0.1} if kind == "smoothing" else {}


def truth(input, target, reduction, options, **others):
    """Return the loss by its definition, from a call without options."""
    z = z_of(input, **options)
    by_label = target.dtype == torch.int64
    target = target if by_label else target.double()
    loss = bonus_cross_entropy(z, target, reduction=reduction, implementation="reference", **others)
    cost = options.get("z_loss", 0.0) * torch.logsumexp(z, 1).square()
    counts = target != -100 if by_label else torch.ones_like(cost, dtype=torch.bool)
    cost = cost.masked_fill(~counts, 0.0)
    return loss + {"none": cost, "sum": cost.sum(), "mean": cost.sum() / counts.sum()}[reduction]


by_kernels = pytest.mark.skipif(not INTERPRETED, reason="tensors are on the CPU")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kind", "shape", "reduction"),
    [
        # several rows a program, one, a row by several programs, rows side by side
        (OPTIONS[0], "labels", (6, 130), "mean"), (OPTIONS[1], "labels", (70, 10), "sum"),
        (OPTIONS[2], "labels", (2, 5, 3, 4), "none"), (OPTIONS[3], "labels", (2, 2065), "none"),
        (OPTIONS[3], "labels", (2, SPLIT_FORWARD), "mean"),
        (OPTIONS[1], "smoothing", (3, 130), "mean"), (OPTIONS[3], "probabilities", (3, 130), "sum"),
        (OPTIONS[2], "smoothing", (2, 5, 3, 4), "mean"), (OPTIONS[3], "probabilities", (2, 2065), "none"),
    ],
)  # fmt: skip
@by_kernels
def test_kernels_compute_the_definition(options, kind, shape, reduction):
    assert_is_the_definition(options, kind, shape, reduction, "triton")


@pytest.mark.slow
@pytest.mark.parametrize(("options", "shape"), [(OPTIONS[2], (6, 130)), (OPTIONS[3], (2, 5, 3, 4))])
@by_kernels
def test_scores_and_softmax_of_kernels_are_those_of_z(options, shape):
    input, target, _ = case("labels", shape)
    z = z_of(input, **options)
    _, scores, softmax = bonus_cross_entropy_with_softmax(input, target, implementation="triton", **options)
    _, expected, of_z = bonus_cross_entropy_with_softmax(z, target, implementation="reference")
    for one, other in zip(scores, expected, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.allclose(softmax.double(), of_z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["numba", *(["triton"] if INTERPRETED else [])])
@pytest.mark.parametrize("bonus", [None, LogBonus(), PowerBonus(2.0)], ids=repr)
def test_the_z_loss_of_soft_targets_knows_every_kind_of_row(implementation, bonus):
    """Sure by far, of nothing, without a rest, wrong by far, ignored."""
    input = torch.tensor([[200.0, 0, 1], [2, 2, 2], [3, -math.inf, -math.inf], [-60, 50, 49], [math.nan, 0, 0]])
    target, others = torch.tensor([0, 1, 0, 0, -100]), {"label_smoothing": 0.1, "bonus": bonus}
    for rows in ([0, 1, 3, 4], [2]):
        exact = input[rows].double().nan_to_num(neginf=-math.inf).requires_grad_()  # an ignored row may hold anything
        up = torch.linspace(0.5, 1.5, len(rows))
        expected = truth(exact, target[rows], "none", {"z_loss": 0.3}, **others)
        expected.nan_to_num(posinf=0).backward(up.double())
        x = input[rows].clone().requires_grad_()
        loss = bonus_cross_entropy(
            x, target[rows], reduction="none", z_loss=0.3, implementation=implementation, **others
        )
        loss.nan_to_num(posinf=0).backward(up)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2e-6, atol=1e-6, equal_nan=True)


@by_kernels
def test_a_cap_lifts_no_masked_lane():
    """cap tanh(-inf) is finite: what a kernel loads past the end of a row, or instead of the label, must stay -inf."""
    for shape in ((3, 10), (2, 21, 2), (1, 2051)):
        input = torch.full(shape, -200.0)
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        loss = bonus_cross_entropy(input, target, bonus=None, softcap=2.0, implementation="triton")
        assert loss == pytest.approx(math.log(shape[1]), rel=1e-6)


@names
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("shape", "reduction"), [((6, 130), "mean"), ((70, 10), "sum"), ((2, 5, 3, 4), "none")])
def test_loss_and_gradient_are_those_of_the_definition(options, kind, shape, reduction):
    assert_is_the_definition(options, kind, shape, reduction)


def assert_is_the_definition(options, kind, shape, reduction, implementation=None):
    input, target, others = case(kind, shape)
    exact = input.double().clone().requires_grad_()
    expected = truth(exact, target, reduction, options, **others)
    up = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    (expected * up).sum().backward()
    x = input.clone().requires_grad_()
    loss = bonus_cross_entropy(x, target, reduction=reduction, implementation=implementation, **others, **options)
    (loss * up.float()).sum().backward()
    assert torch.allclose(loss.double(), expected, rtol=3e-6, atol=3e-6)
    assert (x.grad - exact.grad).abs().max() < 2e-6 * exact.grad.abs().max()
    assert torch.equal(x.grad[0], torch.zeros_like(x.grad[0])) or kind == "probabilities" or len(shape) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.bfloat16, OPTIONS[-1]), (torch.float16, OPTIONS[1]), (torch.float64, OPTIONS[2])]
)
def test_other_dtypes_are_rounded_once(dtype, options):
    input, target, _ = case("labels", (6, 130), dtype)
    exact = input.double().clone().requires_grad_()
    (truth(exact, target, "mean", options) * 3).backward()
    x = input.clone().requires_grad_()
    loss = bonus_cross_entropy(x, target, **options)
    (loss * 3).backward()
    eps = torch.finfo(dtype).eps
    assert abs(loss.double() - truth(exact, target, "mean", options)) <= 4 * eps * (1 + abs(loss.double()))
    assert (x.grad.double() - exact.grad).abs().max() <= 4 * eps * exact.grad.abs().max()


@pytest.mark.parametrize("implementation", ["numba", "reference", *(["triton"] if INTERPRETED else [])])
def test_gradient_is_exact_where_the_cap_has_saturated(implementation):
    input = torch.tensor([[60.0, 120.0, 300.0, 200.0, -150.0]], requires_grad=True)
    bonus_cross_entropy(input, torch.tensor([0]), softcap=30.0, implementation=implementation).backward()
    exact = input.detach().double().requires_grad_()
    z = 30.0 * torch.tanh(exact / 30.0)
    bonus_cross_entropy(z, torch.tensor([0]), implementation="reference").backward()
    slope = 1 / torch.cosh(input.detach().double() / 30.0) ** 2  # tanh's own derivative has lost it in float64 too
    p = torch.softmax(z.detach(), 1)
    assert (input.grad / (slope * torch.sign(exact.grad))).abs().min() > 0
    of_z = bonus_cross_entropy_with_softmax(z.detach(), torch.tensor([0]))[2]
    assert torch.allclose(of_z, p)
    slope_of_loss = torch.autograd.grad(
        bonus_cross_entropy(zz := z.detach().requires_grad_(), torch.tensor([0]), implementation="reference"), zz
    )[0]
    assert torch.allclose(input.grad.double(), slope_of_loss * slope, rtol=3e-5, atol=0)


@names
@pytest.mark.parametrize("kind", TARGETS)
def test_scores_and_softmax_are_of_z(options, kind):
    input, target, others = case(kind, (6, 130))
    z = z_of(input, **options).float()
    _, scores, softmax = bonus_cross_entropy_with_softmax(input, target, **others, **options)
    _, expected, of_z = bonus_cross_entropy_with_softmax(z, target, **others)
    for one, other in zip(scores, expected, strict=True):
        assert torch.allclose(one, other, rtol=2e-5, atol=2e-5, equal_nan=True)
    assert torch.allclose(softmax, of_z, rtol=1e-5, atol=1e-6)
    if kind == "labels":
        options = {name: x for name, x in options.items() if name != "z_loss"}
        assert torch.equal(difficulty_scores(input, target, **options).margin.isnan(), scores.margin.isnan())


def test_scores_report_the_z_loss_that_was_added():
    input, target, _ = case("labels", (6, 130))
    with_z, scores = bonus_cross_entropy_with_scores(input, target, z_loss=0.01)
    plain = bonus_cross_entropy(input, target)
    assert torch.allclose(with_z - plain, scores.z_loss(0.01).nanmean(), rtol=1e-4)
    with pytest.raises(ValueError, match=r"z_loss must be in \[0, inf\)"):
        scores.z_loss(-1.0)


def test_z_loss_counts_rows_and_not_class_weights():
    input, target, _ = case("labels", (6, 130))
    weight = torch.rand(130) + 0.5
    for reduction in ("mean", "sum", "none"):
        plain = bonus_cross_entropy(input, target, weight, reduction=reduction)
        with_z = bonus_cross_entropy(input, target, weight, reduction=reduction, z_loss=0.5)
        cost = (0.5 * torch.logsumexp(input, 1) ** 2).masked_fill(target == -100, 0.0)
        expected = {"none": cost, "sum": cost.sum(), "mean": cost.sum() / 5}[reduction]
        assert torch.allclose(with_z - plain, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "kind"), [*(("numba", kind) for kind in TARGETS), ("reference", "probabilities")]
)
@names
def test_derivatives_of_first_and_second_order(implementation, kind, options):
    input, target, others = case(kind, (2, 3), torch.float64)

    def f(x):
        return bonus_cross_entropy(x, target, implementation=implementation, **others, **options)

    assert torch.autograd.gradcheck(f, input.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(f, input.clone().requires_grad_(), fast_mode=True)


@names
def test_transforms_and_forward_mode(options):
    input, target, _ = case("labels", (4, 6), torch.float64)

    def f(x, y):
        return bonus_cross_entropy(x, y, reduction="sum", **options)

    expected = torch.autograd.grad(f(x := input.clone().requires_grad_(), target), x)[0]
    one_by_one = torch.vmap(torch.func.grad(f))(input[:, None], target[:, None])[:, 0]
    assert torch.allclose(one_by_one, expected)
    tangent = torch.randn_like(input)
    _, moved = torch.func.jvp(lambda x: f(x, target), (input,), (tangent,))
    assert torch.allclose(moved, (expected * tangent).sum())
    hessian = torch.func.hessian(lambda x: f(x, target))(input)
    assert torch.allclose(hessian, torch.autograd.functional.hessian(lambda x: f(x, target), input))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels", "smoothing"])
def test_compiles_to_one_graph(kind):
    input, target, others = case(kind, (6, 30))
    options = OPTIONS[-1] | others
    compiled = torch.compile(bonus_cross_entropy, fullgraph=True, backend="aot_eager")
    x, other = input.clone().requires_grad_(), input.clone().requires_grad_()
    loss = compiled(x, target, **options)
    loss.backward()
    expected = bonus_cross_entropy(other, target, **options)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-6) and torch.allclose(x.grad, other.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("implementation", ["numba", "reference"])
@pytest.mark.parametrize("kind", ["labels", "smoothing"])
def test_ignored_rows_may_hold_anything_and_no_row_need_count(implementation, kind):
    input, target, others = case(kind, (6, 130))
    input[0] = math.nan
    x = input.clone().requires_grad_()
    loss = bonus_cross_entropy(x, target, implementation=implementation, **others, **OPTIONS[-1])
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    loss.backward()
    for grad in (x.grad, again):
        assert grad.isfinite().all() and not grad[0].any()
    nothing = torch.full_like(target, -100)
    assert bonus_cross_entropy(input, nothing, **OPTIONS[-1]).isnan()
    assert bonus_cross_entropy(input, nothing, reduction="sum", **OPTIONS[-1]) == 0


def test_one_class_and_masked_logits():
    x = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    loss = bonus_cross_entropy(x, torch.tensor([0, 0]), bonus=None, z_loss=0.5)
    loss.backward()
    assert loss == 0.5 * (9 + 4) / 2 and torch.equal(x.grad, torch.tensor([[1.5], [-1.0]]))
    masked = torch.tensor([[1.0, -math.inf, 0.5]], requires_grad=True)
    loss = bonus_cross_entropy(masked, torch.tensor([0]), bonus=None, softcap=2.0)
    loss.backward()
    capped = 2 * torch.tanh(masked.detach() / 2)
    assert torch.allclose(loss, cross_entropy(capped, torch.tensor([0]))) and masked.grad.isfinite().all()
    loss = bonus_cross_entropy(masked, torch.tensor([0]), bonus=None, z_loss=0.1)
    assert loss.isfinite()


def test_modules_mixup_and_causal_lm_take_them():
    input, target, _ = case("labels", (6, 130))
    options = OPTIONS[-1]
    expected = bonus_cross_entropy(input, target, **options)
    module = BonusCrossEntropyLoss(**options)
    assert module(input, target) == expected and "softcap=10.0" in repr(module) and "z_loss=0.001" in repr(module)
    assert mixup_cross_entropy(input, target, target, 0.5, **options) == pytest.approx(expected.item(), rel=1e-6)
    labels = target.clone()
    assert causal_lm_loss(input, None, shift_labels=labels, **options) == expected


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"logit_scale": 0.0}, ValueError, r"logit_scale must be in \(0, inf\), got 0.0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be in"),
        ({"logit_scale": torch.tensor(1.0)}, TypeError, "logit_scale must be a number, got Tensor"),
        ({"softcap": -1.0}, ValueError, r"softcap must be in \(0, inf\) or None, got -1.0"),
        ({"softcap": "30"}, TypeError, "softcap must be a number or None, got str"),
        ({"z_loss": -1e-4}, ValueError, r"z_loss must be in \[0, inf\), got -0.0001"),
        ({"z_loss": True}, TypeError, "z_loss must be a number, got bool"),
    ],
)
def test_bad_options(options, error, said):
    input, target, _ = case("labels", (2, 3))
    for call in (
        lambda: bonus_cross_entropy(input, target, **options),
        lambda: BonusCrossEntropyLoss(**options),
        lambda: bonus_ops.mixup_cross_entropy(input, target, target, 0.5, **options),
    ):
        with pytest.raises(error, match=said):
            call()


# --- the last layer ---------------------------------------------------------------------------------------------------


def layer(dtype=torch.float64, n_rows=9, size=6, n_classes=70):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, size, generator=generator, dtype=dtype) * 2 for n in (n_rows, n_classes))
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    target[3] = -100
    return hidden, weight, torch.randn(n_classes, generator=generator, dtype=dtype), target


@names
@pytest.mark.parametrize(
    ("others", "reduction", "budget"),
    [
        ("", "sum", None), ("class weights and rows'", "mean", 3 * 128 * 8), ("smoothing", "mean", 3 * 128 * 8),
        ("smoothing and rows'", "none", 3 * 128 * 8),
    ],
)  # fmt: skip
def test_a_last_layer_has_them_too(options, reduction, others, budget):
    hidden, weight, bias, target = layer()
    named = {"label_smoothing": 0.1} if others.startswith("smoothing") else {}
    row_weight = None
    if others.endswith("rows'"):
        row_weight = torch.linspace(0.1, 1.0, 9, dtype=torch.float64)
    if others.startswith("class"):
        named["weight"] = torch.linspace(0.5, 1.5, 70, dtype=torch.float64)
    found = []
    for ours in (True, False):
        x, w, b = (a.clone().requires_grad_() for a in (hidden, weight, bias))
        rw = None if row_weight is None else row_weight.clone().requires_grad_()
        if ours:
            loss, scores = bonus_ops.linear_bonus_cross_entropy_with_scores(
                x, w, target, linear_bias=b, row_weight=rw, reduction=reduction, budget=budget, **named, **options
            )
        else:
            z = torch.nn.functional.linear(x, w, b)
            loss, scores = bonus_cross_entropy_with_scores(z, target, reduction="none", **named, **options)
            loss = loss if rw is None else loss * rw
            if reduction != "none":
                loss = loss.sum()
            if reduction == "mean":
                of_class = named.get("weight")
                counts = target != -100
                if of_class is None:
                    loss = loss / counts.sum()
                else:  # cross-entropy by the weights, the z-loss by the rows
                    cost = options.get("z_loss", 0.0) * torch.logsumexp(z_of(z, **options), 1).square() * rw
                    cost = cost.masked_fill(~counts, 0.0).sum()
                    loss = (loss - cost) / of_class[target[counts]].sum() + cost / counts.sum()
        up = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
        (loss * up).sum().backward()
        found.append((loss, *(a.grad for a in (x, w, b) + ((rw,) if rw is not None else ())), *scores))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5 if one.dtype == torch.float32 else 1e-9, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("row_weight", [None, torch.linspace(0.1, 1.0, 9)])
def test_the_z_loss_of_a_last_layer_visits_the_logits_once(monkeypatch, smoothing, row_weight):
    from bonus_ops.kernels.cpu import threads

    hidden, weight, bias, target = layer(torch.float32)
    loops, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda *args: loops.append(args) or run(*args))
    loss = bonus_ops.linear_bonus_cross_entropy(
        hidden.requires_grad_(), weight.requires_grad_(), target, linear_bias=bias, row_weight=row_weight,
        label_smoothing=smoothing, z_loss=0.1, budget=3 * 128 * 4,
    )  # fmt: skip
    loss.backward()
    assert len(loops) == 3  # chunks


@names
@pytest.mark.parametrize("implementation", ["numba", "reference"])
def test_the_norm_of_a_last_layers_gradient_is_exact_with_them(options, implementation):
    hidden, weight, bias, target = layer()
    _, scores = bonus_ops.linear_bonus_cross_entropy_with_scores(
        hidden, weight, target, linear_bias=bias, implementation=implementation, reduction="none", **options
    )
    for i, found in enumerate(scores.last_layer_grad_norm):
        w, b = (a.clone().requires_grad_() for a in (weight, bias))
        one = bonus_cross_entropy(torch.nn.functional.linear(hidden[i], w, b), target[i], **options)
        if target[i] == -100:
            assert found.isnan()
            continue
        one.backward()
        assert found == pytest.approx(torch.cat([w.grad.flatten(), b.grad]).norm().item(), rel=1e-5)
    assert torch.allclose(
        bonus_ops.linear_difficulty_scores(
            hidden, weight, target, linear_bias=bias,
            **{name: x for name, x in options.items() if name != "z_loss"},
        ).entropy, scores.entropy, atol=1e-6, equal_nan=True,
    )  # fmt: skip
