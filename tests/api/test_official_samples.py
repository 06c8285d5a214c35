"""torch's own sample inputs for cross-entropy, all of them: no further from float64 than torch is, with a bonus too."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("expecttest")  # torch's sample inputs import it

from bonus_ops import BonusCrossEntropyLoss, LogBonus, bonus_cross_entropy
from tests.budget import assert_within_budget
from tests.cases import FLOATS

EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS)
BONUS = LogBonus(0.75)


class Sample(NamedTuple):
    """What torch calls cross-entropy with: through the function, or through the module."""

    name: str
    input: Tensor
    target: Tensor
    options: dict[str, Any]


@functools.cache
def operator_info() -> Any:
    from torch.testing._internal.common_methods_invocations import op_db

    return next(op for op in op_db if op.name == "nn.functional.cross_entropy")


@functools.cache
def module_info() -> Any:
    from torch.testing._internal.common_modules import module_db

    return next(module for module in module_db if module.module_cls is nn.CrossEntropyLoss)


def operator_samples(dtype: torch.dtype) -> Iterator[Sample]:
    for number, sample in enumerate(operator_info().sample_inputs("cpu", dtype, requires_grad=True)):
        yield Sample(f"sample {number} {sorted(sample.kwargs)}", sample.input, *sample.args, sample.kwargs)


def module_samples(dtype: torch.dtype, device: str = "cpu") -> Iterator[Sample]:
    info = module_info()
    for sample in info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=True):
        made, called = sample.constructor_input, sample.forward_input
        assert not made.args and not called.kwargs
        yield Sample(sample.desc, *called.args, made.kwargs)


def by_module(module: type[nn.Module], **more: Any) -> Any:
    return lambda input, target, **options: module(**options, **more)(input, target)


def widened(x: Any) -> Any:
    """Return the argument in float64: what it is after rounding, without torch's rounding on the way."""
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.dtype in FLOATS else x


def results(function: Any, sample: Sample, wide: bool = False) -> dict[str, Tensor]:
    """Return the loss and the gradients of its sum, also in the target where it asks for one."""
    change = widened if wide else lambda x: x
    input, target = (change(x).detach().requires_grad_(x.requires_grad) for x in (sample.input, sample.target))
    loss = function(input, target, **{name: change(x) for name, x in sample.options.items()})
    leaves = [x for x in (input, target) if x.requires_grad]
    grads = torch.autograd.grad(loss.sum(), leaves)
    return {"loss": loss.detach()} | dict(zip(("gradient", "gradient in the target"), grads, strict=False))


def assert_no_further(ours, theirs, truth, dtype: torch.dtype, what: str) -> None:
    # half precision is rounded once, at the end; elsewhere rows of either sign are summed, in an order of our own
    floor = torch.finfo(dtype).eps * (1 if dtype in (torch.float16, torch.bfloat16) else 16)
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, actual in ours.items():
        eager = theirs[name]
        assert actual.dtype == eager.dtype and actual.shape == eager.shape, f"{what}: {name}"
        assert_within_budget(actual, truth[name], eager, floor=floor, what=f"{what}: {name}")


@pytest.mark.slow
@EVERY_DTYPE
def test_operator_samples(dtype):
    ours, samples = functools.partial(bonus_cross_entropy, bonus=None), list(operator_samples(dtype))
    assert len(samples) >= 20
    for sample in samples:
        theirs, truth = results(F.cross_entropy, sample), results(F.cross_entropy, sample, wide=True)
        assert_no_further(results(ours, sample), theirs, truth, dtype, sample.name)


@pytest.mark.slow
@EVERY_DTYPE
def test_module_samples(dtype):
    ours, theirs = by_module(BonusCrossEntropyLoss, bonus=None), by_module(nn.CrossEntropyLoss)
    samples = list(module_samples(dtype))
    assert len(samples) >= 100
    for sample in samples:
        truth = results(theirs, sample, wide=True)
        assert_no_further(results(ours, sample), results(theirs, sample), truth, dtype, sample.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("reference", torch.float32), ("reference", torch.bfloat16), *(("triton", dtype) for dtype in FLOATS)],
)
def test_module_samples_in_other_implementations(implementation, dtype, request):
    device = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    interpreted = implementation == "triton" and device == "cpu"
    if interpreted and dtype != torch.float32:
        pytest.skip("interpreted, one type tells what there is to tell: the samples differ in their options")
    ours = by_module(BonusCrossEntropyLoss, bonus=None, implementation=implementation)
    theirs = by_module(nn.CrossEntropyLoss)
    ran = 0
    for sample in module_samples(dtype, device):
        if interpreted and sample.options["reduction"] != "mean":
            continue  # no kernel reduces
        ran += 1
        try:
            actual = results(ours, sample)
        except NotImplementedError as error:  # a named implementation does not fall back
            assert implementation == "triton" and "the gradient of target" in str(error)
            continue
        assert_no_further(
            actual, results(theirs, sample), results(theirs, sample, wide=True), dtype, f"{sample.name} on {device}"
        )
    assert ran >= (33 if interpreted else 100)


def direct(
    input: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """Return the encouraging loss at log_end = 3/4 as the paper writes it: each class pays by its share."""
    classes = 0 if input.dim() == 1 else 1
    z, p = input.movedim(classes, -1), torch.softmax(input, classes).movedim(classes, -1)
    bonus = torch.log(1 - p.clamp(max=0.75)) - 4 * (p - 0.75).clamp(min=0)
    loss = bonus - torch.log_softmax(z, -1)
    n_classes = z.shape[-1]
    weight = z.new_ones(n_classes) if weight is None else weight
    if target.is_floating_point():
        shares, count = target.movedim(classes, -1), torch.tensor(z[..., 0].numel())
    else:
        counts = target != ignore_index
        label = target.where(counts, 0)
        shares, count = F.one_hot(label, n_classes).to(z), (weight[label] * counts).sum()
        loss = torch.where(counts[..., None], loss, 0.0)
    shares = shares * (1 - label_smoothing) + label_smoothing / n_classes
    rows = (shares * weight * loss).sum(-1)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / count}[reduction]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "dtype"),
    [(operator_samples, torch.float32), (module_samples, torch.float32), (module_samples, torch.bfloat16)],
)
def test_samples_with_a_bonus(samples, dtype):
    ours = functools.partial(bonus_cross_entropy, bonus=BONUS)
    for sample in samples(dtype):
        truth = results(direct, sample, wide=True)
        specification = results(functools.partial(ours, implementation="reference"), sample, wide=True)
        for name, exact in truth.items():  # the direct formula differs by the 1 / (1 - 3/4) of its tangent, squared
            assert_within_budget(specification[name], exact, None, floor=2.0**-44, what=f"{sample.name}: {name}")
        eager = results(functools.partial(ours, implementation="reference"), sample)
        assert_no_further(results(ours, sample), eager, truth, dtype, sample.name)


@EVERY_DTYPE
@pytest.mark.parametrize("bonus", [None, BONUS], ids=["plain", "bonus"])
def test_what_torch_says_must_raise_raises(bonus, dtype):
    info = module_info()
    if info.module_error_inputs_func is None:
        pytest.skip("this torch lists no error inputs")
    for wrong in info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
        made, called = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input
        before = [x.clone() for x in called.args]
        with pytest.raises(wrong.error_type) as caught:
            BonusCrossEntropyLoss(*made.args, **made.kwargs, bonus=bonus)(*called.args)
        assert type(caught.value) is wrong.error_type and re.search(wrong.error_regex, str(caught.value))
        assert all(map(torch.equal, before, called.args))
