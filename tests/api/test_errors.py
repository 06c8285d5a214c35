"""Bad input: the class and first line torch raises, live; and our own options' errors, which name what came."""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bonus_ops
from bonus_ops import (
    BonusCrossEntropyLoss,
    CosineBonus,
    CrossEntropy,
    Focal,
    GapLoss,
    GeneralizedCrossEntropy,
    LogBonus,
    Poly1,
    PowerBonus,
    Scores,
    SoftmaxAbsoluteError,
    SoftmaxSquaredError,
    SquaredError,
    SubDataBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
    difficulty_scores,
    vocab_parallel,
)

pytestmark = pytest.mark.every_case

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
    "ignore_index 2^70": (logits(), labels(), {"ignore_index": 2**70}),
    "ignore_index numpy float": (logits(), labels(), {"ignore_index": np.float64(1)}),
    "ignore_index tensor of two": (logits(), labels(), {"ignore_index": torch.tensor([1, 2])}),
    "ignore_index float tensor": (logits(), labels(), {"ignore_index": torch.tensor(1.0)}),
    "reduction unknown": (logits(), labels(), {"reduction": "foo"}),
    "reduction None": (logits(), labels(), {"reduction": None}),
    "reduction int": (logits(), labels(), {"reduction": 1}),
    "label_smoothing 1.1": (logits(), labels(), {"label_smoothing": 1.1}),
    "label_smoothing inf": (logits(), labels(), {"label_smoothing": math.inf}),
    "label_smoothing 1.1, probabilities": (logits(), probabilities(), {"label_smoothing": 1.1}),
    "label_smoothing str": (logits(), labels(), {"label_smoothing": "0.1"}),
    "label_smoothing None": (logits(), labels(), {"label_smoothing": None}),
    "label_smoothing list": (logits(), labels(), {"label_smoothing": [0.1]}),
    "label_smoothing complex": (logits(), labels(), {"label_smoothing": 0.1j}),
    "label_smoothing numpy array": (logits(), labels(), {"label_smoothing": np.array([0.1, 0.2])}),
    "label_smoothing tensor of two": (logits(), labels(), {"label_smoothing": torch.tensor([0.1, 0.2])}),
    "label_smoothing that requires grad": (
        logits(), labels(), {"label_smoothing": torch.tensor(0.1, requires_grad=True)},
    ),
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
    "weight float": (logits(), labels(), {"weight": 1.0}),
    "weight ()": (logits(), labels(), {"weight": torch.tensor(1.0)}),
    "weight complex": (logits(), labels(), {"weight": torch.ones(5).to(torch.complex64)}),
    "weight sparse": (logits(), labels(), {"weight": torch.ones(5).to_sparse()}),
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
@pytest.mark.parametrize("implementation", ["numba", "reference"])
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
    message = f"implementation must be None, 'triton', 'numba' or 'reference', got {implementation!r}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        function(logits(), labels(), implementation=implementation)
    with pytest.raises(ValueError, match=f"^{message}$"):
        difficulty_scores(logits(), labels(), implementation=implementation)
    with pytest.raises(ValueError, match=f"^{message}$"):
        BonusCrossEntropyLoss(implementation=implementation)(logits(), labels())


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
    with pytest.raises(TypeError, match=f"^bonus must be a GapLoss instance .*, not {came}$"):
        BonusCrossEntropyLoss(bonus=bonus)


def test_a_loss_in_the_place_of_weights_is_told_where_to_go():
    with pytest.raises(TypeError, match="Expected weight to be a Tensor, got LogBonus. A loss goes by keyword: bonus="):
        bonus_cross_entropy(logits(), labels(), LogBonus())


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


class Undecorated(GapLoss):
    """Neither a dataclass nor numbers."""


@dataclass(frozen=True)
class Worded(GapLoss):
    """A field that is no number."""

    word: str = "log"


@dataclass(frozen=True)
class Formulas(GapLoss):
    """No kernel."""

    def value(self, gap):
        return -gap

    def slope(self, gap):
        return torch.ones_like(gap)


def scores_of_four() -> Scores:
    return difficulty_scores(logits(), labels())


def called(**options):
    """Return what calls every function in turn with the options; all must fail alike."""
    return lambda input, target: [error_of(function, input, target, **options) for function in FUNCTIONS]


# (name, what fails, class, its whole first line); a `called` runs through the three functions
OWN = (
    # losses: each parameter's range, type, NaN and bool
    ("LogBonus log_end above", lambda: LogBonus(1.01), ValueError, r"LogBonus: log_end must be in \[0, 1\], got 1.01"),
    ("LogBonus log_end NaN", lambda: LogBonus(math.nan), ValueError, r"LogBonus: log_end must be in \[0, 1\], got nan"),
    ("LogBonus log_end bool", lambda: LogBonus(False), TypeError, "LogBonus: log_end must be a number, got bool"),
    ("LogBonus log_end list", lambda: LogBonus([0.5]), TypeError, "LogBonus: log_end must be a number, got list"),
    ("LogBonus clamp NaN", lambda: LogBonus(clamp=math.nan), ValueError,
     r"LogBonus: clamp must be in \(0, 1\) or None, got nan"),
    ("LogBonus clamp bool", lambda: LogBonus(clamp=True), TypeError,
     "LogBonus: clamp must be a number or None, got bool"),
    ("LogBonus clamp positional third", lambda: LogBonus(0.5, 1e-5, 1.0), TypeError,
     ".* positional arguments but 4 .*"),
    ("LogBonus unknown", lambda: LogBonus(gamma=1), TypeError, ".* unexpected keyword argument 'gamma'"),
    ("LogBonus is frozen", lambda: setattr(LogBonus(), "log_end", 0.5), FrozenInstanceError,
     "cannot assign to field 'log_end'"),
    ("strength NaN", lambda: PowerBonus(strength=math.nan), ValueError,
     r"PowerBonus: strength must be in \(-inf, inf\), got nan"),
    ("strength -inf", lambda: CosineBonus(strength=-math.inf), ValueError,
     r"CosineBonus: strength must be in \(-inf, inf\), got -inf"),
    ("strength None", lambda: SubDataBonus(strength=None), TypeError,
     "SubDataBonus: strength must be a number, got NoneType"),
    ("strength tensor", lambda: LogBonus(strength=torch.ones(5)), TypeError,
     "LogBonus: strength must be a number, got Tensor"),
    ("start below", lambda: PowerBonus(start=-0.1), ValueError, r"PowerBonus: start must be in \[0, 1\), got -0.1"),
    ("start NaN", lambda: LogBonus(start=math.nan), ValueError, r"LogBonus: start must be in \[0, 1\), got nan"),
    ("start above abrupt", lambda: LogBonus(start=0.8, abrupt=0.2), ValueError,
     "LogBonus: start must be below abrupt=0.2, got 0.8"),
    ("start is abrupt", lambda: CosineBonus(start=0.5, abrupt=0.5), ValueError,
     "CosineBonus: start must be below abrupt=0.5, got 0.5"),
    ("abrupt above", lambda: SubDataBonus(abrupt=1.5), ValueError,
     r"SubDataBonus: abrupt must be in \(0, 1\], got 1.5"),
    ("abrupt NaN", lambda: CosineBonus(abrupt=math.nan), ValueError,
     r"CosineBonus: abrupt must be in \(0, 1\], got nan"),
    ("PowerBonus gamma NaN", lambda: PowerBonus(math.nan), ValueError,
     r"PowerBonus: gamma must be in \(0, inf\), got nan"),
    ("PowerBonus gamma bool", lambda: PowerBonus(True), TypeError, "PowerBonus: gamma must be a number, got bool"),
    ("SubDataBonus k NaN", lambda: SubDataBonus(math.nan), ValueError, r"SubDataBonus: k must be in \(0, 1\], got nan"),
    ("SubDataBonus clamp str", lambda: SubDataBonus(clamp="1"), TypeError,
     "SubDataBonus: clamp must be a number or None, got str"),
    ("SubDataBonus clamp 0", lambda: SubDataBonus(clamp=0), ValueError,
     r"SubDataBonus: clamp must be in \(0, 1\) or None, got 0"),
    ("CosineBonus takes none", lambda: CosineBonus(1.0), TypeError, ".* takes 1 positional argument but 2 were given"),
    ("CrossEntropy takes none", lambda: CrossEntropy(1.0), TypeError,
     ".* takes 1 positional argument but 2 were given"),
    ("Focal gamma inf", lambda: Focal(math.inf), ValueError, r"Focal: gamma must be in \[0, inf\), got inf"),
    ("Focal gamma complex", lambda: Focal(1j), TypeError, "Focal: gamma must be a number, got complex"),
    ("Focal gamma bool", lambda: Focal(True), TypeError, "Focal: gamma must be a number, got bool"),
    ("Poly1 epsilon inf", lambda: Poly1(math.inf), ValueError, r"Poly1: epsilon must be in \[-1, inf\), got inf"),
    ("Poly1 epsilon NaN", lambda: Poly1(math.nan), ValueError, r"Poly1: epsilon must be in \[-1, inf\), got nan"),
    ("Poly1 epsilon None", lambda: Poly1(None), TypeError, "Poly1: epsilon must be a number, got NoneType"),
    ("GCE q above", lambda: GeneralizedCrossEntropy(1.1), ValueError,
     r"GeneralizedCrossEntropy: q must be in \(0, 1\], got 1.1"),
    ("GCE q NaN", lambda: GeneralizedCrossEntropy(math.nan), ValueError,
     r"GeneralizedCrossEntropy: q must be in \(0, 1\], got nan"),
    ("GapLoss has no value", lambda: GapLoss().value(logits()), NotImplementedError,
     r"GapLoss does not define value\(gap\)"),
    ("GapLoss has no slope", lambda: GapLoss().slope(logits()), NotImplementedError,
     r"GapLoss does not define slope\(gap\)"),
    # bonus, implementation, validate: every function, the module and the scores
    ("bonus list", called(bonus=[]), TypeError, "bonus must be a GapLoss instance .*, not list"),
    ("bonus complex", called(bonus=1j), TypeError, "bonus must be a GapLoss instance .*, not complex"),
    ("bonus a function", called(bonus=LogBonus.value), TypeError, "bonus must be a GapLoss instance .*, not function"),
    ("bonus a module", called(bonus=torch.nn.CrossEntropyLoss()), TypeError,
     "bonus must be a GapLoss instance .*, not torch.nn.modules.loss.CrossEntropyLoss"),
    ("bonus the base class", called(bonus=GapLoss()), TypeError,
     "bonus must be a dataclass of numbers, but GapLoss is not one"),
    ("bonus no dataclass", called(bonus=Undecorated()), TypeError,
     "bonus must be a dataclass of numbers, but Undecorated is not one"),
    ("bonus with a word", called(bonus=Worded()), TypeError,
     "bonus must have fields that are numbers or None, but Worded.word is str"),
    ("bonus with a tensor", called(bonus=Worded(torch.ones(()))), TypeError,
     "bonus must have fields that are numbers or None, but Worded.word is Tensor"),
    ("bonus without a kernel", called(bonus=Formulas(), implementation="triton"), NotImplementedError,
     "implementation='triton': Formulas has no kernel."),
    ("bonus without a loop", called(bonus=Formulas(), implementation="numba"), NotImplementedError,
     "implementation='numba': Formulas has no kernel."),
    ("implementation list", called(implementation=["numba"]), ValueError,
     r"implementation must be None, .*, got \['numba'\]"),
    ("implementation bytes", called(implementation=b"numba"), ValueError,
     "implementation must be None, .*, got b'numba'"),
    ("implementation NaN", called(implementation=math.nan), ValueError, "implementation must be None, .*, got nan"),
    ("validate str", called(validate="yes"), TypeError, "validate must be True or False, got str"),
    ("validate int", called(validate=1), TypeError, "validate must be True or False, got int"),
    ("validate None", called(validate=None), TypeError, "validate must be True or False, got NoneType"),
    ("unknown option", called(temperature=2.0), TypeError, ".* unexpected keyword argument 'temperature'"),
    ("smoothing NaN with a bonus", called(bonus=Focal(), label_smoothing=math.nan), RuntimeError,
     "label_smoothing must be between 0.0 and 1.0. Got: nan"),
    # the bonus' own smoothing and weight
    ("smoothing without a kernel", called(bonus=Formulas(), label_smoothing=0.1, implementation="triton"),
     NotImplementedError, "implementation='triton': Formulas has no kernel."),
    ("smoothing of a loss of the gap without a kernel", called(
        bonus=SquaredError(), label_smoothing=0.1, implementation="triton",
     ), NotImplementedError, "implementation='triton': there is no kernel for SquaredError with soft targets."),
    ("smoothing of a loss of the gap without a loop", called(
        bonus=SquaredError(), label_smoothing=0.1, implementation="numba",
     ), NotImplementedError, "implementation='numba': there is no kernel for SquaredError with soft targets."),
    ("bonus_smoothing above", called(bonus_smoothing=1.1), ValueError,
     r"bonus_cross_entropy: bonus_smoothing must be in \[0, 1\] or None, got 1.1"),
    ("bonus_smoothing below", called(bonus_smoothing=-0.1), ValueError,
     r"bonus_cross_entropy: bonus_smoothing must be in \[0, 1\] or None, got -0.1"),
    ("bonus_smoothing NaN", called(bonus_smoothing=math.nan), ValueError,
     r"bonus_cross_entropy: bonus_smoothing must be in \[0, 1\] or None, got nan"),
    ("bonus_smoothing str", called(bonus_smoothing="0.1"), TypeError,
     "bonus_cross_entropy: bonus_smoothing must be a number or None, got str"),
    ("bonus_smoothing bool", called(bonus_smoothing=True), TypeError,
     "bonus_cross_entropy: bonus_smoothing must be a number or None, got bool"),
    ("bonus_smoothing tensor", called(bonus_smoothing=torch.tensor(0.1)), TypeError,
     "bonus_cross_entropy: bonus_smoothing must be a number or None, got Tensor"),
    ("bonus_smoothing without a bonus", called(bonus=None, bonus_smoothing=0.1), ValueError,
     "bonus_smoothing needs a bonus on cross-entropy, which CrossEntropy is not."),
    ("bonus_weight with focal", called(bonus=Focal(), bonus_weight=torch.ones(5)), ValueError,
     "bonus_weight needs a bonus on cross-entropy, which Focal is not."),
    ("bonus_weight with an error", called(bonus=SoftmaxSquaredError(), bonus_weight=torch.ones(5)), ValueError,
     "bonus_weight needs a bonus on cross-entropy, which SoftmaxSquaredError is not."),
    ("bonus_weight (4)", called(bonus_weight=torch.ones(4)), RuntimeError,
     r"bonus_weight must have shape \[5\], one number a class, got \[4\]"),
    ("bonus_weight (1, 5)", called(bonus_weight=torch.ones(1, 5)), RuntimeError,
     r"bonus_weight must have shape \[5\], one number a class, got \[1, 5\]"),
    ("bonus_weight int64", called(bonus_weight=torch.ones(5).long()), RuntimeError,
     "bonus_weight must have a floating point type, got torch.int64"),
    ("bonus_weight list", called(bonus_weight=[1.0] * 5), TypeError, "bonus_weight must be a Tensor or None, got list"),
    ("bonus_weight on meta", called(bonus_weight=torch.ones(5, device="meta")), RuntimeError,
     "bonus_weight must be on the device of input, cpu, got meta"),
    ("bonus_weight requires_grad", called(bonus_weight=torch.ones(5, requires_grad=True)), RuntimeError,
     "bonus_weight must not require a gradient"),
    ("bonus_weight sparse", called(bonus_weight=torch.ones(5).to_sparse()), RuntimeError,
     "bonus_weight must be dense .*, got torch.sparse_coo"),
    ("weight with an error", called(bonus=SoftmaxSquaredError(), weight=torch.ones(5)), ValueError,
     "weight has no meaning for SoftmaxSquaredError."),
    ("error, strength NaN", lambda: SoftmaxSquaredError(math.nan), ValueError,
     r"SoftmaxSquaredError: strength must be in \(-inf, inf\), got nan"),
    ("error, gamma below", lambda: SoftmaxAbsoluteError(1.0, 0.5), ValueError,
     r"SoftmaxAbsoluteError: gamma must be in \[1, inf\), got 0.5"),
    ("error, gamma str", lambda: SoftmaxAbsoluteError(gamma="2"), TypeError,
     "SoftmaxAbsoluteError: gamma must be a number, got str"),
    ("module, bonus_weight list", lambda: BonusCrossEntropyLoss(bonus_weight=[1.0]), TypeError,
     "cannot assign 'list' object to buffer .*"),
    ("validated labels", lambda input, target: bonus_cross_entropy(input, target + 2, validate=True), IndexError,
     "Target 5 is out of bounds."),
    ("meta in triton", lambda: bonus_cross_entropy(logits().to("meta"), labels().to("meta"), implementation="triton"),
     RuntimeError, "implementation='triton' cannot run: there are no kernels for device type meta"),
    ("module, bonus a class", lambda input, target: BonusCrossEntropyLoss(bonus=LogBonus)(input, target), TypeError,
     "bonus must be a GapLoss instance .*, not the class LogBonus"),
    ("module, bonus positional", lambda: BonusCrossEntropyLoss(None, None, -100, None,
     "mean", 0.0, LogBonus()), TypeError,
     ".* positional arguments but 8 were given"),
    ("module, unknown option", lambda: BonusCrossEntropyLoss(gamma=2), TypeError,
     ".* unexpected keyword argument 'gamma'"),
    ("module, bonus_smoothing above", lambda: BonusCrossEntropyLoss(bonus_smoothing=2.0), ValueError,
     r"bonus_cross_entropy: bonus_smoothing must be in \[0, 1\] or None, got 2.0"),
    ("module, implementation", lambda: BonusCrossEntropyLoss(implementation="fast"), ValueError,
     "implementation must be None, 'triton', 'numba' or 'reference', got 'fast'"),
    ("module, weight list", lambda: BonusCrossEntropyLoss([1.0] * 5), TypeError,
     "cannot assign 'list' object to buffer .*"),
    ("module, validate str", lambda input, target: BonusCrossEntropyLoss(validate="no")(input, target), TypeError,
     "validate must be True or False, got str"),
    ("difficulty_scores, reduction", lambda input, target: difficulty_scores(input, target, reduction="sum"), TypeError,
     ".* unexpected keyword argument 'reduction'"),
    ("difficulty_scores, validate", lambda input, target: difficulty_scores(input, target, validate=2), TypeError,
     "validate must be True or False, got int"),
    ("difficulty_scores, label C", lambda input, target: difficulty_scores(input, target + 2), IndexError,
     "Target 5 is out of bounds."),
    # scores
    ("difficulty of an unknown name", lambda: scores_of_four().difficulty("Loss"), ValueError,
     "difficulty: name must be one of loss, .*, got 'Loss'"),
    ("difficulty of what orders nothing", lambda: scores_of_four().difficulty("runner_up"), ValueError,
     "difficulty: name must be one of loss, .*, got 'runner_up'"),
    ("difficulty of None", lambda: scores_of_four().difficulty(None), ValueError,
     "difficulty: name must be one of loss, .*, got None"),
    ("difficulty of a list", lambda: scores_of_four().difficulty(["loss"]), ValueError,
     r"difficulty: name must be one of loss, .*, got \['loss'\]"),
    ("difficulty, bonus a class", lambda: scores_of_four().difficulty("grad_norm", bonus=LogBonus), TypeError,
     "bonus must be a GapLoss instance .*, not the class LogBonus"),
    ("grad_norm, bonus str", lambda: scores_of_four().grad_norm("log"), TypeError,
     "bonus must be a GapLoss instance .*, not str"),
    ("grad_norm, class weights", lambda: scores_of_four().grad_norm(weight=torch.ones(5)), RuntimeError,
     r"weight must be shaped like the scores, \[4\], got \[5\]"),
    ("grad_norm, column of weights", lambda: scores_of_four().grad_norm(weight=torch.ones(4, 1)), RuntimeError,
     r"weight must be shaped like the scores, \[4\], got \[4, 1\]"),
    ("grad_norm, weight float", lambda: scores_of_four().grad_norm(weight=2.0), TypeError,
     "weight must be a Tensor, not float"),
    ("prediction, target (3)", lambda: scores_of_four().prediction(labels(3)), RuntimeError,
     r"target must be shaped like the scores, \[4\], got \[3\]"),
    ("correct, column of targets", lambda: scores_of_four().correct(labels(4, 1)), RuntimeError,
     r"target must be shaped like the scores, \[4\], got \[4, 1\]"),
    ("correct, target list", lambda: scores_of_four().correct([0, 1, 2, 3]), TypeError,
     "target must be a Tensor, not list"),
    ("prediction, target float", lambda: scores_of_four().prediction(labels().float()), RuntimeError,
     r"target must hold class indices, got torch.float32 of shape \[4\]"),
)  # fmt: skip


@pytest.mark.parametrize(("make", "error", "first_line"), [case[1:] for case in OWN], ids=[case[0] for case in OWN])
def test_our_own_options_fail_clearly_and_leave_everything_as_it_was(make, error, first_line, request):
    if "kernel" in first_line:
        request.getfixturevalue("kernel_device")
    input, target = logits().requires_grad_(), labels()
    input.grad = torch.full_like(input, 3.0)
    before = [x.detach().clone() for x in (input, target, input.grad)]
    arguments = make.__code__.co_argcount * (1,) and (input, target)
    if make.__qualname__.startswith("called"):
        came = make(*arguments)
        assert came == [came[0]] * 3 or "unexpected keyword" in first_line
    else:
        came = [error_of(make, *arguments)]
    for kind, line in came:
        assert kind is error
        assert re.fullmatch(first_line, line)
    assert all(map(torch.equal, before, (input, target, input.grad)))
    assert input._version == 0 and target._version == 0 and input.grad_fn is None


def test_there_are_forty_of_them():
    assert len({case[0] for case in OWN}) == len(OWN) >= 40


def test_a_score_takes_the_target_of_one_row_either_way():
    scores = difficulty_scores(logits(5), labels(1))
    assert scores.correct(labels(1)).tolist() == [scores.correct(labels(1)[0]).item()]


@pytest.mark.parametrize(
    "twin",
    [
        bonus_ops.linear_bonus_cross_entropy_with_scores,
        bonus_ops.mixup_cross_entropy_with_scores,
        bonus_ops.bonus_binary_cross_entropy_with_logits_and_scores,
        vocab_parallel.bonus_cross_entropy_with_scores,
        vocab_parallel.linear_bonus_cross_entropy_with_scores,
    ],
)
@pytest.mark.parametrize("unknown", ["reductoin", "scores"])
def test_a_twin_names_itself_where_an_argument_is_unknown(twin, unknown):
    with pytest.raises(TypeError, match=rf"^{twin.__name__}\(\) got an unexpected keyword argument '{unknown}'"):
        twin(torch.zeros(2, 3), torch.zeros(2), **{unknown: True})
