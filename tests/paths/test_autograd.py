"""Autograd in eager mode: derivatives, upstream gradients, modes; second derivatives are right."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bonus_ops import (
    CosineBonus,
    Focal,
    LogBonus,
    PowerBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
)

EVERY_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["numba", "triton"])
EVERY_PATH = pytest.mark.parametrize(  # kernels know no reduction
    ("reduction", "implementation"), [("mean", "numba"), ("sum", "numba"), ("none", "numba"), ("none", "triton")]
)
LOSSES = (None, LogBonus(), LogBonus(1.0, clamp=None), PowerBonus(2.0), CosineBonus(), Focal())


@pytest.fixture
def place(implementation, request) -> str:
    return request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"


def batch(place: str, dtype: torch.dtype = torch.float64, n_rows: int = 4, n_classes: int = 3) -> tuple[Tensor, Tensor]:
    logits = torch.randn(n_rows, n_classes, dtype=dtype, device=place, requires_grad=True)
    target = torch.arange(n_rows, device=place) % n_classes
    target[1] = -100
    return logits, target


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bonus", "reduction", "implementation"),
    [(bonus, "mean", "numba") for bonus in LOSSES]
    + [(LogBonus(), "sum", "numba"), (LogBonus(), "none", "numba"), (LogBonus(), "none", "triton")],
    ids=repr,
)
def test_first_and_second_derivatives_are_right(bonus, reduction, implementation, place):
    logits, target = batch(place, n_rows=3)
    weight = torch.linspace(0.5, 2, 3, dtype=torch.float64, device=place)

    def loss(z: Tensor) -> Tensor:
        return bonus_cross_entropy(z, target, weight, reduction=reduction, bonus=bonus, implementation=implementation)

    assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)


@pytest.mark.slow
@EVERY_PATH
def test_a_gradient_penalty_equals_the_specification(implementation, reduction, place):
    """What every fused loss is silently wrong at: a loss of the gradient, through a layer."""
    logits, target = batch(place)
    layer = torch.randn(3, 3, dtype=torch.float64, device=place, requires_grad=True)
    function = bonus_cross_entropy_with_scores if reduction == "mean" else bonus_cross_entropy_with_softmax

    def penalised(**options) -> tuple[Tensor, ...]:
        z = logits @ layer
        loss = function(z, target, reduction=reduction, **options)[0].sum()
        (grad,) = torch.autograd.grad(loss, layer, create_graph=True)
        return torch.autograd.grad(loss + 10 * grad.square().sum(), (layer, logits))

    for ours, truth in zip(
        penalised(implementation=implementation), penalised(implementation="reference"), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@EVERY_REDUCTION
def test_without_a_bonus_second_derivatives_are_those_of_torch(reduction):
    logits, target = batch("cpu")

    def second(function, **options) -> Tensor:
        loss = function(logits, target, reduction=reduction, **options).sum()
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), logits)[0]

    torch.testing.assert_close(second(bonus_cross_entropy, bonus=None), second(F.cross_entropy), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@EVERY_PATH
def test_the_upstream_gradient_is_differentiable_too(implementation, reduction, place):
    logits, target = batch(place)
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
    upstream = torch.rand_like(loss).requires_grad_()
    (grad,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
    direction = torch.randn_like(grad)
    (ours,) = torch.autograd.grad(grad, upstream, direction)
    # the gradient is linear in upstream: its derivative is the gradient of each loss along the direction
    expected = []
    for i in range(loss.numel()):
        one = torch.zeros_like(loss).view(-1)
        one[i] = 1
        again = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
        expected.append((torch.autograd.grad(again, logits, one.view(loss.shape))[0] * direction).sum())
    torch.testing.assert_close(ours.view(-1), torch.stack(expected))


# --- upstream gradients -----------------------------------------------------------------------------------------------


@EVERY_PATH
@pytest.mark.parametrize(
    "make",
    [lambda x: 3 * x, lambda x: 0 * x, lambda x: -x[..., None].expand(*x.shape, 2)[..., 0]],
    ids=["3", "0", "-1"],
)
def test_the_gradient_is_linear_in_the_upstream_one(implementation, reduction, make, place):
    logits, target = batch(place)
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
    one = torch.ones_like(loss)
    (unit,) = torch.autograd.grad(loss, logits, one, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, logits, make(one), retain_graph=True)
    torch.testing.assert_close(grad, unit * make(torch.ones((), dtype=torch.float64)).item())
    if reduction == "none":
        each = torch.rand(2 * len(target), dtype=torch.float64, device=place)[::2]
        assert each.stride() == (2,)
        (grad,) = torch.autograd.grad(loss, logits, each)
        torch.testing.assert_close(grad, unit * each[:, None])


@EVERY_PATH
@pytest.mark.parametrize("upstream", [math.nan, math.inf])
def test_a_broken_upstream_gradient_leaves_ignored_rows_alone(implementation, reduction, upstream, place):
    logits, target = batch(place)
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, upstream))
    assert (grad[1] == 0).all()
    assert not grad[[0, 2, 3]].isfinite().any()


@EVERY_IMPLEMENTATION
def test_a_broken_upstream_gradient_stays_in_its_row(implementation, place):
    logits, target = batch(place)
    loss = bonus_cross_entropy(logits, target, reduction="none", implementation=implementation)
    upstream = torch.tensor([1.0, math.nan, math.nan, 1.0], dtype=torch.float64, device=place)
    (grad,) = torch.autograd.grad(loss, logits, upstream)
    assert grad[[0, 1, 3]].isfinite().all() and grad[2].isnan().all() and (grad[1] == 0).all()


@pytest.mark.slow
@EVERY_PATH
def test_a_kept_graph_gives_the_same_gradient_every_time(implementation, reduction, place):
    logits, target = batch(place, torch.float32, n_classes=9)
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    first = first.clone()
    for scale in (1.0, 0.5, 1.0):
        (again,) = torch.autograd.grad(loss * scale, logits, retain_graph=True)
        torch.testing.assert_close(again, scale * first)
        again.zero_()  # the caller's to write
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.grad, 2 * first)
    logits.grad.zero_()
    loss.backward()
    torch.testing.assert_close(logits.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@EVERY_PATH
def test_a_hook_may_write_the_gradient_it_is_given(implementation, reduction, place):
    logits, target = batch(place)
    z = logits * 1
    z.register_hook(lambda grad: grad.mul_(2))
    loss = bonus_cross_entropy(z, target, reduction=reduction, implementation=implementation).sum()
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(once, twice)


@EVERY_PATH
def test_a_gradient_is_made_only_where_it_is_wanted(implementation, reduction, place):
    logits, target = batch(place)
    constant = bonus_cross_entropy(logits.detach(), target, reduction=reduction, implementation=implementation)
    assert not constant.requires_grad
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
    assert loss.requires_grad and loss.grad_fn is not None
    _, scores, probabilities = bonus_cross_entropy_with_softmax(logits, target, implementation=implementation)
    assert not any(x.requires_grad for x in (*scores, probabilities))


@EVERY_PATH
@pytest.mark.parametrize("what", ["logits", "target"])
def test_inputs_changed_in_place_before_backward_raise(implementation, reduction, what, place):
    leaf, target = batch(place, torch.float32)
    logits = leaf * 1
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation).sum()
    (logits if what == "logits" else target).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_flow_through_a_network_in_its_dtype(implementation, dtype, place):
    layer = torch.nn.Linear(4, 5, device=place, dtype=dtype)
    x, target = torch.randn(6, 4, device=place, dtype=dtype), torch.arange(6, device=place) % 5
    loss = bonus_cross_entropy(layer(x), target, implementation=implementation)
    for grad, parameter in zip(torch.autograd.grad(loss, layer.parameters()), layer.parameters(), strict=True):
        assert grad.dtype == dtype and grad.shape == parameter.shape and grad.isfinite().all()


@EVERY_PATH
@pytest.mark.parametrize("upstream", [None, torch.float64, torch.float16, torch.int64], ids=str)
def test_an_upstream_gradient_may_be_missing_or_of_another_dtype(implementation, reduction, upstream, place):
    """As with F.cross_entropy: None is 1 for a scalar and an error otherwise, other dtypes are converted."""
    logits, target = batch(place, torch.float32)

    def derivative(function, **options):
        loss = function(logits, target, reduction=reduction, **options)
        given = None if upstream is None else torch.full_like(loss, 2, dtype=upstream)
        try:
            return torch.autograd.grad(loss, logits, given)[0]
        except RuntimeError as error:
            return str(error)

    ours = derivative(bonus_cross_entropy, bonus=None, implementation=implementation)
    theirs = derivative(F.cross_entropy)
    assert type(ours) is type(theirs)
    if isinstance(ours, str):
        assert ours == theirs and upstream is None and reduction == "none"
    else:
        torch.testing.assert_close(ours, theirs)


# --- modes ------------------------------------------------------------------------------------------------------------


@EVERY_PATH
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same(implementation, use_reentrant, reduction, place):
    logits, target = batch(place)

    def loss(z: Tensor) -> Tensor:
        return bonus_cross_entropy(z * 2, target, reduction=reduction, implementation=implementation).sum()

    (plain,) = torch.autograd.grad(loss(logits), logits)
    torch.utils.checkpoint.checkpoint(loss, logits, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(logits.grad, plain, rtol=0, atol=0)


@EVERY_PATH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_tape_the_loss_is_the_same(implementation, reduction, mode, place):
    logits, target = batch(place, torch.float32)
    call = {"reduction": reduction, "implementation": implementation}
    expected, scores = bonus_cross_entropy_with_scores(logits, target, **call)
    with mode():
        loss, same = bonus_cross_entropy_with_scores(logits, target, **call)
        assert not loss.requires_grad and loss.is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(tuple(same), tuple(scores), equal_nan=True)


def test_what_was_made_in_inference_mode_cannot_be_trained():
    with torch.inference_mode():
        x, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    layer = torch.randn(3, 3, requires_grad=True)
    for function in (F.cross_entropy, bonus_cross_entropy):
        assert function(x, target).isfinite()
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(x @ layer, target)


@pytest.mark.parametrize(("reduction", "implementation"), [("mean", "numba"), ("none", "triton")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast_gives_the_dtypes_of_torch(implementation, reduction, dtype, autocast, place):
    logits, target = batch(place, dtype)
    with torch.autocast(logits.device.type, dtype=autocast):
        ours = bonus_cross_entropy(logits, target, reduction=reduction, bonus=None, implementation=implementation)
        theirs = F.cross_entropy(logits, target, reduction=reduction)
    assert ours.dtype == theirs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)]
    assert grads[0].dtype == dtype
    # interpreted kernels cut bfloat16 off instead of rounding it
    torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gradient_scaler_keeps_what_would_underflow(dtype):
    """Scaled before it is rounded: a gradient of 1.5e-8 is 0 in float16, 2^14 times it is not."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    logits = torch.tensor([[18.0, 0.0, 0.0]], requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    scaler.scale(bonus_cross_entropy(logits.to(dtype), torch.tensor([0]), bonus=None)).backward()
    truth = 2.0**14 * math.exp(-18) / (1 + 2 * math.exp(-18))
    # the gap of 18 is known to half an ulp, 1e-6, and so is its exponential
    torch.testing.assert_close(logits.grad[0, 1].item(), truth, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14
    with torch.no_grad():
        logits.copy_(torch.tensor([[math.inf, 0.0, 0.0]]))
    before = logits.detach().clone()
    scaler.scale(bonus_cross_entropy(logits.to(dtype), torch.tensor([0]), bonus=None)).backward()
    scaler.step(optimizer)  # NaN gradients: skipped
    scaler.update()
    assert torch.equal(logits.detach(), before) and scaler.get_scale() == 2.0**13


class Tagged(torch.Tensor):
    pass


@EVERY_REDUCTION
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_subclass_is_kept_as_torch_keeps_it(reduction, requires_grad):
    logits, target = batch("cpu")
    ours, theirs = (logits.detach().as_subclass(Tagged).requires_grad_(requires_grad) for _ in range(2))
    loss = bonus_cross_entropy(ours, target, reduction=reduction, bonus=None)
    expected = F.cross_entropy(theirs, target, reduction=reduction)
    assert type(loss) is type(expected) is Tagged
    assert type(bonus_cross_entropy(torch.nn.Parameter(logits.detach()), target)) is Tensor
    if requires_grad:
        loss.sum().backward()
        expected.sum().backward()
        assert type(ours.grad) is type(theirs.grad)
        torch.testing.assert_close(ours.grad, theirs.grad)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")


def step(logits: Tensor, target: Tensor, reduction: str = "mean", implementation: str | None = None) -> list[Tensor]:
    logits = logits.detach().requires_grad_()
    loss, scores = bonus_cross_entropy_with_scores(logits, target, reduction=reduction, implementation=implementation)
    return [loss.detach(), torch.autograd.grad(loss.sum(), logits)[0], *scores]


@ON_CUDA
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_current_is_used():
    logits, target = batch("cuda:1", torch.float32, n_rows=64, n_classes=1000)
    assert torch.cuda.current_device() == 0
    actual = step(logits, target)
    assert torch.cuda.current_device() == 0 and all(x.device == logits.device for x in actual)
    torch.testing.assert_close([x.cpu() for x in actual], step(logits.cpu(), target.cpu()), equal_nan=True)


@ON_CUDA
def test_launches_follow_the_current_stream():
    """A long task before it on the stream: who launches on another stream reads what is not there yet."""
    truth, target = batch("cuda", torch.float32, n_rows=512, n_classes=1000)
    expected = step(truth, target)
    logits = torch.zeros_like(truth)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        logits.data.copy_(truth)
        actual = step(logits, target)
    torch.cuda.synchronize()
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=0, atol=0)


def test_a_call_leaves_nothing_to_the_garbage_collector():
    """A cycle would hold the gradients of every call until it runs."""
    logits, target = batch("cpu", torch.float32)

    def call(loss) -> object:
        return torch.autograd.grad(loss(logits, target, bonus=LogBonus(), implementation="numba"), logits)

    losses = bonus_cross_entropy, lambda *args, **options: bonus_cross_entropy_with_scores(*args, **options)[0]
    for loss in losses:
        call(loss)
    gc.disable()
    gc.collect()
    gc.freeze()  # what other tests have left
    try:
        for loss in losses:
            call(loss)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        held = (Tensor, torch.autograd.function.BackwardCFunction)
        assert [x for x in gc.garbage if isinstance(x, held)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


@ON_CUDA
@EVERY_REDUCTION
def test_a_step_is_captured_in_a_cuda_graph(reduction):
    logits, target = batch("cuda", torch.float32, n_rows=64, n_classes=1000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile before the capture
        step(logits, target, reduction)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(logits, target, reduction)
    for _ in range(2):
        with torch.no_grad():
            logits.copy_(torch.randn_like(logits))
        graph.replay()
        torch.testing.assert_close(captured, step(logits, target, reduction), equal_nan=True, rtol=0, atol=0)


@ON_CUDA
@EVERY_REDUCTION
def test_nothing_waits_for_the_gpu(reduction):
    logits, target = batch("cuda", torch.float32, n_rows=64, n_classes=1000)
    expected = step(logits, target, reduction)
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        actual = step(logits, target, reduction)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(actual, expected, equal_nan=True)
