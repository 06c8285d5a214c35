"""What compiled kernels do that interpreted ones cannot show, where EMULATE names the GPU they are compiled for."""

from __future__ import annotations

import collections

import pytest
import torch

from bonus_ops import bonus_binary_cross_entropy_with_logits, bonus_cross_entropy, bonus_cross_entropy_with_scores
from tests.conftest import EMULATED

if not EMULATED:
    pytest.skip("EMULATE is not set", allow_module_level=True)

from tests.ptx import launching
from tests.ptx.memory import Fault


def step(logits, target):
    """Return loss, scores and gradient."""
    logits = logits.detach().requires_grad_()
    loss, scores = bonus_cross_entropy_with_scores(logits, target, reduction="none", implementation="triton")
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))
    return loss.detach(), *scores, grad


@pytest.mark.parametrize("n_classes", [1000, 262144])
def test_more_logits_than_a_32_bit_offset_reaches(n_classes):
    """Past 2^32 one with a sign and one without come back to other rows; memory that nobody touches costs nothing."""
    n_rows, few = 2**32 // n_classes + 40, 4  # the ends of the grid are what is run
    try:
        logits, _ = (torch.empty(n_rows, n_classes, dtype=torch.bfloat16) for _ in range(2))  # and its gradient
    except RuntimeError as error:
        pytest.skip(f"a machine that grants no memory on trust: {error}")
    target = torch.zeros(n_rows, dtype=torch.int64)
    ends = slice(0, few), slice(n_rows - few, n_rows)
    for rows in ends:
        logits[rows].normal_()
        target[rows].random_(0, n_classes)
    with launching.watched(ends=few):
        everything = step(logits, target)
    for rows in ends:
        for far, near in zip(everything, step(logits[rows].clone(), target[rows].clone()), strict=True):
            torch.testing.assert_close(far[rows], near, rtol=0, atol=0, equal_nan=True)


def moved(step, *tensors):
    """Return the traffic of a step with each of ``tensors`` and of those that it returns."""
    with launching.watched() as machines:
        made = step()
    regions = [region for machine in machines for region in machine.memory.regions]
    return [
        sum((r.traffic for r in regions if r.begin == tensor.data_ptr()), collections.Counter())
        for tensor in (*tensors, *made)
    ]


@pytest.mark.parametrize(
    ("n_rows", "n_classes", "dtype"),
    [(64, 1000, torch.bfloat16), (2, 32000, torch.bfloat16), (2, 50257, torch.bfloat16), (2, 50257, torch.float32)],
    ids=str,
)
def test_logits_are_moved_by_whole_sectors(n_rows, n_classes, dtype):
    """Each logit once a pass, but for the label and the runner-up's chunk; rows off the 32 bytes share sectors."""
    logits, target = torch.randn(n_rows, n_classes).to(dtype).requires_grad_(), torch.zeros(n_rows, dtype=torch.int64)

    def step():
        loss, _ = bonus_cross_entropy_with_scores(logits, target, implementation="triton")
        return torch.autograd.grad(loss, logits)

    of_logits, of_grad = moved(step, logits)
    size = logits.nbytes
    assert 2 * size < of_logits["bytes loaded"] <= 2.02 * size
    assert of_grad["bytes stored"] == size
    assert of_grad["sectors stored"] * 32 <= 1.13 * size
    # the forward of float32 reads a sector by halves, one right after the other
    assert of_logits["sectors loaded"] * 32 <= (2 * 1.15 + (dtype == torch.float32)) * size


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "sweeps", "most"),  # sectors that a warp asks for by halves count twice
    [
        ("labels", (1, 21, 64, 64), torch.bfloat16, 1, 1.2),
        ("labels", (1, 150, 32, 32), torch.float32, 1, 1.2),
        ("labels", (1, 21, 65, 65), torch.bfloat16, 1, 1.6),
        ("smoothing", (1, 21, 32, 32), torch.bfloat16, 2, 1.2),
        ("probabilities", (1, 21, 32, 32), torch.float32, 2, 1.2),
        ("sigmoid", (1, 21, 32, 32), torch.bfloat16, 1, 1.2),
        ("sigmoid", (1, 21, 32, 32), torch.float32, 1, 2.4),
    ],
    ids=str,
)
def test_classes_apart_are_moved_by_whole_sectors(kind, shape, dtype, sweeps, most):
    """A thread a pixel: what lies side by side in memory is asked for side by side."""
    logits = torch.randn(shape).to(dtype).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    if kind in ("probabilities", "sigmoid"):
        target = torch.randn(shape).softmax(1).to(dtype)
    options = {"label_smoothing": 0.1} if kind == "smoothing" else {}
    loss_of = {"labels": bonus_cross_entropy_with_scores, "sigmoid": bonus_binary_cross_entropy_with_logits}
    made = []
    step = loss_of.get(kind, bonus_cross_entropy)
    (of_logits,) = moved(lambda: made.append(step(logits, target, implementation="triton", **options)) or (), logits)
    loss = made[0][0] if kind == "labels" else made[0]
    assert 1 <= 32 * of_logits["sectors loaded"] / sweeps / logits.nbytes <= most
    of_logits, of_grad = moved(lambda: torch.autograd.grad(loss, logits), logits)
    for sectors in (of_logits["sectors loaded"], of_grad["sectors stored"]):
        assert 1 <= 32 * sectors / logits.nbytes <= most


@pytest.mark.parametrize(("n_classes", "dtype"), [(10, torch.bfloat16), (50257, torch.float32)])
def test_without_its_barriers_a_kernel_fails(monkeypatch, n_classes, dtype):
    """So that shared memory is known to be watched where it is used."""
    parse, found = launching.parse, []

    def without_barriers(text):
        program = parse(text)
        found.append(sum(x.name == "bar" for x in program.instructions))
        return program._replace(instructions=[
            x._replace(name="mov", modifiers=("pred",), operands=("%p1", "%p1")) if x.name == "bar" else x
            for x in program.instructions
        ])  # fmt: skip

    monkeypatch.setattr(launching, "parse", without_barriers)
    with pytest.raises(Fault, match="before a barrier"):
        step(torch.randn(3, n_classes).to(dtype), torch.tensor([0, 1, 2]))
    assert found[0] > 0
