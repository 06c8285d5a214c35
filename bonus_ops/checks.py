"""What a call must look like. A fault raises what torch raises for it, then says what was expected and what came."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn.functional import cross_entropy

from .losses import Bonus, ClassLoss, GapLoss
from .number_checks import check_number
from .schedules import Scheduled

__all__ = [
    "by_keyword",
    "check_bonus",
    "check_call",
    "check_factor",
    "check_gap_loss",
    "check_implementation",
    "check_reduction",
    "check_soft",
    "check_validate",
    "checked_bonus_smoothing",
    "checked_ignore_index",
    "checked_label_smoothing",
    "raise_as_torch",
]

IMPLEMENTATIONS = ("triton", "numba", "reference")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_bonus(bonus: Any) -> None:
    """Raise TypeError unless ``bonus`` is None, a `GapLoss` or a `ClassLoss`: a dataclass whose fields are numbers."""
    if bonus is None:
        return
    kind = type(bonus)
    if not isinstance(bonus, (GapLoss, ClassLoss)):
        came = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        if isinstance(bonus, type):
            came = f"the class {bonus.__name__}"
        raise TypeError(
            "bonus must be a GapLoss instance such as LogBonus(log_end=0.75), or None for plain cross-entropy, not "
            f"{came}"
        )
    if isinstance(bonus.kernel, str) and kind.__module__.startswith("bonus_ops.losses."):
        return  # its fields were checked when it was made
    loss = bonus.loss if isinstance(bonus, Scheduled) else bonus
    # a frozen one that passed passes again; the fields of another may change, and the compiler warns of caches
    changes = type(loss).__hash__ in (None, object.__hash__)
    (_check_fields if changes or torch.compiler.is_compiling() else _checked_once)(loss)


def check_gap_loss(bonus: Any, why: str = "") -> None:
    """Raise TypeError unless ``bonus`` is None or a `GapLoss`, as `check_bonus` wants it."""
    check_bonus(bonus)
    if isinstance(bonus, ClassLoss):
        raise TypeError(
            f"bonus must be a GapLoss or None, not the ClassLoss {type(bonus).__name__}\nExpected one such as "
            f"LogBonus(log_end=0.75), SquaredError() or AbsoluteError().{why}"
        )


def _check_fields(bonus: Any) -> None:
    kind = type(bonus)
    if not is_dataclass(bonus):
        raise TypeError(
            f"bonus must be a dataclass of numbers, but {kind.__name__} is not one\nExpected a subclass of GapLoss "
            "decorated with @dataclass(frozen=True)."
        )
    for field in fields(bonus):
        value = getattr(bonus, field.name)
        if value is not None and not isinstance(value, Real):
            raise TypeError(
                f"bonus must have fields that are numbers or None, but {kind.__name__}.{field.name} is "
                f"{type(value).__name__}"
            )
    if isinstance(bonus, GapLoss) and not isinstance(bonus.kernel, str) and not torch.compiler.is_compiling():
        _check_formulas(bonus)


def _check_formulas(loss: GapLoss) -> None:
    """Raise where a formula of the caller's own gives another shape, which would broadcast in silence."""
    gap = torch.zeros(2, device="cpu")
    for name, formula in (("value", loss.value), ("slope", loss.slope)):
        try:
            result = formula(gap)
        except Exception:  # raised again where it is needed, if it is, with the caller's gap
            continue
        if not isinstance(result, Tensor) or result.shape != gap.shape:
            came = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise RuntimeError(
                "bonus must have formulas shaped like the gap, but of a gap [2] "
                f"{type(loss).__name__}.{name} is {came}\nExpected a number for each; check_loss(bonus) tells more."
            )


_checked_once = functools.lru_cache(maxsize=256)(_check_fields)


def checked_bonus_smoothing(bonus_smoothing: Any, label_smoothing: float) -> float:
    """Return ``bonus_smoothing`` as a float in [0, 1], ``label_smoothing`` where it is None."""
    if bonus_smoothing is None:
        return label_smoothing
    check_number("bonus_cross_entropy", "bonus_smoothing", bonus_smoothing, "[0, 1] or None")
    return float(bonus_smoothing)


def check_soft(input: Tensor, bonus: Any, weight: Any, bonus_smoothing: Any, bonus_weight: Any) -> None:
    """Raise for options of the bonus that the loss or the input cannot have."""
    if bonus_smoothing is bonus_weight is weight is None:
        return
    given = [n for n, x in (("bonus_smoothing", bonus_smoothing), ("bonus_weight", bonus_weight)) if x is not None]
    loss = bonus.loss if isinstance(bonus, Scheduled) else bonus
    if given and not isinstance(loss, Bonus):
        raise ValueError(
            f"{given[0]} needs a bonus on cross-entropy, which {type(loss).__name__} is not.\nExpected LogBonus, "
            "PowerBonus, CosineBonus or SubDataBonus."
        )
    if isinstance(loss, ClassLoss) and weight is not None:
        raise ValueError(f"weight has no meaning for {type(loss).__name__}.\nExpected None: all classes count alike.")
    if bonus_weight is None:
        return
    n_classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    check_factor("bonus_weight", bonus_weight, f"have shape [{n_classes}], one number a class", [n_classes], input)
    if bonus_weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("bonus_weight must not require a gradient")


def check_factor(name: str, x: Any, must: str, shape: Sequence[int], input: Tensor) -> None:
    """Raise unless factors of the losses are a floating point tensor of the shape, on the device of the input."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise RuntimeError(f"{name} must be dense (torch.strided), got {x.layout}")
    if list(x.shape) != list(shape):
        raise RuntimeError(f"{name} must {must}, got {list(x.shape)}")
    if x.dtype not in FLOATS:
        raise RuntimeError(f"{name} must have a floating point type, got {x.dtype}")
    if x.device != input.device:
        raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {x.device}")


def check_reduction(reduction: Any) -> None:
    """Raise torch's ValueError unless ``reduction`` is one."""
    if reduction in ("mean", "sum", "none"):
        return
    try:
        _reduction.get_enum(reduction)
    except ValueError as error:
        raise ValueError(f"{error}\nExpected 'mean', 'sum' or 'none', got {reduction!r}.") from None


def check_implementation(implementation: Any) -> None:
    """Raise ValueError unless ``implementation`` is None or the name of one."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None, 'triton', 'numba' or 'reference', got {implementation!r}")


def by_keyword(x: Any) -> str:
    """Return what to say of a loss where a tensor goes."""
    return " A loss goes by keyword: bonus=." if isinstance(x, (GapLoss, ClassLoss)) else ""


def check_validate(validate: Any) -> None:
    """Raise TypeError unless ``validate`` is a bool."""
    if not isinstance(validate, bool):
        raise TypeError(f"validate must be True or False, got {type(validate).__name__}")


def _ask_torch(**option: Any) -> None:
    """Raise what torch raises for the option alone, if it does."""
    cross_entropy(torch.zeros(1, 1, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"), **option)


def checked_ignore_index(ignore_index: Any) -> int:
    """Return ``ignore_index`` as an int, or raise torch's error."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool) or not -(2**63) <= ignore_index < 2**63:
        _ask_torch(ignore_index=ignore_index)
        return operator.index(ignore_index)
    return ignore_index  # a symbol under dynamic compilation


def checked_label_smoothing(label_smoothing: Any) -> float:
    """Return ``label_smoothing`` as a float in [0, 1]; unlike torch, refuse negative numbers and NaN."""
    if isinstance(label_smoothing, float) and 0 <= label_smoothing <= 1:  # a symbol under dynamic compilation
        return label_smoothing
    if not isinstance(label_smoothing, (int, float)):
        _ask_torch(label_smoothing=label_smoothing)
    if not 0 <= float(label_smoothing) <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {float(label_smoothing):g}")
    return float(label_smoothing)


def check_call(
    input: Any, target: Any, weight: Any, ignore_index: int, reduction: Any, label_smoothing: float, autocast: bool
) -> None:
    """Raise for a wrong type, device, dtype or shape, nothing having been computed."""
    check_reduction(reduction)
    fault = _tensors(input, target, weight) or _shapes(input, target, ignore_index)
    fault = fault or (weight is not None and _weight(input, target, weight, autocast)) or None
    if fault is None:
        return
    raise_as_torch(
        fault, cross_entropy, input, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip


def raise_as_torch(fault: str, function: Callable[..., Tensor], *inputs: Any, **options: Any) -> NoReturn:
    """Raise what torch raises for the call, with the fault behind its first line."""
    try:
        function(*inputs, **options)
    except Exception as error:
        first_line = str(error).split("\n")[0]
        raise type(error)(f"{first_line}\n{fault}") from None
    raise RuntimeError(fault)


_TENSORS = ("input", "target", "weight")


def _tensors(input: Any, target: Any, weight: Any) -> str | None:
    given = (input, target) if weight is None else (input, target, weight)
    for name, x in zip(_TENSORS, given, strict=False):
        if not isinstance(x, Tensor):
            return f"Expected {name} to be a Tensor, got {type(x).__name__}.{by_keyword(x)}"
        if x.layout is not torch.strided:
            return f"Expected {name} to be dense (torch.strided), got {x.layout}."
    if input.dtype not in FLOATS:
        swapped = " It looks as if input and target were swapped." if target.is_floating_point() else ""
        return f"Expected input of float16, bfloat16, float32 or float64, got {input.dtype}.{swapped}"
    device = input.device
    for name, x in zip(_TENSORS, given, strict=False):
        if x.device != device:
            return f"Expected {name} on the device of input, {device}, got {x.device}."
    return None


def _shapes(input: Tensor, target: Tensor, ignore_index: int) -> str | None:
    shape, of_target = input.shape, target.shape
    if len(shape) == 0:
        return "Expected input [C], [N, C] or [N, C, d1, ...], got shape []."
    if shape == of_target:
        if not target.is_floating_point():
            return (
                f"Expected probabilities of a floating point type for a target shaped like input, got {target.dtype}."
            )
        return "Expected class indices as target where ignore_index is set." if ignore_index >= 0 else None
    expected = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    if of_target != expected and not (len(shape) == 1 and of_target == (1,)):
        return f"Expected target of shape {list(expected)} for input of shape {list(shape)}, got {list(of_target)}."
    if target.dtype not in (torch.int64, torch.uint8):
        return f"Expected class indices of int64 or uint8, got {target.dtype}."
    return None


def _weight(input: Tensor, target: Tensor, weight: Tensor, autocast: bool) -> str | None:
    n_classes = input.shape[0] if input.dim() == 1 else input.shape[1]
    if list(weight.shape) != [n_classes]:
        return f"Expected weight of shape [{n_classes}], one number a class, got {list(weight.shape)}."
    if input.shape == target.shape:
        return None
    dtype = torch.float32 if autocast and input.dtype != torch.float64 else input.dtype
    if weight.dtype != dtype:
        return f"Expected weight of the dtype of input, {dtype}, got {weight.dtype}."
    if weight.requires_grad and torch.is_grad_enabled():
        return "Expected weight not to require a gradient."
    return None
