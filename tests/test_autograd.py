"""Autograd in eager mode: derivatives, upstream gradients, modes; second derivatives are right, never silently wrong."""

from __future__ import annotations

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
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", ["torch", "triton"])
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


@pytest.mark.parametrize(
    ("implementation", "reduction"),
    [("torch", "mean"), ("torch", "sum"), ("torch", "none"), ("triton", "none")],  # kernels know no reduction
)
@pytest.mark.parametrize("bonus", LOSSES, ids=repr)
def test_first_and_second_derivatives_are_right(implementation, reduction, bonus, place):
    logits, target = batch(place, n_rows=3)
    weight = torch.linspace(0.5, 2, 3, dtype=torch.float64, device=place)

    def loss(z: Tensor) -> Tensor:
        return bonus_cross_entropy(z, target, weight, reduction=reduction, bonus=bonus, implementation=implementation)

    assert torch.autograd.gradcheck(loss, logits, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, logits, fast_mode=True)


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
@pytest.mark.parametrize("function", [bonus_cross_entropy_with_scores, bonus_cross_entropy_with_softmax])
def test_a_gradient_penalty_equals_the_specification(implementation, reduction, function, place):
    """What every fused loss is silently wrong at: a loss of the gradient, through a layer."""
    logits, target = batch(place)
    layer = torch.randn(3, 3, dtype=torch.float64, device=place, requires_grad=True)

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


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
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


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
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


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
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


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
def test_a_kept_graph_gives_the_same_gradient_every_time(implementation, reduction, place):
    logits, target = batch(place, torch.float32, n_rows=6, n_classes=100)
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


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
def test_a_hook_may_write_the_gradient_it_is_given(implementation, reduction, place):
    logits, target = batch(place)
    z = logits * 1
    z.register_hook(lambda grad: grad.mul_(2))
    loss = bonus_cross_entropy(z, target, reduction=reduction, implementation=implementation).sum()
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(once, twice)


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
def test_a_gradient_is_made_only_where_it_is_wanted(implementation, reduction, place):
    logits, target = batch(place)
    constant = bonus_cross_entropy(logits.detach(), target, reduction=reduction, implementation=implementation)
    assert not constant.requires_grad
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation)
    assert loss.requires_grad and loss.grad_fn is not None
    _, scores, probabilities = bonus_cross_entropy_with_softmax(logits, target, implementation=implementation)
    assert not any(x.requires_grad for x in (*scores, probabilities))


@EVERY_IMPLEMENTATION
@EVERY_REDUCTION
@pytest.mark.parametrize("what", ["logits", "target"])
def test_inputs_changed_in_place_before_backward_raise(implementation, reduction, what, place):
    leaf, target = batch(place, torch.float32)
    logits = leaf * 1
    loss = bonus_cross_entropy(logits, target, reduction=reduction, implementation=implementation).sum()
    (logits if what == "logits" else target).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_flow_through_a_network_in_its_dtype(implementation, dtype, place):
    layer = torch.nn.Linear(4, 5, device=place, dtype=dtype)
    x, target = torch.randn(6, 4, device=place, dtype=dtype), torch.arange(6, device=place) % 5
    for reduction in ("mean", "none"):
        loss = bonus_cross_entropy(layer(x), target, reduction=reduction, implementation=implementation).sum()
        for grad, parameter in zip(torch.autograd.grad(loss, layer.parameters()), layer.parameters(), strict=True):
            assert grad.dtype == dtype and grad.shape == parameter.shape and grad.isfinite().all()


@EVERY_IMPLEMENTATION
def test_checkpointing_recomputes_the_same(implementation, place):
    logits, target = batch(place)

    def loss(z: Tensor) -> Tensor:
        return bonus_cross_entropy(z * 2, target, implementation=implementation)

    (plain,) = torch.autograd.grad(loss(logits), logits)
    kept = torch.utils.checkpoint.checkpoint(loss, logits, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(kept, logits)[0], plain)
