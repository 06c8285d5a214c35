"""The one checker of numbers: intervals open and closed, numbers of Python and numpy, and who is told what."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from bonus_ops.number_checks import check_integer, check_number

pytestmark = pytest.mark.every_case

INTERVALS = {
    "[0, 1]": (0, 1, 0.5), "(0, 1]": (1, 0.5), "[0, 1)": (0, 0.5), "(0, 1)": (0.5,), "(0, inf)": (1e300, 5e-324),
    "(0, inf]": (math.inf,), "[-inf, inf]": (-math.inf, math.inf, 0), "(-inf, inf)": (-1e300, 0),
}  # fmt: skip


@pytest.mark.parametrize("interval", INTERVALS)
def test_a_number_is_in_its_interval_or_named_with_it(interval):
    for value in INTERVALS[interval]:
        for kind in (float, np.float64):
            check_number("f", "x", kind(value), interval)
    low, high = (float(end) for end in interval[1:-1].split(","))
    outside = [math.nan, *([low] if interval[0] == "(" else []), *([high] if interval[-1] == ")" else [])]
    outside += [low - 1] if low > -math.inf else []
    outside += [high + 1] if high < math.inf else []
    for value in outside:
        with pytest.raises(ValueError) as error:
            check_number("f", "x", value, interval)
        assert str(error.value) == f"f: x must be in {interval}, got {value!r}"


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), np.uint8(1), Fraction(1)])
def test_numbers_of_python_and_numpy_are_numbers(value):
    check_number("f", "x", value, "[0, 1]")


@pytest.mark.parametrize("value", [True, np.bool_(True), "1", None, [1], 1j, torch.tensor(1.0)])
def test_what_is_no_number_raises_its_type(value):
    with pytest.raises(TypeError, match=f"^f: x must be a number, got {type(value).__name__}$"):
        check_number("f", "x", value, "[0, 1]")
    with pytest.raises(TypeError, match=f"^f: x must be an int, got {type(value).__name__}$"):
        check_integer("f", "x", value, 0)


def test_what_else_is_taken_is_named_and_none_passes():
    check_number("f", "x", None, "[0, 1] or None")
    for expected, value, error, said in (
        ("[0, 1] or None", "1", TypeError, "f: x must be a number or None, got str"),
        ("[0, 1] or None", 2, ValueError, "f: x must be in [0, 1] or None, got 2"),
        ("[0, 1] or a Tensor", None, TypeError, "f: x must be a number or a Tensor, got NoneType"),
    ):
        with pytest.raises(error) as raised:
            check_number("f", "x", value, expected)
        assert str(raised.value) == said


def test_an_int_has_a_least_and_may_have_a_most():
    for value in (2, 5, np.int16(3), 10**30):
        check_integer("f", "x", value, 2)
    check_integer("f", "x", 5, 2, 5)
    for value, match in (
        (1, "x must be at least 2, got 1"),
        (6, "x must be in 2 .. 5, got 6"),
        (-1, "at least 2, got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            check_integer("f", "x", value, 2, 5)
    for value in (2.0, np.float64(2), math.nan):
        with pytest.raises(TypeError, match="x must be an int, got float"):
            check_integer("f", "x", value, 2)
