"""The kernels for soft targets: what they touch, to the byte, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bonus_ops import CosineBonus, LogBonus, PowerBonus, SoftmaxSquaredError, bonus_cross_entropy_with_scores
from bonus_ops.kernels.gpu import launching
from tests.conftest import INTERPRETED
from tests.kernels.test_traffic import CHUNK, draw, reads

if INTERPRETED:
    from tests.interpreter_guard import guard

watched = pytest.mark.skipif(not INTERPRETED, reason="the guard watches the interpreter")
ONE_SWEEP = (None, LogBonus(0.0), PowerBonus(2.5), LogBonus(strength=0.0))
TWO_SWEEPS = (LogBonus(), LogBonus(0.0, start=0.2), PowerBonus(2.0, abrupt=0.9), CosineBonus(), SoftmaxSquaredError())
SHAPES = [(5, 3, "contiguous"), (19, 10, "transposed"), (3, 65, "padded_rows"), (3, 1003, "offset_3")]


def observe(bonus, n_rows, n_classes, layout, dtype, given=False, weighted=False, z_loss=0.0):
    """Run forward and backward under the guard; the second row is ignored unless there are probabilities."""
    logits, target = draw(n_rows, n_classes, layout, dtype)
    if given:
        target = torch.softmax(torch.randn(n_rows, n_classes), 1).to(dtype)
    options = {}
    if weighted:
        options = {"weight": torch.rand(n_classes, dtype=dtype), "bonus_weight": torch.rand(n_classes, dtype=dtype)}
    with guard() as launches:
        loss, _ = bonus_cross_entropy_with_scores(
            logits.requires_grad_(), target, reduction="sum", label_smoothing=0.1, bonus=bonus, **options,
            z_loss=z_loss, implementation="triton",
        )  # fmt: skip
        loss.backward()
    assert [x.kernel for x in launches] == ["soft_forward_kernel", "soft_backward_kernel"]
    return logits.detach(), target, launches


def body_of(row, aligned=True):
    """Return (first, last) class of the row's chunks; without alignment they start at class 0."""
    head = -row.data_ptr() % 16 // row.element_size() if row.stride(0) == 1 and aligned else 0
    head = min(head, len(row))
    return head, head + (len(row) - head) // CHUNK * CHUNK


def by_planes(logits):
    """Return whether a thread has a row, so that label and max are not read again."""
    return launching.vector(logits[:, None]) == 0


def forward_reads(logits, label, sweeps, aligned=True):
    """Return how often forward must read each logit: sweeps, the label, the chunk of the runner-up but the label."""
    times = np.zeros(logits.shape, int)
    for i, (row, y) in enumerate(zip(logits, label.tolist(), strict=True)):
        if y == -100:
            continue
        times[i] = sweeps
        if by_planes(logits):
            continue
        times[i, y] += 1
        head, end = body_of(row, aligned)
        others = row.float().clone()
        others[y] = -torch.inf
        if end > head and others[head:end].max() > -torch.inf:
            chunk = head + int(others[head:end].argmax()) // CHUNK * CHUNK
            times[i, chunk : chunk + CHUNK] += np.arange(chunk, chunk + CHUNK) != y
    return times


@watched
@pytest.mark.parametrize(("bonus", "sweeps"), [*((x, 1) for x in ONE_SWEEP), *((x, 2) for x in TWO_SWEEPS)], ids=repr)
def test_how_many_sweeps_a_loss_takes(bonus, sweeps):
    logits, target, (forward, backward) = observe(bonus, 3, 65, "contiguous", torch.float32)
    np.testing.assert_array_equal(reads(forward), forward_reads(logits, target, sweeps))
    counted = (target != -100).numpy().astype(int)[:, None] * np.ones(logits.shape, int)
    np.testing.assert_array_equal(reads(backward), counted)


@pytest.mark.slow
@watched
@pytest.mark.parametrize(
    ("n_rows", "n_classes", "layout", "dtype", "bonus", "sweeps"),
    [*((*shape, torch.float32, LogBonus(), 2) for shape in SHAPES), (*SHAPES[1], torch.bfloat16, LogBonus(), 2),
     *((*shape, torch.bfloat16, None, 1) for shape in SHAPES[2:])],
)  # fmt: skip
def test_every_byte_of_a_smoothed_label(n_rows, n_classes, layout, dtype, bonus, sweeps):
    logits, target, (forward, backward) = observe(bonus, n_rows, n_classes, layout, dtype)
    size, counted = logits.element_size(), int((target != -100).sum())
    times = forward_reads(logits, target, sweeps)
    np.testing.assert_array_equal(reads(forward), times)
    assert forward.bytes_read() == {"logits[0]": int(times.sum()) * size, "targets[0]": 8 * n_rows}
    # loss, five scores, runner-up, five columns for backward
    assert forward.bytes_written() == {f"outputs[{i}]": 4 * n * n_rows for i, n in enumerate((1, 5, 1, 5))}
    assert backward.bytes_read() == {
        "logits[0]": counted * n_classes * size, "targets[0]": 8 * n_rows,
        "saved[0]": 20 * n_rows, "saved[1]": 4 * n_rows, "saved[2]": 4 * n_rows,
    }  # fmt: skip
    assert (backward.times_written("grad[0]") == 1).all()
    assert backward.bytes_written() == {"grad[0]": n_rows * n_classes * size}


@watched
def test_a_z_loss_reads_no_logit_again():
    logits, target, (forward, backward) = observe(LogBonus(), 3, 65, "contiguous", torch.float32, z_loss=0.1)
    np.testing.assert_array_equal(reads(forward), forward_reads(logits, target, 2))
    # two saved columns more, the logsumexp and its upstream gradient
    assert forward.bytes_written() == {f"outputs[{i}]": 4 * n * 3 for i, n in enumerate((1, 5, 1, 7, 1))}
    columns = {"saved[0]": 28 * 3, "saved[1]": 4 * 3, "saved[2]": 4 * 3, "saved[3]": 4 * 3}
    assert backward.bytes_read() == {"logits[0]": 2 * 65 * 4, "targets[0]": 8 * 3} | columns


@pytest.mark.slow
@watched
@pytest.mark.parametrize(
    ("n_rows", "n_classes", "layout", "bonus", "sweeps"),
    [(5, 10, "contiguous", None, 1), (5, 10, "contiguous", LogBonus(), 2), (2, 203, "padded_rows", LogBonus(), 2)],
)
def test_every_byte_of_probabilities_and_weights(n_rows, n_classes, layout, bonus, sweeps):
    weighted = bonus is not None  # two weights; the second would have no meaning without a bonus
    logits, given, (forward, backward) = observe(bonus, n_rows, n_classes, layout, torch.float32, True, weighted)
    label = given.argmax(1)
    aligned = layout == "contiguous"  # where rows of both lie alike
    times = forward_reads(logits, label, sweeps, aligned)
    np.testing.assert_array_equal(forward.times_read("logits[0]")[:, 0], times)
    shares = (sweeps * n_classes + 2) * n_rows * 4  # label and runner-up once more
    read = {"logits[0]": int(times.sum()) * 4, "targets[0]": 8 * n_rows, "targets[1][0]": shares}
    if weighted:
        read |= {"targets[2]": shares, "targets[3]": shares}
    assert forward.bytes_read() == read
    once = n_rows * n_classes * 4
    read = {"logits[0]": once, "targets[0]": 8 * n_rows, "targets[1][0]": once}
    if weighted:
        read |= {"targets[2]": once, "targets[3]": once}
    columns = {"saved[0]": 20 * n_rows, "saved[1]": 4 * n_rows, "saved[2]": 4 * n_rows}
    assert backward.bytes_read() == read | columns
    assert backward.bytes_written() == {"grad[0]": once}
