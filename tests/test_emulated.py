"""What compiled kernels do that interpreted ones cannot show, where EMULATE names the GPU they are compiled for."""

from __future__ import annotations

import collections

import pytest
import torch

from bonus_ops import bonus_cross_entropy_with_scores
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
@pytest.mark.parametrize("n_logits", [2**31, 2**32], ids=["31", "32"])
def test_more_logits_than_a_32_bit_offset_reaches(n_logits, n_classes):
    """Memory that nobody touches costs nothing; the ends of the grid are what is run."""
    n_rows, few = n_logits // n_classes + 40, 4
    try:
        logits, _ = (torch.empty(n_rows, n_classes, dtype=torch.bfloat16) for _ in range(2))  # and its gradient
    except RuntimeError as error:
        pytest.skip(f"a machine that grants no memory on trust: {error}")
    target = torch.zeros(n_rows, dtype=torch.int64)
    ends = slice(0, few), slice(n_rows - few, n_rows)
    for rows in ends:
        logits[rows].normal_()
        target[rows].random_(0, n_classes)
    with launching.only_ends(few):
        everything = step(logits, target)
    for rows in ends:
        for far, near in zip(everything, step(logits[rows].clone(), target[rows].clone()), strict=True):
            torch.testing.assert_close(far[rows], near, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("n_rows", "n_classes"), [(64, 1000), (4, 32000), (4, 50257)])
def test_logits_are_moved_by_whole_sectors(n_rows, n_classes, dtype):
    """Each logit once a pass, but for the label and the runner-up's chunk; rows off the 32 bytes share sectors."""
    logits, target = torch.randn(n_rows, n_classes).to(dtype).requires_grad_(), torch.zeros(n_rows, dtype=torch.int64)
    with launching.watched() as machines:
        loss, _ = bonus_cross_entropy_with_scores(logits, target, implementation="triton")
        (grad,) = torch.autograd.grad(loss, logits)
    moved = {
        what: sum((region.traffic for machine in machines for region in machine.memory.regions
                   if region.begin == tensor.data_ptr()), collections.Counter())
        for what, tensor in (("logits", logits), ("grad", grad))
    }  # fmt: skip
    size = logits.numel() * dtype.itemsize
    assert 2 * size < moved["logits"]["bytes loaded"] <= 2.02 * size
    assert moved["grad"]["bytes stored"] == size
    assert moved["grad"]["sectors stored"] * 32 <= 1.13 * size
    # the forward of float32 reads a sector by halves, one right after the other
    halves = dtype == torch.float32
    assert moved["logits"]["sectors loaded"] * 32 <= (2 * 1.15 + halves) * size


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

    monkeypatch.setattr(launching, "_programs", {})
    monkeypatch.setattr(launching, "parse", without_barriers)
    with pytest.raises(Fault, match="before a barrier"):
        step(torch.randn(3, n_classes).to(dtype), torch.tensor([0, 1, 2]))
    assert found[0] > 0
