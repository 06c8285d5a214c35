"""Bitwise: results repeat, and a row's loss, scores and gradient do not tell its batch, its place or the batch size.

In loops that holds for rows whose classes lie equally far apart in memory; in kernels also for rows that start at the
same address modulo 16 bytes, since the classes up to the first 16-byte boundary are added last.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bonus_ops import LogBonus, bonus_cross_entropy_with_scores, bonus_cross_entropy_with_softmax
from tests import cases
from tests.conftest import ACCELERATOR
from tests.threads import several_threads

IDS = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=IDS.get)


def results(
    logits: Tensor, target: Tensor, bonus=None, reduction="none", softmax=False, implementation="numba", **options
):
    """Return the per-row results by name: loss, scores, gradient of the sum, probabilities."""
    leaf = logits.detach().requires_grad_()
    call = bonus_cross_entropy_with_softmax if softmax else bonus_cross_entropy_with_scores
    loss, scores, *more = call(leaf, target, reduction=reduction, bonus=bonus, implementation=implementation, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    found = {f"score {name}": column for name, column in scores._asdict().items()} | {"gradient": grad}
    if reduction == "none":
        found["loss"] = loss.detach()
    return found | ({"softmax": more[0]} if softmax else {})


def bits(x: Tensor) -> Tensor:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return x.contiguous().view(kind)


def assert_same_bits(actual: dict, expected: dict, index=slice(None), what="") -> None:
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(bits(x), bits(expected[name][index])), f"{name} differs: {what}"


def assert_rows_stand_alone(logits: Tensor, target: Tensor, parts, **options) -> None:
    together = results(logits, target, **options)
    for part in parts:
        assert_same_bits(results(logits[part], target[part], **options), together, part, f"rows {part}")


# --- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("n_classes", [10, 1003])
def test_twenty_runs_are_one(n_classes, reduction):
    logits, target = cases.typical(cases.generator(), 37, n_classes, torch.float32)
    first = results(logits, target, LogBonus(), reduction)
    for _ in range(20):
        assert_same_bits(results(logits.clone(), target.clone(), LogBonus(), reduction), first)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("contiguous", torch.float64), ("contiguous", torch.bfloat16)]
    + [(layout, torch.float32) for layout in ("contiguous", "transposed", "column_slice", "padded_rows", "offset_1")],
    ids=lambda x: IDS.get(x, x),
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("n_classes", [1, 2, 10, 64, 65, 130, 1003])
def test_a_row_does_not_tell_its_batch(n_classes, layout, reduction, dtype):
    regime = cases.masked if n_classes == 130 else cases.typical
    logits, target = regime(cases.generator(n_classes), 131, n_classes, dtype)
    target[5] = -100
    parts = [slice(0, 1), slice(1, 4), slice(64, 131), slice(0, 127), slice(130, 131), torch.arange(130, -1, -1)]
    if layout in ("transposed", "column_slice"):  # indexing would lay classes side by side
        parts.pop()
    logits = cases.LAYOUTS[layout](logits)
    assert_rows_stand_alone(logits, target, parts, bonus=LogBonus(), reduction=reduction, softmax=reduction == "none")


@pytest.mark.parametrize("name", cases.LOSSES)
def test_every_loss_by_row(name):
    logits, target = cases.confident(cases.generator(), 70, 11, torch.float32)
    assert_rows_stand_alone(logits, target, [slice(3, 10), slice(69, 70)], bonus=cases.LOSSES[name])


def test_rows_of_inner_axes_do_not_tell_their_image():
    logits, target = torch.randn(3, 12, 5, 7), torch.randint(0, 12, (3, 5, 7))
    assert_rows_stand_alone(logits, target, [slice(0, 1), slice(1, 3)], bonus=LogBonus(), softmax=True)


@pytest.mark.parametrize("n_threads", [2, 3])
@pytest.mark.parametrize(("n_rows", "n_classes"), [(7000, 10), (300, 130), (3, 70001)])
def test_threads_leave_no_trace(n_threads, n_rows, n_classes):
    """At bounds that are no vector's."""
    logits, target = cases.typical(cases.generator(), n_rows, n_classes, torch.float32)
    alone = results(logits, target, LogBonus(), "sum")
    parts = [slice(0, 1), slice(1, n_rows), slice(n_rows // 2, n_rows)]
    with several_threads(n_threads):
        assert_rows_stand_alone(logits, target, parts, bonus=LogBonus(), reduction="sum")
        assert_same_bits(results(logits, target, LogBonus(), "sum"), alone)


SOFT = {
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"label_smoothing": 0.1, "weight": torch.linspace(0.1, 2, 300), "bonus_weight": torch.rand(300)},
    "probabilities": {},
}


@over_dtypes
@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("bonus", [None, LogBonus()], ids=["plain", "bonus"])
def test_a_row_of_soft_targets_does_not_tell_its_batch(kind, bonus, dtype):
    logits, target = cases.typical(cases.generator(3), 41, 300, dtype)
    target = torch.randn(41, 300).softmax(1).to(dtype) if kind == "probabilities" else target
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in SOFT[kind].items()}
    if bonus is None:
        options.pop("bonus_weight", None)
    parts = [slice(0, 1), slice(3, 17), torch.arange(40, -1, -1)]
    assert_rows_stand_alone(logits, target, parts, bonus=bonus, **options)
    together = results(logits, target, bonus, "sum", **options)
    with several_threads():
        assert_same_bits(results(logits, target, bonus, "sum", **options), together)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=repr)
@pytest.mark.parametrize("n_classes", [10, 130])
def test_a_bad_row_leaves_no_trace_in_others(n_classes, bad):
    logits, target = cases.typical(cases.generator(), 70, n_classes, torch.float32)
    others = torch.arange(70) != 33
    good = results(logits, target, LogBonus())
    logits[33, int(target[33] + 1) % n_classes] = bad
    found = results(logits, target, LogBonus())
    for name, x in found.items():
        assert torch.equal(bits(x[others]), bits(good[name][others])), name


# --- kernels ----------------------------------------------------------------------------------------------------------

in_kernels = pytest.mark.usefixtures("kernel_device")


@pytest.mark.slow
@in_kernels
@pytest.mark.parametrize("n_classes", [10, 1003, cases.SPLIT_FORWARD])
def test_twenty_kernel_runs_are_one(n_classes, kernel_device):
    n_rows = 20 if n_classes == 10 else 1
    logits, target = cases.typical(cases.generator(), n_rows, n_classes, torch.float32, kernel_device)
    first = results(logits, target, LogBonus(), implementation="triton")
    for _ in range(20 if ACCELERATOR else 1):  # the interpreter has no order to vary
        assert_same_bits(results(logits, target, LogBonus(), implementation="triton"), first)


@pytest.mark.slow
@in_kernels
@pytest.mark.parametrize(
    ("n_classes", "dtype"),
    [(8, torch.bfloat16), (16, torch.float32), (72, torch.float32), (1000, torch.bfloat16)],
    ids=lambda x: IDS.get(x, str(x)),
)
def test_a_row_does_not_tell_its_batch_in_kernels(n_classes, dtype, kernel_device):
    """Every row starts on 16 bytes."""
    n_rows = 19 if n_classes < 100 else 5
    logits, target = cases.typical(cases.generator(), n_rows, n_classes, dtype, kernel_device)
    parts = [slice(2, 4), torch.arange(n_rows - 1, -1, -1)]
    assert_rows_stand_alone(logits, target, parts, bonus=LogBonus(), implementation="triton")


@pytest.mark.slow
@in_kernels
def test_rows_that_start_alike_do_not_tell_their_batch_in_kernels(kernel_device):
    """Rows of 1003 float32 return to the same address modulo 16 bytes every fourth time."""
    logits, target = cases.typical(cases.generator(), 6, 1003, torch.float32, kernel_device)
    together = results(logits, target, LogBonus(), implementation="triton")
    alone = results(logits[4:].clone(), target[4:], LogBonus(), implementation="triton")
    assert_same_bits(alone, together, slice(4, 6))


@pytest.mark.slow
@in_kernels
def test_a_split_row_is_merged_by_one_tree(kernel_device):
    from bonus_ops.kernels.gpu import launch

    for n_classes in (16392, 32784, 10**6):
        assert len({launch.forward(n_rows, n_classes) for n_rows in (1, 7, 600, 10**6)}) == 1
    logits, target = cases.typical(cases.generator(), 2, 16392, torch.float32, kernel_device)
    assert_rows_stand_alone(logits, target, [slice(1, 2)], bonus=LogBonus(), implementation="triton")
