"""Soft targets: from a checked call to rows of kernels or loops, as `labels` has it for class indices.

First derivatives run the operators. All others, and those for the target, follow from the formula.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..call import Call, as_input
from ..kernels.results import MEMORY_OF_GRADIENT, SoftResult, empty_soft
from ..logit_options import LogitOptions
from ..losses import ClassLoss, Loss, decode, encode
from ..soft_targets import SoftTargets
from ..watchers import is_plain_eager
from . import labels, room
from .labels import Result
from .made import MadeInForward, Tensors

__all__ = ["WAYS"]


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
    label = of.label.expand(of.logits.shape[:2])
    row = (reference.z_of(of.logits, label, call.ignore_index, call.options), label, call.ignore_index)
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
    options = _Soft(
        call.ignore_index, call.loss.current, call.scores, call.reduction == "mean", *of.targets[3:], call.options,
        _z_factor(call),
    )  # fmt: skip
    operands = (of.label, *of.targets[:3], of.divisor, None if given is None else call.target)
    loss, *columns = _ReducedByLoops.apply(of.logits, options, *operands)
    loss = loss if call.reduction == "mean" else loss / _classes_of_mean(call)
    return _result(call, of, loss, (*columns[0], columns[1]) if columns else None)


def _by_rows(call: Call) -> Result:
    """Return the result by the registered operators, which make the gradient in backward by a second read."""
    of = _rows(call)
    name, fields = encode(call.loss)
    tensors = (of.logits, of.label, *of.targets[:3], fields)
    options = (call.options[:2], bool(call.options.z_loss))
    value, lse, columns, runner_up, _ = _OperatorRows.apply(  # type: ignore[no-untyped-call]
        *tensors, of.targets[3:], call.ignore_index, name, *options, call.scores, call.implementation
    )
    loss = _reduced(call, of, value, lse if call.options.z_loss else None)
    return _result(call, of, loss, (*columns, runner_up) if call.scores else None)


WAYS = {"triton": _by_rows, "numba": _by_loops, "reference": _by_formula}


def _classes_of_mean(call: Call) -> int:
    """Return how many classes a loss of all classes is the mean over; 1 for any other loss."""
    return call.n_classes if isinstance(call.loss, ClassLoss) else 1


def _z_factor(call: Call) -> float:
    """Return what times the squared logsumexp of every row is the z-loss of a reduced loss, before it is divided."""
    if not call.options.z_loss or call.reduction == "sum":
        return call.options.z_loss * _classes_of_mean(call)
    return call.options.z_loss / max(int(call.n_counted()), 1)


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


class _Soft(NamedTuple):
    """The options of a reduced loss."""

    ignore_index: int
    loss: Loss
    scores: bool
    mean: bool
    smoothing: float
    bonus_smoothing: float
    options: LogitOptions
    z_factor: float  # of the squared logsumexp of every row

    def again(self, logits: Tensor, operands: Tensors, kept: Tensors, scale: float, factor: Tensor) -> Tensor:
        (upstream,) = kept
        assert upstream is not None
        z_factor = self.z_factor and self.z_factor * factor.item()  # of a CPU: nothing waits
        return self.visited(logits, operands, False, upstream * factor.to(upstream.dtype), z_factor)[1]

    def formula(self, logits: Tensor, operands: Tensors, kept: Tensors, scale: float, factor: Tensor) -> Tensor:
        label, upstream = operands[0], kept[0]
        assert label is not None and upstream is not None
        upstream = (factor.to(upstream.dtype) * upstream).expand(label.numel())
        grad_lse = None
        if self.z_factor:
            rows = label.expand(logits.shape[:2])
            z = reference.z_of(logits, rows, self.ignore_index, self.options)
            grad_lse = reference.logsumexp(z, rows, self.ignore_index).reshape(-1) * (2 * self.z_factor * factor)
        row = (self.ignore_index, self.loss, self._targets(operands), self.options)
        return _gradient(logits, label, *row, upstream, grad_lse)

    def _targets(self, operands: Tensors) -> SoftTargets:
        _, probabilities, weight, bonus_weight, *_ = operands
        return SoftTargets(probabilities, weight, bonus_weight, self.smoothing, self.bonus_smoothing)

    def visited(
        self, logits: Tensor, operands: Tensors, scores: bool, upstream: Tensor, z_factor: float
    ) -> tuple[SoftResult, Tensor]:
        label, targets, loops = operands[0], self._targets(operands), room("numba", "soft")
        assert label is not None
        if targets.probabilities is None:
            labels.counted(label, logits.shape[2], self.ignore_index)
        out: tuple[SoftResult, Tensor] = loops.visit(
            logits, label, targets, self.ignore_index, self.loss, scores, upstream, self.options, z_factor
        )
        return out


class _ReducedByLoops(MadeInForward):
    """Reduced loss of rows; with ``of.scores`` also scores and runner-up.

    Operands are label, probabilities, weight, bonus weight, divisor, and the target, so that a change of it in place
    is noticed.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, of: _Soft, *operands: Tensor | None) -> Any:
        divisor = operands[4]
        assert divisor is not None
        upstream = logits.new_ones(1, dtype=reference.accumulation_dtype(logits.dtype))
        upstream = upstream / divisor if of.mean else upstream
        out, grad = of.visited(logits, operands, of.scores, upstream, of.z_factor)
        total = out.loss.sum() / divisor if of.mean else out.loss.sum()
        if of.z_factor:
            total = total + out.lse.square().sum() * of.z_factor
        others = (out.scores, out.runner_up) if of.scores else ()
        _ReducedByLoops.keep(ctx, logits, of, operands, grad, (upstream,), None, others)
        return total, *others


def _gradient(
    logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, targets: SoftTargets, options: LogitOptions,
    grad_loss: Tensor, grad_lse: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient, where grad mode is on a differentiable function of logits and upstream gradients [N]."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x = logits if again else logits.detach().requires_grad_()
        rows = label.expand(x.shape[:2])
        row = (reference.z_of(x, rows, ignore_index, options), rows, ignore_index)
        value = reference.soft_rows(*row, loss, targets).reshape(-1)
        of, upstream = [value], [grad_loss.to(value.dtype)]
        if grad_lse is not None:
            of.append(reference.logsumexp(*row).reshape(-1))
            upstream.append(grad_lse.to(of[1].dtype))
    grad: Tensor = torch.autograd.grad(of, x, upstream, create_graph=again)[0]
    return grad


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bonus_ops::soft_forward", mutates_args=())
def forward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, smoothing: float, bonus_smoothing: float, ignore_index: int, loss: str, logit_scale: float,
    softcap: float | None, lse: bool, scores: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to what `SoftResult` holds."""
    targets = SoftTargets(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    if logits.device.type == "cpu" and probabilities is None:
        reference.check_target(label, logits.shape[2], ignore_index)
    kernels = room(implementation, "soft")
    options = LogitOptions(logit_scale, softcap)
    return tuple(kernels.forward(logits, label, targets, ignore_index, decode(loss, fields), scores, options, lse))


@forward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, label, probabilities, weight, bonus_weight, fields, smoothing, bonus_smoothing, ignore_index, loss,
    logit_scale, softcap, lse, scores, implementation,
):  # fmt: skip
    return tuple(empty_soft(logits, scores, lse))


@torch.library.custom_op("bonus_ops::soft_backward", mutates_args=())
def backward(
    logits: Tensor, label: Tensor, probabilities: Tensor | None, weight: Tensor | None, bonus_weight: Tensor | None,
    fields: Tensor, saved: Tensor, runner_up: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, smoothing: float,
    bonus_smoothing: float, ignore_index: int, loss: str, logit_scale: float, softcap: float | None,
    implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradients [N] of each row's loss and logsumexp."""
    targets = SoftTargets(probabilities, weight, bonus_weight, smoothing, bonus_smoothing)
    grad: Tensor = room(implementation, "soft").backward(
        logits, label, targets, saved, runner_up, grad_loss, ignore_index, decode(loss, fields),
        options=LogitOptions(logit_scale, softcap), **({} if grad_lse is None else {"grad_lse": grad_lse}),
    )  # fmt: skip
    return grad


@backward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, label, probabilities, weight, bonus_weight, fields, saved, runner_up, grad_loss, grad_lse, smoothing,
    bonus_smoothing, ignore_index, loss, logit_scale, softcap, implementation,
):  # fmt: skip
    return MEMORY_OF_GRADIENT[implementation](logits)


class _OperatorRows(torch.autograd.Function):
    """Loss of each row, and its logsumexp where ``lse`` asks for it; the gradient is made in backward."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        logits, label, probabilities, weight, bonus_weight, fields, smoothings, ignore_index, loss, options, lse,
        scores, implementation,
    ):  # fmt: skip
        loss, *others, lse = forward(logits, label, probabilities, weight, bonus_weight, fields, *smoothings,
                                     ignore_index, loss, *options, lse, scores, implementation)  # fmt: skip
        return loss, lse, *others

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        *tensors, ctx.smoothings, ctx.ignore_index, ctx.loss, ctx.options, ctx.lse, _, ctx.implementation = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[4], output[3])

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None and grad_lse is None:
            return (None,) * 13
        logits, label, *targets, fields, saved, runner_up = ctx.saved_tensors
        grad_loss = torch.zeros_like(grad_lse) if grad_loss is None else grad_loss
        grad_lse = grad_lse if ctx.lse else None
        if torch.is_grad_enabled():
            row = (ctx.ignore_index, decode(ctx.loss, fields), SoftTargets(*targets, *ctx.smoothings))
            grad = _gradient(logits, label, *row, LogitOptions(*ctx.options), grad_loss, grad_lse)
        else:
            grad = backward(logits, label, *targets, fields, saved, runner_up, grad_loss, grad_lse, *ctx.smoothings,
                            ctx.ignore_index, ctx.loss, *ctx.options, ctx.implementation)  # fmt: skip
        return grad, *(None,) * 12
