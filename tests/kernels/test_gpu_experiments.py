"""The experiments of `bench gpu`: the library's results, whatever they cost."""

from __future__ import annotations

import pytest
import torch

from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores
from tests import cases

pytest.importorskip("triton")
from bench.gpu.experiments import InForward, with_depth


@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(10, torch.float32), (1003, torch.bfloat16), (2053, torch.float32)], ids=str
)
def test_a_gradient_made_in_forward_is_that_of_the_library(n_classes, dtype, kernel_device):
    logits, target = cases.typical(cases.generator(n_classes), 3, n_classes, dtype, kernel_device)
    target[0] = -100
    exact = logits.detach().double().requires_grad_()
    options = {"bonus": LogBonus(0.75), "reduction": "sum", "implementation": "reference"}
    true = bonus_cross_entropy(exact, target, **options) / 3
    (true_grad,) = torch.autograd.grad(true, exact)
    loss = InForward.apply(logits.requires_grad_(), target)
    (grad,) = torch.autograd.grad(loss, logits)
    rtol = torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(loss.double(), true.detach(), rtol=rtol, atol=1e-5)
    torch.testing.assert_close(grad.double(), true_grad, rtol=rtol, atol=1e-8)
    assert (grad[0] == 0).all()


def test_more_tiles_in_flight_give_the_same_bits(kernel_device):
    logits, target = cases.typical(cases.generator(1), 1, 16391, torch.bfloat16, kernel_device)
    expected = bonus_cross_entropy_with_scores(logits, target, implementation="triton")
    for depth in (1, 2, 4):
        with with_depth(depth):
            found = bonus_cross_entropy_with_scores(logits, target, implementation="triton")
        for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
            assert torch.equal(a, b), depth
