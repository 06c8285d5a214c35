"""Soft targets, shares of the classes: logits and target to loss, scores and what backward needs, then to the gradient.

    L = sum t_k (lse - z_k) + sum value_k        dL/dz_j = p_j M - (t_j + pull_j)        M = sum (t_k + pull_k)

M is the saved mass. Label and runner-up stand apart: forward saves their gradients. It takes one sweep where algebra
allows, two where not.

Traffic a row of V logits of b bytes and, where given, V probabilities of c bytes. Forward: a sweep reads V (b + c), the
second from cache as far as it reaches; besides, the label's logit, the runner-up's chunk, and label's and runner-up's
probabilities again; writes 4 bytes a column. Backward reads V (b + c), 5 saved columns, runner-up, target and upstream
gradient; writes V b. Class weights are read as probabilities are. Where the logsumexp is differentiated, it is one
column more, its upstream gradient another, and so are the probabilities of label and runner-up: dL/dz_j gets
``grad_lse p_j``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..formulas import class_terms
from ..formulas.scalar import tiny
from ..formulas.scores import gap_of, lse_of
from ..formulas.soft_targets import (
    Softmax,
    cross_entropy_apart,
    cross_entropy_of,
    gap_of_runner_up,
    gradient_apart,
    of_runner_up,
    softmax_of,
)
from ..results import SoftResult, empty_at_phase, empty_soft, fill_ignored
from . import class_sums, launch
from .apart import apart
from .launching import (
    FEW_VARIANTS,
    WARP_SIZE,
    Halves,
    array,
    device_guard,
    logit_kernel,
    once_a_loss,
    vector,
)
from .params import halved, widen
from .probabilities import along, probabilities
from .rows import (
    accumulable,
    chunk_classes,
    chunk_mask,
    edge_classes,
    load_classes,
    numbers_of,
    row_index,
    row_index_reversed,
    row_ptr,
    rows_at,
    store_chunks,
)
from .scores import store_scores
from .soft_sweeps import first_sweep, power_sums, second_sweep
from .soft_targets import Target, fetch_both, rows_of, shares_at, shares_in_chunks
from .tiles import chunks_of, n_all, n_plain, needs_no_mask, tiles_of_part


class Targets(NamedTuple):
    """What turns the labels of rows into shares, as kernels take it; probabilities and weights may be None."""

    label_ptr: tl.tensor
    probabilities: tl.tensor  # an Array
    weight_ptr: tl.tensor
    bonus_weight_ptr: tl.tensor


class Numbers(NamedTuple):
    """Run-time numbers of the loss, the shares and the logit options, each by its two halves."""

    loss: tl.tuple
    shares: tl.tuple
    logits: tl.tuple


@triton.jit
def target_of(targets, rows, row, numbers, like):
    """Return the Target of rows."""
    given = targets.probabilities
    return Target(
        rows_of(given, rows, row), given, targets.weight_ptr, targets.bonus_weight_ptr, widen(numbers.shares, like)
    )


@triton.jit(**FEW_VARIANTS)
def soft_forward_kernel(
    logits, targets, outputs, n_rows, ignore_index, numbers,
    TERMS: tl.constexpr, SUMS: tl.constexpr, LOGIT: tl.constexpr, POWER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program: sweep, again unless POWER says that the bonus is ``-p^gamma``, finish."""
    row = row_index(TILE.rows)
    rows = rows_at(logits, targets.label_ptr, row, n_rows, ignore_index, TILE.vector)
    like = accumulable(tl.zeros((), logits.ptr.dtype.element_ty))
    params, options = widen(numbers.loss, like), widen(numbers.logits, like)
    target = target_of(targets, rows, row, numbers, like)
    gamma = params[4] if POWER else None

    rest, paid, z_target = first_sweep(rows, target, gamma, options, LOGIT, TILE)
    gap = tl.where(rows.active, gap_of(z_target, rest), float("nan"))
    softmax = softmax_of(gap, rest)
    inside, missing = row < n_rows, tl.where(rows.active, 0.0, float("nan"))
    loss_ptr, scores_ptr, runner_up_ptr, saved_ptr, lse_ptr = outputs
    # stored first: what a second sweep need not keep
    if scores_ptr is not None:
        store_scores(scores_ptr, row, n_rows, z_target, gap, rest, missing)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, tl.where(rows.ignored, 0.0, lse_of(z_target, gap, rest)), inside)
    known = rows.active & (rest.argmax >= 0) & (rest.argmax < rows.n_classes)
    runner_up = tl.where(known, rest.argmax, 0)
    tl.store(runner_up_ptr + row, tl.where(known & (gap == gap) & (rest.max > -float("inf")), runner_up, -1), inside)
    column = saved_ptr + row
    tl.store(column, softmax.max, inside)
    column += n_rows  # one by one: a multiple may not fit 32 bits
    tl.store(column, softmax.scale, inside)

    if POWER:
        sums = power_sums(paid, rest, softmax, params[0], gamma)
    else:
        sums = second_sweep(rows, target, rest.argmax, softmax, params, options, TERMS, SUMS, LOGIT, TILE)
    of_label = apart(rows.target, rows.active, gap, target, params, TERMS)
    gap = gap_of_runner_up(z_target, rest, sums.exp)
    of_other = apart(runner_up, known, gap, target, params, TERMS)
    of_other = of_runner_up(known, of_other, of_label, softmax)
    store_row(rows, row, n_rows, of_label, of_other, sums, paid, softmax, (loss_ptr, column, lse_ptr), missing, POWER)


@triton.jit
def store_row(rows, row, n_rows, of_label, of_other, sums, paid, softmax, pointers, missing, POWER: tl.constexpr):
    """Store the loss, and all but the first two saved columns."""
    inside = row < n_rows
    loss = cross_entropy_of(paid, softmax.log_scale) + cross_entropy_apart(of_label)
    loss += sums.value + of_label.value
    mass = paid.total - of_other.share + sums.pull
    if POWER:  # its sums hold the runner-up
        mass -= of_other.pull
    else:
        loss += of_other.value

    loss_ptr, column, lse_ptr = pointers
    tl.store(loss_ptr + row, tl.where(rows.ignored, 0.0, loss + missing), inside)
    mass_of_row = mass + (of_label.pull + of_label.share) + (of_other.pull + of_other.share)
    column += n_rows
    tl.store(column, mass_of_row + missing, inside)
    column += n_rows
    tl.store(column, gradient_apart(of_label, of_other, mass), inside)
    column += n_rows
    tl.store(column, gradient_apart(of_other, of_label, mass), inside)
    if lse_ptr is not None:
        column += n_rows
        tl.store(column, of_label.p, inside)
        tl.store(column + n_rows, of_other.p, inside)


class Saved(NamedTuple):
    """What forward saved of each row [ROWS], gradients times the upstream one and with that of the logsumexp."""

    softmax: Softmax
    grad_loss: tl.tensor
    mass: tl.tensor
    at_target: tl.tensor
    runner_up: tl.tensor
    at_runner_up: tl.tensor


@triton.jit
def load_saved(saved, row, n_rows):
    """Load the Saved from the pointers (columns, runner-up, upstream gradients of loss and of logsumexp or None)."""
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
    column += n_rows
    at_runner_up = tl.load(column, inside, 0.0) * grad_loss
    if saved[3] is not None:
        grad_lse = tl.load(saved[3] + row, inside, 0.0).to(scale.dtype)
        mass += grad_lse
        column += n_rows
        at_target += tl.load(column, inside, 0.0) * grad_lse
        at_runner_up += tl.load(column + n_rows, inside, 0.0) * grad_lse
    softmax = Softmax(maximum, scale, tl.log(tl.maximum(scale, tiny(scale))))
    return Saved(softmax, grad_loss, mass, at_target, tl.load(saved[1] + row, inside, -1), at_runner_up)


@triton.jit(**FEW_VARIANTS)
def soft_backward_kernel(
    logits, targets, saved, grad, n_rows, ignore_index, numbers,
    TERMS: tl.constexpr, LOGIT: tl.constexpr, LOGIT_SLOPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows (axis 0) and a share of their tiles (axis 1)."""
    row, part, n_parts = row_index_reversed(TILE.rows), tl.program_id(1), tl.num_programs(1)
    rows = rows_at(logits, targets.label_ptr, row, n_rows, ignore_index, TILE.vector)
    saved = load_saved(saved, row, n_rows)
    params, options = widen(numbers.loss, saved.mass), widen(numbers.logits, saved.mass)
    target = target_of(targets, rows, row, numbers, saved.mass)
    out_ptr, out_class_stride = row_ptr(grad, row), grad.class_stride
    inside = row < n_rows
    LANES: tl.constexpr = TILE.lanes

    tiles = tiles_of_part(rows, (rows.target, saved.runner_up), part, n_parts, TILE, needs_no_mask(TILE))
    read = rows.active & inside
    n, chunk = n_all(tiles), chunks_of(tiles, 0, LANES)
    raw, given = fetch_both(rows, target, chunk, read & (n > 0), TILE.vector)
    start = 0
    if needs_no_mask(TILE):
        start = tl.maximum(n_plain(tiles) - 1, 0)
        for i in range(start):
            after = chunks_of(tiles, i + 1, LANES, True)
            raw_ahead, given_ahead = fetch_both(rows, target, after, None, TILE.vector)
            x = numbers_of(raw, rows)
            shares = shares_in_chunks(target, given, chunk, None, x)
            x = gradient_of_others(x, shares, saved, params, options, TERMS, LOGIT) * LOGIT_SLOPE(x, options)
            store_chunks(out_ptr, out_class_stride, rows, chunk, x, None, TILE.vector)
            raw, given, chunk = raw_ahead, given_ahead, after

    for i in range(start, n):
        after = chunks_of(tiles, i + 1, LANES)
        raw_ahead, given_ahead = fetch_both(rows, target, after, read & (i + 1 < n), TILE.vector)
        mask = chunk_mask(rows, chunk, read, TILE.vector)
        x = numbers_of(raw, rows)
        shares, slope = shares_in_chunks(target, given, chunk, mask, x), LOGIT_SLOPE(x, options)
        x = gradient_of_others(x, shares, saved, params, options, TERMS, LOGIT)
        x = with_apart(x, chunk_classes(rows, chunk), rows, saved) * slope
        mask = inside if TILE.vector == 0 else chunk_mask(rows, chunk, inside, TILE.vector)
        store_chunks(out_ptr, out_class_stride, rows, chunk, x, mask, TILE.vector)
        raw, given, chunk = raw_ahead, given_ahead, after

    if TILE.vector > 0:
        if part == 0:
            write_edge((out_ptr, out_class_stride), rows, target, saved, inside, params, options,
                       TERMS, LOGIT, LOGIT_SLOPE)  # fmt: skip


@triton.jit
def write_edge(
    out, rows, target, saved, inside, params, options,
    TERMS: tl.constexpr, LOGIT: tl.constexpr, LOGIT_SLOPE: tl.constexpr,
):  # fmt: skip
    out_ptr, out_class_stride = out
    classes = edge_classes(rows)
    mask = (classes < rows.n_classes) & inside[:, None]
    x = accumulable(load_classes(rows, classes, mask & rows.active[:, None]))
    shares, slope = shares_at(target, classes, mask & rows.active[:, None], x), LOGIT_SLOPE(x, options)
    x = with_apart(gradient_of_others(x, shares, saved, params, options, TERMS, LOGIT), classes, rows, saved) * slope
    at = out_ptr[:, None] + classes.to(tl.int64) * out_class_stride
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def gradient_of_others(raw, shares, saved, params, options, TERMS: tl.constexpr, LOGIT: tl.constexpr):
    """Return dL/dz of raw numbers [ROWS, ...] that are of neither label nor runner-up."""
    z = LOGIT(raw, options)
    t, v = shares
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
    logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any, scores: bool, options: Any = None,
    lse: bool = False,
) -> SoftResult:  # fmt: skip
    """Return the results of each row; ``targets`` turn the labels [outer, inner] into shares."""
    out = empty_soft(logits, scores, lse)
    n_rows, n_classes = out.loss.numel(), logits.shape[2]
    if n_rows == 0 or n_classes == 0:
        fill_ignored(out)
        return out
    kernel, by = class_kernel(loss), _vector(targets, logits)
    how = launch.soft_forward(n_classes, WARP_SIZE, by)
    with device_guard(logits):
        soft_forward_kernel[(-(-n_rows // how.rows),)](
            **_rows(logits, label, targets, ignore_index, loss, options),
            outputs=(out.loss, out.scores if scores else None, out.runner_up, out.saved, out.lse if lse else None),
            TERMS=kernel.terms, SUMS=kernel.sums, POWER=kernel.is_power, TILE=how.tile(by), num_warps=how.num_warps,
        )  # fmt: skip
    return out


def backward(
    logits: Tensor, label: Tensor, targets: Any, saved: Tensor, runner_up: Tensor, grad_loss: Tensor,
    ignore_index: int, loss: Any, out: Tensor | None = None, options: Any = None, grad_lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradients [N] of each row's loss and logsumexp.

    It is written to ``out``, where that is given: it may be the logits.
    """
    grad = empty_at_phase(logits) if out is None else out
    n_rows, n_classes = runner_up.numel(), logits.shape[2]
    if grad.numel() == 0:
        return grad
    kernel, by = class_kernel(loss), _vector(targets, logits, grad)
    how = launch.soft_backward(n_classes, WARP_SIZE, by)
    from_forward = saved, runner_up, grad_loss.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    with device_guard(logits):
        soft_backward_kernel[(-(-n_rows // how.rows), how.parts)](
            **_rows(logits, label, targets, ignore_index, loss, options), saved=from_forward,
            grad=array(grad), TERMS=kernel.terms_below_half, LOGIT_SLOPE=logit_kernel(options).slope,
            TILE=how.tile(by), num_warps=how.num_warps,
        )  # fmt: skip
    return grad


def _rows(logits: Tensor, label: Tensor, targets: Any, ignore_index: int, loss: Any, options: Any) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    n_classes, given, made = logits.shape[2], targets.probabilities, logit_kernel(options)
    t, v = targets.of_cross_entropy(n_classes), targets.of_bonus(n_classes)
    of_t = (t.keep, t.off) if loss.adds_to_cross_entropy else (0.0, 0.0)
    weights = (None if w is None else w.contiguous() for w in (t.weight, v.weight))
    shares = halved((*of_t, v.keep, v.off))
    return dict(
        logits=array(logits), targets=Targets(label.contiguous(), None if given is None else array(given), *weights),
        n_rows=logits.shape[0] * logits.shape[1], ignore_index=ignore_index,
        numbers=Numbers(class_kernel(loss).params, shares, made.options), LOGIT=made.value,
    )  # fmt: skip


def _vector(targets: Any, *tensors: Tensor) -> int:
    """Return how chunks of all tensors are read, see `vector`."""
    given = targets.probabilities
    if given is not None and given.dtype != tensors[0].dtype:
        by = vector(*tensors), vector(given)
        return 0 if by == (0, 0) else 1
    return vector(*tensors) if given is None else vector(*tensors, given)
