"""Graphs: operators keep their contract, every call is one graph, and transforms inside it are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bonus_ops import (
    BonusCrossEntropyLoss,
    Focal,
    LogBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
)
from bonus_ops.losses import encode
from bonus_ops.ops import labels as operators

EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["numba", "triton"])


@pytest.fixture
def place(implementation, request) -> str:
    return request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(place: str, dtype: torch.dtype = torch.float64, n_rows: int = 4, n_classes: int = 3) -> tuple[Tensor, Tensor]:
    logits = torch.randn(n_rows, n_classes, dtype=dtype, device=place, requires_grad=True)
    target = torch.arange(n_rows, device=place) % n_classes
    target[1] = -100
    return logits, target


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(
    ("layout", "scores", "softmax"),
    [((6, 1, 5), False, False), ((2, 3, 5), True, False), ((2, 3, 5), True, True), ((0, 1, 5), False, False)],
)
def test_the_operators_keep_their_contract(implementation, layout, scores, softmax, place):
    n_rows = layout[0] * layout[1]
    logits = torch.randn(layout, device=place)
    target = (torch.arange(n_rows, device=place) % 5).view(layout[:2])
    name, fields = encode(LogBonus())
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (logits, target, fields, -100, name, 1.0, None, scores, softmax, implementation)
    torch.library.opcheck(operators.forward, args, test_utils=checks)
    if not scores and not softmax:
        saved = operators.forward(*args)[3]
        grad_loss = torch.rand(n_rows, dtype=saved.dtype, device=place)
        args = (logits, target, fields, saved, grad_loss, None, -100, name, 1.0, None, implementation)
        torch.library.opcheck(operators.backward, args, test_utils=checks)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_it_compiles_as_one_graph(reduction):
    logits, target = batch("cpu", torch.float32, n_rows=5, n_classes=7)
    weight = torch.rand(7)

    def step(z, y):
        loss, scores = bonus_cross_entropy_with_scores(z * 2, y, weight, reduction=reduction)
        return loss, scores, scores.difficulty("el2n"), scores.prediction(y)

    expected, actual = step(logits, target), torch.compile(step, fullgraph=True, backend="aot_eager")(logits, target)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(tuple(actual[1]), tuple(expected[1]), equal_nan=True)
    torch.testing.assert_close(actual[2:], expected[2:], equal_nan=True)
    grads = [torch.autograd.grad(out[0].sum(), logits)[0] for out in (expected, actual)]
    torch.testing.assert_close(*grads)


def test_compiled_backward_runs_the_operator():
    """Neither the specification nor a second forward: one opaque operator a pass."""
    graphs = []

    def record(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if "bonus_ops" in str(node.target)])
        return make_boxed_func(graph)

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=record, bw_compiler=record)
    logits, target = batch("cpu", torch.float32)
    torch.compile(bonus_cross_entropy, fullgraph=True, backend=backend)(logits, target).backward()
    assert graphs == [[torch.ops.bonus_ops.labels_forward.default], [torch.ops.bonus_ops.labels_backward.default]]


@pytest.mark.slow
def test_new_shapes_do_not_recompile_for_ever():
    """At most twice: once for the first shape, once for all others."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(bonus_cross_entropy_with_scores, fullgraph=True, backend=counter)
    for n_rows, n_classes in ((4, 5), (7, 11), (2, 70), (9, 33)):
        logits = torch.randn(n_rows, n_classes, requires_grad=True)
        target = torch.arange(n_rows) % n_classes
        loss, scores = compiled(logits, target)
        expected, same = bonus_cross_entropy_with_scores(logits, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(tuple(scores), tuple(same))
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3,), (2, 3, 2, 2)], ids=repr)
def test_other_shapes_are_one_graph_too(shape):
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, 3, shape[:1] + shape[2:] if len(shape) > 1 else ())
    for x in (logits, target) if len(shape) > 1 else ():
        torch._dynamo.maybe_mark_dynamic(x, (0, x.dim() - 1))
    compiled = torch.compile(bonus_cross_entropy_with_softmax, fullgraph=True, backend="aot_eager")
    expected, actual = bonus_cross_entropy_with_softmax(logits, target), compiled(logits, target)
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(tuple(actual[1]), tuple(expected[1]))
    torch.testing.assert_close(actual[2], expected[2])
    torch.testing.assert_close(*(torch.autograd.grad(x[0], logits)[0] for x in (actual, expected)))


@pytest.mark.slow
def test_a_new_parameter_of_the_loss_gives_the_new_loss():
    """A frozen loss is a constant of the graph: another one is another graph. `Scheduled` is not."""
    logits, target = batch("cpu", torch.float32)
    compiled = torch.compile(bonus_cross_entropy, fullgraph=True, backend="eager")
    for bonus in (LogBonus(0.3), LogBonus(1.0), Focal(1.5), None):
        losses = [function(logits, target, bonus=bonus) for function in (bonus_cross_entropy, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@pytest.mark.slow
def test_inductor_agrees():
    logits, target = batch("cpu", torch.float32, n_rows=5, n_classes=7)
    compiled = torch.compile(bonus_cross_entropy, fullgraph=True)
    try:
        loss = compiled(logits, target)
    except torch._inductor.exc.InductorError as error:
        pytest.skip(f"no C++ compiler: {error}")
    expected = bonus_cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


@pytest.mark.slow
def test_a_compiled_second_derivative_is_right_or_raises():
    logits, target = batch("cpu")
    compiled = torch.compile(bonus_cross_entropy, fullgraph=True, backend="aot_eager")
    try:
        (grad,) = torch.autograd.grad(compiled(logits, target), logits, create_graph=True)
        (actual,) = torch.autograd.grad(grad.square().sum(), logits)
    except RuntimeError:
        return
    (grad,) = torch.autograd.grad(bonus_cross_entropy(logits, target), logits, create_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(grad.square().sum(), logits)[0])


# --- transforms in a graph --------------------------------------------------------------------------------------------


TRANSFORMS: dict[str, Callable] = {
    "grad": lambda loss, z: grad(lambda z: loss(z).sum())(z),
    "vmap": lambda loss, z: vmap(loss)(torch.stack([z, 2 * z])),
    "jvp": lambda loss, z: jvp(loss, (z,), (z.square(),)),
    "hessian": lambda loss, z: hessian(lambda z: loss(z).sum())(z),
    "grad of grad": lambda loss, z: grad(lambda z: grad(lambda z: loss(z).sum())(z).square().sum())(z),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "transform"), [(None, "grad of grad"), ("numba", "vmap"), ("triton", "vmap")]
)
def test_a_compiled_transform_gives_what_torch_gives(transform, implementation, place):
    """Those of every family are in test_watchers.py."""
    logits, target = (x.detach() for x in batch(place))
    apply = TRANSFORMS[transform]
    ours = {"bonus": None, "implementation": implementation}
    compiled = torch.compile(
        lambda z: apply(lambda z: bonus_cross_entropy(z, target, **ours), z), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(logits), apply(lambda z: F.cross_entropy(z, target), logits))


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "transform"), [("numba", "jvp"), ("triton", "hessian")])
def test_what_only_the_formula_computes_is_not_computed_by_what_was_named(transform, implementation, place):
    logits, target = (x.detach() for x in batch(place))
    apply = TRANSFORMS[transform]
    compiled = torch.compile(
        lambda z: apply(lambda z: bonus_cross_entropy(z, target, implementation=implementation), z),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    with pytest.raises(Exception, match=f"implementation='{implementation}' has no kernel for nested transforms"):
        compiled(logits)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_a_transform_of_a_graph_is_right_or_raises(transform):
    logits, target = (x.detach() for x in batch("cpu"))
    compiled = torch.compile(lambda z: bonus_cross_entropy(z, target, bonus=None), backend="aot_eager")
    compiled(logits)  # a graph that knows of no transform is there to be used by mistake
    try:
        actual = TRANSFORMS[transform](compiled, logits)
    except torch._dynamo.exc.Unsupported:
        return
    torch.testing.assert_close(actual, TRANSFORMS[transform](lambda z: F.cross_entropy(z, target), logits))


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["vmap of vmap", "jvp"])
def test_scores_and_probabilities_pass_a_compiled_transform(transform):
    logits, target = (x.detach() for x in batch("cpu", torch.float32))

    def everything(z):
        loss, scores, probabilities = bonus_cross_entropy_with_softmax(z, target, reduction="none")
        return loss, *scores, probabilities

    def apply(z):
        if transform == "jvp":
            return jvp(lambda z: everything(z)[0], (z,), (z,))
        return vmap(vmap(everything))(torch.stack([z, 2 * z])[None])

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), apply(logits), equal_nan=True)


# --- tracing without the compiler -------------------------------------------------------------------------------------


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
def test_shapes_are_found_without_data(implementation, reduction, place):
    logits, target = (x.detach() for x in batch(place, torch.float32))
    with FakeTensorMode() as mode:
        logits, target = mode.from_tensor(logits).requires_grad_(), mode.from_tensor(target)
        loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert type(loss) is type(grad) is FakeTensor
    assert loss.shape == (target.shape if reduction == "none" else ()) and grad.shape == logits.shape


@EVERY_REDUCTION
@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_a_traced_step_runs_the_operators_on_other_data(reduction, tracing_mode):
    def step(z, y):
        z = z.detach().requires_grad_()
        loss = bonus_cross_entropy(z, y, reduction=reduction).sum()
        return loss, torch.autograd.grad(loss, z)[0]

    logits, target = (x.detach() for x in batch("cpu", torch.float32))
    traced = make_fx(step, tracing_mode=tracing_mode)(logits, target)
    calls = [str(node.target) for node in traced.graph.nodes if "bonus_ops" in str(node.target)]
    assert calls == ["bonus_ops.labels_forward.default", "bonus_ops.labels_backward.default"]
    other = torch.randn_like(logits), target.flip(0)
    torch.testing.assert_close(traced(*other), step(*other))


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("implementation", "strict"), [("numba", True), ("triton", False)])
def test_it_exports_with_dynamic_shapes(implementation, strict, place):
    criterion = BonusCrossEntropyLoss(torch.rand(3, device=place), implementation=implementation)
    logits, target = (x.detach() for x in batch(place, torch.float32))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        criterion, (logits, target), strict=strict, dynamic_shapes={"input": {0: rows}, "target": {0: rows}}
    )
    assert any("bonus_ops.labels_forward" in str(node.target) for node in program.graph.nodes)
    for n_rows in (2, 7):
        logits, target = (x.detach() for x in batch(place, torch.float32, n_rows=n_rows))
        torch.testing.assert_close(program.module()(logits, target), criterion(logits, target))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"bonus_smoothing": 0.1}, {"given": True}], ids=str)
def test_a_class_weight_of_soft_targets_is_no_second_input(options):
    logits, weight = torch.randn(4, 9, requires_grad=True), torch.rand(9)
    target = torch.softmax(torch.randn(4, 9), 1) if options.pop("given", False) else torch.tensor([0, 3, 8, 1])
    compiled = torch.compile(bonus_cross_entropy, fullgraph=True, backend="eager")
    expected = bonus_cross_entropy(logits, target, weight, **options)
    torch.testing.assert_close(compiled(logits, target, weight, **options), expected)
