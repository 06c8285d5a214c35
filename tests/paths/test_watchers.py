"""Every family of losses under every watcher: batched gradients, transforms, fake tensors, compiled or not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import jvp

from bonus_ops import (
    SoftmaxSquaredError,
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    mixup_cross_entropy,
)

LABEL = torch.tensor([0, 3, 8, 3])
SHARE = torch.softmax(torch.linspace(-1, 1, 36).reshape(4, 9), 1)
FAMILIES = {
    "labels": lambda x: bonus_cross_entropy(x, LABEL),
    "smoothed labels": lambda x: bonus_cross_entropy(x, LABEL, label_smoothing=0.1),
    "probabilities": lambda x: bonus_cross_entropy(x, SHARE),
    "all classes": lambda x: bonus_cross_entropy(x, LABEL, bonus=SoftmaxSquaredError(1.0)),
    "two labels": lambda x: mixup_cross_entropy(x, LABEL, LABEL.flip(0), 0.3),
    "sigmoid": lambda x: bonus_binary_cross_entropy_with_logits(x, SHARE.to(x.dtype)),
}
FAMILY = pytest.mark.parametrize("loss", FAMILIES.values(), ids=FAMILIES)
DIRECTION = torch.linspace(1, -2, 36).reshape(4, 9)
OPERATORS = ("labels", "probabilities", "sigmoid")  # the families whose graphs differ; two labels are two of one


def logits(**options) -> torch.Tensor:
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(**options)


def slope(f, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return the directional derivative by central differences, in float64."""
    step = 1e-6 * direction
    return (f(x + step) - f(x - step)) / 2e-6


@FAMILY
def test_a_batch_of_upstream_gradients(loss):
    x = logits(dtype=torch.float32).requires_grad_()
    (one,) = torch.autograd.grad(loss(x), x)
    (batch,) = torch.autograd.grad(loss(x), x, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(batch, torch.stack([one, -2 * one]), rtol=2e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("family", OPERATORS)
def test_a_compiled_transform_is_the_eager_one(family):
    """The compiler drops the tangent of an operator without a word: forward mode must not meet one."""
    loss, x = FAMILIES[family], logits(dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: jvp(loss, (x,), (DIRECTION.double(),))[1], backend="aot_eager")
    torch.testing.assert_close(compiled(x), tangent(loss, x), rtol=1e-10, atol=1e-12)


def tangent(f, x: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, DIRECTION.double()))).tangent


@FAMILY
def test_tangents_are_those_of_finite_differences(loss):
    x = logits(dtype=torch.float64)
    torch.testing.assert_close(tangent(loss, x), slope(loss, x, DIRECTION.double()), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["labels", "sigmoid"])
def test_a_graph_without_tangents_does_not_serve_those_that_have(family):
    loss, x = FAMILIES[family], logits(dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    compiled(x)
    torch.testing.assert_close(tangent(compiled, x), tangent(loss, x), rtol=1e-10, atol=1e-12)


@FAMILY
def test_a_tangent_has_the_dtype_of_its_value(loss):
    value, tangent = jvp(loss, (logits(dtype=torch.float32),), (DIRECTION,))
    assert value.dtype == tangent.dtype == torch.float32


@FAMILY
def test_fake_tensors_pass_forward_and_backward(loss):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 9, requires_grad=True)
        loss(x).backward()
        assert x.grad is not None and x.grad.shape == (4, 9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_that_a_transform_has_left_behind_are_labels(smoothing):
    left = []
    torch.func.grad(lambda x, label: (left.append(label), x.sum())[1])(logits(), LABEL)
    x = logits().requires_grad_()
    leftover, own = (bonus_cross_entropy(x, label, label_smoothing=smoothing) for label in (left[0], LABEL))
    torch.testing.assert_close(leftover, own)
    torch.testing.assert_close(torch.autograd.grad(leftover, x)[0], torch.autograd.grad(own, x)[0])
