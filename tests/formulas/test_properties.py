"""Sixteen properties of the losses, each over sixty seeded draws: what must hold whatever the numbers are.

Bounds are in units in the last place of float32: eps = 2^-23 is the spacing at 1, and e^x by exp2 is accurate relative
to its argument, here at most some 30.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bonus_ops import CrossEntropy, LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores, reference
from tests.cases import LOSSES
from tests.threads import several_threads

EXAMPLES = range(60)
EPS = 2.0**-23
BOUNDED = {name: loss for name, loss in LOSSES.items() if "abrupt" not in name and "window" not in name}


def draw(seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, torch.Generator]:
    """Return logits [2..20, 2..130], labels and the generator, so that an example is its seed."""
    rng = torch.Generator().manual_seed(seed)
    n_rows = int(torch.randint(2, 21, (), generator=rng))
    n_classes = int(torch.randint(2, 131, (), generator=rng))
    logits = (scale * torch.randn(n_rows, n_classes, generator=rng, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, n_classes, (n_rows,), generator=rng), rng


def loss_of(seed: int):
    """Return one of the losses without a jump, all in turn."""
    return list(BOUNDED.values())[seed % len(BOUNDED)]


def run(logits: Tensor, target: Tensor, reduction="none", upstream: Tensor | None = None, **options):
    """Return (loss, gradient)."""
    leaf = logits.detach().requires_grad_()
    loss = bonus_cross_entropy(leaf, target, reduction=reduction, implementation="numba", **options)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


def at(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target[:, None])[:, 0]


def close(a: Tensor, b: Tensor, ulp: float, unit: float = 1.0) -> bool:
    return bool(((a - b).abs() <= ulp * EPS * torch.maximum(a.abs(), b.abs()).clamp(min=unit)).all())


@pytest.mark.parametrize("offset", [1e2, -1e2, 1e4, -1e4, 1e6, -1e6])
def test_01_a_common_offset_changes_nothing(offset):
    for seed in EXAMPLES:
        logits, target, _ = draw(seed)
        logits = (8 * logits).round() / 8  # a sum with the offset is then exact
        for a, b in zip(run(logits, target), run(logits + offset, target), strict=True):
            assert torch.equal(a, b)


def test_02_classes_may_be_renamed():
    for seed in EXAMPLES:
        logits, target, rng = draw(seed)
        order = torch.randperm(logits.shape[1], generator=rng)
        loss, grad = run(logits, target, bonus=loss_of(seed))
        renamed, renamed_grad = run(logits[:, order], order.argsort()[target], bonus=loss_of(seed))
        # sums in another order: some ulp of the gap, which the loss and every gradient pass on
        assert close(renamed, loss, 40) and close(renamed_grad, grad[:, order], 40, 1e-6)


def test_03_rows_may_be_reordered_bitwise():
    for seed in EXAMPLES:
        logits, target, rng = draw(seed)
        order = torch.randperm(len(logits), generator=rng)
        loss, grad = run(logits, target, bonus=loss_of(seed))
        moved, moved_grad = run(logits[order], target[order], bonus=loss_of(seed))
        assert torch.equal(moved, loss[order]) and torch.equal(moved_grad, grad[order])


def test_04_the_batch_size_changes_nothing_bitwise():
    for seed in EXAMPLES:
        logits, target, rng = draw(seed)
        n = int(torch.randint(1, len(logits), (), generator=rng))
        loss, grad = run(logits, target, bonus=loss_of(seed))
        few, few_grad = run(logits[:n], target[:n], bonus=loss_of(seed))
        assert torch.equal(few, loss[:n]) and torch.equal(few_grad, grad[:n])


def test_05_impossible_classes_change_nothing():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed)
        wider = torch.cat([logits, torch.full((len(logits), 1 + seed), -math.inf)], 1)
        (loss, grad), (same, same_grad) = run(logits, target), run(wider, target)
        assert close(same, loss, 40) and close(same_grad[:, : logits.shape[1]], grad, 40, 1e-6)
        assert (same_grad[:, logits.shape[1] :] == 0).all()


def test_06_masked_prefixes_and_suffixes_of_any_length():
    for seed in EXAMPLES:
        logits, target, rng = draw(seed)
        cut = int(torch.randint(0, logits.shape[1], (), generator=rng))
        out = torch.arange(logits.shape[1]) < cut if seed % 2 else torch.arange(logits.shape[1]) >= cut
        masked = torch.where(out & (torch.arange(logits.shape[1]) != target[:, None]), -math.inf, logits)
        with several_threads(1 + seed % 4):
            loss, grad = run(masked, target, bonus=None)
        truth = reference.rows(masked.double(), target, -100, CrossEntropy())
        assert loss.isfinite().all() and grad.isfinite().all() and (grad[masked == -math.inf] == 0).all()
        assert close(loss.double(), truth, 40)


def test_07_threads_change_nothing_bitwise():
    """Stronger than the 4 ulp asked for."""
    for seed in EXAMPLES:
        logits, target, _ = draw(seed)
        whole = run(logits, target, "sum", bonus=loss_of(seed))[1]
        with several_threads(2 + seed % 5):
            assert torch.equal(run(logits, target, "sum", bonus=loss_of(seed))[1], whole)


def test_08_gradient_rows_sum_to_zero():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed)
        _, grad = run(logits, target, bonus=loss_of(seed))
        assert (grad.double().sum(1).abs() <= logits.shape[1] * EPS * grad.abs().amax(1)).all()


def test_09_plain_gradients_are_probabilities_off_the_label():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed, scale=10)
        _, grad = run(logits, target, bonus=None)
        is_label = torch.arange(logits.shape[1]) == target[:, None]
        assert ((grad >= 0) & (grad <= 1) | is_label).all()
        assert ((at(grad, target) <= 0) & (at(grad, target) >= -1)).all()


def test_10_the_plain_loss_is_positive_and_falls_with_the_label():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed, scale=6)
        steps = []
        for lead in (0.0, 0.25, 1.0, 4.0, 16.0, 64.0):
            steps.append(
                run(logits.scatter_add(1, target[:, None], torch.full((len(target), 1), lead)), target, bonus=None)[0]
            )
        loss = torch.stack(steps)
        assert (loss >= 0).all() and (loss[1:] < loss[:-1]).all()


def test_11_sum_is_count_times_mean_is_sum_of_rows():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed)
        target[::3] = -100
        n = int((target != -100).sum())
        (rows, row_grad), (total, sum_grad) = run(logits, target), run(logits, target, "sum")
        mean, mean_grad = run(logits, target, "mean")
        unit = float(rows.abs().sum())
        assert close(total, rows.double().sum(), 4, unit) and close(mean * n, total, 4, unit)
        assert close(sum_grad, row_grad, 20, 1e-6) and close(mean_grad * n, sum_grad, 20, 1e-6)


def test_12_ignored_rows_cost_and_teach_nothing_whatever_they_hold():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed)
        clean = run(logits[1:], target[1:], bonus=loss_of(seed))
        logits[0] = (math.nan, math.inf, -math.inf, 3e38)[seed % 4]
        target[0] = (-100, -100, logits.shape[1])[seed % 3]
        loss, grad = run(logits, target, bonus=loss_of(seed), ignore_index=int(target[0]))
        assert loss[0] == 0 and (grad[0] == 0).all()
        assert torch.equal(loss[1:], clean[0]) and torch.equal(grad[1:], clean[1])


def test_13_the_gradient_is_linear_in_the_upstream_one():
    for seed in EXAMPLES:
        logits, target, rng = draw(seed)
        one = run(logits, target)[1]
        upstream = 2.0 ** torch.randint(-3, 4, target.shape, generator=rng)  # exact factors
        assert torch.equal(run(logits, target, upstream=upstream)[1], one * upstream[:, None])
        assert torch.equal(run(logits, target, upstream=torch.tensor(0.5).expand(target.shape))[1], one * 0.5)
        assert (run(logits, target, upstream=torch.zeros(target.shape))[1] == 0).all()
        strided = torch.stack([upstream, torch.full_like(upstream, math.nan)], 1)[:, 0]
        assert torch.equal(run(logits, target, upstream=strided)[1], one * upstream[:, None])
        upstream[0] = math.nan
        poisoned = run(logits, target, upstream=upstream)[1]
        assert poisoned[0].isnan().all() and torch.equal(poisoned[1:], one[1:] * upstream[1:, None])


def test_14_no_bonus_is_plain_bitwise_and_log_end_one_is_minus_the_gap():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed, scale=8)
        for a, b in zip(
            run(logits, target, bonus=LogBonus(strength=0.0)), run(logits, target, bonus=None), strict=True
        ):
            assert torch.equal(a, b)
        loss, grad = run(logits, target, bonus=LogBonus(1.0, clamp=None))
        is_label = torch.arange(logits.shape[1]) == target[:, None]
        rest = logits.double().masked_fill(is_label, -math.inf).logsumexp(1)
        assert close(loss.double(), rest - at(logits, target), 40)
        assert close(at(grad, target), torch.tensor(-1.0), 4)
        nearly, _ = run(logits.double(), target, bonus=LogBonus(1 - 1e-12))
        confident = rest - at(logits, target).double() < -20
        assert ((nearly - (rest - at(logits, target))).abs() < 1e-5)[~confident].all()


def test_15_scores_are_in_range_equal_to_the_reference_and_ordered_alike():
    for seed in EXAMPLES:
        logits, target, _ = draw(seed, scale=(0.1, 3, 10)[seed % 3])
        _, scores = bonus_cross_entropy_with_scores(logits, target, implementation="numba")
        truth = reference.scores(logits.double(), target, -100, torch.float64)
        bounds = {"loss": (0, math.inf), "el2n": (0, 2**0.5), "entropy": (0, math.log(logits.shape[1]))}
        for name in ("loss", "el2n", "margin", "entropy", "energy"):
            column, exact = getattr(scores, name), getattr(truth, name)
            low, high = bounds.get(name, (-math.inf, math.inf))
            assert (column >= low - 8 * EPS).all() and (column <= high + 8 * EPS * max(1, high)).all(), name
            assert close(column.double(), exact, 16), name
            apart = exact[:, None] - exact > 1e-5 * exact.abs().clamp(min=1)
            assert (column[:, None] > column)[apart].all(), name
        assert torch.equal(scores.runner_up, truth.runner_up)


@pytest.mark.slow
def test_16_the_gradient_is_the_central_difference():
    for seed in EXAMPLES:
        logits, target, rng = draw(seed, scale=2, dtype=torch.float64)
        direction = torch.randn(logits.shape, generator=rng, dtype=torch.float64)
        step = 1e-5
        ahead, behind = (run(logits + s * direction, target, bonus=loss_of(seed))[0] for s in (step, -step))
        slope = (run(logits, target, bonus=loss_of(seed))[1] * direction).sum(1)
        # of order step^2 but where a piecewise bonus bends within the step
        error = ((ahead - behind) / (2 * step) - slope).abs() / slope.abs().clamp(min=1)
        assert error.median() < 1e-8 and (error < 1e-4).all()
