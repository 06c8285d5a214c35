"""Class indices: from a checked call to rows of kernels or loops, with every derivative.

First derivatives run the operators. Derivatives that are differentiated again, forward-mode ones and those of
`torch.func` follow the closed form of `reference.gradient`, from the input: plain torch, hence right at any depth.
Eager calls that only the tape watches go from a Function straight to kernels or loops; the two registered operators
are for all others: torch.compile, torch.export, torch.func, DTensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import logsigmoid

from .. import reference
from ..call import Call, as_input, as_rows
from ..kernels.results import MEMORY_OF_GRADIENT, LabelResult, empty_labels
from ..logit_options import LogitOptions
from ..losses import GapLoss, decode, encode
from ..scores import Scores
from ..watchers import is_plain_eager
from . import room
from .made import MadeInForward, Tensors

__all__ = ["WAYS", "Result", "counted", "softmax"]


class Result(NamedTuple):
    """What a call returns, in the shapes of its arguments; None where it was not asked for."""

    loss: Tensor
    scores: Scores | None
    softmax: Tensor | None


def _by_formula(call: Call) -> Result:
    logits = call.logits()
    target = call.target.reshape(logits.shape[:2])
    logits = reference.z_of(logits, target, call.ignore_index, call.options)
    if logits.device.type == "cpu":
        reference.check_target(target, call.n_classes, call.ignore_index)
    value = reference.rows(logits, target, call.ignore_index, cast(GapLoss, call.loss)).reshape(-1)
    columns = reference.scores(logits, target, call.ignore_index) if call.scores else None
    probabilities = reference.softmax(logits.detach(), target, call.ignore_index) if call.softmax else None
    lse = reference.logsumexp(logits, target, call.ignore_index).reshape(-1) if call.options.z_loss else None
    return _result(call, _reduced(call, value, lse), columns, probabilities)


def _by_loops(call: Call) -> Result:
    input, target, weight = call.input, call.target, call.weight
    eager = input.requires_grad and torch.is_grad_enabled() and is_plain_eager(input, target, weight)
    if not eager or call.reduction == "none" or call.softmax:
        return _by_rows(call)
    weight = None if weight is None else call.row_weight()
    of = _Labels(call.ignore_index, call.loss.current, call.scores, call.reduction == "mean", call.options, call.dtype)
    total, *columns = _ReducedByLoops.apply(input, of, target, weight)
    return _result(call, total, (*columns[0].unbind(), columns[1]) if columns else None, None)


def _by_kernels(call: Call) -> Result:
    mean = call.reduction == "mean" and call.weight is None and not call.softmax and not call.options.z_loss
    if not mean or call.input.dim() < 2 or not is_plain_eager(*call.tensors()):
        return _by_rows(call)
    if call.input.device.type == "cpu":
        reference.check_target(call.target, call.n_classes, call.ignore_index)
    options = (call.ignore_index, cast(GapLoss, call.loss).current, call.scores, call.dtype, call.options)
    loss, *columns = _MeanByKernels.apply(call.input, call.target, *options)  # type: ignore[no-untyped-call]
    return Result(loss, call.scores_of((*columns[0].unbind(), columns[1])) if columns else None, None)


WAYS = {"triton": _by_kernels, "numba": _by_loops, "reference": _by_formula}


def _by_rows(call: Call) -> Result:
    """Return the result of rows; their gradient is made in backward, by a second read."""
    logits = call.logits()
    target = call.target.reshape(logits.shape[:2])
    wanted = (call.scores, call.softmax)
    if not (call.input.requires_grad and torch.is_grad_enabled()) and is_plain_eager(*call.tensors()):
        options = (call.ignore_index, cast(GapLoss, call.loss).current, *wanted, call.options, call.implementation)
        loss, scores, runner_up, saved, probabilities = _visited(logits, target, *options)
        of_rows = (target, saved, call.ignore_index, call.options[:2])
        lse = logsumexp(logits, *of_rows) if call.options.z_loss else None
    else:
        name, fields = encode(call.loss)
        function = _Rows if torch.compiler.is_compiling() else _ForwardModeRows
        loss, lse, scores, runner_up, _, probabilities = function.apply(  # type: ignore[no-untyped-call]
            logits, target, fields, call.ignore_index, name, call.options[:2], bool(call.options.z_loss), *wanted,
            call.implementation,
        )  # fmt: skip
    columns = (*scores, runner_up) if call.scores else None
    loss = _reduced(call, loss, lse if call.options.z_loss else None)
    return _result(call, loss, columns, probabilities if call.softmax else None)


def softmax(call: Call, logits: Tensor, label: Tensor) -> Tensor:
    """Return the probabilities of rows [outer, inner, C], detached, 0 where the label is ignored."""
    return _SOFTMAXES[call.implementation](call, logits.detach(), label)


def _softmax_by_formula(call: Call, logits: Tensor, label: Tensor) -> Tensor:
    return reference.softmax(call.options.applied(logits), label, call.ignore_index).to(logits.dtype)


def _softmax_by_rows(call: Call, logits: Tensor, label: Tensor) -> Tensor:
    name, fields = encode(reference.CROSS_ENTROPY)
    options = (call.ignore_index, name, *call.options[:2], False, True, call.implementation)
    out: Tensor = forward(logits, label, fields, *options)[4]
    return out


_SOFTMAXES = {"triton": _softmax_by_rows, "numba": _softmax_by_rows, "reference": _softmax_by_formula}


def _reduced(call: Call, loss: Tensor, lse: Tensor | None) -> Tensor:
    """Return the losses of rows [N] reduced, each times its weight."""
    weight = call.row_weight()
    divisor = call.divisor(weight) if call.reduction == "mean" else None
    return call.reduced(loss if weight is None else loss * weight, divisor, lse)


def _result(call: Call, loss: Tensor, columns: Any, probabilities: Tensor | None) -> Result:
    loss = call.shaped(loss) if call.reduction == "none" else loss
    scores = None if columns is None else call.scores_of(columns)
    softmax = None if probabilities is None else as_input(probabilities, call.input)
    return Result(loss if loss.dtype == call.dtype else loss.to(call.dtype), scores, softmax)


# --- eager on a CPU ---------------------------------------------------------------------------------------------------


def counted(target: Tensor, n_classes: int, ignore_index: int) -> int:
    """Return how many labels count, or raise torch's IndexError where one is out of range."""
    found: tuple[int, int, int] = room("numba", "labels").count(target, n_classes, ignore_index)
    n, n_bad, bad = found
    if n_bad:
        raise reference.out_of_bounds(bad, n_bad, n_classes, ignore_index)
    return n


class _Labels(NamedTuple):
    """The options of a reduced loss."""

    ignore_index: int
    loss: GapLoss
    scores: bool
    mean: bool
    options: LogitOptions
    dtype: torch.dtype  # of the loss, which is rounded last

    def again(self, input: Tensor, operands: Tensors, kept: Tensors, scales: Any, factor: Tensor) -> Tensor:
        logits, target, (upstream, saved, lse) = _rows(input), operands[0], kept
        assert target is not None
        loops, (scale, z_factor) = room("numba", "labels"), scales
        factor = factor.to(reference.accumulation_dtype(logits.dtype))
        upstream = factor * (scale if upstream is None else upstream)
        row = (self.ignore_index, self.loss)
        if saved is None:
            grad = loops.visit(logits, target, *row, False, upstream, False, self.options, 0.0).grad
        else:
            grad_lse = None if lse is None else lse * (2 * z_factor * factor)
            grad = loops.backward(logits, target, saved, upstream, grad_lse, *row, self.options)
        return _undone(grad, input)

    def formula(self, input: Tensor, operands: Tensors, kept: Tensors, scales: Any, factor: Tensor) -> Tensor:
        logits, target, upstream = as_rows(input), operands[0], kept[0]
        assert target is not None
        scale, z_factor = scales
        upstream = (factor * (scale if upstream is None else upstream)).expand(target.numel())
        grad_lse = None
        if z_factor:
            rows = target.reshape(logits.shape[:2])
            z = reference.z_of(logits, rows, self.ignore_index, self.options)
            grad_lse = reference.logsumexp(z, rows, self.ignore_index).reshape(-1) * (2 * z_factor * factor)
        return as_input(
            _gradient(logits, target, upstream, grad_lse, self.ignore_index, self.loss, self.options), input
        )


class _ReducedByLoops(MadeInForward):
    """Reduced loss of labels [N] with weights of rows [N] or None; with ``of.scores`` also scores and runner-up."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, of: _Labels, target: Tensor, weight: Tensor | None) -> Any:
        logits, loops = _rows(input), room("numba", "labels")
        n = counted(target, logits.shape[-1], of.ignore_index)
        upstream: Any = (1 / n if n else 0.0) if of.mean else 1.0
        if weight is not None:
            upstream = weight / weight.sum() if of.mean else weight
            upstream = upstream.to(reference.accumulation_dtype(logits.dtype))
        z_factor = of.options.z_loss / max(n, 1) if of.mean else of.options.z_loss
        save = logits.dtype.itemsize == 2 or z_factor != 0
        out = loops.visit(logits, target, of.ignore_index, of.loss, of.scores, upstream, save, of.options, z_factor)
        if weight is not None:
            total = (out.loss * weight).sum()
            total = total / weight.sum() if of.mean else total
        else:
            total = loops.total(out.loss, n if of.mean else 1, of.dtype if out.lse is None else out.loss.dtype)
        if out.lse is not None:
            total = total + out.lse.square().sum() * z_factor
        others = (out.scores, out.runner_up) if of.scores else ()
        kept = (None if weight is None else upstream, out.saved, out.lse)
        scale = (upstream if weight is None else 1.0, z_factor)
        _ReducedByLoops.keep(ctx, input, of, (target, weight), _undone(out.grad, input), kept, scale, others)
        return total, *others


def _rows(input: Tensor) -> Tensor:
    """Return rows as loops take them: without a view where they lie so already."""
    return input if input.dim() == 2 else as_rows(input)


def _undone(rows: Tensor, input: Tensor) -> Tensor:
    return rows if input.dim() == 2 else as_input(rows, input)


def _gradient(
    logits: Tensor, target: Tensor, grad_loss: Tensor, grad_lse: Tensor | None, ignore_index: int, loss: GapLoss,
    options: LogitOptions,
) -> Tensor:  # fmt: skip
    """Return the gradient by the closed form, from the input, differentiable again."""
    rows = logits.shape[:2]
    target, grad_loss = target.reshape(rows), grad_loss.reshape(rows)
    if options.kernel == "as_given" and grad_lse is None:
        return reference.gradient(logits, target, ignore_index, loss, grad_loss)
    dtype = logits.dtype
    logits = logits.to(reference.accumulation_dtype(dtype)).masked_fill((target == ignore_index)[..., None], 0.0)
    z = options.applied(logits)
    grad = reference.gradient(z, target, ignore_index, loss, grad_loss)
    if grad_lse is not None:
        grad = grad + reference.logsumexp_gradient(z, target, ignore_index, grad_lse.reshape(rows))
    return (grad * options.slope(logits)).to(dtype)


# --- eager on a GPU ---------------------------------------------------------------------------------------------------


class _MeanByKernels(torch.autograd.Function):
    """Mean over the rows not ignored, launched from here.

    Takes the input itself, so that its view as rows is no node of the tape, and returns the mean in ``dtype``, with
    ``scores`` also scores [5, N] and runner-up [N].
    """

    @staticmethod
    def forward(ctx, input, target, ignore_index, loss, scores, dtype, options):  # type: ignore[no-untyped-def]
        kernels = room("triton", "labels")
        rows = as_rows(input)
        mean, columns, runner_up, saved = kernels.forward_mean(rows, target, ignore_index, loss, scores, options)
        ctx.save_for_backward(input, target, *saved)
        ctx.ignore_index, ctx.loss, ctx.options = ignore_index, loss, options
        ctx.set_materialize_grads(False)
        if mean.dtype != dtype:
            mean = mean.to(dtype)
        if not scores:
            return (mean,)
        ctx.mark_non_differentiable(columns, runner_up)
        return mean, columns, runner_up

    @staticmethod
    def backward(ctx, grad_loss, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None:
            return (None,) * 7
        input, target, *saved = ctx.saved_tensors
        logits, row = as_rows(input), (ctx.ignore_index, ctx.loss, ctx.options)
        if torch.is_grad_enabled() or not is_plain_eager(grad_loss):
            upstream = (grad_loss / saved[-1]).expand(target.numel())
            grad = _gradient(logits, target, upstream, None, *row)
        else:
            grad = room("triton", "labels").backward_mean(logits, target, saved, grad_loss, *row)
        return as_input(grad, input), *(None,) * 6


# --- rows -------------------------------------------------------------------------------------------------------------


def _visited(
    logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, scores: bool, softmax: bool,
    options: LogitOptions, implementation: str,
) -> LabelResult:  # fmt: skip
    if logits.device.type == "cpu":
        _CHECKS[implementation](target, logits.shape[2], ignore_index)
    out: LabelResult = room(implementation, "labels").forward(
        logits, target, ignore_index, loss, scores, softmax, options
    )
    return out


_CHECKS = {"triton": reference.check_target, "numba": counted}


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bonus_ops::labels_forward", mutates_args=())
def forward(
    logits: Tensor, target: Tensor, fields: Tensor, ignore_index: int, loss: str, logit_scale: float,
    softcap: float | None, scores: bool, softmax: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [outer, inner, C] to what `LabelResult` holds; ``loss`` and ``fields`` are what `losses.encode` returns."""
    options = (scores, softmax, LogitOptions(logit_scale, softcap), implementation)
    return tuple(_visited(logits, target, ignore_index, decode(loss, fields), *options))  # type: ignore[return-value]


@forward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, target, fields, ignore_index, loss, logit_scale, softcap, scores, softmax, implementation
):
    return tuple(empty_labels(logits, scores, softmax))


@torch.library.custom_op("bonus_ops::labels_backward", mutates_args=())
def backward(
    logits: Tensor, target: Tensor, fields: Tensor, saved: Tensor, grad_loss: Tensor, grad_lse: Tensor | None,
    ignore_index: int, loss: str, logit_scale: float, softcap: float | None, implementation: str,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits from the upstream gradients [N] of each row's loss and logsumexp."""
    options = (ignore_index, decode(loss, fields), LogitOptions(logit_scale, softcap))
    grad: Tensor = room(implementation, "labels").backward(logits, target, saved, grad_loss, grad_lse, *options)
    return grad


@backward.register_fake
def _(  # type: ignore[no-untyped-def]
    logits, target, fields, saved, grad_loss, grad_lse, ignore_index, loss, logit_scale, softcap, implementation
):
    return MEMORY_OF_GRADIENT[implementation](logits)


def fold(x: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """Return ``x`` with a mapped dimension (None: repeated ``size`` times) folded into dimension ``at``."""
    x = x.unsqueeze(at).expand(*x.shape[:at], size, *x.shape[at:]) if dim is None else x.movedim(dim, at)
    return x.flatten(at, at + 1)


def unfold(x: Tensor, at: int, size: int) -> Tensor:
    """Undo `fold`, leaving the mapped dimension in place ``at``."""
    return x.view(*x.shape[:at], size, x.shape[at] // size, *x.shape[at + 1 :])


@backward.register_vmap
def _(info, in_dims, logits, target, fields, saved, grad_loss, grad_lse, *options):  # type: ignore[no-untyped-def]
    size, dims = info.batch_size, in_dims
    logits, target = fold(logits, dims[0], size), fold(target, dims[1], size)
    saved, grad_loss = fold(saved, dims[3], size, at=1), fold(grad_loss, dims[4], size)
    grad_lse = None if grad_lse is None else fold(grad_lse, dims[5], size)
    return unfold(backward(logits, target, fields, saved, grad_loss, grad_lse, *options), 0, size), 0


class _Rows(torch.autograd.Function):
    """Loss of each row, and its logsumexp where ``lse`` asks for it; the gradient is made in backward."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        logits, target, fields, ignore_index, loss, options, lse, scores, softmax, implementation
    ):
        # the compiler counts the names: of `*args` it would take a context for the first
        out = forward(logits, target, fields, ignore_index, loss, *options, scores, softmax, implementation)
        of_rows = logsumexp(logits, target, out[3], ignore_index, options) if lse else out[0].new_empty(0)
        return out[0], of_rows, *out[1:]

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        logits, target, fields, ctx.ignore_index, ctx.loss, ctx.options, ctx.lse, _, _, ctx.implementation = inputs
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for probabilities would be as large as the gradient
        ctx.save_for_backward(logits, target, fields, output[4])
        ctx.save_for_forward(logits, target, fields)

    @staticmethod
    def backward(ctx, grad_loss, grad_lse, *_):  # type: ignore[no-untyped-def]
        if grad_loss is None and grad_lse is None:
            return (None,) * 10
        logits, target, fields, saved = ctx.saved_tensors
        grad_loss = torch.zeros_like(grad_lse) if grad_loss is None else grad_loss
        grad_lse = grad_lse if ctx.lse else None
        if torch.is_grad_enabled():  # create_graph: the closed form in torch, from the input, is differentiable again
            row = (ctx.ignore_index, decode(ctx.loss, fields), LogitOptions(*ctx.options))
            grad = _gradient(logits, target, grad_loss, grad_lse, *row)
        else:
            row = (ctx.ignore_index, ctx.loss, *ctx.options, ctx.implementation)
            grad = backward(logits, target, fields, saved, grad_loss, grad_lse, *row)
        return grad, *(None,) * 9

    @staticmethod
    def vmap(  # type: ignore[no-untyped-def]
        info, in_dims, logits, target, fields, ignore_index, loss, options, lse, scores, softmax, implementation
    ):
        size = info.batch_size
        logits, target = fold(logits, in_dims[0], size), fold(target, in_dims[1], size)
        function = _Rows if torch.compiler.is_compiling() else _ForwardModeRows
        out = function.apply(  # type: ignore[no-untyped-call]
            logits, target, fields, ignore_index, loss, options, lse, scores, softmax, implementation
        )
        dims = (0, 0 if lse else None, 1 if scores else None, 0 if scores else None, 1, 0 if softmax else None)
        return tuple(x if d is None else unfold(x, d, size) for x, d in zip(out, dims, strict=True)), dims


class _ForwardModeRows(_Rows):
    """`_Rows` with a forward-mode derivative, which torch.compile refuses to see."""

    @staticmethod
    def jvp(ctx, tangent, *_):  # type: ignore[no-untyped-def]
        logits, target, fields = ctx.saved_tensors
        dtype = reference.accumulation_dtype(logits.dtype)
        one = torch.ones_like(target, dtype=dtype)
        row = (ctx.ignore_index, decode(ctx.loss, fields), LogitOptions(*ctx.options))
        # torch turns it off here: an outer jvp would see zeros, and under the compiler a primal keeps its tangent
        with forward_ad._set_fwd_grad_enabled(True):
            logits = forward_ad.unpack_dual(logits).primal.to(dtype)  # type: ignore[no-untyped-call]
            of_loss = (_gradient(logits, target, one, None, *row) * tangent).sum(-1).reshape(-1)
            of_lse = of_loss.new_empty(0)
            if ctx.lse:
                of_lse = (_gradient(logits, target, one * 0.0, one, *row) * tangent).sum(-1).reshape(-1)
            return of_loss, of_lse, *(None,) * 4


def logsumexp(
    logits: Tensor, target: Tensor, saved: Tensor, ignore_index: int, options: tuple[float, float | None]
) -> Tensor:
    """Return the logsumexp of rows [N], 0 where ignored, from the label's logit and what kernels save."""
    if logits.shape[2] == 0:
        return torch.zeros_like(saved[0])
    gap, largest, sum_exp = saved
    counts = target != ignore_index
    label = torch.where(counts, target, 0).clamp(0, logits.shape[2] - 1)
    z = LogitOptions(*options).applied(logits.gather(2, label[..., None])).to(saved.dtype).reshape(-1)
    rest = largest + torch.where(sum_exp == 0, 1.0, sum_exp).log()
    lse = torch.where(gap > 0, z - logsigmoid(gap), rest - logsigmoid(-gap))
    return torch.where(counts.reshape(-1), lse, 0.0)
