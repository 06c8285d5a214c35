"""Forward of targets that are shares of classes: by one sweep where algebra allows, by two where not.

    L = sum t_k (lse - z_k) + sum value_k

Traffic a row of V logits of b bytes and, where given, V probabilities of c bytes: a sweep reads V (b + c), the second
from cache as far as it reaches. Besides, the label's logit, the runner-up's chunk, and label's and runner-up's
probabilities again. Class weights are read as probabilities are. Writes 4 bytes a column.
"""

import triton
import triton.language as tl

from .apart import apart, cross_entropy_apart, gap_of_runner_up, gradient_apart, where_known
from .dense_sweeps import first_sweep, power_sums, second_sweep
from .forward import widen
from .paid import cross_entropy_of
from .probabilities import softmax_of
from .rows import load, row_index, rows_at
from .scores import gap_of, store_scores
from .shares import Target, rows_of


@triton.jit
def dense_forward_kernel(
    logits_ptr, targets, outputs, shape, strides, ignore_index, loss_params, TERMS: tl.constexpr, SUMS: tl.constexpr,
    POWER: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Whole rows, several a program: sweep, again unless POWER says that the bonus is ``-p^gamma``, finish.

    ``targets`` are label, probabilities, weight, bonus weight, strides of the probabilities and the params of shares.
    """
    n_rows, n_classes, class_stride = shape[0], shape[1], strides[2]
    row = row_index(ROWS)
    rows = rows_at(logits_ptr, targets[0], row, shape, strides, ignore_index, VECTOR)
    z_target = load(rows.ptr + rows.target.to(tl.int64) * class_stride, rows.active)
    params = widen(loss_params[0], loss_params[1], z_target)
    share_params = widen(targets[5][0], targets[5][1], z_target)
    of_target = rows_of(targets[1], rows, row, shape[2], targets[4])
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
    tl.store(column + n_rows, softmax.scale, inside)

    if POWER:
        sums = power_sums(paid, rest, softmax, params[0], gamma)
    else:
        sums = second_sweep(
            rows, target, rest.argmax, softmax, n_classes, class_stride, params, TERMS, SUMS, ROWS, LANES, VECTOR
        )
    of_label = apart(rows.target, rows.active, gap, target, params, TERMS)
    gap = gap_of_runner_up(z_target, rest, sums.exp)
    of_runner_up = where_known(known, apart(runner_up, known, gap, target, params, TERMS))
    loss = cross_entropy_of(paid, softmax.log_scale) + cross_entropy_apart(of_label)
    loss += sums.value + of_label.value
    mass = paid.total - of_runner_up.share + sums.pull
    if POWER:  # its sums hold the runner-up
        mass -= of_runner_up.pull
    else:
        loss += of_runner_up.value

    tl.store(loss_ptr + row, tl.where(rows.ignored, 0.0, loss + missing), inside)
    mass_of_row = mass + (of_label.pull + of_label.share) + (of_runner_up.pull + of_runner_up.share)
    tl.store(column + 2 * n_rows, mass_of_row + missing, inside)
    tl.store(column + 3 * n_rows, gradient_apart(of_label, of_runner_up, mass), inside)
    tl.store(column + 4 * n_rows, gradient_apart(of_runner_up, of_label, mass), inside)
