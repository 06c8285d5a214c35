"""Two labels a row: the convex combination of two losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bonus_ops import (
    CosineBonus,
    Focal,
    LogBonus,
    SoftmaxSquaredError,
    bonus_cross_entropy,
    difficulty_scores,
    mixup_cross_entropy,
    mixup_cross_entropy_with_scores,
)
from tests.conftest import INTERPRETED

LOSSES = [None, LogBonus(), LogBonus(1.0, clamp=None), CosineBonus(), Focal(2.0)]
PATHS = ["numba", "triton", "reference"]


@pytest.fixture
def place(path, request) -> str:
    return request.getfixturevalue("kernel_device") if path == "triton" else "cpu"


def truth(logits, a, b, lam, **options):
    """Return loss and gradient in float64 as two losses of one label each, by the reference."""
    x = logits.detach().double().requires_grad_()
    losses = [bonus_cross_entropy(x, t, implementation="reference", **options) for t in (a, b)]
    loss = lam * losses[0] + (1 - lam) * losses[1]
    loss.sum().backward()
    return loss.detach(), x.grad


def batch(n_rows=7, n_classes=11, dtype=torch.float32, place="cpu"):
    logits = (3 * torch.randn(n_rows, n_classes, dtype=torch.float64)).to(place, dtype)
    a, b = torch.randint(0, n_classes, (2, n_rows)).to(place)
    b[0] = a[0]
    logits[1, a[1]] += 20
    logits[2, b[2]] += 20
    return logits.requires_grad_(), a, b


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "loss"),
    [(torch.float32, loss) for loss in LOSSES] + [(torch.float64, LOSSES[1]), (torch.bfloat16, LOSSES[1])],
    ids=repr,
)
def test_is_the_combination_of_two_losses(path, dtype, loss, place):
    logits, a, b = batch(dtype=dtype, place=place)
    if dtype == torch.bfloat16 and path == "triton" and INTERPRETED:
        pytest.skip("the interpreter truncates bfloat16")
    value = mixup_cross_entropy(logits, a, b, 0.3, bonus=loss, implementation=path, reduction="none")
    value.sum().backward()
    expected, grad = truth(logits, a, b, 0.3, bonus=loss, reduction="none")
    eps = torch.finfo(dtype).eps
    # a dozen roundings in the accumulation dtype and one to the dtype of the logits
    torch.testing.assert_close(value.double(), expected, rtol=12 * eps, atol=12 * eps)
    torch.testing.assert_close(logits.grad.double(), grad, rtol=12 * eps, atol=12 * eps)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_classes", [1, 2, 9, 137])
def test_any_number_of_classes(path, n_classes, place):
    logits, a, b = batch(3, n_classes, torch.float64, place)
    mixup_cross_entropy(logits, a, b, 0.6, implementation=path).backward()
    _, grad = truth(logits, a, b, 0.6, reduction="mean")
    torch.testing.assert_close(logits.grad, grad, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_labels_anywhere_among_many_classes(path, place):
    """In one tile of the kernels, in two, in the edge, the same, one of them ignored, side by side in two tiles."""
    logits, a, b = batch(6, 531, place=place)
    a[:] = torch.tensor([0, 5, 530, 7, -100, 256])
    b[:] = torch.tensor([1, 300, 3, 7, 9, 255])
    value = mixup_cross_entropy(logits, a, b, 0.3, implementation=path, reduction="none")
    value.sum().backward()
    expected, grad = truth(logits, a, b, 0.3, reduction="none")
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), grad, rtol=2e-5, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("reduction", "weighted"), [("mean", False), ("mean", True), ("sum", False), ("none", True)])
def test_ignored_labels_weights_and_a_share_for_each_row(path, reduction, weighted, place):
    logits, a, b = batch(6, 9, torch.float64, place)
    a[3], b[4], a[5], b[5] = -100, -100, -100, -100
    with torch.no_grad():
        logits[5] = float("nan")
    weight = torch.rand(9, dtype=torch.float64, device=place) if weighted else None
    lam = torch.rand(6, dtype=torch.float64, device=place)
    options = {"reduction": reduction, "weight": weight, "bonus": None}
    value = mixup_cross_entropy(logits, a, b, lam, implementation=path, **options)
    value.sum().backward()
    x = logits.detach().nan_to_num().requires_grad_()
    parts = [F.cross_entropy(x, t, weight=weight, reduction="none") for t in (a, b)]
    if reduction == "mean":
        ones = lam.new_ones(9) if weight is None else weight
        parts = [p / ones[t[t >= 0]].sum() for p, t in zip(parts, (a, b), strict=True)]
    expected = lam * parts[0] + (1 - lam) * parts[1]
    expected = expected if reduction == "none" else expected.sum()
    expected.sum().backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(logits.grad, x.grad, rtol=1e-10, atol=1e-12)


def test_more_axes_no_batch_and_no_rows():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    a, b = torch.randint(0, 5, (2, 2, 3))
    value = mixup_cross_entropy(x, a, b, 0.4)
    torch.testing.assert_close(value, 0.4 * bonus_cross_entropy(x, a) + 0.6 * bonus_cross_entropy(x, b))
    assert mixup_cross_entropy(x[0, :, 0], a[0, 0], b[0, 0], 0.4).shape == ()
    assert mixup_cross_entropy(torch.empty(0, 5), a.new_empty(0), a.new_empty(0), 0.4, reduction="sum") == 0
    assert mixup_cross_entropy(torch.empty(0, 5), a.new_empty(0), a.new_empty(0), 0.4).isnan()  # as F.cross_entropy
    torch.testing.assert_close(mixup_cross_entropy(x, a, b, 0.4, reduction="elementwise_mean"), value)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["numba", "triton"])
def test_derivatives_of_any_order(path, place):
    logits, a, b = batch(3, 5, torch.float64, place)

    def f(x):
        return mixup_cross_entropy(x, a, b, 0.3, bonus=LogBonus(0.5), implementation=path)

    # the first backward may scale a gradient made before
    assert torch.autograd.gradcheck(f, (logits,), nondet_tol=1e-15, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (logits,), fast_mode=True)
    x = logits.detach()
    hessian = torch.func.hessian(f)(x)
    plain = torch.func.hessian(lambda z: 0.3 * bonus_cross_entropy(z, a, bonus=LogBonus(0.5))
                               + 0.7 * bonus_cross_entropy(z, b, bonus=LogBonus(0.5)))(x)  # fmt: skip
    torch.testing.assert_close(hessian, plain)


def test_bad_calls_say_what_was_expected():
    x, t = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\] or a Tensor, got 1.5"):
        mixup_cross_entropy(x, t, t, 1.5)
    with pytest.raises(TypeError, match="lam must be a number or a Tensor, got str"):
        mixup_cross_entropy(x, t, t, "half")
    with pytest.raises(RuntimeError, match=r"lam must be a number or shaped like the targets, \[3\], got \[2\]"):
        mixup_cross_entropy(x, t, t, torch.rand(2))
    with pytest.raises(RuntimeError, match="lam must have a floating point type, got torch.int64"):
        mixup_cross_entropy(x, t, t, torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError, match="Target 4 is out of bounds."):
        mixup_cross_entropy(x, t, t + 2, 0.5)
    with pytest.raises(ValueError, match="Expected input batch_size"):
        mixup_cross_entropy(x, t, t[:2], 0.5)
    with pytest.raises(RuntimeError, match="expected class indices as targets of mixup"):
        mixup_cross_entropy(x, t, torch.softmax(x, 1), 0.5)
    with pytest.raises(TypeError, match="bonus must be a GapLoss"):
        mixup_cross_entropy(x, t, t, 0.5, bonus=SoftmaxSquaredError())


@pytest.mark.parametrize(
    ("path", "reduction", "by_row"),
    [("numba", "mean", False), ("numba", "sum", True), ("triton", "none", True), ("reference", "none", True)],
)
def test_scores_are_those_of_either_label(path, reduction, by_row, place):
    logits, a, b = batch(4, place=place)
    a[3] = -100
    lam = torch.linspace(0, 1, 4, device=place) if by_row else 0.3
    out = mixup_cross_entropy_with_scores(logits, a, b, lam, reduction=reduction, implementation=path)
    assert torch.equal(out.loss, mixup_cross_entropy(logits, a, b, lam, reduction=reduction, implementation=path))
    for scores, target in ((out.scores_a, a), (out.scores_b, b)):
        expected = difficulty_scores(logits, target, implementation=path)
        torch.testing.assert_close(tuple(scores), tuple(expected), rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(scores.target, target) and not scores.loss.requires_grad
    out.loss.sum().backward()
    assert logits.grad.isfinite().all()


def test_both_scores_give_the_loss_of_the_mix():
    logits, a, b = batch(dtype=torch.float64)
    out = mixup_cross_entropy_with_scores(logits, a, b, 0.3, reduction="none", bonus=None)
    mixed = 0.3 * F.one_hot(a, 11) + 0.7 * F.one_hot(b, 11)
    expected = F.cross_entropy(logits, mixed.double(), reduction="none").detach()
    torch.testing.assert_close(
        (0.3 * out.scores_a.loss + 0.7 * out.scores_b.loss).double(), expected, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(out.scores_a.entropy, out.scores_b.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lam", [0.5, torch.tensor([0.5, 0.5])], ids=["one", "a row"])
def test_an_unknown_reduction_is_refused_however_shares_come(lam):
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        mixup_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([1, 2]), lam, reduction="foo")


@pytest.mark.slow
def test_scores_of_a_mix_compile_whole():
    logits, a, b = batch()
    compiled = torch.compile(mixup_cross_entropy_with_scores, fullgraph=True, backend="aot_eager")
    expected, actual = (f(logits, a, b, 0.3) for f in (mixup_cross_entropy_with_scores, compiled))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(tuple(actual.scores_b), tuple(expected.scores_b))
