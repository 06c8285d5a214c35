"""Bad input: the class and first line torch raises, live; and our own options' errors, which name what came."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bonus_ops import (
    BonusCrossEntropyLoss,
    LogBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
)

FUNCTIONS = (bonus_cross_entropy, bonus_cross_entropy_with_scores, bonus_cross_entropy_with_softmax)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (4, 5))


def labels(*shape: int) -> torch.Tensor:
    return torch.arange(4) if not shape else torch.zeros(shape, dtype=torch.int64)


def probabilities(*shape: int) -> torch.Tensor:
    return torch.full(shape or (4, 5), 0.2)


# What torch refuses, as (input, target, options); both functions run live, so no message is written down here.
REFUSED = {
    "input int32": (logits().int(), labels(), {}),
    "input int64": (logits().long(), labels(), {}),
    "input uint8": (logits().byte(), labels(), {}),
    "input bool": (logits().bool(), labels(), {}),
    "input complex64": (logits().to(torch.complex64), labels(), {}),
    "input float8_e4m3fn": (logits().to(torch.float8_e4m3fn), labels(), {}),
    "input float8_e5m2": (logits().to(torch.float8_e5m2), labels(), {}),
    "input list": ([[1.0, 2.0]], labels(), {}),
    "input None": (None, labels(), {}),
    "input numpy": (logits().numpy(), labels(), {}),
    "input sparse": (logits().to_sparse(), labels(), {}),
    "input scalar": (torch.tensor(1.0), torch.tensor(0), {}),
    "input scalar, target (1)": (torch.tensor(1.0), labels(1), {}),
    "input scalar, target float": (torch.tensor(1.0), torch.tensor(1.0), {}),
    "input on meta": (logits().to("meta"), labels(), {}),
    "target int32": (logits(), labels().int(), {}),
    "target int16": (logits(), labels().short(), {}),
    "target int8": (logits(), labels().char(), {}),
    "target bool": (logits(), labels().bool(), {}),
    "target uint16": (logits(), labels().to(torch.uint16), {}),
    "target uint32": (logits(), labels().to(torch.uint32), {}),
    "target uint64": (logits(), labels().to(torch.uint64), {}),
    "target float32": (logits(), labels().float(), {}),
    "target float64": (logits(), labels().double(), {}),
    "target bfloat16": (logits(), labels().bfloat16(), {}),
    "target float16": (logits(), labels().half(), {}),
    "target complex64": (logits(), labels().to(torch.complex64), {}),
    "target float32, smoothing": (logits(), labels().float(), {"label_smoothing": 0.1}),
    "target numpy": (logits(), np.arange(4), {}),
    "target int": (logits(), 3, {}),
    "target None": (logits(), None, {}),
    "target sparse": (logits(), labels().to_sparse(), {}),
    "target on meta": (logits(), labels().to("meta"), {}),
    "target (N, 1)": (logits(), labels(4, 1), {}),
    "target (N - 1)": (logits(), labels(3), {}),
    "target (N + 1)": (logits(), labels(5), {}),
    "target () for N rows": (logits(), labels()[0], {}),
    "target () for one row": (logits(1, 5), labels()[0], {}),
    "target (2) for (C)": (logits(5), labels(2), {}),
    "target (1, 1) for (C)": (logits(5), labels(1, 1), {}),
    "class axis last": (logits(2, 3, 5), labels(2, 3), {}),
    "target (2, 3) for (2, 5)": (logits(2, 5), labels(2, 3), {}),
    "3-D, target of other N": (logits(2, 5, 3), labels(3, 3), {}),
    "3-D, target (N)": (logits(2, 5, 3), labels(2), {}),
    "4-D, target transposed": (logits(2, 5, 3, 4), labels(2, 4, 3), {}),
    "4-D, target of other N": (logits(2, 5, 3, 4), labels(3, 3, 4), {}),
    "4-D, target (N, d)": (logits(2, 5, 3, 4), labels(2, 3), {}),
    "5-D, target (N, d1, d2)": (logits(2, 5, 3, 4, 2), labels(2, 3, 4), {}),
    "probabilities (N, C + 1)": (logits(), probabilities(4, 6), {}),
    "probabilities int64": (logits(), labels(4, 5), {}),
    "probabilities bool": (logits(), labels(4, 5).bool(), {}),
    "probabilities complex64": (logits(), probabilities().to(torch.complex64), {}),
    "probabilities, ignore_index 1": (logits(), probabilities(), {"ignore_index": 1}),
    "label C": (logits(), labels() + 2, {}),
    "label C, none": (logits(), labels() + 2, {"reduction": "none"}),
    "label C, smoothing": (logits(), labels() + 2, {"label_smoothing": 0.1}),
    "label C, weight": (logits(), labels() + 2, {"weight": torch.ones(5)}),
    "label -1": (logits(), labels() - 1, {}),
    "label -1, none": (logits(), labels() - 1, {"reduction": "none"}),
    "label 2^40": (logits(), labels() + 2**40, {}),
    "label 200 in uint8": (logits(), labels().byte() + 200, {}),
    "label C, 3-D": (logits(2, 5, 3), labels(2, 3) + 5, {}),
    "label -100 when another is ignored": (logits(), labels() - 100, {"ignore_index": 2}),
    "no classes": (logits(4, 0), labels(), {}),
    "no classes, sum": (logits(4, 0), labels(), {"reduction": "sum"}),
    "ignore_index None": (logits(), labels(), {"ignore_index": None}),
    "ignore_index float": (logits(), labels(), {"ignore_index": 1.0}),
    "ignore_index bool": (logits(), labels(), {"ignore_index": True}),
    "ignore_index str": (logits(), labels(), {"ignore_index": "1"}),
    "reduction unknown": (logits(), labels(), {"reduction": "foo"}),
    "reduction None": (logits(), labels(), {"reduction": None}),
    "reduction int": (logits(), labels(), {"reduction": 1}),
    "label_smoothing 1.1": (logits(), labels(), {"label_smoothing": 1.1}),
    "label_smoothing inf": (logits(), labels(), {"label_smoothing": math.inf}),
    "label_smoothing 1.1, probabilities": (logits(), probabilities(), {"label_smoothing": 1.1}),
    "label_smoothing str": (logits(), labels(), {"label_smoothing": "0.1"}),
    "label_smoothing None": (logits(), labels(), {"label_smoothing": None}),
    "weight (4)": (logits(), labels(), {"weight": torch.ones(4)}),
    "weight (1, 5)": (logits(), labels(), {"weight": torch.ones(1, 5)}),
    "weight (4), smoothing": (logits(), labels(), {"weight": torch.ones(4), "label_smoothing": 0.1}),
    "weight (4), probabilities": (logits(), probabilities(), {"weight": torch.ones(4)}),
    "weight (1, 5), probabilities": (logits(), probabilities(), {"weight": torch.ones(1, 5)}),
    "weight (4), 3-D": (logits(2, 5, 3), labels(2, 3), {"weight": torch.ones(4)}),
    "weight float64": (logits(), labels(), {"weight": torch.ones(5).double()}),
    "weight float32 for bfloat16": (logits().bfloat16(), labels(), {"weight": torch.ones(5)}),
    "weight int64": (logits(), labels(), {"weight": torch.ones(5).long()}),
    "weight requires_grad": (logits(), labels(), {"weight": torch.ones(5, requires_grad=True)}),
    "weight requires_grad, smoothing": (
        logits(), labels(), {"weight": torch.ones(5, requires_grad=True), "label_smoothing": 0.1},
    ),
    "weight list": (logits(), labels(), {"weight": [1.0] * 5}),
    "weight on meta": (logits(), labels(), {"weight": torch.ones(5, device="meta")}),
}  # fmt: skip


def error_of(function, *args, **options) -> tuple[type, str]:
    try:
        function(*args, **options)
    except Exception as error:
        return type(error), str(error).split("\n")[0]
    raise AssertionError("no error")


def comparable(line: str) -> str:
    """Return the first sentence of what only names torch's own backends."""
    return line.split(" This could be because")[0]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("bonus", [None, LogBonus()], ids=["plain", "bonus"])
def test_class_and_first_line_are_those_of_torch(name, bonus):
    input, target, options = REFUSED[name]
    theirs = error_of(F.cross_entropy, input, target, **options)
    ours = error_of(bonus_cross_entropy, input, target, **options, bonus=bonus)
    assert (ours[0], comparable(ours[1])) == (theirs[0], comparable(theirs[1]))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_the_implementation_makes_no_difference_to_an_error(name, implementation):
    input, target, options = REFUSED[name]
    assert error_of(bonus_cross_entropy, input, target, **options, implementation=implementation) == error_of(
        bonus_cross_entropy, input, target, **options
    )


@pytest.mark.parametrize("name", ["label C", "label -1", "target (N + 1)", "input int64", "target int32", "weight (4)"])
def test_kernels_raise_the_same(name, kernel_device):
    input, target, options = REFUSED[name]
    if name.startswith("label") and kernel_device != "cpu":
        options = options | {"validate": True}  # on a GPU only then does anyone wait
    input, target = input.to(kernel_device), target.to(kernel_device)
    options = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = error_of(bonus_cross_entropy, *REFUSED[name][:2], **REFUSED[name][2])
    assert error_of(bonus_cross_entropy, input, target, **options, implementation="triton") == expected


@pytest.mark.parametrize(
    ("name", "expected", "came"),
    [
        ("label C", "[0, 5)", "got 1 outside"),
        ("target (N + 1)", "[4]", "got [5]"),
        ("class axis last", "[2, 5]", "got [2, 3]"),
        ("4-D, target transposed", "[2, 3, 4]", "got [2, 4, 3]"),
        ("input int64", "float16, bfloat16, float32 or float64", "got torch.int64"),
    ],
)
def test_the_second_line_says_what_was_expected_and_what_came(name, expected, came):
    input, target, options = REFUSED[name]
    with pytest.raises(Exception, match=re.escape(expected)) as caught:
        bonus_cross_entropy(input, target, **options)
    assert came in str(caught.value)


# What torch takes, we take: types that only look wrong.
@pytest.mark.parametrize(
    ("input", "target", "options"),
    [
        (logits(), labels(), {"ignore_index": np.int64(2)}),
        (logits(), labels(), {"ignore_index": torch.tensor(2)}),
        (logits(), labels(), {"label_smoothing": True}),
        (logits(), labels(), {"label_smoothing": np.float32(0.1)}),
        (logits(), labels(), {"label_smoothing": torch.tensor(0.1)}),
        (logits(), probabilities(), {"weight": torch.ones(5).double()}),
        (logits(), probabilities(), {"weight": torch.ones(5, requires_grad=True)}),
        (logits(5), labels(1), {"reduction": "none"}),
        (logits(4, 0), torch.full((4,), -100), {"reduction": "none"}),
    ],
)
def test_what_torch_accepts_is_accepted(input, target, options):
    ours, theirs = bonus_cross_entropy(input, target, **options, bonus=None), F.cross_entropy(input, target, **options)
    torch.testing.assert_close(ours, theirs)


def test_a_weight_that_requires_grad_is_fine_where_nothing_is_differentiated():
    weight = torch.ones(5, requires_grad=True)
    with torch.no_grad():
        expected = F.cross_entropy(logits_once := logits(), labels(), weight)
        torch.testing.assert_close(bonus_cross_entropy(logits_once, labels(), weight, bonus=None), expected)


# Where torch passes over a fault in silence, on purpose not so here.
@pytest.mark.parametrize("label_smoothing", [-0.1, math.nan, -math.inf])
def test_smoothing_below_zero_or_nan_raises_where_torch_is_silent(label_smoothing):
    with pytest.raises(RuntimeError, match="label_smoothing must be between 0.0 and 1.0. Got: "):
        bonus_cross_entropy(logits(), labels(), label_smoothing=label_smoothing)
    if not math.isinf(label_smoothing):
        assert F.cross_entropy(logits(), labels(), label_smoothing=label_smoothing).isfinite()


# --- our own options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("implementation", ["cuda", "Triton", "", 1, True])
def test_an_unknown_implementation_is_refused(function, implementation):
    message = f"implementation must be None, 'triton', 'torch' or 'reference', got {implementation!r}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        function(logits(), labels(), implementation=implementation)
    with pytest.raises(ValueError, match=f"^{message}$"):
        difficulty_scores(logits(), labels(), implementation=implementation)
    with pytest.raises(ValueError, match=f"^{message}$"):
        BonusCrossEntropyLoss(implementation=implementation)(logits(), labels())


@pytest.mark.parametrize(
    ("target", "options"),
    [(labels(), {"label_smoothing": 0.1}), (probabilities(), {}), (probabilities(), {"weight": torch.ones(5)})],
)
def test_what_has_no_kernel_says_so(target, options):
    with pytest.raises(NotImplementedError, match="implementation='triton' has no kernel"):
        bonus_cross_entropy(logits(), target, **options, implementation="triton")


def test_an_unknown_reduction_says_which_there_are():
    with pytest.raises(ValueError, match="avg is not a valid value for reduction\nExpected 'mean', 'sum' or 'none'"):
        bonus_cross_entropy(logits(), labels(), reduction="avg")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("bonus", "came"),
    [
        (LogBonus, "the class LogBonus"),
        (0.75, "float"),
        ("log", "str"),
        (True, "bool"),
        (torch.tensor(0.75), "torch.Tensor"),
    ],
)  # fmt: skip
def test_a_bonus_must_be_an_instance_of_a_gap_loss(function, bonus, came):
    with pytest.raises(TypeError, match=f"^bonus must be a GapLoss instance .*, not {came}$"):
        function(logits(), labels(), bonus=bonus)


def test_probability_targets_have_no_scores():
    for function in FUNCTIONS[1:]:
        with pytest.raises(NotImplementedError, match="(?s)scores of probability targets.*got torch.float32"):
            function(logits(), probabilities())
    with pytest.raises(NotImplementedError, match="scores of probability targets"):
        difficulty_scores(logits(), probabilities())


@pytest.mark.parametrize("name", ["label C", "target (N + 1)", "input int64", "target int32", "ignore_index float"])
def test_every_function_refuses_alike(name):
    input, target, options = REFUSED[name]
    expected = error_of(bonus_cross_entropy, input, target, **options)
    assert error_of(bonus_cross_entropy_with_scores, input, target, **options) == expected
    assert error_of(bonus_cross_entropy_with_softmax, input, target, **options) == expected
    assert error_of(difficulty_scores, input, target, **options) == expected
    if "ignore_index" not in options:
        assert error_of(BonusCrossEntropyLoss(), input, target) == expected


def test_our_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        bonus_cross_entropy(logits(), labels(), None, None, -100, None, "mean", 0.0, LogBonus())
    with pytest.raises(TypeError, match="positional"):
        difficulty_scores(logits(), labels(), -100)
