"""Soft targets, shares of the classes: logits and target to loss, scores and what backward needs, then to the gradient.

    L = sum t_k (lse - z_k) + sum value_k        dL/dz_j = p_j M - (t_j + pull_j)        M = sum (t_k + pull_k)

M is the saved mass. Label and runner-up stand apart: forward saves their gradients. It takes one sweep where algebra
allows, two where not.

Traffic a row of V logits of b bytes and, where given, V probabilities of c bytes. Forward: a sweep reads V (b + c), the
second from cache as far as it reaches; besides, the label's logit, the runner-up's chunk, and label's and runner-up's
probabilities again; writes 4 bytes a column. Backward reads V (b + c), 5 saved columns, runner-up, target and upstream
gradient; writes V b. Class weights are read as probabilities are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import class_terms
from ..formulas.scalar import tiny
from ..formulas.scores import gap_of
from ..formulas.soft_targets import (
    Softmax,
    cross_entropy_apart,
    cross_entropy_of,
    gap_of_runner_up,
    gradient_apart,
    of_runner_up,
    softmax_of,
)
from ..results import SoftResult, empty_soft, fill_ignored
from . import class_sums, launch
from .apart import apart
from .launching import FEW_VARIANTS, WARP_SIZE, Halves, device_guard, once_a_loss, vector
from .params import halved, widen
from .probabilities import along, probabilities
from .rows import (
    chunk_classes,
    chunk_mask,
    edge_classes,
    load,
    load_chunks,
    load_classes,
    row_index,
    row_ptr,
    rows_at,
    store_chunks,
)
from .scores import store_scores
from .soft_sweeps import first_sweep, power_sums, second_sweep
from .soft_targets import Target, rows_of, shares_at, shares_in_chunks
from .tiles import masked, n_masked, n_segments, needs_no_mask, segment, tiles_of_program


@triton.jit(**FEW_VARIANTS)
def soft_forward_kernel(
    logits_ptr, targets, outputs, n_rows, shape, strides, ignore_index, loss_params,
    TERMS: tl.constexpr, SUMS: tl.constexpr, POWER: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program: sweep, again unless POWER says that the bonus is ``-p^gamma``, finish.

    ``targets`` are label, probabilities, weight, bonus weight, strides of the probabilities and the params of shares.
    """
    n_classes, class_stride = shape[1], strides[2]
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, targets[0], row, n_rows, shape, strides, ignore_index, VECTOR)
    z_target = load(rows.ptr + rows.target.to(tl.int64) * class_stride, rows.active)
    params = widen(loss_params[0], loss_params[1], z_target)
    share_params = widen(targets[5][0], targets[5][1], z_target)
    of_target = rows_of(targets[1], rows, row, shape[0], targets[4])
    target = Target(of_target, targets[1], targets[4][2], targets[2], targets[3], share_params)
    gamma = params[4] if POWER else None

    rest, paid = first_sweep(rows, target, n_classes, class_stride, gamma, ROWS, LANES, VECTOR)
    gap = tl.where(rows.active, gap_of(z_target, rest), float("nan"))
    softmax = softmax_of(gap, rest)
    inside, missing = row < n_rows, tl.where(rows.active, 0.0, float("nan"))
    loss_ptr, scores_ptr, runner_up_ptr, saved_ptr = outputs
    # stored first: what a second sweep need not keep
    if scores_ptr is not None:
        store_scores(scores_ptr, row, n_rows, z_target, gap, rest, missing)
    known = rows.active & (rest.argmax >= 0) & (rest.argmax < n_classes)
    runner_up = tl.where(known, rest.argmax, 0)
    tl.store(runner_up_ptr + row, tl.where(known & (gap == gap) & (rest.max > -float("inf")), runner_up, -1), inside)
    column = saved_ptr + row
    tl.store(column, softmax.max, inside)
    column += n_rows  # one by one: a multiple may not fit 32 bits
    tl.store(column, softmax.scale, inside)

    if POWER:
        sums = power_sums(paid, rest, softmax, params[0], gamma)
    else:
        sums = second_sweep(
            rows, target, rest.argmax, softmax, n_classes, class_stride, params, TERMS, SUMS, ROWS, LANES, VECTOR
        )
    of_label = apart(rows.target, rows.active, gap, target, params, TERMS)
    gap = gap_of_runner_up(z_target, rest, sums.exp)
    of_other = apart(runner_up, known, gap, target, params, TERMS)
    of_other = of_runner_up(known, of_other, of_label, softmax)
    loss = cross_entropy_of(paid, softmax.log_scale) + cross_entropy_apart(of_label)
    loss += sums.value + of_label.value
    mass = paid.total - of_other.share + sums.pull
    if POWER:  # its sums hold the runner-up
        mass -= of_other.pull
    else:
        loss += of_other.value

    tl.store(loss_ptr + row, tl.where(rows.ignored, 0.0, loss + missing), inside)
    mass_of_row = mass + (of_label.pull + of_label.share) + (of_other.pull + of_other.share)
    column += n_rows
    tl.store(column, mass_of_row + missing, inside)
    column += n_rows
    tl.store(column, gradient_apart(of_label, of_other, mass), inside)
    tl.store(column + n_rows, gradient_apart(of_other, of_label, mass), inside)


class Saved(NamedTuple):
    """What forward saved of each row [ROWS], gradients times the upstream one."""

    softmax: Softmax
    grad_loss: tl.tensor
    mass: tl.tensor
    at_target: tl.tensor
    runner_up: tl.tensor
    at_runner_up: tl.tensor


@triton.jit
def load_saved(saved, row, n_rows):
    """Load the Saved from the pointers (columns, runner-up, upstream gradient)."""
    inside = row < n_rows
    column = saved[0] + row
    maximum = tl.load(column, inside, 0.0)
    column += n_rows  # one by one: a multiple may not fit 32 bits
    scale = tl.load(column, inside, 0.0)
    grad_loss = tl.load(saved[2] + row, inside, 0.0).to(scale.dtype)
    column += n_rows
    mass = tl.load(column, inside, 0.0) * grad_loss
    column += n_rows
    at_target = tl.load(column, inside, 0.0) * grad_loss
    at_runner_up = tl.load(column + n_rows, inside, 0.0) * grad_loss
    softmax = Softmax(maximum, scale, tl.log(tl.maximum(scale, tiny(scale))))
    return Saved(softmax, grad_loss, mass, at_target, tl.load(saved[1] + row, inside, -1), at_runner_up)


@triton.jit(**FEW_VARIANTS)
def soft_backward_kernel(
    logits_ptr, targets, saved, grad_ptr, n_rows, shape, strides, grad_strides, ignore_index,
    loss_params,
    TERMS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1)."""
    n_classes = shape[1]
    row = row_index(ROWS)
    inside = row < n_rows
    rows = rows_at(logits_ptr, targets[0], row, n_rows, shape, strides, ignore_index, VECTOR)
    saved = load_saved(saved, row, n_rows)
    params = widen(loss_params[0], loss_params[1], saved.mass)
    share_params = widen(targets[5][0], targets[5][1], saved.mass)
    of_target = rows_of(targets[1], rows, row, shape[0], targets[4])
    target = Target(of_target, targets[1], targets[4][2], targets[2], targets[3], share_params)
    out = row_ptr(grad_ptr, row, shape[0], grad_strides)

    tiles = tiles_of_program(rows, (rows.target, saved.runner_up), n_classes, ROWS, LANES, VECTOR)
    lane, class_strides = tl.arange(0, LANES)[None, :], (strides[2], grad_strides[2])
    if needs_no_mask(ROWS, VECTOR):
        for i in range(n_segments(tiles)):
            start, stop = segment(tiles, i)
            for tile in range(start, stop):
                write_tile(out, rows, target, saved, inside, tile * LANES + lane, class_strides, params, TERMS,
                           False, VECTOR)  # fmt: skip
    for i in range(n_masked(tiles)):
        chunk = masked(tiles, i) * LANES + lane
        write_tile(out, rows, target, saved, inside, chunk, class_strides, params, TERMS, True, VECTOR)
    if tl.program_id(1) == 0:
        classes = edge_classes(rows)
        mask = (classes < n_classes) & inside[:, None]
        z = load_classes(rows, classes, mask & rows.active[:, None], strides[2])
        t, v = shares_at(target, classes, mask & rows.active[:, None], z)
        x = with_apart(gradient_of_others(z, t, v, saved, params, TERMS), classes, rows, saved)
        tl.store(out[:, None] + classes.to(tl.int64) * grad_strides[2], x.to(grad_ptr.dtype.element_ty), mask)


@triton.jit
def write_tile(
    out, rows, target, saved, inside, chunk, class_strides, params, TERMS: tl.constexpr, MASKED: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    class_stride, out_class_stride = class_strides
    mask, active = None, None
    if MASKED:
        mask, classes = chunk_mask(rows, chunk, inside), chunk_classes(rows, chunk)
        active = mask & rows.active[:, None, None]
    z = load_chunks(rows, chunk, active, class_stride, VECTOR)
    t, v = shares_in_chunks(target, chunk, active, z, VECTOR)
    x = gradient_of_others(z, t, v, saved, params, TERMS)
    if MASKED:
        x = with_apart(x, classes, rows, saved)
    store_chunks(out, rows, chunk, x, mask, out_class_stride, VECTOR)


@triton.jit
def gradient_of_others(z, t, v, saved, params, TERMS: tl.constexpr):
    """Return the gradient of classes [ROWS, ...] that are neither label nor runner-up."""
    _, p, log_p = probabilities(saved.softmax, z, None)
    _, pull = TERMS(p, 1.0 - p, log_p, log_p, v, params)
    return p * along(saved.mass, z) - along(saved.grad_loss, z) * (t + pull)


@triton.jit
def with_apart(x, classes, rows, saved):
    """Put the gradients of label and runner-up where they belong; an ignored row has none."""
    x = tl.where(classes == along(saved.runner_up, x), along(saved.at_runner_up, x), x)
    x = tl.where(classes == along(rows.target, x), along(saved.at_target, x), x)
    return tl.where(along(rows.ignored, x), 0.0, x)


# --- launches, of rows [outer, inner, C] ------------------------------------------------------------------------------


class ClassKernel(NamedTuple):
    """A loss of all classes as kernels take it."""

    terms: Any  # jit functions: of a class, of one with p <= 1/2, and sums of these
    terms_below_half: Any
    sums: Any
    params: Halves
    is_power: bool  # of p and without a window: one sweep does


@once_a_loss
def class_kernel(loss: Any) -> ClassKernel:
    """Return the jit functions and numbers of a loss."""
    kernel, below_half, params = class_terms.terms_of(loss)
    return ClassKernel(
        getattr(class_terms, f"{kernel}_terms"),
        getattr(class_terms, f"{below_half}_terms"),
        getattr(class_sums, f"{below_half}_sums", class_sums.sums_of_terms),
        halved(params),
        kernel == "power_bonus" and not class_terms.has_window(params),
    )


def forward(
    logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any, scores: bool, options: Any = None
) -> SoftResult:
    """Return the results of each row; ``targets`` turn the labels [outer, inner] into shares.

    ``options`` are those of logits as they are: `Call` sends no others here.
    """
    out = empty_soft(logits, scores)
    n_rows, n_classes = out.loss.numel(), logits.shape[2]
    if n_rows == 0 or n_classes == 0:
        fill_ignored(out)
        return out
    kernel, how = class_kernel(loss), launch.soft_forward(n_classes, WARP_SIZE)
    with device_guard(logits):
        soft_forward_kernel[(-(-n_rows // how.rows),)](
            **_rows(logits, label, targets, ignore_index, loss),
            outputs=(out.loss, out.scores if scores else None, out.runner_up, out.saved), loss_params=kernel.params,
            TERMS=kernel.terms, SUMS=kernel.sums, POWER=kernel.is_power, ROWS=how.rows, LANES=how.lanes,
            VECTOR=_vector(targets, logits), num_warps=how.num_warps,
        )  # fmt: skip
    return out


def backward(
    logits: Tensor, label: Tensor, targets: Any, saved: Tensor, runner_up: Tensor, grad_loss: Tensor,
    grad_lse: None, ignore_index: int, loss: Any, options: Any = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradient [N] of each row's loss.

    It is written to ``out``, where that is given: it may be the logits.
    """
    grad = torch.empty_like(logits) if out is None else out
    n_rows, n_classes = runner_up.numel(), logits.shape[2]
    if grad.numel() == 0:
        return grad
    kernel, how = class_kernel(loss), launch.soft_backward(n_classes, WARP_SIZE)
    with device_guard(logits):
        soft_backward_kernel[(-(-n_rows // how.rows), how.parts)](
            **_rows(logits, label, targets, ignore_index, loss), saved=(saved, runner_up, grad_loss.contiguous()),
            grad_ptr=grad, grad_strides=grad.stride(), loss_params=kernel.params, TERMS=kernel.terms_below_half,
            ROWS=how.rows, LANES=how.lanes, VECTOR=_vector(targets, logits, grad), num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _rows(logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    n_outer, n_inner, n_classes = logits.shape
    given = targets.probabilities
    t, v = targets.of_cross_entropy(n_classes), targets.of_bonus(n_classes)
    of_t = (t.keep, t.off) if loss.adds_to_cross_entropy else (0.0, 0.0)
    weights = (None if w is None else w.contiguous() for w in (t.weight, v.weight))
    strides = logits.stride() if given is None else given.stride()
    return dict(
        logits_ptr=logits, targets=(label.contiguous(), given, *weights, strides, halved((*of_t, v.keep, v.off))),
        n_rows=n_outer * n_inner, shape=(n_inner, n_classes), strides=logits.stride(), ignore_index=ignore_index,
    )  # fmt: skip


def _vector(targets: Any, *tensors: Tensor) -> int:
    """Return elements in 16 bytes if all tensors can be walked by such vectors from one common head, else 1."""
    given = targets.probabilities
    if given is not None and given.dtype != tensors[0].dtype:
        return 1
    return vector(*tensors) if given is None else vector(*tensors, given)
