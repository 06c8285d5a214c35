"""Calls that Hypothesis draws, every option with every other: as the truth in float64, or refused as torch does."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")  # in the extra `test`
from hypothesis import given, settings

from bonus_ops.kernels.cpu import labels
from tests import calls
from tests.conftest import ACCELERATOR

FEW = settings(max_examples=max(settings.default.max_examples // 20, 5))  # interpreted, or slow to fail


@pytest.mark.slow
@given(calls.calls("numba"))
def test_loops(case):
    calls.check(case)


@pytest.mark.slow
@FEW
@given(calls.calls("reference"))
def test_the_reference(case):
    calls.check(case)


@pytest.mark.slow
@pytest.mark.skipif(ACCELERATOR is not None, reason="draws tensors on the CPU, where kernels are not compiled")
@pytest.mark.usefixtures("kernel_device")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@FEW
@given(calls.calls("triton"))
def test_interpreted_kernels(case):
    calls.check(case)


@given(calls.faulty_calls())
@settings(max_examples=100)
def test_faults_are_those_of_torch(arguments):
    calls.check_fault(arguments, "numba")


def test_a_fault_is_found(monkeypatch):
    real = labels.visit

    def visit(*args):
        out = real(*args)
        return out._replace(loss=out.loss * (1 + 2e-5))

    monkeypatch.setattr(labels, "visit", visit)

    @settings(max_examples=50, database=None)
    @given(calls.calls("numba"))
    def fuzz(case):
        calls.check(case)

    with pytest.raises(AssertionError, match="outside the budget"):
        fuzz()
