"""The experiment of `bench gpu`: a gradient made in the forward visit."""

from __future__ import annotations

import pytest
import torch

from bonus_ops import LogBonus, bonus_cross_entropy
from tests import cases

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernel_device")


@pytest.mark.slow
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("n_classes", [1, 10, 1003, 2053, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_the_library(n_classes, dtype, upstream, kernel_device):
    from bench.gpu.in_forward import InForward

    n_rows = 5 if n_classes < 2053 else 2
    logits, target = cases.typical(cases.generator(n_classes), n_rows, n_classes, dtype, kernel_device)
    target[0] = -100 if n_classes == 10 else target[0]
    exact = logits.double().requires_grad_()
    options = {"bonus": LogBonus(0.75), "reduction": "sum", "implementation": "reference"}
    true = bonus_cross_entropy(exact, target, **options) / n_rows
    (true_grad,) = torch.autograd.grad(true, exact, torch.tensor(upstream, device=kernel_device).double())
    leaf = logits.requires_grad_()
    loss = InForward.apply(leaf, target)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    assert grad.dtype == dtype
    # rounded once, where it is scaled twice; from float32 with errors as of `test_kernels`
    rtol = (2 if upstream != 1 else 1) * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(loss.double(), true.detach(), rtol=rtol, atol=1e-5)
    torch.testing.assert_close(grad.double(), true_grad, rtol=rtol, atol=1e-8)
    assert (grad[0] == 0).all() or n_classes != 10
