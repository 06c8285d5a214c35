"""Soft targets on a CPU: what `gpu.soft` computes, by loops over rows that stay in cache (`soft_rows`).

Logits whose classes lie apart are copied first. Traffic a row of V logits of b bytes and V probabilities of c bytes:
reads V (b + c), writes V b.
"""

from __future__ import annotations

import functools
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..results import SoftResult, empty_soft, fill_ignored
from . import rows, soft_rows, stored, threads
from .elements import NAMES, address_of, real_of, record_of, strided
from .labels import bound_options
from .losses import terms_of
from .tile import PAD, ROWS

__all__ = ["forward", "backward", "visit"]


@functools.cache
def _loop(element: str, given: str, of_logit: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        bound = bound_options(rows, of_logit) | {"Plan": record_of(soft_rows.Plan), "MORE": True}
        return module_of(soft_rows.visit_loop, element, bound, given)

    name = f"soft_{element}_{given}_{of_logit}"
    return stored.entry(4, name, name, make)


# --- what the library calls -------------------------------------------------------------------------------------------


class Visited(NamedTuple):
    """What a visit returns; None where it was not asked for."""

    result: SoftResult  # whose `saved` is not written: a second visit needs nothing of the first
    grad: Any  # as the logits


def forward(
    logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any, scores: bool, options: Any, lse: bool
) -> SoftResult:
    """Return loss, scores and logsumexp of rows [outer, inner, C]; nothing is saved."""
    out = visit(logits, label, targets, ignore_index, loss, scores, None, options, lse=lse).result
    out.saved.zero_()
    return out._replace(runner_up=out.runner_up if scores else out.runner_up.zero_())


def backward(
    logits: Tensor, label: Tensor, targets: Any, saved: Tensor, runner_up: Tensor, grad_loss: Tensor, ignore_index: int,
    loss: Any, options: Any, grad_lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient from the upstream gradients [N] or [1] of loss and logsumexp, by another visit."""
    row = (ignore_index, loss, False, grad_loss, options)
    grad: Tensor = visit(logits, label, targets, *row, grad_lse=grad_lse).grad
    return grad


def visit(
    logits: Tensor, label: Tensor | None, targets: Any, ignore_index: int, loss: Any, scores: bool,
    upstream: Tensor | None, options: Any, z_factor: float = 0.0, grad_lse: Tensor | None = None,
    out: Tensor | None = None, lse: bool = False,
) -> Visited:  # fmt: skip
    """Return loss and scores, the logsumexp for ``lse`` or a ``z_factor``, the gradient for an upstream one [N] or [1].

    It is written to ``out``, where that is given: it may be the logits, whose classes then lie side by side. ``label``
    [outer, inner] is not looked at where probabilities are given: theirs is the largest. ``z_factor`` times
    the squared logsumexp of every row is added to what the gradient is of, times its ``grad_lse`` [N] where that is
    given; without a factor, ``grad_lse`` is the upstream gradient of the logsumexp itself.
    """
    result = empty_soft(logits, scores, lse or z_factor != 0)
    grad = None if upstream is None else torch.empty_like(logits) if out is None else out
    n_outer, n_inner, n_classes = logits.shape
    if not logits.numel():
        fill_ignored(result)
        return Visited(result, grad)
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
    numbers = torch.tensor((*options.numbers(), 2 * z_factor), dtype=real_dtype, device="cpu")
    up, of_lse = (None if x is None else x.to(real_dtype) for x in (upstream, grad_lse))
    in_place = out is not None and out.data_ptr() != z.data_ptr() and logits.element_size() == real_dtype.itemsize
    tile = min(max((1 << 15) // n_classes, 1), PAD)
    plan = array("q", soft_rows.Plan(
        n_outer * n_inner, n_inner, n_classes, tile, z.data_ptr(), *z.stride()[:2],
        address_of(label), ignore_index, address_of(given), *((0, 0) if given is None else given.stride()[:2]),
        *map(address_of, weights), given is None and weights == [None, None], shares.data_ptr(),
        *((0, 0, 0, 0) if terms is None else terms[:4]), numbers.data_ptr(), *strided(up), *strided(of_lse),
        result.loss.data_ptr(), result.lse.data_ptr(), result.scores.data_ptr(),
        result.runner_up.data_ptr() if scores else 0,
        address_of(out), *((0, 0) if out is None else out.stride()[:2]), int(in_place),
    ))  # fmt: skip
    of_tile = tile * n_classes * ((not in_place) + (terms is not None))
    work = (soft_rows.END + of_tile) * real_dtype.itemsize + 2 * ROWS * 4
    loop = _loop(element, element if given is None else NAMES[given.dtype], options.kernel)
    threads.run(loop, plan.buffer_info()[0], n_outer * n_inner, logits.numel(), work)
    if grad is not out:
        grad.copy_(out)
    return Visited(result, grad)
