"""Soft targets on a CPU: what `gpu.soft` computes, by loops over rows that stay in cache (`soft_rows`).

Logits whose classes lie apart are copied first. Traffic a row of V logits of b bytes and V probabilities of c bytes:
reads V (b + c), writes V b.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any

import torch
from torch import Tensor

from ..results import SoftResult, empty_soft, fill_ignored
from . import soft_rows, stored, threads
from .elements import NAMES, real_of, record_of
from .losses import terms_of
from .tile import PAD, ROWS

__all__ = ["forward", "backward", "visit"]


@functools.cache
def _loop(element: str, given: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        return module_of(soft_rows.visit_loop, element, {"Plan": record_of(soft_rows.Plan)}, given)

    name = f"soft_{element}_{given}"
    return stored.entry(4, name, name, make)


# --- what the library calls -------------------------------------------------------------------------------------------


def forward(logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any, scores: bool) -> SoftResult:
    """Return loss and scores of rows [outer, inner, C]; `backward` needs nothing saved."""
    out, _ = visit(logits, label, targets, ignore_index, loss, scores, None)
    return out._replace(saved=out.saved.zero_(), runner_up=out.runner_up if scores else out.runner_up.zero_())


def backward(
    logits: Tensor, label: Tensor, targets: Any, saved: Tensor, runner_up: Tensor, grad_loss: Tensor, ignore_index: int,
    loss: Any,
) -> Tensor:  # fmt: skip
    """Return the gradient from the upstream gradient [N] or [1], by another visit."""
    grad: Tensor = visit(logits, label, targets, ignore_index, loss, False, grad_loss)[1]
    return grad


def visit(
    logits: Tensor, label: Tensor | None, targets: Any, ignore_index: int, loss: Any, scores: bool,
    upstream: Tensor | None,
) -> tuple[SoftResult, Any]:  # fmt: skip
    """Return loss and scores and, for an upstream gradient [N] or [1], the gradient.

    ``label`` [outer, inner] is not looked at where probabilities are given: theirs is the largest.
    """
    result = empty_soft(logits, scores)
    grad = None if upstream is None else torch.empty_like(logits)
    n_outer, n_inner, n_classes = logits.shape
    if not logits.numel():
        fill_ignored(result)
        return result, grad
    real_dtype, element = result.loss.dtype, NAMES[logits.dtype]
    z = logits if logits.stride(2) == 1 else logits.contiguous()
    out = grad if grad is None or grad.stride(2) == 1 else grad.new_empty(grad.shape)
    given = targets.probabilities
    if given is not None:
        given = given if given.stride(2) == 1 else given.contiguous()
        given = given if given.dtype == logits.dtype else given.to(real_dtype)
        label = None
    t, v = targets.of_cross_entropy(n_classes), targets.of_bonus(n_classes)
    of_t = (t.keep, t.off) if loss.adds_to_cross_entropy else (0.0, 0.0)
    weights = [None if w is None else w.to(real_dtype).contiguous() for w in (t.weight, v.weight)]
    shares = torch.tensor((*of_t, v.keep, v.off), dtype=real_dtype, device="cpu")
    terms = None if loss.is_cross_entropy() else terms_of(loss, real_of(element))
    label = None if label is None else label.reshape(-1).contiguous()
    up = None if upstream is None else upstream.to(real_dtype)
    in_place = out is not None and logits.element_size() == real_dtype.itemsize
    tile = min(max((1 << 15) // n_classes, 1), PAD)
    plan = array("q", soft_rows.Plan(
        n_outer * n_inner, n_inner, n_classes, tile, z.data_ptr(), *z.stride()[:2],
        _at(label), ignore_index, _at(given), *((0, 0) if given is None else given.stride()[:2]),
        *map(_at, weights), given is None and weights == [None, None], shares.data_ptr(),
        *((0, 0, 0, 0) if terms is None else terms[:4]),
        _at(up), 0 if up is None or up.numel() == 1 else up.stride(0), 0, 0,
        result.loss.data_ptr(), result.scores.data_ptr(), result.runner_up.data_ptr() if scores else 0,
        _at(out), *((0, 0) if out is None else out.stride()[:2]), int(in_place),
    ))  # fmt: skip
    of_tile = tile * n_classes * ((not in_place) + (terms is not None))
    work = (soft_rows.END + of_tile) * real_dtype.itemsize + 2 * ROWS * 4
    loop = _loop(element, element if given is None else NAMES[given.dtype])
    threads.run(loop, plan.buffer_info()[0], n_outer * n_inner, logits.numel(), work)
    if grad is not out:
        grad.copy_(out)
    return result, grad


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
