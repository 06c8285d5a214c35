"""A call: its arguments checked once, and what runs decided once.

`Call` is of the losses on a softmax. `decide` says for every kind of call which implementation runs: kernels by Triton,
loops by Numba, or the reference's formulas. A named one runs or raises; None takes the fastest that can.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from . import reference
from .checks import (
    check_bonus,
    check_call,
    check_implementation,
    check_soft,
    check_validate,
    checked_bonus_smoothing,
    checked_ignore_index,
    checked_label_smoothing,
)
from .logit_options import LogitOptions
from .losses import CrossEntropy, GapLoss, Loss
from .scores import Scores
from .soft_targets import SoftTargets
from .watchers import constant_when_compiled, is_deeply_transformed, is_transformed

__all__ = ["Call", "as_input", "as_rows", "decide", "why_not_numba", "why_not_triton"]


class Call:
    """The checked arguments of `bonus_cross_entropy` or a twin, and what runs: ``kind`` and ``implementation``."""

    def __init__(
        self, input: Tensor, target: Tensor, weight: Tensor | None, size_average: bool | None, ignore_index: int,
        reduce: bool | None, reduction: str, label_smoothing: float, bonus: Any, bonus_smoothing: float | None,
        bonus_weight: Tensor | None, options: LogitOptions, implementation: str | None, validate: bool, scores: bool,
        softmax: bool,
    ) -> None:  # fmt: skip
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        check_bonus(bonus)
        check_validate(validate)
        self.loss: Loss = CrossEntropy() if bonus is None else bonus
        self.ignore_index = checked_ignore_index(ignore_index)
        self.smoothing = checked_label_smoothing(label_smoothing)
        self.bonus_smoothing = checked_bonus_smoothing(bonus_smoothing, self.smoothing)
        # asked of any device first: to name one takes longer than all other checks
        autocast = torch._C._is_any_autocast_enabled() and isinstance(input, Tensor) and input.device.type != "meta"
        autocast = autocast and torch.is_autocast_enabled(input.device.type)
        if autocast and isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.to(torch.float32)
        check_call(input, target, weight, self.ignore_index, reduction, self.smoothing, autocast)
        check_soft(input, self.loss, weight, bonus_smoothing, bonus_weight)
        self.input, self.weight, self.bonus_weight, self.options = input, weight, bonus_weight, options
        self.reduction = "mean" if reduction == "elementwise_mean" else reduction
        self.scores, self.softmax = scores, softmax
        shape = input.shape
        self.by_probabilities = shape == target.shape
        # comparisons with a uint8 would wrap
        self.target = target if self.by_probabilities or target.dtype == torch.int64 else target.to(torch.int64)
        self.n_classes = shape[0] if len(shape) == 1 else shape[1]
        self.row_shape = shape[:1] + shape[2:] if len(shape) > 1 else shape[:0]
        self.dtype = input.dtype
        if autocast and input.dtype in (torch.float16, torch.bfloat16):
            self.dtype = torch.float32
        smooth = self.smoothing > 0 or self.bonus_smoothing > 0
        by_label = isinstance(self.loss, GapLoss) and not (self.by_probabilities or smooth or bonus_weight is not None)
        self.kind = "labels" if by_label else "soft"
        self.implementation = decide(implementation, input, self.kind, self.loss, self._only_by_formula())
        if validate and not self.by_probabilities:
            reference.check_target(self.target, self.n_classes, self.ignore_index)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that were given."""
        return self.input, self.target, self.weight, self.bonus_weight

    def logits(self) -> Tensor:
        """Return the input as rows [outer, inner, C]: a view wherever strides allow."""
        return as_rows(self.input)

    def soft_targets(self) -> SoftTargets:
        """Return what makes shares of the target."""
        given = as_rows(self.target) if self.by_probabilities else None
        return SoftTargets(given, self.weight, self.bonus_weight, self.smoothing, self.bonus_smoothing)

    def row_weight(self) -> Tensor | None:
        """Return the class weight of every row [N], 0 where ignored or out of range."""
        if self.weight is None:
            return None
        target = self.target.reshape(-1)
        inside = (target >= 0) & (target < self.n_classes) & (target != self.ignore_index)
        weight = self.weight.to(reference.accumulation_dtype(self.weight.dtype))
        return torch.where(inside, weight[torch.where(inside, target, 0)], 0.0)

    def divisor(self, row_weight: Tensor | None) -> Tensor:
        """Return what the mean divides by: the weight in use, or the number of rows not ignored."""
        if row_weight is not None:
            return row_weight.sum()
        return (self.target != self.ignore_index).sum().to(reference.accumulation_dtype(self.input.dtype))

    def reduced(self, loss: Tensor, divisor: Tensor | None, lse: Tensor | None) -> Tensor:
        """Return the losses of rows [N] reduced, with what their logsumexps cost.

        ``divisor`` is what a mean of the losses divides by; that of the z-loss divides by the rows that count.
        """
        z = None if lse is None else self.options.z_loss * lse.square()
        if self.reduction == "none":
            return loss if z is None else loss + z
        total = loss.sum() if divisor is None else loss.sum() / divisor
        if z is None:
            return total
        return total + (z.sum() if divisor is None else z.sum() / self.n_counted())

    def n_counted(self) -> Tensor | int:
        """Return how many rows are not ignored."""
        if self.by_probabilities:
            return self.input.numel() // max(self.n_classes, 1)
        return (self.target != self.ignore_index).sum()

    def shaped(self, rows: Tensor) -> Tensor:
        """Return numbers of rows [N] in the shape of the target."""
        return rows if rows.shape == self.row_shape else rows.reshape(self.row_shape)

    def scores_of(self, columns: Any) -> Scores:
        """Return scores and runner-up, each [N], as an object that knows its target."""
        return Scores(*map(self.shaped, columns), target=self.target)

    def _only_by_formula(self) -> str | None:
        """Return what no kernel does of this call, if anything."""
        if self.kind == "labels":
            deep = torch.compiler.is_compiling() and is_deeply_transformed()
            return "nested transforms under torch.compile" if deep else None
        others = [x for x in (self.target, self.weight, self.bonus_weight) if x is not None and x.is_floating_point()]
        if torch.is_grad_enabled() and any(x.requires_grad for x in others):
            return "the gradient of target or weight"
        dtype = reference.accumulation_dtype(self.input.dtype)
        if any(torch.promote_types(x.dtype, dtype) != dtype for x in others):
            return "a float64 target or weight of logits that are not float64"
        return "torch.func and forward mode" if is_transformed() else None


def as_rows(x: Tensor) -> Tensor:
    """Return logits (or probabilities) as [outer, inner, C]: a view wherever strides allow."""
    if x.dim() == 1:
        return x[None, None, :]
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(2).transpose(1, 2)


def as_input(rows: Tensor, input: Tensor) -> Tensor:
    """Undo `as_rows` of an input: a view where strides allow."""
    if input.dim() == 1:
        return rows[0, 0]
    return rows.squeeze(1) if input.dim() == 2 else rows.transpose(1, 2).reshape(input.shape)


# --- what runs --------------------------------------------------------------------------------------------------------


def decide(requested: str | None, input: Tensor, kind: str, loss: Loss, only_by_formula: str | None) -> str:
    """Return the implementation that runs: the one asked for, or the fastest that can.

    Args:
        requested: "triton", "numba", "reference" or None.
        input: the logits.
        kind: what the target is, "labels", "soft" or "sigmoid": a file of ``ops`` and of either room of ``kernels``.
        loss: the loss.
        only_by_formula: what no kernel does of this call, or None.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it cannot run on this device or machine.
        NotImplementedError: it has no kernel for what was asked.
    """
    device = "cpu" if input.is_cpu else input.device.type
    if requested is None:
        if only_by_formula is None:
            if device != "cpu" and why_not_triton(device) is None and why_no_kernel(kind, loss) is None:
                return "triton"
            if device == "cpu" and why_not_numba(device) is None and why_no_loop(kind, loss) is None:
                return "numba"
        return "reference"
    check_implementation(requested)
    if requested == "reference":
        return requested
    why = why_not_triton(device) if requested == "triton" else why_not_numba(device)
    if why is not None:
        raise RuntimeError(f"implementation={requested!r} cannot run: {why}")
    if only_by_formula is not None:
        raise NotImplementedError(f"implementation={requested!r} has no kernel for {only_by_formula}; None computes it")
    why = why_no_kernel(kind, loss) if requested == "triton" else why_no_loop(kind, loss)
    if why is not None:
        raise NotImplementedError(f"implementation={requested!r}: {why}\nNone computes it by the loss's formulas.")
    return requested


@functools.cache
def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@constant_when_compiled
def why_not_triton(device_type: str) -> str | None:
    """Return why kernels cannot run on this type of device, or None if they can."""
    if not _found("triton"):
        return "triton is not installed"
    if device_type in ("cuda", "xpu"):
        return None
    if device_type == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "tensors are on the CPU and TRITON_INTERPRET is not set"
    return f"there are no kernels for device type {device_type}"


@constant_when_compiled
def why_not_numba(device_type: str) -> str | None:
    """Return why loops cannot run on this type of device, or None if they can."""
    if device_type != "cpu":
        return f"its loops are for tensors on the CPU, not of device type {device_type}"
    return None if _found("numba") else "numba is not installed; pip install 'bonus-ops[cpu]' brings it"


def why_no_kernel(kind: str, loss: Loss) -> str | None:
    """Return why Triton has no kernel for a loss under a kind of target, or None if it has one."""
    kernel = loss.kernel
    if kernel is None:
        return (
            f"{type(loss).__name__} has no kernel.\nExpected a class attribute kernel = (value, slope) of two "
            "@triton.jit functions."
        )
    if kind == "soft" and not (loss.is_cross_entropy() or isinstance(kernel, str) and _has_terms(kernel)):
        return f"there is no kernel for {type(loss).__name__} with soft targets.\nExpected a loss of bonus_ops."
    return None


def why_no_loop(kind: str, loss: Loss) -> str | None:
    """Return why Numba has no loop for a loss under a kind of target, or None if it has one."""
    why = why_no_kernel(kind, loss)
    if why is None and not isinstance(loss.kernel, str):
        why = _why_not_compiled(loss.current._name, len(loss.parameters()))
    return why


@constant_when_compiled
def _has_terms(kernel: str) -> bool:
    from .kernels.formulas import class_terms

    return hasattr(class_terms, f"{kernel}_terms")


@constant_when_compiled  # which takes words and numbers, no functions
def _why_not_compiled(name: str, n_params: int) -> str | None:
    """Return why Numba cannot compile the functions of a user's loss; ``name`` is what `losses.encode` returns."""
    from .kernels.cpu.losses import why_not_compiled
    from .losses.base import class_of

    cls = class_of(name)
    why: str | None = why_not_compiled(cls.__name__, cls.kernel, n_params)
    return why
