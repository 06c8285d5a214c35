"""The linear form: from a checked call to chunks of logits, with every derivative.

Gradients of a reduced loss are made in the forward visit, for an upstream gradient of 1, and kept in the accumulation
dtype until backward scales and rounds them, once. Derivatives that are differentiated again follow the formula, which
makes the logits. One registered operator serves eager calls and the compiler alike.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import reference
from ..linear_call import LinearCall
from ..logit_options import LogitOptions
from ..losses import ClassLoss, GapLoss, decode, encode
from ..scores import Scores
from ..soft_targets import SoftTargets
from ..watchers import is_plain_eager
from . import chunks
from .chunks import Layer, LinearResult, Rows, Wanted

__all__ = ["Result", "run"]


class Result(NamedTuple):
    """What a call returns, in the shapes of its arguments."""

    loss: Tensor
    scores: Scores | None
    norm: Tensor | None  # of the last layer's gradient of each row's loss


def run(call: LinearCall) -> Result:
    """Return the loss of a call and, where it wants them, scores and norms."""
    return _WAYS[call.implementation](call)


class _Options(NamedTuple):
    """What a graph may take for constants."""

    loss: str  # by `losses.encode`
    ignore_index: int
    soft: bool
    smoothing: float
    bonus_smoothing: float
    scores: bool
    norm: bool
    reduced: bool
    logits: LogitOptions
    dtype: torch.dtype  # of products
    budget: int  # 0: as was measured
    implementation: str


class _Operands(NamedTuple):
    """The tensors of a call that are not differentiated.

    The loss is ``sum row_weight (weight_of_row L + z_upstream logsumexp^2) / divisor``.
    """

    label: Tensor  # [N]
    weight_of_row: Tensor | None  # [N] by its class
    weight: Tensor | None  # [C] of soft targets
    bonus_weight: Tensor | None
    divisor: Tensor | None  # of a mean, or of a loss that is a mean over classes
    z_upstream: Tensor | None  # 0-d; undoes the divisor, for the z-loss is divided by the rows that count
    fields: Tensor  # of the loss

    def targets(self, of: _Options) -> SoftTargets | None:
        return SoftTargets(None, self.weight, self.bonus_weight, of.smoothing, of.bonus_smoothing) if of.soft else None


def _asked(call: LinearCall) -> tuple[_Operands, _Options]:
    soft, mean = call.kind == "soft", call.reduction == "mean"
    weight_of_row = call.row_weight()
    divisor = call.divisor(weight_of_row) if mean else None
    bonus_weight = call.bonus_weight
    if soft and bonus_weight is not None and divisor is not None and call.weight is not None:
        # a weighted cross-entropy is divided by its weights, the bonus by the number of rows
        bonus_weight = bonus_weight * (divisor / call.divisor(None))
    if isinstance(call.loss, ClassLoss):
        n = call.hidden.new_full((), call.n_classes, dtype=reference.accumulation_dtype(call.hidden.dtype))
        divisor = n if divisor is None else n * divisor
    z_upstream = None
    if call.options.z_loss:
        z_upstream = call.hidden.new_full(
            (), call.options.z_loss, dtype=reference.accumulation_dtype(call.hidden.dtype)
        )
        if divisor is not None:
            z_upstream = z_upstream * (divisor / (call.n_counted() if mean else 1))
    name, fields = encode(call.loss)
    tensors = (call.weight, bonus_weight) if soft else (None, None)
    return _Operands(call.target, None if soft else weight_of_row, *tensors, divisor, z_upstream, fields), _Options(
        name, call.ignore_index, soft, call.smoothing, call.bonus_smoothing, call.scores, call.norm,
        call.reduction != "none", call.options, call.product_dtype, call.budget or 0, call.implementation,
    )  # fmt: skip


def _by_formula(call: LinearCall) -> Result:
    given, of = _asked(call)
    if call.hidden.device.type == "cpu":
        reference.check_target(given.label, call.n_classes, of.ignore_index)
    parameters = call.hidden, call.linear_weight, call.linear_bias, call.row_weight_given
    loss = _formula(*parameters, given, of, call.loss)
    scores = norm = None
    if call.scores:
        with torch.no_grad():
            logits = _logits(*parameters[:3], given.label, of)
        scores = reference.scores(of.logits.applied(logits), given.label, of.ignore_index)
    if call.norm:
        norm = _norm_by_formula(logits, parameters, given, of, call.loss)
    return _result(call, loss, scores, norm)


def _by_chunks(call: LinearCall) -> Result:
    given, of = _asked(call)
    parameters = call.hidden, call.linear_weight, call.linear_bias, call.row_weight_given
    loss, *others = _Made.apply(*parameters, *given, of, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    if not call.scores:
        return _result(call, loss, None, None)
    columns, runner_up, norm = others
    scores = Scores._make((*columns.unbind(), runner_up))
    rows = Rows(given.label, None, given.z_upstream, given.targets(of), call.loss, of.ignore_index, of.logits)
    if not call.norm:
        norm = None
    elif rows.norm_from_scores:
        norm = _norm_from_scores(scores, parameters, given, of, cast(GapLoss, call.loss))
    else:
        norm = norm * _layer_norm(call.hidden.detach(), call.linear_bias)
    return _result(call, loss, scores, norm if norm is None or rows.folded == 1.0 else norm * rows.folded)


_WAYS = {"triton": _by_chunks, "numba": _by_chunks, "reference": _by_formula}


def _result(call: LinearCall, loss: Tensor, scores: Scores | None, norm: Tensor | None) -> Result:
    loss = call.shaped(loss) if call.reduction == "none" else loss
    if norm is not None and isinstance(call.loss, ClassLoss):
        norm = norm / call.n_classes  # as the loss, a mean over them
    return Result(
        loss.to(call.dtype),
        None if scores is None else call.scores_of(scores),
        None if norm is None else call.shaped(norm),
    )


# --- the norm of the last layer's gradient: a row's is the outer product of dL/dz and (hidden, 1) ---------------------


def _layer_norm(hidden: Tensor, bias: Tensor | None) -> Tensor:
    """Return the norm of (hidden, 1), or of hidden where there is no bias."""
    square = hidden.to(reference.accumulation_dtype(hidden.dtype)).square().sum(1)
    return torch.sqrt(square if bias is None else square + 1.0).to(torch.float32)


def _norm_from_scores(scores: Scores, parameters: Any, given: _Operands, of: _Options, loss: GapLoss) -> Tensor:
    upstream = _upstream(given.weight_of_row, parameters[3])
    weight = None if upstream is None else upstream.detach().to(torch.float32)
    return scores.grad_norm(loss, weight) * _layer_norm(parameters[0].detach(), parameters[2])


def _norm_by_formula(logits: Tensor, parameters: Any, given: _Operands, of: _Options, loss: Any) -> Tensor:
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        rows = _rows_of(z, given, of, loss)
    (grad,) = torch.autograd.grad(rows, z, torch.ones_like(rows))
    norm: Tensor = torch.linalg.vector_norm(grad, dim=1).to(torch.float32)
    if parameters[3] is not None:
        norm = norm * parameters[3].detach().abs()
    norm = norm * _layer_norm(parameters[0].detach(), parameters[2])
    return norm.masked_fill(given.label == of.ignore_index, torch.nan)


# --- the formula ------------------------------------------------------------------------------------------------------


def _upstream(weight_of_row: Tensor | None, row_weight: Tensor | None) -> Tensor | None:
    if weight_of_row is None or row_weight is None:
        return row_weight if weight_of_row is None else weight_of_row
    return weight_of_row * row_weight


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, label: Tensor, of: _Options) -> Tensor:
    """Return the logits in the accumulation dtype; those of ignored rows do not follow from what these hold."""
    dtype = reference.accumulation_dtype(of.dtype)
    hidden, weight = (x.to(of.dtype).to(dtype) for x in (hidden, weight))
    hidden = hidden.masked_fill((label == of.ignore_index)[:, None], 0.0)
    return torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(of.dtype).to(dtype))


def _rows_of(logits: Tensor, given: _Operands, of: _Options, loss: Any) -> Tensor:
    """Return the loss of each row, times the weight of its class, with what its logsumexp costs."""
    logits, targets, lse = of.logits.applied(logits), given.targets(of), None
    if given.z_upstream is not None:
        lse = reference.logsumexp(logits, given.label, of.ignore_index)
    if targets is not None:
        return _with_z(reference.soft_rows(logits, given.label, of.ignore_index, loss, targets), lse, given)
    rows = reference.rows(logits, given.label, of.ignore_index, loss)
    return _with_z(rows if given.weight_of_row is None else rows * given.weight_of_row, lse, given)


def _with_z(rows: Tensor, lse: Tensor | None, given: _Operands) -> Tensor:
    return rows if lse is None or given.z_upstream is None else rows + given.z_upstream * lse.square()


def _formula(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, row_weight: Tensor | None, given: _Operands, of: _Options,
    loss: Any,
) -> Tensor:  # fmt: skip
    """Return the loss, differentiable at any order, of logits that are made."""
    rows = _rows_of(_logits(hidden, weight, bias, given.label, of), given, of, loss)
    return _reduced(rows if row_weight is None else rows * row_weight, given.divisor, of)


def _reduced(rows: Tensor, divisor: Tensor | None, of: _Options) -> Tensor:
    total = rows.sum() if of.reduced else rows
    return total if divisor is None else total / divisor


# --- chunks -----------------------------------------------------------------------------------------------------------


class _Made(torch.autograd.Function):
    """``apply(hidden, weight, bias, row_weight, *operands, options, grad_mode)``.

    Returns the loss and, with scores, columns [5, N], runner-up [N] and norm [N] of dL/dlogits. Gradients of a reduced
    loss are made here. With reduction "none" they wait for the upstream gradients, unless that of hidden is all: its
    rows are scaled.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden, weight, bias, row_weight, label, weight_of_row, class_weight, bonus_weight, divisor, z_upstream,
        fields, of, grad_mode,
    ):  # fmt: skip
        given = _Operands(label, weight_of_row, class_weight, bonus_weight, divisor, z_upstream, fields)
        ctx.wanted = [grad_mode and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        ctx.later = not of.reduced and any(ctx.wanted[1:])
        asked = [False] * 3 if ctx.later else ctx.wanted
        upstream = _upstream(weight_of_row, row_weight)
        z_of_rows = _z_of_rows(given, row_weight)
        out = _call(hidden, weight, bias, upstream, z_of_rows, given, of, of.scores, asked)
        rows = out.loss if weight_of_row is None else out.loss * weight_of_row
        rows = _with_z(rows, out.lse, given)
        loss = _reduced(rows if row_weight is None else rows * row_weight, divisor, of)
        ctx.save_for_backward(hidden, weight, bias, row_weight, *given, rows, *out[5:])
        ctx.of = of
        ctx.set_materialize_grads(False)
        if not of.scores:
            return (loss,)
        others = out.scores, out.runner_up, out.norm
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None:
            return (None,) * 13
        hidden, weight, bias, row_weight, *given, rows, made_hidden, made_weight, made_bias = ctx.saved_tensors
        given, of, compiled = _Operands(*given), ctx.of, torch.compiler.is_compiling()
        if torch.is_grad_enabled() or not compiled and torch._C._functorch.is_legacy_batchedtensor(grad_loss):
            return (*_gradients(ctx, (hidden, weight, bias, row_weight), given, grad_loss), *(None,) * 9)
        grad_row_weight = None
        if ctx.needs_input_grad[3]:
            grad_row_weight = rows * grad_loss if given.divisor is None else rows * (grad_loss / given.divisor)
        made = made_hidden, made_weight, made_bias
        factor = grad_loss
        if ctx.later:
            of_row = _upstream(row_weight, grad_loss.to(rows.dtype))
            upstream, z_of_rows = _upstream(given.weight_of_row, of_row), _z_of_rows(given, of_row)
            made = _call(hidden, weight, bias, upstream, z_of_rows, given, of, False, ctx.wanted)[5:]
            factor = torch.ones_like(rows[:0].sum())
        if given.divisor is not None and not _divides(hidden):
            factor = factor / given.divisor
        counts = given.label != of.ignore_index
        grads = [
            _times(x, factor, counts, like is hidden, like.dtype, compiled) if wanted else None
            for wanted, x, like in zip(ctx.wanted, made, (hidden, weight, bias), strict=True)
        ]
        return *grads, grad_row_weight, *(None,) * 9


def _divides(hidden: Tensor) -> bool:
    """Return whether the operator's gradients are divided by the divisor."""
    return hidden.device.type == "cpu"


def _times(made: Tensor, factor: Tensor, counts: Tensor, of_rows: bool, dtype: torch.dtype, compiled: bool) -> Tensor:
    """Return a gradient that was made, times the upstream gradient, in the dtype of what it is of.

    What ignored rows add is 0 whatever the upstream gradient: of rows [N, H] theirs, of all rows if none counts.
    """
    number = math.nan
    if not (factor.dim() or compiled) and is_plain_eager(factor) and factor.device.type == "cpu":
        number = factor.item()  # of a CPU: nothing waits
    if not math.isfinite(number):
        factor = torch.where(counts if of_rows else counts.any(), factor, 0.0)
        return (made * (factor[:, None] if of_rows else factor)).to(dtype)
    kept = torch._C._autograd._get_current_graph_task_keep_graph()  # there may be another backward
    if number != 1:
        made = made * number if kept else made.mul_(number)
    elif kept and made.dtype == dtype:
        made = made.clone()
    return made.to(dtype)


def _gradients(ctx: Any, parameters: Any, given: _Operands, grad_loss: Tensor) -> list[Tensor | None]:
    """Return the gradients by the formula, where grad mode is on as differentiable functions of all."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        if not again:
            parameters = [x if x is None else x.detach().requires_grad_(x.requires_grad) for x in parameters]
        hidden, weight, bias, row_weight = parameters
        loss = _formula(hidden, weight, bias, row_weight, given, ctx.of, decode(ctx.of.loss, given.fields))
    inputs = [x for x, needed in zip(parameters, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(loss, inputs, grad_loss.to(loss.dtype), create_graph=again))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _z_of_rows(given: _Operands, of_row: Tensor | None) -> Tensor | None:
    """Return the upstream gradients [N] of the squares of logsumexps; ``of_row`` are those of rows."""
    if given.z_upstream is None:
        return None
    return (given.z_upstream if of_row is None else given.z_upstream * of_row).expand(len(given.label))


def _call(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor | None, z_upstream: Tensor | None,
    given: _Operands, of: _Options, scores: bool, gradients: Any,
) -> LinearResult:  # fmt: skip
    out = forward(
        hidden, weight, bias, upstream, z_upstream, given.label, given.weight, given.bonus_weight, given.divisor,
        given.fields, of.loss, of.ignore_index, of.soft, of.smoothing, of.bonus_smoothing, *of.logits[:2], scores,
        scores and of.norm, gradients, of.dtype, of.budget, of.implementation,
    )  # fmt: skip
    return LinearResult._make(out)


@torch.library.custom_op("bonus_ops::linear_forward", mutates_args=())
def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, upstream: Tensor | None, z_upstream: Tensor | None,
    label: Tensor, class_weight: Tensor | None, bonus_weight: Tensor | None, divisor: Tensor | None, fields: Tensor,
    loss: str, ignore_index: int, soft: bool, smoothing: float, bonus_smoothing: float, logit_scale: float,
    softcap: float | None, scores: bool, norm: bool, gradients: list[bool], dtype: torch.dtype, budget: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `LinearResult` holds, with the gradients asked for: of hidden, weight and bias."""
    targets = SoftTargets(None, class_weight, bonus_weight, smoothing, bonus_smoothing) if soft else None
    options = LogitOptions(logit_scale, softcap)
    rows = Rows(label, upstream, z_upstream, targets, decode(loss, fields), ignore_index, options)
    layer, wanted = Layer(hidden, weight, bias, dtype), Wanted(scores, norm, *gradients)
    out: Any = tuple(chunks.computed(layer, rows, wanted, divisor, budget, implementation))
    return out  # type: ignore[no-any-return]


@forward.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, upstream, z_upstream, label, class_weight, bonus_weight, divisor, fields, loss, ignore_index,
    soft, smoothing, bonus_smoothing, logit_scale, softcap, scores, norm, gradients, dtype, budget, implementation,
):  # fmt: skip
    return tuple(
        chunks.empty(Layer(hidden, weight, bias, dtype), Wanted(scores, norm, *gradients), z_upstream is not None)
    )
