"""Inputs of `F.cross_entropy`, one a row: what a drop-in must do with each is asked of torch, live.

A row is ``case(number, name, call)`` with, where it is not the loss and its gradient that are observed, ``how``. Rows
1-171 are a recorded table whose numbers are kept; the rest came later.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Loss = Callable[..., Tensor]
Results = dict[str, Any]
REDUCTIONS = ("mean", "sum", "none")
nan, inf = math.nan, math.inf


class Call(NamedTuple):
    """The arguments of one call."""

    input: Any
    target: Any
    options: dict[str, Any]


class Case(NamedTuple):
    """One row: ``make`` gives the arguments, ``how`` calls a loss with them and says what came."""

    number: int
    name: str
    make: Callable[[], Call]
    how: Callable[..., Results]


# --- constructors -----------------------------------------------------------------------------------------------------


def call(input: Any, target: Any, **options: Any) -> Call:
    return Call(input, target, options)


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal draws of a fixed seed, float32 rounded to ``dtype``."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def t(*labels: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(labels, dtype=dtype)


def base(**options: Any) -> Call:
    """Four rows, five classes, labels 0 to 3."""
    return call(x(4, 5), t(0, 1, 2, 3), **options)


def base_with(input: Any = None, target: Any = None, **options: Any) -> Call:
    return call(x(4, 5) if input is None else input, t(0, 1, 2, 3) if target is None else target, **options)


def small(*labels: int, **options: Any) -> Call:
    """Two rows, three classes: what the autograd rows use."""
    return call(x(2, 3), t(*(labels or (0, 1))), **options)


def row(*logits: float, label: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    """Return one row, unreduced."""
    return call(torch.tensor([logits], dtype=dtype), t(label), reduction="none", **options)


def labels(*shape: int, n_classes: int = 5) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % n_classes


def fifths(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape or (4, 5), 0.2, dtype=dtype)


def mixture(*shape: int) -> Tensor:
    """Probabilities over axis 1, none of them equal."""
    return torch.softmax(x(*shape).flip(0), 1)


def into(view: Tensor, values: Tensor) -> Tensor:
    """Write ``values`` into a view of something larger that holds NaN or -1."""
    view.copy_(values)
    return view


# --- what is observed -------------------------------------------------------------------------------------------------


def leaf_of(input: Any) -> Any:
    differentiable = isinstance(input, Tensor) and (input.is_floating_point() or input.is_complex())
    return input.detach().requires_grad_() if differentiable else input


def described(name: str, value: Any) -> Results:
    if not isinstance(value, Tensor):
        return {name: value}
    # a gradient by kernels begins as far into 16 bytes as its logits do, which its storage offset tells
    offset = {} if name.startswith("gradient") else {f"{name}'s storage offset": value.storage_offset()}
    return offset | {
        name: value.detach(),
        f"{name}'s strides": [step for step, n in zip(value.stride(), value.shape, strict=True) if n > 1],
        f"{name} requires grad": value.requires_grad,
        f"{name} has a history": value.grad_fn is not None,
        f"{name}'s class": type(value),
        f"{name}'s device": value.device,
    }


def loss_and_grad(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    """Observe the loss, and the gradient of its sum in whatever asks for one."""
    leaf = leaf_of(input)
    out = loss(leaf, target, **options)
    wanted = {"input": leaf, "target": target, "weight": options.get("weight")}
    wanted = {k: v for k, v in wanted.items() if isinstance(v, Tensor) and v.requires_grad}
    out.sum().backward()
    results = described("loss", out)
    for name, value in wanted.items():
        results |= described(f"gradient of {name}", value.grad)
    return results


def loss_alone(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    return described("loss", loss(input, target, **options))


def loss_without_grad_mode(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    with torch.no_grad():
        return described("loss", loss(leaf_of(input), target, **options))


def backward_called(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    leaf = leaf_of(input)
    loss(leaf, target, **options).backward()
    return described("gradient", leaf.grad)


def upstream(make: Callable[[Tensor], Tensor]) -> Callable[..., Results]:
    """Observe the gradient under the upstream gradient that ``make`` returns for the loss."""

    def observe(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
        leaf = leaf_of(input)
        out = loss(leaf, target, **options)
        out.backward(make(out.detach()))
        return described("gradient", leaf.grad)

    return observe


def backward_twice(retain_graph: bool) -> Callable[..., Results]:
    def observe(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
        leaf = leaf_of(input)
        out = loss(leaf, target, **options)
        first = torch.autograd.grad(out.sum(), leaf, retain_graph=retain_graph)[0].clone()
        return described("first", first) | described("second", torch.autograd.grad(out.sum(), leaf)[0])

    return observe


def changed_before_backward(what: str) -> Callable[..., Results]:
    def observe(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
        leaf, target = leaf_of(input), target.clone()
        middle = leaf * 1
        out = loss(middle, target, **options)
        (middle if what == "input" else target).zero_()
        return described("gradient", torch.autograd.grad(out.sum(), leaf)[0])

    return observe


def penalty(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    """Observe the gradient of the squared norm of the gradient."""
    leaf = leaf_of(input)
    (grad,) = torch.autograd.grad(loss(leaf, target, **options), leaf, create_graph=True)
    return described("second", torch.autograd.grad((grad**2).sum(), leaf)[0])


def gradcheck(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    check = functools.partial(torch.autograd.gradcheck, check_forward_ad=True, check_batched_grad=True)
    return {"passes": check(lambda z: loss(z, target, **options), leaf_of(input))}


def gradgradcheck(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    return {"passes": torch.autograd.gradgradcheck(lambda z: loss(z, target, **options), leaf_of(input))}


def func_grad(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    return described("gradient", torch.func.grad(lambda z: loss(z, target, **options))(input))


def vmap(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    return described("loss", torch.func.vmap(lambda z, y: loss(z, y, **options))(input, target))


def vmap_of_grad(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    grad = torch.func.grad(lambda z, y: loss(z, y, **options))
    return described("gradients", torch.func.vmap(grad)(input, target))


def jvp(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    value, tangent = torch.func.jvp(lambda z: loss(z, target, **options), (input,), (torch.ones_like(input),))
    return described("loss", value) | described("tangent", tangent)


def hessian(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    return described("hessian", torch.func.hessian(lambda z: loss(z, target, **options))(input))


def autocast(dtype: torch.dtype) -> Callable[..., Results]:
    def observe(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
        with torch.autocast("cpu", dtype):
            return loss_and_grad(loss, input, target, options)

    return observe


def deterministic(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    torch.use_deterministic_algorithms(True)
    try:
        return loss_and_grad(loss, input, target, options)
    finally:
        torch.use_deterministic_algorithms(False)


def inference_mode(loss: Loss, input: Any, target: Any, options: dict[str, Any]) -> Results:
    with torch.inference_mode():
        out = loss(input, target, **options)
        return described("loss", out) | {"loss is of inference": out.is_inference()}


class Named(Tensor):
    """A subclass that adds nothing."""


# --- the table --------------------------------------------------------------------------------------------------------

CASES: list[Case] = []


def case(number: int, name: str, make: Callable[..., Call], how: Callable[..., Results] = loss_and_grad) -> None:
    CASES.append(Case(number, name, make, how))


def case_by_reduction(number: int, name: str, make: Callable[..., Call], reductions: tuple = REDUCTIONS) -> None:
    """Add one row for each reduction, numbered on."""
    for step, reduction in enumerate(reductions):
        case(number + step, f"{name}, {reduction}", functools.partial(make, reduction=reduction))


# values
case_by_reduction(1, "base", base)
case_by_reduction(4, "no rows", lambda **o: call(x(0, 5), t(), **o))
case_by_reduction(7, "no classes", lambda **o: call(x(4, 0), t(0, 0, 0, 0), **o))
case_by_reduction(10, "neither rows nor classes", lambda **o: call(x(0, 0), t(), **o))
case_by_reduction(13, "all ignored", lambda **o: small(-100, -100, **o))
case_by_reduction(16, "one class", lambda **o: call(x(2, 1), t(0, 0), **o))
case(19, "no classes, all ignored", lambda: call(x(2, 0), t(-100, -100)))
case(20, "no rows, probabilities", lambda: call(x(0, 5), x(0, 5)))
case(21, "no rows, smoothing", lambda: call(x(0, 5), t(), label_smoothing=0.1))
case_by_reduction(
    22, "all ignored, smoothing", lambda **o: small(-100, -100, label_smoothing=0.1, **o), ("mean", "none")
)

# NaN and infinities: one row of three classes
case(24, "NaN off the label", lambda: row(0, nan, 1))
case(25, "NaN at the label", lambda: row(nan, 0, 1))
case(26, "inf at the label", lambda: row(inf, 0, 1))
case(27, "inf off the label", lambda: row(0, inf, 1))
case(28, "two inf", lambda: row(inf, inf, 1))
case(29, "all -inf", lambda: row(-inf, -inf, -inf))
case(30, "-inf off the label", lambda: row(0, -inf, 1))
case(31, "-inf at the label", lambda: row(-inf, 0, 1))
case(32, "-inf everywhere else", lambda: row(3, -inf, -inf))
case(33, "ignored, all -inf", lambda: row(-inf, -inf, -inf, label=-100))
case(34, "ignored, NaN", lambda: row(nan, 0, 1, label=-100))
case(35, "ignored, inf", lambda: row(inf, 0, 1, label=-100))
case(36, "ignored, NaN, smoothing", lambda: row(nan, 0, 1, label=-100, label_smoothing=0.1))
case(37, "-inf off the label, smoothing", lambda: row(0, -inf, 1, label_smoothing=0.1))
case(38, "3e38 against the label", lambda: row(3e38, -3e38, 1, label=1))
case(39, "3e38 for the label", lambda: row(3e38, -3e38, 1))
case(40, "1e38 everywhere", lambda: row(1e38, 1e38, 1e38, label=1))
case(41, "subnormal", lambda: row(1e-45, 0, 2e-45))
case(42, "leads by 100", lambda: row(100, 0, 0))
case(43, "leads by 20", lambda: row(20, 0, 0))
case(44, "float16 at its limits", lambda: row(65504, -65504, 0, label=1, dtype=torch.float16))
case(45, "bfloat16 near its limits", lambda: row(3e38, -3e38, 0, label=1, dtype=torch.bfloat16))

# dtype of the input
for n, dtype in enumerate((torch.float64, torch.float32, torch.float16, torch.bfloat16)):
    case(46 + n, f"input {dtype}", lambda dtype=dtype: base_with(x(4, 5, dtype=dtype)))
for n, dtype in enumerate(
    (torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.int64, torch.bool, torch.complex64)
):
    case(50 + n, f"input {dtype}", lambda dtype=dtype: base_with(x(4, 5, dtype=dtype)))

# dtype of the target
for n, dtype in enumerate((
    torch.int64, torch.uint8, torch.int32, torch.int16, torch.int8, torch.bool, torch.uint16, torch.uint32,
    torch.uint64, torch.float32, torch.float64, torch.bfloat16, torch.float16,
)):  # fmt: skip
    case(56 + n, f"target {dtype}", lambda dtype=dtype: base_with(target=t(0, 1, 2, 3, dtype=dtype)))
for n, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16)):
    case(69 + n, f"probabilities {dtype}", lambda dtype=dtype: base_with(target=fifths(dtype=dtype)))
case(73, "probabilities float32, input bfloat16", lambda: base_with(x(4, 5, dtype=torch.bfloat16), fifths()))
case(74, "target int64 shaped like the input", lambda: base_with(target=labels(4, 5)))

# values of the target
case(75, "label V", lambda: base_with(target=t(0, 5, 2, 3)))
case(76, "label V, none", lambda: base_with(target=t(0, 5, 2, 3), reduction="none"))
case(77, "label V, smoothing", lambda: base_with(target=t(0, 5, 2, 3), label_smoothing=0.1))
case(78, "label V, weight", lambda: base_with(target=t(0, 5, 2, 3), weight=torch.ones(5)))
case(79, "label -1", lambda: base_with(target=t(0, -1, 2, 3)))
case(80, "label -1, none", lambda: base_with(target=t(0, -1, 2, 3), reduction="none"))
case(81, "label 2**40", lambda: base_with(target=t(0, 2**40, 2, 3)))
case(82, "label V in 3-D", lambda: call(x(2, 3, 2), torch.tensor([[0, 3], [1, 2]])))
case(83, "ignore_index 2", lambda: base(ignore_index=2, reduction="none"))
case(84, "ignore_index -1", lambda: base_with(target=t(0, 1, -1, 3), ignore_index=-1))
case(85, "ignore_index 255, uint8", lambda: base_with(target=t(0, 1, 255, 3, dtype=torch.uint8), ignore_index=255))
case(86, "ignore_index -100, uint8", lambda: base_with(target=t(0, 1, 2, 3, dtype=torch.uint8), ignore_index=-100))
case(87, "ignore_index None", lambda: base(ignore_index=None))
case(88, "ignore_index 1.0", lambda: base(ignore_index=1.0))
case(89, "probabilities, ignore_index 1", lambda: base_with(target=fifths(), ignore_index=1))
case(90, "probabilities, ignore_index -100", lambda: base_with(target=fifths(), ignore_index=-100))

# shapes
case(91, "(V), target ()", lambda: call(x(4, 5)[0], torch.tensor(0)))
case(92, "(V), target (), none", lambda: call(x(4, 5)[0], torch.tensor(0), reduction="none"))
case(93, "(V), target (1)", lambda: call(x(4, 5)[0], t(0)), loss_alone)
case(94, "target (N, 1)", lambda: base_with(target=labels(4, 1)))
case(95, "probabilities (N, V + 1)", lambda: base_with(target=fifths(4, 6)))
case(96, "target (N - 1)", lambda: base_with(target=labels(3)))
case(97, "target (N + 1)", lambda: base_with(target=labels(5)))
case(98, "target () for (4, 5)", lambda: base_with(target=torch.tensor(0)))
case(99, "target () for (1, 5)", lambda: call(x(1, 5), torch.tensor(0)))
case(100, "input ()", lambda: call(torch.tensor(1.0), torch.tensor(0)))
case(101, "classes last", lambda: call(x(2, 3, 5), labels(2, 3)))
case(102, "3-D", lambda: call(x(2, 5, 3), labels(2, 3), reduction="none"))
case(103, "4-D", lambda: call(x(2, 5, 3, 4), labels(2, 3, 4), reduction="none"))
case(104, "5-D", lambda: call(x(2, 5, 3, 4, 2), labels(2, 3, 4, 2), reduction="none"))
case(105, "4-D, target transposed", lambda: call(x(2, 5, 3, 4), labels(2, 4, 3)))
case(106, "(V), probabilities", lambda: call(x(4, 5)[0], fifths(5)))

# options
case(107, "reduction 'foo'", lambda: base(reduction="foo"))
case(108, "reduction None", lambda: base(reduction=None))
case(109, "reduction 'elementwise_mean'", lambda: base(reduction="elementwise_mean"))
case(110, "size_average False", lambda: base(size_average=False))
case(111, "reduce False", lambda: base(reduce=False))
case(112, "label_smoothing -0.1", lambda: base(label_smoothing=-0.1))
case(113, "label_smoothing NaN", lambda: base(label_smoothing=nan))
case(114, "label_smoothing 0", lambda: base(label_smoothing=0))
case(115, "label_smoothing 1.1", lambda: base(label_smoothing=1.1))
case(116, "label_smoothing 1.0", lambda: base(label_smoothing=1.0))
case(117, "weight (4)", lambda: base(weight=torch.ones(4)))
case(118, "weight (1, 5)", lambda: base(weight=torch.ones(1, 5)))
case(119, "weight float64", lambda: base(weight=torch.ones(5).double()))
case(120, "weight float32, input bfloat16", lambda: base_with(x(4, 5, dtype=torch.bfloat16), weight=torch.ones(5)))
case(121, "weight int64", lambda: base(weight=torch.ones(5).long()))
case(122, "weight 0", lambda: base(weight=torch.zeros(5)))
case(123, "weight -1", lambda: base(weight=-torch.ones(5)))
case(124, "weight that requires grad", lambda: base(weight=torch.ones(5, requires_grad=True)))
case(125, "probabilities that require grad", lambda: base_with(target=fifths().requires_grad_()))
case(126, "weight expanded, stride 0", lambda: base(weight=torch.ones(1).expand(5)))

# types, devices
case(127, "input list", lambda: base_with([[1.0, 2.0]]))
case(128, "target numpy", lambda: base_with(target=np.arange(4)))
case(129, "target int", lambda: base_with(target=3))
case(130, "both on meta", lambda: call(x(4, 5).to("meta"), labels(4).to("meta")), loss_alone)
case(131, "input on meta", lambda: base_with(x(4, 5).to("meta")), loss_alone)
case(132, "target on meta", lambda: base_with(target=labels(4).to("meta")), loss_alone)
case(133, "input sparse", lambda: base_with(x(4, 5).to_sparse()), loss_alone)

# layout
case(134, "transposed", lambda: base_with(x(5, 4).t()))
case(135, "rows expanded", lambda: base_with(x(1, 5).expand(4, 5)))
case(136, "every other column", lambda: base_with(x(4, 10)[:, ::2]))
case(137, "storage offset 1", lambda: base_with(x(21)[1:].view(4, 5)))
case(138, "target of stride 2", lambda: base_with(target=labels(8)[::2]))
case(139, "target expanded", lambda: base_with(target=t(2).expand(4)))
case(140, "columns flipped", lambda: base_with(x(4, 5).flip(1)))

# autograd
case(141, "no gradient wanted", lambda: small(reduction="none"), loss_alone)
case(142, "a history, mean", lambda: small())
case(143, "a history, probabilities", lambda: call(x(2, 3), fifths(2, 3)))
case(144, "backward of a vector", lambda: small(reduction="none"), backward_called)
case(145, "upstream of stride 0", lambda: small(reduction="none"), upstream(lambda y: y.new_ones(1).expand(2)))
case(146, "upstream float64", lambda: small(reduction="none"), upstream(lambda y: torch.ones_like(y).double()))
case(147, "upstream 0", lambda: small(reduction="none"), upstream(torch.zeros_like))
case(148, "upstream NaN in a row", lambda: small(reduction="none"), upstream(lambda y: y.new_tensor([nan, 1])))
case(149, "upstream inf in a row", lambda: small(reduction="none"), upstream(lambda y: y.new_tensor([inf, 1])))
case(150, "upstream of another shape", lambda: small(reduction="none"), upstream(lambda y: y.new_ones(3)))
case(151, "upstream 3", lambda: small(), upstream(lambda y: y.new_tensor(3.0)))
case(152, "upstream NaN, ignored", lambda: small(-100, 1, reduction="none"), upstream(lambda y: y.new_tensor([nan, 1])))
case(153, "backward twice, not retained", lambda: small(), backward_twice(retain_graph=False))
case(154, "backward twice, retained", lambda: small(), backward_twice(retain_graph=True))
case(155, "input changed in place", lambda: small(), changed_before_backward("input"))
case(156, "target changed in place", lambda: small(), changed_before_backward("target"))
case(157, "second derivative", lambda: call(x(2, 3).double(), t(0, 1)), penalty)
case(158, "gradcheck", lambda: base_with(x(4, 5).double()), gradcheck)
case(159, "gradgradcheck", lambda: base_with(x(4, 5).double()), gradgradcheck)

# function transforms
case(160, "func.grad", base, func_grad)
case(161, "vmap", base, vmap)
case(162, "vmap of func.grad", base, vmap_of_grad)
case(163, "jvp", base, jvp)
case(164, "hessian", base, hessian)

# automatic mixed precision, modes
case(165, "autocast to bfloat16, float32", base, autocast(torch.bfloat16))
case(166, "autocast to bfloat16", lambda: base_with(x(4, 5, dtype=torch.bfloat16)), autocast(torch.bfloat16))
case(167, "autocast to float16", lambda: base_with(x(4, 5, dtype=torch.float16)), autocast(torch.float16))
case(168, "deterministic mode", base, deterministic)
case(169, "deterministic mode, 3-D", lambda: call(x(2, 5, 3), labels(2, 3)), deterministic)
case(170, "inference mode", base, inference_mode)
case(171, "subclass", lambda: base_with(x(4, 5).as_subclass(Named)))

RECORDED = len(CASES)
_number = itertools.count(RECORDED + 1)


def more(name: str, make: Callable[..., Call], how: Callable[..., Results] = loss_and_grad) -> None:
    case(next(_number), name, make, how)


# more layouts
more("3-D permuted", lambda: call(x(2, 3, 5).permute(0, 2, 1), labels(2, 3), reduction="none"))
more("3-D permuted, mean", lambda: call(x(2, 3, 5).permute(0, 2, 1), labels(2, 3)))
more("3-D, axes reversed", lambda: call(x(3, 5, 2).permute(2, 1, 0), labels(2, 3)))
more("channels_last", lambda: call(x(2, 5, 3, 4).to(memory_format=torch.channels_last), labels(2, 3, 4)))
more("channels_last, weight", lambda: call(
    x(2, 5, 3, 4).to(memory_format=torch.channels_last), labels(2, 3, 4), weight=mixture(1, 5)[0], reduction="sum"
))  # fmt: skip
more("channels_last_3d", lambda: call(
    x(2, 5, 3, 2, 2).to(memory_format=torch.channels_last_3d), labels(2, 3, 2, 2), reduction="none"
))  # fmt: skip
more("rows padded with NaN", lambda: base_with(into(torch.full((4, 8), nan)[:, :5], x(4, 5))))
more("rows padded, one row", lambda: call(into(torch.full((1, 8), nan)[:, :5], x(1, 5)), t(2)))
more("storage offset 3", lambda: base_with(into(torch.full((23,), nan)[3:].view(4, 5), x(4, 5))))
more("storage offset 3, float16", lambda: base_with(x(23, dtype=torch.float16)[3:].view(4, 5)))
more("3-D expanded in space", lambda: call(x(2, 5, 1).expand(2, 5, 3), labels(2, 3), reduction="none"))
more("target of offset 3, stride 2", lambda: base_with(target=into(torch.full((11,), -1)[3::2], labels(4))))
more("target expanded in 3-D", lambda: call(x(2, 5, 3), t(1, 4)[:, None].expand(2, 3), reduction="none"))
more("target transposed in 3-D", lambda: call(x(2, 5, 3), labels(3, 2).t(), reduction="none"))
more("probabilities transposed", lambda: base_with(target=mixture(5, 4).t()))
more("weight of stride 2", lambda: base(weight=mixture(1, 10)[0, ::2]))

more("4-D, a part", lambda: call(x(2, 5, 6, 5)[:, :, ::2, 1:], labels(2, 3, 4), reduction="none"))
more("4-D, expanded in the batch", lambda: call(x(1, 5, 3, 2).expand(2, 5, 3, 2), labels(2, 3, 2)))
more("4-D, classes flipped", lambda: call(x(2, 5, 3, 2).flip(1), labels(2, 3, 2), reduction="sum"))

# more values
more("-inf prefix of 64", lambda: call(torch.cat([x(4, 6).new_full((4, 64), -inf), x(4, 6)], 1), labels(4) + 64))
more("-inf suffix of 64", lambda: call(torch.cat([x(4, 6), x(4, 6).new_full((4, 64), -inf)], 1), labels(4)))
more("-inf in all but one other", lambda: row(-1, -inf, 2, -inf, -inf, -inf))
more("-inf at the label and all but one", lambda: row(-inf, -inf, 2, -inf))
more("inf at the label, -inf everywhere else", lambda: row(inf, -inf, -inf))
more("inf off the label, -inf everywhere else", lambda: row(-inf, inf, -inf))
more("ties everywhere", lambda: call(torch.full((3, 4), 0.75), t(0, 1, 3), reduction="none"))
more("a tie of label and runner-up", lambda: row(2, 5, 5, -1, label=2))
for offset in (1e4, 1e6, -1e8):
    more(f"common offset {offset:g}", lambda offset=offset: base_with(x(4, 5) * 30 + offset, reduction="none"))
more("common offset 1e12, float64", lambda: base_with(x(4, 5).double() + 1e12, reduction="none"))
more("one class, NaN", lambda: row(nan))
more("one class, inf", lambda: row(inf))
more("one class, -inf", lambda: row(-inf))
more("one class, smoothing", lambda: call(x(2, 1), t(0, 0), label_smoothing=0.1))
more("one class, 3-D", lambda: call(x(2, 1, 3), torch.zeros(2, 3).long(), reduction="none"))
more("one class, ignored among others", lambda: call(x(3, 1), t(0, -100, 0)))
more("one class, probabilities", lambda: call(x(2, 1), fifths(2, 1)))
more("one class, weight", lambda: call(x(2, 1), t(0, 0), weight=torch.tensor([3.0])))

# more targets
more("uint8 label 255", lambda: call(x(2, 256), t(255, 0, dtype=torch.uint8), reduction="none"))
more("uint8 label 255, ignored", lambda: call(x(2, 256), t(255, 0, dtype=torch.uint8), ignore_index=255))
more("uint8 label 200 of 5", lambda: base_with(target=t(0, 200, 2, 3, dtype=torch.uint8)))
for label, ignored in ((255, -1), (232, -100), (156, -100)):  # what -1 and -100 are in uint8, and -1 of 488 classes
    more(f"uint8 label {label} of 488, {ignored} ignored, weight", lambda n=label, ignored=ignored: call(
        x(2, 488), t(n, 0, dtype=torch.uint8), ignore_index=ignored, weight=mixture(1, 488)[0], reduction="none"
    ))  # fmt: skip
more("ignore_index 2**40", lambda: base_with(target=t(0, 2**40, 2, 3), ignore_index=2**40))
more("label -100 where another is ignored", lambda: base_with(target=t(0, -100, 2, 3), ignore_index=2))
for reduction in REDUCTIONS:
    more(f"no places, {reduction}", lambda r=reduction: call(x(2, 5, 0), labels(2, 0), reduction=r))
more("no places, 4-D", lambda: call(x(2, 5, 3, 0), labels(2, 3, 0), reduction="sum"))
more("no rows, 3-D", lambda: call(x(0, 5, 3), labels(0, 3), reduction="none"))
more("no classes, 4-D", lambda: call(x(2, 0, 3, 2), labels(2, 3, 2)))
more("no classes, 4-D, all ignored", lambda: call(x(2, 0, 3, 2), labels(2, 3, 2) * 0 - 100, reduction="none"))
more("neither classes nor places", lambda: call(x(2, 0, 0), labels(2, 0)))
more("no places, smoothing", lambda: call(x(2, 5, 0), labels(2, 0), label_smoothing=0.1, reduction="sum"))
more("no classes, probabilities", lambda: call(x(2, 0), fifths(2, 0)))
more("no places, probabilities", lambda: call(x(2, 5, 0), x(2, 5, 0)))

# more probabilities
more("probabilities of a mixture, 3-D", lambda: call(x(2, 5, 3), mixture(2, 5, 3)))
more("probabilities, weight", lambda: base_with(target=mixture(4, 5), weight=mixture(1, 5)[0]))
more("probabilities, smoothing, weight", lambda: base_with(
    target=mixture(4, 5), weight=mixture(1, 5)[0], label_smoothing=0.1, reduction="none"
))  # fmt: skip
more("probabilities that sum to 2", lambda: base_with(target=2 * mixture(4, 5), reduction="sum"))
more("probabilities below 0", lambda: base_with(target=-mixture(4, 5)))
more("probabilities 0", lambda: base_with(target=torch.zeros(4, 5)))
more("probabilities NaN in a row", lambda: base_with(target=torch.where(labels(4)[:, None] == 1, nan, fifths())))
more("probabilities 0 at -inf", lambda: call(torch.tensor([[-inf, 0, 1]]), torch.tensor([[0, 0.5, 0.5]])))
more("probabilities 1 at -inf", lambda: call(torch.tensor([[-inf, 0, 1]]), torch.tensor([[1.0, 0, 0]])))
more("probabilities bfloat16, input bfloat16", lambda: base_with(
    x(4, 5, dtype=torch.bfloat16), mixture(4, 5).bfloat16(), reduction="none"
))  # fmt: skip
more("probabilities float64, input bfloat16", lambda: base_with(x(4, 5).bfloat16(), mixture(4, 5).double()))

# more options
for size_average, reduce in itertools.product((None, True, False), repeat=2):
    if (size_average, reduce) not in ((None, None), (False, None), (None, False)):  # the last two are rows 110, 111
        pair = {"size_average": size_average, "reduce": reduce}
        more(f"size_average {size_average}, reduce {reduce}", functools.partial(base, **pair))
more("size_average against reduction", lambda: base(size_average=True, reduction="none"))
for reduction in REDUCTIONS:
    more(f"weight, an ignored row, {reduction}", lambda r=reduction: base_with(
        target=t(0, -100, 2, 3), weight=mixture(1, 5)[0], reduction=r
    ))  # fmt: skip
    more(f"weight, an ignored row, smoothing, {reduction}", lambda r=reduction: base_with(
        target=t(0, -100, 2, 3), weight=mixture(1, 5)[0], label_smoothing=0.1, reduction=r
    ))  # fmt: skip
    more(f"weight 0, some ignored, {reduction}", lambda r=reduction: base_with(
        target=t(0, -100, 2, -100), weight=torch.zeros(5), reduction=r
    ))  # fmt: skip
more("weight, 3-D, ignore_index 3", lambda: call(x(2, 5, 3), labels(2, 3), weight=mixture(1, 5)[0], ignore_index=3))
more("all ignored, weight", lambda: small(-100, -100, weight=torch.ones(3)))
more("weights that cancel", lambda: base(weight=t(1, -1, 1, -1, 1, dtype=torch.float32)))
more("weight inf", lambda: base(weight=t(1, inf, 1, 1, 1, dtype=torch.float32)))
more("weight NaN of a class not in use", lambda: base(weight=t(1, 1, 1, 1, nan, dtype=torch.float32)))
more("weight NaN, smoothing", lambda: base(weight=t(1, 1, 1, 1, nan, dtype=torch.float32), label_smoothing=0.1))
more("weight 0 of a row that costs inf", lambda: row(-inf, 0, 1, weight=t(0, 1, 1, dtype=torch.float32)))
more("smoothing, 3-D", lambda: call(x(2, 5, 3), labels(2, 3), label_smoothing=0.3))
more("smoothing, float16", lambda: base_with(x(4, 5, dtype=torch.float16), label_smoothing=0.3, reduction="none"))
more("smoothing, -inf at the label", lambda: row(-inf, 0, 1, label_smoothing=0.1))
for bad in (nan, inf):
    for at in ((bad, 0, 1), (0, bad, 1)):
        more(f"smoothing, {at}", lambda at=at: row(*at, label_smoothing=0.1))
        more(f"probabilities, {at}", lambda at=at: call(torch.tensor([at]), torch.tensor([[0.7, 0.2, 0.1]])))

# more of autograd and modes
more("no_grad", base, loss_without_grad_mode)
more("upstream -2, ignored NaN-free rows", lambda: small(-100, 1), upstream(lambda y: y.new_tensor(-2.0)))
more("upstream NaN, mean", lambda: small(), upstream(lambda y: y.new_tensor(nan)))
more("upstream inf, sum", lambda: small(reduction="sum"), upstream(lambda y: y.new_tensor(inf)))
more("upstream 1e30, confident rows", lambda: row(9, 0, 0), upstream(lambda y: y.new_tensor([1e30])))
more("upstream of stride 2, 3-D", lambda: call(x(2, 5, 3), labels(2, 3), reduction="none"), upstream(
    lambda y: x(2, 6, dtype=y.dtype)[:, ::2]
))  # fmt: skip
more("backward twice, none, retained", lambda: small(reduction="none"), backward_twice(retain_graph=True))
more("target changed in place, none", lambda: small(reduction="none"), changed_before_backward("target"))
more("target changed in place, smoothing", lambda: small(label_smoothing=0.1), changed_before_backward("target"))
more("autocast, weight float32", lambda: base_with(
    x(4, 5, dtype=torch.bfloat16), weight=mixture(1, 5)[0]
), autocast(torch.bfloat16))  # fmt: skip
more("autocast, weight bfloat16", lambda: base_with(
    x(4, 5, dtype=torch.bfloat16), weight=mixture(1, 5)[0].bfloat16()
), autocast(torch.bfloat16))  # fmt: skip
more("autocast, float64", lambda: base_with(x(4, 5).double()), autocast(torch.bfloat16))
more("autocast, probabilities", lambda: base_with(
    x(4, 5, dtype=torch.bfloat16), mixture(4, 5).bfloat16()
), autocast(torch.bfloat16))  # fmt: skip
more("subclass, none", lambda: base_with(x(4, 5).as_subclass(Named), reduction="none"))
more("subclass as target", lambda: base_with(target=labels(4).as_subclass(Named)))


# --- running ----------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a case gave: results or an error, and the warnings on the way."""

    results: Results | None
    error: tuple[type, str] | None
    warnings: list[tuple[type, str]]
    untouched: bool


def widened(value: Any) -> Any:
    """Return the argument in float64 as it is after rounding; anything that is no float tensor as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _bits(value: Any) -> Any:
    """Return a copy that compares NaN and -0.0 by their bits, and the version, which any write raises."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
        return None
    return value._version, value.detach().contiguous().view(-1).view(torch.uint8).tolist() if value.numel() else None


def _arguments(made: Call) -> Iterator[Any]:
    return iter((made.input, made.target, *made.options.values()))


def run(row: Case, loss: Loss, wide: bool = False) -> Outcome:
    """Run one case with ``loss``, in float64 if ``wide``."""
    made = row.make()
    if wide:
        options = {name: widened(value) for name, value in made.options.items()}
        made = Call(widened(made.input), widened(made.target), options)
    before = [_bits(value) for value in _arguments(made)]
    results, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            results = row.how(loss, *made)
        except Exception as e:
            error = type(e), str(e).split("\n")[0]
    said = [
        (w.category, str(w.message).split("\n")[0])
        for w in caught
        if "torch.jit" not in str(w.message)  # torch's own code
        if "triton" not in w.filename  # numpy's infinities, interpreted
    ]
    return Outcome(results, error, said, before == [_bits(value) for value in _arguments(made)])
