"""Ours and other losses on logits [n_rows, n_classes]: a name to a function that returns the mean loss.

Peers are imported where they are asked for; one that is not there, or that fails its check, is skipped with the reason.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores
from bonus_ops.call import why_not_triton

BONUS = LogBonus(0.75)
OURS, LOSS_ONLY, IN_FORWARD = "ours", "ours, loss only", "ours, gradient in forward"
EAGER, COMPILED = "F.cross_entropy", "F.cross_entropy, compiled"
Loss = Callable[[Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    load: Callable[[], Loss]  # imports; raises where it cannot
    bonus: bool = False  # the bonus loss, else plain cross-entropy
    overwrites: bool = False  # leaves its gradient in the logits
    trains_only: bool = False  # its forward makes the gradient too
    slow_start: bool = False  # compiles for each shape: only some shapes
    upstream: float = 0.5  # what backward starts from; not 1: a peer may do nothing then


def _ours() -> Loss:
    return lambda z, y: bonus_cross_entropy_with_scores(z, y, bonus=BONUS)[0]


def _loss_only() -> Loss:
    return lambda z, y: bonus_cross_entropy(z, y, bonus=BONUS)


def _in_forward() -> Loss:
    if why := why_not_triton("cuda" if torch.cuda.is_available() else "cpu"):
        raise RuntimeError(why)
    from .in_forward import InForward

    return lambda z, y: InForward.apply(z, y)


def _compiled() -> Loss:
    return torch.compile(lambda z, y: F.cross_entropy(z, y), dynamic=False)


def _liger() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def _flash_attention() -> Loss:
    # by its file: the package itself wants its compiled extension, which this loss does not need
    package = importlib.util.find_spec("flash_attn")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'flash_attn'")
    path = Path(package.submodule_search_locations[0]) / "ops" / "triton" / "cross_entropy.py"
    spec = importlib.util.spec_from_file_location("flash_attn_cross_entropy", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda z, y: module.cross_entropy_loss(z, y)[0].mean()


def _quack() -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda z, y: cross_entropy(z, y, reduction="mean")


PEERS = {
    OURS: Peer(_ours, bonus=True),
    LOSS_ONLY: Peer(_loss_only, bonus=True),
    IN_FORWARD: Peer(_in_forward, bonus=True, trains_only=True, upstream=1.0),
    EAGER: Peer(lambda: F.cross_entropy),
    COMPILED: Peer(_compiled, slow_start=True),
    "Liger-Kernel": Peer(_liger, overwrites=True, trains_only=True),
    "flash-attention": Peer(_flash_attention),
    "QuACK": Peer(_quack, slow_start=True),
}


def cut_cross_entropy() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return Cut Cross-Entropy's loss of (hidden states, classifier, target): it takes no logits."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def check(peer: Peer, loss: Loss, n_classes: int, device: str) -> str | None:
    """Return what is wrong with a peer's loss or gradient on a few rows, against float64, or None."""
    z, y = logits(16, n_classes, torch.float32, device)
    truth = z.detach().double().requires_grad_()
    bonus = BONUS if peer.bonus else None
    exact = bonus_cross_entropy(truth, y, bonus=bonus, implementation="reference")
    (exact_grad,) = torch.autograd.grad(exact * 0.5, truth)
    exact = exact.detach()
    value = loss(z, y)
    (grad,) = torch.autograd.grad(value, z, torch.full_like(value, 0.5))
    error = float((value.detach().double() - exact).abs() / (1 + exact.abs()))
    grad_error = float((grad.double() - exact_grad).abs().max() / exact_grad.abs().max())
    if not (error < 1e-4 and grad_error < 1e-3):  # a NaN fails too
        return f"wrong result: loss off by {error:.1e}, gradient by {grad_error:.1e}"
    return None


def logits(n_rows: int, n_classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Return random logits made on the device, the label of each row ahead of what it drew by up to 12."""
    z = torch.randn(n_rows, n_classes, device=device, dtype=dtype)
    y = torch.randint(n_classes, (n_rows,), device=device)
    z.scatter_add_(1, y[:, None], 12 * torch.rand(n_rows, 1, device=device).to(dtype))
    return z.requires_grad_(), y
