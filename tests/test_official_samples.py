"""torch's own sample inputs for cross-entropy: without a bonus we are no further from float64 than torch is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("expecttest")  # torch's sample inputs import it

from bonus_ops import BonusCrossEntropyLoss, bonus_cross_entropy
from tests.budget import assert_within_budget
from tests.cases import FLOATS

EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS)


@functools.cache
def operator_info() -> Any:
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == "nn.functional.cross_entropy")


@functools.cache
def module_info() -> Any:
    from torch.testing._internal.common_modules import module_db

    return next(module for module in module_db if module.module_cls is nn.CrossEntropyLoss)


def widened(x: Any) -> Any:
    """Return the argument in float64: what it is after rounding, without torch's rounding on the way."""
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def value_and_grad(function, input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = input.detach().clone().requires_grad_()
    loss = function(leaf, *args, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_no_further_than_torch(ours, theirs, truth, dtype: torch.dtype, what: str) -> None:
    # half precision is rounded once, at the end; elsewhere rows of either sign are summed, in an order of our own
    floor = torch.finfo(dtype).eps * (1 if dtype in (torch.float16, torch.bfloat16) else 16)
    for name, actual, eager, exact in zip(("loss", "gradient"), ours, theirs, truth, strict=True):
        assert actual.dtype == eager.dtype and actual.shape == eager.shape, f"{what}: {name}"
        assert_within_budget(actual, exact, eager, floor=floor, what=f"{what}: {name}")


@EVERY_DTYPE
def test_operator_samples(dtype):
    samples = list(operator_info().sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) >= 20
    for number, sample in enumerate(samples):
        args, options = sample.args, sample.kwargs
        ours = value_and_grad(bonus_cross_entropy, sample.input, *args, **options, bonus=None)
        theirs = value_and_grad(F.cross_entropy, sample.input, *args, **options)
        wide = {key: widened(x) for key, x in options.items()}
        truth = value_and_grad(F.cross_entropy, widened(sample.input), *map(widened, args), **wide)
        assert_no_further_than_torch(ours, theirs, truth, dtype, f"sample {number} {sorted(options)}")


@EVERY_DTYPE
def test_module_samples(dtype):
    info = module_info()
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert len(samples) >= 100
    for sample in samples:
        made, called = sample.constructor_input, sample.forward_input
        args, options = list(made.args), dict(made.kwargs)
        loss = BonusCrossEntropyLoss(*args, **options, bonus=None)
        ours = value_and_grad(loss, *called.args, **called.kwargs)
        theirs = value_and_grad(nn.CrossEntropyLoss(*args, **options), *called.args, **called.kwargs)
        wide = nn.CrossEntropyLoss(*map(widened, args), **{key: widened(x) for key, x in options.items()})
        truth = value_and_grad(wide, *map(widened, called.args), **called.kwargs)
        assert_no_further_than_torch(ours, theirs, truth, dtype, sample.desc)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_module_samples_in_other_implementations(implementation, request):
    device = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    info = module_info()
    ran = 0
    for sample in info.module_inputs_func(info, device=device, dtype=torch.float32, requires_grad=True, training=True):
        made, called = sample.constructor_input, sample.forward_input
        loss = BonusCrossEntropyLoss(*made.args, **made.kwargs, bonus=None, implementation=implementation)
        try:
            ours = value_and_grad(loss, *called.args, **called.kwargs)
        except NotImplementedError as error:
            assert "no kernel" in str(error) and implementation == "triton"
            continue
        theirs = value_and_grad(nn.CrossEntropyLoss(*made.args, **made.kwargs), *called.args, **called.kwargs)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True, msg=sample.desc)
        ran += 1
    assert ran >= 30
