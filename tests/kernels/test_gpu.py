"""What only a GPU can show: rounding of the hardware's exp2, 64-bit offsets, streams, graphs, synchronisation.

Where a GPU is emulated its arithmetic and addresses are tested.
"""

from __future__ import annotations

import pytest
import torch

from bonus_ops import (
    CrossEntropy,
    LogBonus,
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    mixup_cross_entropy,
    reference,
)
from bonus_ops.call import decide
from tests.conftest import ACCELERATOR, EMULATED

pytestmark = pytest.mark.skipif(ACCELERATOR != "cuda" and not EMULATED, reason="needs a CUDA device")
only_cuda = pytest.mark.skipif(bool(EMULATED), reason="needs a CUDA device")
DEVICE = "cpu" if EMULATED else "cuda"
HALVES = (torch.bfloat16, torch.float16)
IDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get
SHAPES = ((600, 10), (70, 1000), (70, 1003), (9, 5003), (5, 50257), (3, 262144))


def draw(n_rows, n_classes, dtype=torch.float32, scale=3.0):
    logits = (scale * torch.randn(n_rows, n_classes, device=DEVICE)).to(dtype)
    return logits.requires_grad_(), torch.randint(n_classes, (n_rows,), device=DEVICE)


def step(logits, target, **options):
    """Return loss, scores and gradient of one call."""
    loss, scores = bonus_cross_entropy_with_scores(logits, target, reduction="none", implementation="triton", **options)
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))
    return loss.detach(), *scores, grad


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0))


def ulps(actual, truth):
    """Return the largest error in units of the last place of ``actual``'s dtype at the truth."""
    info = torch.finfo(actual.dtype)
    exponent = torch.floor(torch.log2(truth.abs().clamp(min=info.tiny)))
    return ((actual.double() - truth).abs() / (torch.exp2(exponent) * info.eps)).max().item()


@pytest.mark.parametrize("dtype", HALVES, ids=IDS)
@pytest.mark.parametrize(("n_rows", "n_classes"), SHAPES)
def test_half_precision_is_rounded_once(n_rows, n_classes, dtype):
    """Within 0.51 units in the last place: float32 inside, one rounding to nearest at the end."""
    logits, target = draw(n_rows, n_classes, dtype)
    exact = logits.detach().double()
    loss, _, softmax = bonus_cross_entropy_with_softmax(
        logits, target, reduction="none", bonus=None, implementation="triton"
    )
    (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))
    upstream = torch.full((n_rows,), 0.5, device=DEVICE, dtype=torch.float64)
    assert grad.dtype == softmax.dtype == dtype
    assert ulps(grad, reference.gradient(exact, target, -100, CrossEntropy(), upstream)) <= 0.51
    assert ulps(softmax, reference.softmax(exact, target, -100)) <= 0.51
    if loss.dtype == dtype:
        assert ulps(loss, reference.rows(exact, target, -100, CrossEntropy())) <= 0.51


@only_cuda
def test_more_logits_than_a_32_bit_offset_reaches():
    for n_logits in (2**31, 2**32):  # one test, so that parallel workers do not hold both
        for n_classes in (1000, 262144):
            assert_far_rows_are_right(n_logits // n_classes + 40, n_classes)
            torch.cuda.empty_cache()


def assert_far_rows_are_right(n_rows, n_classes):
    if torch.cuda.mem_get_info()[0] < 5.2 * n_rows * n_classes:
        pytest.skip(f"not enough memory for {n_rows} x {n_classes} logits and their gradient")
    logits = torch.empty(n_rows, n_classes, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    target = torch.randint(n_classes, (n_rows,), device=DEVICE)
    everything = step(logits, target)
    for rows in (slice(0, 8), slice(n_rows - 64, n_rows)):
        few = logits.detach()[rows].clone().requires_grad_()
        # the same rows alone: the launch may split them otherwise, so not bit by bit
        for x, y in zip(step(few, target[rows]), everything, strict=True):
            torch.testing.assert_close(x, y[rows], rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=IDS)
@pytest.mark.parametrize("n_classes", [1000, 1003, 5003])
def test_rows_and_targets_at_any_address(n_classes, dtype):
    logits, target = draw(5, n_classes, dtype)
    expected = step(logits, target)
    for offset in (1, 4, 7) if EMULATED else range(1, 9):
        storage = torch.full((5 * n_classes + offset,), float("nan"), device=DEVICE, dtype=dtype)
        moved = storage[offset:].view(5, n_classes)
        moved.copy_(logits.detach())
        labels = torch.full((5 + offset,), -(10**9), device=DEVICE)[offset:]  # 8 bytes past an aligned address
        labels.copy_(target)
        for x, y in zip(step(moved.requires_grad_(), labels), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype in HALVES else 1e-5, atol=1e-6)


CALLS = {  # of logits, labels, shares, a number a class
    "labels": lambda z, y, t, w: bonus_cross_entropy_with_scores(z, y, ignore_index=3),
    "labels, sum": lambda z, y, t, w: bonus_cross_entropy_with_scores(z, y, reduction="sum"),
    "labels, rows": lambda z, y, t, w: bonus_cross_entropy_with_scores(z, y, reduction="none"),
    "labels, weight": lambda z, y, t, w: bonus_cross_entropy_with_scores(z, y, w),
    "smoothing": lambda z, y, t, w: bonus_cross_entropy_with_scores(z, y, label_smoothing=0.1),
    "probabilities": lambda z, y, t, w: bonus_cross_entropy_with_scores(z, t),
    "two labels": lambda z, y, t, w: (mixup_cross_entropy(z, y, y.flip(0), 0.3),),
    "sigmoid": lambda z, y, t, w: (bonus_binary_cross_entropy_with_logits(z, t),),
}


@only_cuda
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("n_rows", "n_classes"), [(128, 10), (64, 1003), (4, 262144)])
def test_nothing_waits_for_the_device_and_a_graph_replays(call, n_rows, n_classes):
    """100 replays, each on other logits, shares and labels."""
    logits, target = draw(n_rows, n_classes)
    shares, weight = torch.rand_like(logits), torch.rand(n_classes, device=DEVICE)

    def run():
        loss, *scores = call(logits, target, shares, weight)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), *((*scores[0], scores[0].difficulty("el2n")) if scores else ()), grad

    expected = run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a wait raises
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(100):
        logits.detach().normal_()
        shares.uniform_()
        target.random_(0, n_classes)
        graph.replay()
        assert_same(captured, run())


@only_cuda
@pytest.mark.parametrize("n_classes", [10, 1003, 262144])
def test_work_follows_the_current_stream(n_classes):
    """Inputs appear late on a second stream; a launch elsewhere would read them before."""
    logits, target = draw(8, n_classes)
    expected = step(logits, target)
    late = torch.full_like(logits, float("nan")).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms
        late.detach().copy_(logits.detach())
        found = step(late, target)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(found, expected)


@only_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS)
@pytest.mark.parametrize(("n_rows", "n_classes"), [(600, 10), (3000, 1000), (40, 50257), (4, 262144)])
def test_twenty_runs_agree_bit_by_bit(n_rows, n_classes, dtype):
    logits, target = draw(n_rows, n_classes, dtype)
    first = step(logits, target)
    for _ in range(20):
        assert_same(step(logits, target), first)


@only_cuda
def test_the_kernels_are_what_runs():
    """`implementation=None` on a GPU must not fall back."""
    logits, target = draw(4, 1003)
    assert decide(None, logits, "labels", LogBonus(), None) == "triton"
    chosen = bonus_cross_entropy(logits, target, bonus=LogBonus())
    assert torch.equal(chosen, bonus_cross_entropy(logits, target, bonus=LogBonus(), implementation="triton"))
