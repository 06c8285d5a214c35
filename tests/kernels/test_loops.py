"""The loops of a CPU against float64, on one thread and on several, in one tile and in many, and what they hold."""

from __future__ import annotations

import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import (
    LogBonus,
    PowerBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    reference,
)
from bonus_ops.losses import CrossEntropy
from tests.cases import FLOATS, LAYOUTS, REGIMES, generator, masked, regimes_of, typical
from tests.threads import several_threads

CLASS_COUNTS = (1, 2, 10, 64, 65, 255, 256, 1000, 5000)
ROWS = [  # vectors end elsewhere with every count of classes; threads and losses share what each dtype compiles to
    pytest.param(threads, dtype, n_classes, bonus, id=f"{threads}-dtype{i}-{n_classes}-{'bonus' if bonus else 'plain'}")
    for threads in ("one thread", "several threads")
    for i, dtype in enumerate(FLOATS)
    for n_classes in CLASS_COUNTS
    for bonus in (None, LogBonus())
    if threads == "one thread"
    and dtype == torch.float32
    or bonus
    and n_classes in (64, 255, 1000)
    and (threads == "one thread" or dtype == torch.float32)
]


@pytest.fixture(params=["one thread", "several threads"])
def shared(request):
    """Run once as shipped, where these cases are worth one thread, and once with shares of a few rows."""
    with several_threads(3 if request.param == "several threads" else 1):
        yield


def truth_of(logits: Tensor, target: Tensor, bonus) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of each row in float64, from the logits as rounded."""
    wide, loss = logits.double(), bonus or CrossEntropy()
    grad_loss = torch.ones(target.shape, dtype=torch.float64, device=logits.device)
    return (
        reference.rows(wide, target, -100, loss),
        reference.gradient(wide, target, -100, loss, grad_loss),
    )


def assert_rounded_from(actual: Tensor, truth: Tensor, dtype: torch.dtype, steps: Tensor, what: str) -> None:
    """Fail unless ``actual`` is the truth to ``steps`` units of the accumulation dtype, rounded once to ``dtype``."""
    accumulation = torch.finfo(reference.accumulation_dtype(dtype))
    allowed = accumulation.eps * steps * truth.abs() + accumulation.smallest_normal
    if dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(dtype)
        allowed = allowed + 0.51 * info.eps * truth.abs() + info.smallest_normal * info.eps
    same = (actual.double() == truth) | (actual.isnan() & truth.isnan())
    excess = ((actual.double() - truth).abs() / allowed).masked_fill(same, 0.0)
    assert (excess <= 1).all(), f"{what}: {excess.max().item():.3g} times the allowed error"


def rounding_steps(logits: Tensor) -> Tensor:
    """Return [N, 1] units in the last place: exp rounds relative to its argument, at most the spread of the row."""
    wide = logits.double()
    spread = wide.amax(1, keepdim=True) - wide.masked_fill(wide == -math.inf, math.inf).amin(1, keepdim=True)
    return 8 + 1.5 * spread


@pytest.mark.parametrize(("shared", "dtype", "n_classes", "bonus"), ROWS, indirect=["shared"])
def test_rows_and_gradients_are_float64_truth_rounded_once(bonus, n_classes, dtype, shared):
    n_rows = 8 if n_classes > 1000 else 23
    for regime in regimes_of(dtype):
        logits, target = REGIMES[regime](generator(n_classes), n_rows, n_classes, dtype)
        target[5] = -100
        truth, true_grad = truth_of(logits, target, bonus)
        steps = rounding_steps(logits)
        # a value with a bonus may cross zero, where it is exact to the size of its two terms
        near_zero = steps[:, 0] * (1 if bonus is None else (truth.abs() + 2.5) / truth.abs().clamp(min=1e-6))

        leaf = logits.clone().requires_grad_()
        rows = bonus_cross_entropy(leaf, target, reduction="none", bonus=bonus, implementation="numba")
        (grad,) = torch.autograd.grad(rows.sum(), leaf)
        assert rows.dtype == grad.dtype == dtype
        assert_rounded_from(rows, truth, dtype, near_zero, f"{regime}: rows")
        assert_rounded_from(grad, true_grad, dtype, steps, f"{regime}: gradient of the rows")

        total = bonus_cross_entropy(leaf, target, reduction="sum", bonus=bonus, implementation="numba")
        (grad,) = torch.autograd.grad(total, leaf)
        assert_rounded_from(grad, true_grad, dtype, steps, f"{regime}: gradient of the sum")
        size = (near_zero * truth.abs()).sum() / truth.sum().abs()
        assert_rounded_from(total, truth.sum(), dtype, size + n_rows, f"{regime}: sum")

        n_counted = (target != -100).sum()
        mean = bonus_cross_entropy(leaf, target, bonus=bonus, implementation="numba")
        (grad,) = torch.autograd.grad(mean, leaf)
        assert_rounded_from(grad, true_grad / n_counted, dtype, steps + 2, f"{regime}: gradient of the mean")
        assert_rounded_from(mean, truth.sum() / n_counted, dtype, size + n_rows + 2, f"{regime}: mean")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize(
    ("reduction", "dtype", "n_classes"),
    [
        pytest.param("none", torch.float32, 3, id="none-dtype0-3"),
        pytest.param("sum", torch.float32, 65, id="sum-dtype0-65"),
        pytest.param("none", torch.bfloat16, 65, id="none-dtype1-65"),
        pytest.param("sum", torch.bfloat16, 300, id="sum-dtype1-300"),
    ],
)
def test_layouts_threads_and_unwritten_memory_change_nothing(layout, n_classes, dtype, reduction, shared, poison):
    logits, target = typical(generator(2), 31, n_classes, dtype)
    logits = LAYOUTS[layout](logits)
    truth, true_grad = truth_of(logits, target, LogBonus())
    leaf = logits.detach().requires_grad_()
    loss, scores, probabilities = bonus_cross_entropy_with_softmax(leaf, target, implementation="numba")
    loss = bonus_cross_entropy(leaf, target, reduction=reduction, implementation="numba")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    steps = rounding_steps(logits)
    assert_rounded_from(grad, true_grad, dtype, steps, "gradient")
    assert_rounded_from(probabilities, logits.double().softmax(1), dtype, steps, "softmax")
    torch.testing.assert_close(loss.double().sum(), truth.sum(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    for column, expected in zip(scores, reference.scores(logits, target, -100), strict=True):
        torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(7, 3, 5), (2, 70, 11), (3, 200, 4), (1, 5, 2), (5, 12, 3, 4), (2, 19, 25, 23), (3, 2, 1300), (301, 2, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_inner_axes_are_rows_like_any_other(shape, dtype, channels_last, shared, poison):
    logits = 3 * torch.randn(shape).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::7] = -100
    if channels_last:  # classes lie side by side
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    flat = logits.movedim(1, -1).reshape(-1, shape[1])
    truth, true_grad = truth_of(flat, target.reshape(-1), LogBonus())
    for reduction in ("sum", "none"):
        leaf = logits.detach().requires_grad_()
        loss = bonus_cross_entropy(leaf, target, reduction=reduction, implementation="numba")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert_rounded_from(
            grad.movedim(1, -1).reshape(-1, shape[1]), true_grad, dtype, rounding_steps(flat), reduction
        )
    _, scores = bonus_cross_entropy_with_scores(logits, target, implementation="numba")
    for column, expected in zip(scores, reference.scores(flat, target.reshape(-1), -100), strict=True):
        torch.testing.assert_close(column.reshape(-1), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("n_classes", [10, 130, 131, 1000])
def test_the_runner_up_is_the_lowest_index_of_many_ties(n_classes, shared):
    """Long rows are searched block by block, the last block shorter than the others."""
    for place in (0, 1, n_classes // 2, n_classes - 2, n_classes - 1):
        logits = torch.zeros(n_classes, n_classes)
        logits[:, place] = logits[:, -1] = 1.0  # labels run over every class
        logits[: n_classes // 2, 0] = 1.0
        target = torch.arange(n_classes)
        _, scores = bonus_cross_entropy_with_scores(logits, target, implementation="numba")
        expected = logits.masked_fill(torch.eye(n_classes, dtype=torch.bool), -math.inf).argmax(1)
        assert torch.equal(scores.runner_up.long(), expected)


@pytest.mark.parametrize("target", [torch.full((4,), -100), torch.zeros(4, 0)], ids=["ignored", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_rows_without_classes_cost_nothing_and_have_no_scores(target, options, poison):
    loss, scores = bonus_cross_entropy_with_scores(
        torch.zeros(4, 0, requires_grad=True), target, reduction="none", implementation="numba", **options
    )
    assert loss.tolist() == [0.0] * 4 and scores.runner_up.tolist() == [-1] * 4
    assert all(column.isnan().all() for column in scores[:-1])


@pytest.mark.parametrize("n_classes", [5, 70, 500])
def test_masked_classes_get_no_gradient_and_spoil_nothing(n_classes, shared):
    logits, target = masked(generator(3), 40, n_classes, torch.float32)
    out = logits == -math.inf
    assert out.any()
    for reduction in ("sum", "none"):
        leaf = logits.clone().requires_grad_()
        loss, scores = bonus_cross_entropy_with_scores(leaf, target, reduction=reduction, implementation="numba")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert (grad[out] == 0).all() and grad.isfinite().all() and loss.isfinite().all()
        assert all(column.isfinite().all() for column in (scores.loss, scores.el2n, scores.entropy, scores.energy))


@pytest.mark.parametrize("target_type", ["labels", "smoothing", "probabilities"])
@pytest.mark.parametrize("n_classes", [131, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_target_is_float64_truth(target_type, n_classes, dtype, shared):
    logits, label = typical(generator(n_classes), 9, n_classes, dtype)
    options = {"label_smoothing": 0.1} if target_type == "smoothing" else {}
    target = (
        torch.randn_like(logits, dtype=torch.float32).softmax(1).to(dtype) if target_type == "probabilities" else label
    )
    found = []
    for z, t, implementation in ((logits, target, "numba"), (logits.double(), target, "reference")):
        leaf = z.clone().requires_grad_()
        t = t.to(z.dtype) if t.is_floating_point() else t
        loss, scores = bonus_cross_entropy_with_scores(leaf, t, implementation=implementation, **options)
        found.append((loss, torch.autograd.grad(loss, leaf)[0], scores))
    (loss, grad, scores), (true_loss, true_grad, true_scores) = found
    # the largest entry of a row is near 1 / 9
    torch.testing.assert_close(grad.double(), true_grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(loss.double(), true_loss, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    for column, expected in zip(scores, true_scores, strict=True):
        torch.testing.assert_close(column, expected, rtol=1e-5, atol=1e-5)


# --- properties -------------------------------------------------------------------------------------------------------


def run(logits: Tensor, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = bonus_cross_entropy(leaf, target, implementation="numba", **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("n_classes", [10, 100, 1000])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_row_does_not_depend_on_its_company(n_classes, reduction, shared):
    logits, target = typical(generator(4), 50, n_classes, torch.float32)
    loss, grad = run(logits, target, reduction=reduction)
    again, same_grad = run(logits, target, reduction=reduction)
    assert torch.equal(again, loss) and torch.equal(same_grad, grad)
    order = torch.randperm(50)
    shuffled, shuffled_grad = run(logits[order], target[order], reduction=reduction)
    few, few_grad = run(logits[:7], target[:7], reduction=reduction)
    assert torch.equal(shuffled_grad, grad[order]) and torch.equal(few_grad, grad[:7])
    if reduction == "none":
        assert torch.equal(shuffled, loss[order]) and torch.equal(few, loss[:7])


@pytest.mark.parametrize(("n_rows", "n_classes"), [(1201, 10), (150, 1000), (41, 5000)])
def test_rows_of_every_tile_are_those_of_small_batches(n_rows, n_classes):
    """Several tiles, the last one partly filled."""
    logits, target = typical(generator(n_classes), n_rows, n_classes, torch.float32)
    target[::9] = -100
    loss, grad = run(logits, target, reduction="none")
    for part in torch.arange(n_rows).split(37):
        few, few_grad = run(logits[part], target[part], reduction="none")
        assert torch.equal(few, loss[part]) and torch.equal(few_grad, grad[part])


@pytest.mark.parametrize("n_classes", [10, 1000])
def test_classes_may_be_renamed_and_impossible_ones_added(n_classes, shared):
    logits, target = typical(generator(5), 20, n_classes, torch.float64)
    loss, grad = run(logits, target, reduction="none")
    order = torch.randperm(n_classes)
    renamed, renamed_grad = run(logits[:, order], order.argsort()[target], reduction="none")
    torch.testing.assert_close(renamed, loss)
    torch.testing.assert_close(renamed_grad, grad[:, order])
    wider = torch.cat([torch.full((20, 9), -math.inf, dtype=torch.float64), logits], 1)
    same, same_grad = run(wider, target + 9, reduction="none")
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(same_grad[:, 9:], grad)
    assert (same_grad[:, :9] == 0).all()


@pytest.mark.parametrize("offset", [1e2, -1e4, 1e6])
def test_a_common_offset_cancels(offset):
    logits, target = typical(generator(6), 20, 50, torch.float64)
    logits = (logits * 16).round() / 16  # so that adding the offset rounds nothing away in float32
    loss, grad = run(logits.float(), target, reduction="none")
    shifted, shifted_grad = run((logits + offset).float(), target, reduction="none")
    torch.testing.assert_close(shifted, loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bonus", [None, LogBonus(), LogBonus(1.0, clamp=None), PowerBonus(2.0)], ids=repr)
@pytest.mark.parametrize("n_classes", [10, 1000])
def test_gradient_rows_sum_to_zero(bonus, n_classes):
    logits, target = typical(generator(7), 30, n_classes, torch.float32)
    _, grad = run(logits, target, reduction="none", bonus=bonus)
    bound = n_classes * 2**-24 * grad.abs().amax(1)
    assert (grad.double().sum(1).abs() <= bound).all()


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(function) -> int:
    """Return the most memory held at once above what was held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_peak_bytes_counts():
    assert 2 * 4096 <= peak_bytes(lambda: (torch.empty(1024) + torch.empty(1024)).sum()) <= 4 * 4096
    assert peak_bytes(lambda: [torch.empty(1024) for _ in range(3)]) == 3 * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "n_classes"), [(4096, 1000), (128, 32000)])
@pytest.mark.parametrize("ignored", [0, 10])
def test_forward_and_backward_hold_at_most_one_gradient_and_a_fifth(dtype, n_rows, n_classes, ignored):
    logits = torch.randn(n_rows, n_classes).to(dtype).requires_grad_()
    target = torch.randint(0, n_classes, (n_rows,))
    target[:ignored] = -100

    def step():
        loss, _ = bonus_cross_entropy_with_scores(logits, target, implementation="numba")
        loss.backward()

    step()
    logits.grad = None
    assert peak_bytes(step) <= 1.2 * logits.numel() * logits.element_size()


def test_scores_without_a_gradient_hold_half_the_logits():
    logits, target = torch.randn(3000, 1000), torch.randint(0, 1000, (3000,))
    peak = peak_bytes(lambda: bonus_cross_entropy_with_scores(logits, target, implementation="numba"))
    assert peak <= 0.6 * logits.numel() * logits.element_size()


@pytest.mark.parametrize(("dtype", "gradients"), [(torch.float32, 2.5), (torch.bfloat16, 3.5)])
def test_of_few_classes_the_columns_weigh_more_than_the_gradient(dtype, gradients):
    logits, target = torch.randn(65536, 10).to(dtype).requires_grad_(), torch.randint(0, 10, (65536,))

    def step():
        loss, _ = bonus_cross_entropy_with_scores(logits, target, implementation="numba")
        loss.backward()

    step()
    logits.grad = None
    assert peak_bytes(step) <= gradients * logits.numel() * logits.element_size()


# --- who calls --------------------------------------------------------------------------------------------------------


def test_callers_on_several_threads_do_not_meet():
    batches = [typical(generator(seed), 40 + seed, 100, torch.float32) for seed in range(8)]
    expected = [run(*batch, reduction="none") for batch in batches]

    def call(i: int) -> bool:
        found = [run(*batches[i], reduction="none") for _ in range(10)]
        return all(torch.equal(a, b) for one in found for a, b in zip(one, expected[i], strict=True))

    with several_threads(2), ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same():
    """A pool of threads would not be there any more, and its caller would wait for ever."""
    logits, target = typical(generator(9), 50, 100, torch.float32)
    with several_threads(2):
        loss, grad = run(logits, target)
        child = os.fork()
        if child == 0:
            try:
                again, same = run(logits, target)
                os._exit(0 if torch.equal(again, loss) and torch.equal(same, grad) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("label", [-1, -(2**40), 7, 2**40])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["labels", "smoothing"])
def test_a_label_out_of_range_raises_before_a_loop_reads_by_it(label, options):
    logits, target = torch.zeros(5, 7, requires_grad=True), torch.tensor([0, 1, label, -100, 6])
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        bonus_cross_entropy(logits, target, implementation="numba", **options)


@pytest.mark.parametrize("n_rows", [1, 64, 1024, 5000])
def test_a_mean_of_many_rows_is_that_of_float64(n_rows):
    """In blocks, so that many rows lose no digits; rounded once to the dtype of the logits."""
    logits, target = torch.randn(n_rows, 3).mul(4).requires_grad_(), torch.randint(3, (n_rows,))
    target[: n_rows // 3] = -100
    loss = bonus_cross_entropy(logits, target, bonus=None, implementation="numba")
    true = F.cross_entropy(logits.double(), target)
    assert abs(loss.item() - true.item()) <= 4 * torch.finfo(torch.float32).eps * true.item()
    half = bonus_cross_entropy(logits.bfloat16(), target, bonus=None, implementation="numba")
    true = F.cross_entropy(logits.bfloat16().double(), target)
    assert half.dtype == torch.bfloat16 and abs(half.item() - true.item()) <= 0.51 * 2.0**-7 * true.item()
