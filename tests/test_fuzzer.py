"""A run of the fuzzer, and proof that it can fail."""

from __future__ import annotations

import pytest
import torch

from bonus_ops.kernels.cpu import labels
from tests import fuzzer
from tests.conftest import ACCELERATOR

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(4))
def test_loops(seed):
    assert fuzzer.fuzz(500, seed, "numba") == 500


@pytest.mark.skipif(ACCELERATOR is not None, reason="draws tensors on the CPU, where kernels are not compiled")
@pytest.mark.usefixtures("kernel_device")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("seed", range(2))
def test_interpreted_kernels(seed):
    assert fuzzer.fuzz(50, seed, "triton") == 50


def test_every_kind_of_case_is_drawn():
    drawn = [fuzzer.draw_case(seed, "numba") for seed in range(1, 500)]
    expected = {
        "regime": fuzzer.REGIMES,
        "outputs": fuzzer.OUTPUTS,
        "reduction": ("mean", "sum", "none"),
        "ignore": ("nothing", "some", "a class", "all"),
        "weight": ("none", "uniform", "zeros"),
        "target": ("int64", "uint8", "strided", "probabilities"),
    }
    for field, values in expected.items():
        assert {getattr(case, field) for case in drawn} == set(values), field
    assert {len(case.shape) for case in drawn} == {1, 2, 3, 4}


def test_a_case_is_its_seed():
    case = fuzzer.draw_case(7, "numba")
    assert case == fuzzer.draw_case(7, "numba") != fuzzer.draw_case(8, "numba")
    for a, b in zip(fuzzer.inputs_of(case), fuzzer.inputs_of(case), strict=True):
        assert a == b if not isinstance(a, torch.Tensor) else torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_a_fault_is_found_and_its_seed_told(monkeypatch):
    real = labels.visit

    def visit(*args):
        out = real(*args)
        return out._replace(loss=out.loss * (1 + 2e-5))

    monkeypatch.setattr(labels, "visit", visit)
    with pytest.raises(AssertionError, match=r"--replay \d+ --implementation numba") as failure:
        fuzzer.fuzz(100, 0, "numba")
    number = int(str(failure.value).split("--replay ")[1].split()[0])
    with pytest.raises(AssertionError, match="outside the budget"):
        fuzzer.run_seed(number, "numba")
