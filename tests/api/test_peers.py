"""The last layer means what it means to the peers, run here where they are installed: values and gradients.

Cut Cross-Entropy by its torch implementation; Liger's kernels by Triton's interpreter, which runs neither its softcap
nor its class weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bonus_ops import linear_bonus_cross_entropy
from tests.conftest import INTERPRETED

N, H, C = 24, 16, 150


def outcome(loss: Callable[..., Tensor]) -> list[Tensor]:
    """Return loss and gradients of hidden states, weight and bias, where it takes one."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=draw).requires_grad_() for s in ((N, H), (C, H), (C,)))
    target = torch.randint(0, C, (N,), generator=draw)
    target[[3, 7]] = -100
    value = loss(hidden, weight, bias, target)
    value.backward(torch.linspace(0.5, 1.5, value.numel()).view(value.shape))
    return [value.detach(), *(x.grad for x in (hidden, weight, bias) if x.grad is not None)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cut_cross_entropy(reduction, softcap):
    theirs = pytest.importorskip("cut_cross_entropy").linear_cross_entropy
    options = dict(softcap=softcap, reduction=reduction)
    with torch.compiler.set_stance("force_eager"):
        found = outcome(lambda x, w, b, t: theirs(x, w, t, impl="torch_compile", **options))
    ours = outcome(lambda x, w, b, t: linear_bonus_cross_entropy(x, w, t, bonus=None, **options))
    for x, y in zip(ours, found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not INTERPRETED, reason="Liger's kernels run on no CPU here")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"z_loss": 0.1}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "label_smoothing": 0.1}], ids=str
)
def test_liger(reduction, options):
    theirs = pytest.importorskip("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    named: dict[str, Any] = {"lse_square_scale" if k == "z_loss" else k: x for k, x in options.items()}

    def liger(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        found = theirs(x, w, t, bias=b, reduction=reduction, **named)
        return found[0] if isinstance(found, tuple) else found

    def ours(x: Tensor, w: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return linear_bonus_cross_entropy(x, w, t, linear_bias=b, bonus=None, reduction=reduction, **options)

    for x, y in zip(outcome(ours), outcome(liger), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
