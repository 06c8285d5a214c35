"""A drop-in to the letter: every row of `tests.behaviour_cases` through `F.cross_entropy` and through us, live.

Without a bonus everything observed must be the same: dtypes, shapes, strides, classes and first lines of errors,
warnings. Values may be no further from float64 than torch's are. What differs on purpose is in `DEVIATIONS`, and in
bonus_ops/README.md.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bonus_ops import bonus_cross_entropy, reference
from bonus_ops.ops import labels as of_labels
from tests.behaviour_cases import CASES, Outcome, labels, leaf_of, loss_and_grad, run, x
from tests.budget import FLOAT32_FLOOR, FLOAT64_FLOOR, assert_within_budget
from tests.conftest import COMPILED

TABLE = {row.number: row for row in CASES}


def ours(implementation: str | None) -> Callable[..., Tensor]:
    return functools.partial(bonus_cross_entropy, bonus=None, implementation=implementation)


@functools.cache
def of_torch(number: int) -> tuple[Outcome, Outcome | None]:
    """Return what torch makes of a row, and of its float64 copy where it makes anything."""
    theirs = run(TABLE[number], F.cross_entropy)
    return theirs, None if theirs.results is None else run(TABLE[number], F.cross_entropy, wide=True)


# --- what differs on purpose ------------------------------------------------------------------------------------------


class Deviation(NamedTuple):
    """A row where we differ: which item of bonus_ops/README.md, and what must come instead."""

    item: int
    instead: Callable[[Outcome], None]


def nothing_to_learn(outcome: Outcome) -> None:
    assert outcome.results is not None
    assert outcome.results["loss"].tolist() == [0.0]
    assert outcome.results["gradient of input"].tolist() == [[0.0, 0.0, 0.0]]


def raises(error: type, first_line: str) -> Callable[[Outcome], None]:
    def check(outcome: Outcome) -> None:
        assert outcome.error is not None and outcome.error[0] is error
        assert re.search(first_line, outcome.error[1])

    return check


def leads_by(gap: float) -> Callable[[Outcome], None]:
    """Two others are ``gap`` below the label: the loss is log(1 + 2 exp(-gap)), however small."""

    def check(outcome: Outcome) -> None:
        assert outcome.results is not None
        other = math.exp(-gap) / (1 + 2 * math.exp(-gap))
        gradient = torch.tensor([[-2 * other, other, other]])
        truth = torch.tensor([math.log1p(2 * math.exp(-gap))])
        ulps = (8 + 1.5 * gap) * torch.finfo(torch.float32).eps
        subnormal = torch.finfo(torch.float32).tiny  # what a device may flush to zero
        torch.testing.assert_close(outcome.results["loss"], truth, rtol=ulps, atol=subnormal if COMPILED else 2e-45)
        torch.testing.assert_close(outcome.results["gradient of input"], gradient, rtol=ulps, atol=subnormal)

    return check


def costs(value: float) -> Callable[[Outcome], None]:
    def check(outcome: Outcome) -> None:
        assert outcome.results is not None and not outcome.warnings
        assert outcome.results["gradient of input"].isfinite().all()
        torch.testing.assert_close(outcome.results["loss"], torch.tensor(value))

    return check


SMOOTHING = "label_smoothing must be between 0.0 and 1.0. Got: "
DEVIATIONS = {
    "ignored, all -inf": Deviation(1, nothing_to_learn),
    "ignored, NaN": Deviation(1, nothing_to_learn),
    "ignored, inf": Deviation(1, nothing_to_learn),
    "ignored, NaN, smoothing": Deviation(1, nothing_to_learn),
    "probabilities 0 at -inf": Deviation(1, costs(math.log1p(math.exp(1)) - 0.5)),
    # item 2, labels out of range where nobody waits for a GPU: `test_labels_out_of_range_make_their_row_nan`
    "label_smoothing -0.1": Deviation(3, raises(RuntimeError, f"^{SMOOTHING}-0.1$")),
    "label_smoothing NaN": Deviation(3, raises(RuntimeError, f"^{SMOOTHING}nan$")),
    "input changed in place": Deviation(4, raises(RuntimeError, r"^one of the variables needed .* inplace operation")),
    "leads by 100": Deviation(5, leads_by(100)),
    "leads by 20": Deviation(5, leads_by(20)),
}
OUT_OF_RANGE = (75, 76, 78, 79, 80, 81, 82)

# The specification is differentiated by autograd: it saves no target, keeps no rule for infinite upstream gradients,
# and checks labels by their values, which vmap over the target forbids.
NOT_OF_THE_SPECIFICATION = {
    "target changed in place", "target changed in place, none", "target changed in place, smoothing",
    "upstream inf in a row", "upstream inf, sum",
    "weights that cancel", "vmap", "vmap of func.grad",
}  # fmt: skip
# Interpreted, these take seconds; `tests/paths/test_autograd.py` has them for the kernels.
SLOW_INTERPRETED = {"gradcheck", "gradgradcheck", "hessian"}


# --- comparison -------------------------------------------------------------------------------------------------------


def comparable(error: tuple[type, str] | None) -> tuple[type, str] | None:
    """Return the error without the shape of the tensor autograd saved: we save views."""
    return error and (error[0], re.sub(r"(inplace operation: \[torch\.\w+) \[.*?\](, which is .*?,)?", r"\1", error[1]))


def assert_no_further_than_torch(actual: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    """Compare with float64: allowed are torch's own error and 2^-22 of the largest element (a half: one rounding)."""
    limits = torch.finfo(actual.dtype)
    floor = {torch.float32: FLOAT32_FLOOR, torch.float64: FLOAT64_FLOOR}.get(actual.dtype, 0.51 * limits.eps)
    actual, eager, truth = (x.as_subclass(Tensor) for x in (actual, eager, truth))
    truth = truth.double()
    rounded = truth.to(actual.dtype).double()
    truth = torch.where(rounded.isinf(), rounded, truth)  # beyond the range of the dtype
    finite = truth[truth.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    unit = max(largest, limits.tiny / floor)  # subnormal numbers may be flushed
    if what == "tangent":
        unit = max(unit, 1.0)  # a sum of products: the unit is that of its terms
    if truth.numel():
        assert_within_budget(actual, truth, eager, floor=floor, unit=unit, what=what)


def assert_same(actual: Outcome, expected: Outcome, truth: Outcome | None) -> None:
    assert comparable(actual.error) == comparable(expected.error)
    assert actual.warnings == expected.warnings
    if expected.results is None:
        return
    assert actual.results is not None and truth is not None and truth.results is not None
    assert actual.results.keys() == expected.results.keys()
    for name, theirs in expected.results.items():
        found = actual.results[name]
        if not isinstance(theirs, Tensor):
            assert found == theirs, name
            continue
        assert (found.dtype, found.shape) == (theirs.dtype, theirs.shape), name
        if not theirs.is_meta:
            assert_no_further_than_torch(found, theirs, truth.results[name], name)


def identical(actual: Outcome, expected: Outcome) -> bool:
    """Return whether all values are close, without any slack for small ones, and all else is equal."""
    if actual.error != expected.error or (actual.results is None) != (expected.results is None):
        return False
    for name, theirs in (expected.results or {}).items():
        found = (actual.results or {})[name]
        if not isinstance(theirs, Tensor):
            if found != theirs:
                return False
        elif not torch.allclose(found, theirs, rtol=1e-5, atol=0.0, equal_nan=True):
            return False
    return True


# what only the formula does: a named implementation raises
WITHOUT_KERNEL = {
    "probabilities torch.float64",
    "probabilities that require grad",
    "probabilities float64, input bfloat16",
}


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "reference", "triton"])
@pytest.mark.parametrize("number", TABLE, ids=[f"{row.number} {row.name}" for row in CASES])
def test_the_row_is_as_in_torch_or_deviates_as_listed(number, implementation, request):
    row = TABLE[number]
    if implementation == "reference" and row.name in NOT_OF_THE_SPECIFICATION:
        pytest.skip("the specification is differentiated by autograd")
    if implementation == "triton":
        if request.getfixturevalue("kernel_device") != "cpu":
            pytest.skip("the table runs on a CPU, kernels interpreted")
        if row.name in SLOW_INTERPRETED or row.name == "both on meta":
            pytest.skip("slow interpreted, or no kernel's business")
    expected, truth = of_torch(number)
    actual = run(row, ours(implementation))
    assert actual.untouched and expected.untouched, "an argument was written"
    if implementation == "triton" and row.name in WITHOUT_KERNEL:
        assert actual.error is not None and actual.error[0] is NotImplementedError
        return
    deviation = DEVIATIONS.get(row.name)
    if deviation is None or (implementation == "reference" and deviation.item == 4):  # it saves no logits to guard
        assert_same(actual, expected, truth)
        return
    deviation.instead(actual)
    assert not identical(actual, expected), "this no longer deviates: take it off the list"


@pytest.mark.parametrize("number", OUT_OF_RANGE)
def test_labels_out_of_range_make_their_row_nan(number, kernel_device, monkeypatch):
    """Deviation 2: on a GPU nobody waits for the labels. The interpreter stands in, its host check taken away."""
    if kernel_device == "cpu":
        monkeypatch.setattr(reference, "check_target", lambda *_: None)
        monkeypatch.setitem(of_labels._CHECKS, "triton", lambda *_: None)
    assert of_torch(number)[0].error[0] is IndexError
    input, target, options = TABLE[number].make()
    options = {name: value.to(kernel_device) if isinstance(value, Tensor) else value for name, value in options.items()}
    options |= {"reduction": "none", "implementation": "triton", "bonus": None}
    bad = (target < 0) | (target >= input.shape[1])
    leaf = leaf_of(input.to(kernel_device))
    loss = bonus_cross_entropy(leaf, target.to(kernel_device), **options)
    loss.nansum().backward()
    assert loss.isnan().cpu().equal(bad)
    kept = F.cross_entropy(leaf_of(input), target.masked_fill(bad, -100), reduction="none")
    torch.testing.assert_close(loss.cpu()[~bad], kept[~bad])
    by_row = leaf.grad.cpu().movedim(1, -1)
    assert by_row[~bad].isfinite().all()
    mean = bonus_cross_entropy(leaf, target.to(kernel_device), **options | {"reduction": "mean"})
    assert mean.isnan()


# --- the lists --------------------------------------------------------------------------------------------------------


def test_every_exception_names_a_row():
    names = {row.name for row in CASES}
    assert names.issuperset(NOT_OF_THE_SPECIFICATION | SLOW_INTERPRETED | DEVIATIONS.keys())


# --- beyond torch -----------------------------------------------------------------------------------------------------

LEAVES = [row for row in CASES if row.how is loss_and_grad and of_torch(row.number)[0].results is not None]
LEAVES = [row for row in LEAVES if row.make().input.is_contiguous() and row.name not in DEVIATIONS]


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("row", LEAVES, ids=[row.name for row in LEAVES])
def test_the_gradient_of_contiguous_logits_is_contiguous(row):
    """Before autograd lays it out for a leaf: what a hook, or the layer below, is handed."""
    input, target, options = row.make()
    leaf = leaf_of(input)
    loss = bonus_cross_entropy(leaf, target, **options, bonus=None)
    assert torch.autograd.grad(loss.sum(), leaf)[0].is_contiguous()


# Where only torch stops: it raises for want of a code path, and we answer as for the same thing said otherwise.
BEYOND = {
    "uint8 labels beyond two axes": ((x(2, 5, 3), labels(2, 3).byte()), (x(2, 5, 3), labels(2, 3))),
    "backward of (V) with target (1)": ((x(1, 5)[0], labels(1)), (x(1, 5)[0], labels(1)[0])),
}


@pytest.mark.parametrize("name", BEYOND)
def test_where_torch_has_no_code_path_the_same_thing_said_otherwise_decides(name):
    stopped, otherwise = BEYOND[name]
    with pytest.raises(RuntimeError):
        loss_and_grad(F.cross_entropy, *stopped, {})
    actual = loss_and_grad(ours(None), *stopped, {})
    expected = loss_and_grad(F.cross_entropy, *otherwise, {})
    for part in ("loss", "gradient of input"):
        torch.testing.assert_close(actual[part], expected[part], rtol=2e-7, atol=2e-7)
