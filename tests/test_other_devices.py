"""A device that is no CPU and has no kernels: formulas of torch serve, with their gradients."""

from __future__ import annotations

import pytest
import torch

import bonus_ops
from tests import conftest

pytest.importorskip("triton")
if conftest.ACCELERATOR is not None or not conftest.INTERPRETED:
    pytest.skip("the stand-in for a device interprets kernels", allow_module_level=True)
from tests import cuda_stand_in

N_CLASSES = 7
CALLS = {
    "labels": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y),
    "labels, weight": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y, w),
    "labels, scores": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_scores(z, y)[0],
    "labels, softmax": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_softmax(z, y)[0],
    "smoothing": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y, label_smoothing=0.1),
    "smoothing, weight": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, y, w, label_smoothing=0.1),
    "smoothing, rows": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(
        z, y, label_smoothing=0.1, reduction="none").sum(),
    "smoothing, scores": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_scores(z, y, label_smoothing=0.1)[0],
    "probabilities": lambda z, y, t, w: bonus_ops.bonus_cross_entropy(z, t),
    "probabilities, scores": lambda z, y, t, w: bonus_ops.bonus_cross_entropy_with_scores(z, t)[0],
    "mixup": lambda z, y, t, w: bonus_ops.mixup_cross_entropy(z, y, y.flip(0), 0.3),
    "sigmoid": lambda z, y, t, w: bonus_ops.bonus_binary_cross_entropy_with_logits(z, t, w),
}  # fmt: skip


def value_and_gradient(call, where):
    made = torch.Generator().manual_seed(0)
    z, t, w = (torch.rand(shape, generator=made) for shape in ((5, N_CLASSES), (5, N_CLASSES), (N_CLASSES,)))
    y = torch.tensor([0, 6, -100, 3, 2])
    y = y.abs() % N_CLASSES if call is CALLS["mixup"] else y
    z, y, t, w = (x.to(device=where) for x in (3 * z, y, t, w))
    z.requires_grad_()
    loss = call(z, y, t, w)
    (grad,) = torch.autograd.grad(loss, z)
    return loss.detach(), grad


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_need_no_kernels(call):
    expected = value_and_gradient(call, "cpu")
    with cuda_stand_in.stand_in() as cuda:
        cuda.why_no_kernels = "this device has none"
        found = [x.held.clone() for x in value_and_gradient(call, "cuda")]
    torch.testing.assert_close(tuple(found), expected, rtol=1e-5, atol=1e-6)
