"""Soft targets: from a checked call to rows of kernels or loops, as `labels` has it for class indices.

First derivatives run the operators. All others, and those for the target, follow from the formula.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..call import Call, as_input
from ..kernels.results import SoftResult, empty_at_phase, empty_soft
from ..losses import ClassLoss, Loss, decode, encode
from ..soft_targets import SoftTargets
from ..watchers import is_plain_eager
from . import labels, room
from .labels import Result
from .made import MadeInForward, Tensors, Visited

__all__ = ["run"]


def run(call: Call) -> Result:
    """Return loss, scores and probabilities of a call."""
    return _WAYS[call.implementation](call)


class _Rows(NamedTuple):
    """The operands of a call: its rows, what their shares are made of, and what the mean divides by."""

    logits: Tensor
    label: Tensor  # [outer, inner], of probabilities the largest where that is asked for
    targets: SoftTargets
    divisor: Tensor


def _rows(call: Call, largest: bool = True) -> _Rows:
    logits, targets = call.logits(), call.soft_targets()
    if targets.probabilities is not None:
        known = largest and call.n_classes > 0
        label = targets.probabilities.argmax(-1) if known else call.target.new_zeros((), dtype=torch.int64)
        label = label.expand(logits.shape[:2])
        # as torch, which divides the number of elements by that of classes: without any the mean is NaN
        divisor = torch.full((), logits.shape[0] * logits.shape[1] if call.n_classes else 0, device=logits.device)
    else:
        label = call.target.reshape(logits.shape[:2])
        divisor = call.divisor(call.row_weight())
        if call.bonus_weight is not None and call.reduction == "mean" and call.weight is not None:
            # a weighted cross-entropy is divided by its weights, the bonus by the number of rows
            targets = targets._replace(bonus_weight=call.bonus_weight * (divisor / call.divisor(None)))
    divisor = divisor * _classes_of_mean(call)
    return _Rows(logits, label, targets, divisor)


def _by_formula(call: Call) -> Result:
    of = _rows(call)
    if of.targets.probabilities is None and of.logits.device.type == "cpu":
        reference.check_target(of.label, call.n_classes, call.ignore_index)
    row = (call.options.applied(of.logits), of.label, call.ignore_index)
    value = reference.soft_rows(*row, call.loss, of.targets).reshape(-1)
    columns = reference.scores(*row) if call.scores else None
    lse = reference.logsumexp(*row).reshape(-1) if call.options.z_loss else None
    return _result(call, of, _reduced(call, of, value, lse), columns)


def _by_loops(call: Call) -> Result:
    eager = call.input.requires_grad and torch.is_grad_enabled() and is_plain_eager(*call.tensors())
    if not eager or call.reduction == "none":
        return _by_rows(call)
    of = _rows(call, largest=False)  # loops find it on their way
    given = of.targets.probabilities
    visit = _Visit(call.ignore_index, call.loss.current, call.scores, call.reduction == "mean", *of.targets[3:])
    operands = (of.label, *of.targets[:3], of.divisor, None if given is None else call.target)
    loss, *columns = MadeInForward.apply(of.logits, visit, *operands)  # type: ignore[no-untyped-call]
    loss = loss if call.reduction == "mean" else loss / _classes_of_mean(call)
    return _result(call, of, loss, (*columns[0], columns[1]) if columns else None)


def _by_rows(call: Call) -> Result:
    """Return the result by the registered operators, which make the gradient in backward by a second read."""
    of = _rows(call)
    name, fields = encode(call.loss)
    tensors = (of.logits, of.label, *of.targets[:3], fields)
    value, columns, runner_up, _ = _OperatorRows.apply(  # type: ignore[no-untyped-call]
        *tensors, of.targets[3:], call.ignore_index, name, call.scores, call.implementation
    )
    return _result(call, of, _reduced(call, of, value, None), (*columns, runner_up) if call.scores else None)


_WAYS = {"triton": _by_rows, "numba": _by_loops, "reference": _by_formula}


def _classes_of_mean(call: Call) -> int:
    """Return how many classes a loss of all classes is the mean over; 1 for any other loss."""
    return call.n_classes if isinstance(call.loss, ClassLoss) else 1


def _reduced(call: Call, of: _Rows, loss: Tensor, lse: Tensor | None) -> Tensor:
    if call.reduction == "mean":
        return call.reduced(loss, of.divisor, lse)
    return call.reduced(loss / _classes_of_mean(call), None, lse)


def _result(call: Call, of: _Rows, loss: Tensor, columns: Any) -> Result:
    loss = call.shaped(loss) if call.reduction == "none" else loss
    dtype = call.dtype
    if call.by_probabilities:
        for other in (call.target, call.weight, call.bonus_weight):
            dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
    scores = None if columns is None else call.scores_of(columns)
    softmax = None
    if call.softmax:
        label = torch.zeros_like(of.label) if call.by_probabilities else of.label
        softmax = as_input(labels.softmax(call, of.logits, label), call.input)
    return Result(loss.to(dtype), scores, softmax)


# --- eager on a CPU ---------------------------------------------------------------------------------------------------


class _Visit(NamedTuple):
    """A reduced loss of soft targets for `MadeInForward`.

    Operands are label, probabilities, weight, bonus weight, divisor, and the target, so that a change of it in place
    is noticed.
    """

    ignore_index: int
    loss: Loss
    scores: bool
    mean: bool
    smoothing: float
    bonus_smoothing: float

    def visit(self, logits: Tensor, operands: Tensors) -> Visited:
        divisor = operands[4]
        assert divisor is not None
        upstream = logits.new_ones(1, dtype=reference.accumulation_dtype(logits.dtype))
        upstream = upstream / divisor if self.mean else upstream
        out, grad = self._visited(logits, operands, self.scores, upstream)
        total = out.loss.sum() / divisor if self.mean else out.loss.sum()
        return Visited(total, (out.scores, out.runner_up) if self.scores else (), grad, (upstream,), 1.0)

    def again(self, logits: Tensor, operands: Tensors, kept: Tensors, scale: float, factor: Tensor) -> Tensor:
        (upstream,) = kept
        assert upstream is not None
        grad: Tensor = self._visited(logits, operands, False, upstream * factor.to(upstream.dtype))[1]
        return grad

    def formula(self, logits: Tensor, operands: Tensors, kept: Tensors, scale: float, factor: Tensor) -> Tensor:
        label, upstream = operands[0], kept[0]
        assert label is not None and upstream is not None
        upstream = (factor.to(upstream.dtype) * upstream).expand(label.numel())
        return _gradient(logits, label, self.ignore_index, self.loss, self._targets(operands), upstream)

    def _targets(self, operands: Tensors) -> SoftTargets:
        _, probabilities, weight, bonus_weight, *_ = operands
        return SoftTargets(probabilities, weight, bonus_weight, self.smoothing, self.bonus_smoothing)

    def _visited(self, logits: Tensor, operands: Tensors, scores: bool, upstream: Tensor) -> tuple[SoftResult, Tensor]:
        label, targets, loops = operands[0], self._targets(operands), room("numba", "soft")
        assert label is not None
        if targets.probabilities is None:
            _check_labels(label, logits.shape[2], self.ignore_index)
        out: tuple[SoftResult, Tensor] = loops.visit(
            logits, label, targets, self.ignore_index, self.loss, scores, upstream
        )
        return out


def _check_labels(label: Tensor, n_classes: int, ignore_index: int) -> None:
    _, n_bad, bad = room("numba", "labels").count(label, n_classes, ignore_index)
    if n_bad:
        raise reference.out_of_bounds(bad, n_bad, n_classes, ignore_index)


def _gradient(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, targets: SoftTargets, grad_loss: Tensor
) -> Tensor:
    """Return the gradient, where grad mode is on a differentiable function of logits and upstream gradient [N]."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x = logits if again else logits.detach().requires_grad_()
        value = reference.soft_rows(x, label, ignore_index, loss, targets).reshape(-1)
    grad: Tensor = torch.autograd.grad(value, x, grad_loss.to(value.dtype), create_graph=again)[0]
    return grad


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bonus_ops::soft_forward", mutates_args=())
def forward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, smoothing: float, bonus_smoothing: float, ignore_index: int, loss: str, scores: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to what `SoftResult` holds."""
    targets = SoftTargets(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    if logits.device.type == "cpu" and probabilities is None:
        reference.check_target(label, logits.shape[2], ignore_index)
    kernels = room(implementation, "soft")
    return tuple(kernels.forward(logits, label, targets, ignore_index, decode(loss, fields), scores))


@forward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, label, probabilities, weight, bonus_weight, fields, smoothing, bonus_smoothing, ignore_index, loss, scores,
    implementation,
):  # fmt: skip
    return tuple(empty_soft(logits, scores))


@torch.library.custom_op("bonus_ops::soft_backward", mutates_args=())
def backward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, saved: Tensor, runner_up: Tensor, grad_loss: Tensor, smoothing: float, bonus_smoothing: float,
    ignore_index: int, loss: str, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradient [N] of each row's loss."""
    targets = SoftTargets(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    grad: Tensor = room(implementation, "soft").backward(
        logits, label, targets, saved, runner_up, grad_loss, ignore_index, decode(loss, fields)
    )
    return grad


@backward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, label, probabilities, weight, bonus_weight, fields, saved, runner_up, grad_loss, smoothing,
    bonus_smoothing, ignore_index, loss, implementation,
):  # fmt: skip
    return empty_at_phase(logits) if implementation == "triton" else torch.empty_like(logits)


class _OperatorRows(torch.autograd.Function):
    """Loss of each row; the gradient is made in backward by a second read."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        logits, label, probabilities, weight, bonus_weight, fields, smoothings, ignore_index, loss, scores,
        implementation,
    ):  # fmt: skip
        return forward(logits, label, probabilities, weight, bonus_weight, fields, *smoothings, ignore_index, loss,
                       scores, implementation)  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.smoothings, ctx.ignore_index, ctx.loss, _, ctx.implementation = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[3], output[2])

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None:
            return (None,) * 11
        logits, label, *targets, fields, saved, runner_up = ctx.saved_tensors
        if torch.is_grad_enabled():
            soft_targets = SoftTargets(*targets, *ctx.smoothings)
            grad = _gradient(logits, label, ctx.ignore_index, decode(ctx.loss, fields), soft_targets, grad_loss)
        else:
            grad = backward(logits, label, *targets, fields, saved, runner_up, grad_loss, *ctx.smoothings,
                            ctx.ignore_index, ctx.loss, ctx.implementation)  # fmt: skip
        return grad, *(None,) * 10
