"""The public functions: check, choose an implementation, reduce."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from . import ops, reference
from .losses import CrossEntropy, GapLoss, LogBonus
from .scores import Scores

__all__ = [
    "bonus_cross_entropy",
    "bonus_cross_entropy_with_scores",
    "bonus_cross_entropy_with_softmax",
    "difficulty_scores",
]

_DEFAULT_BONUS = LogBonus()


def bonus_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    bonus: GapLoss | None = _DEFAULT_BONUS,
    implementation: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Compute cross-entropy with a bonus for well-classified examples.

    A drop-in for `torch.nn.functional.cross_entropy`, whose signature is the prefix of this one; with ``bonus=None``
    it is that function. Where cross-entropy stops teaching (p -> 1), the bonus goes on:

        L = -log p + strength * b(p),        b(p) = log(1 - min(p, LE)) - max(p - LE, 0) / (1 - LE),  LE = log_end

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...], float16, bfloat16, float32 or float64, any strides. Not written.
        target: class indices (int64, uint8) shaped like ``input`` without C, or probabilities shaped like ``input``.
        weight: factor of each class, [C], dtype of ``input``; as in torch, ``mean`` divides by the weights in use.
        size_average: deprecated, as in torch.
        reduce: deprecated, as in torch.
        ignore_index: rows with this label cost 0, whatever they hold, and get zero gradient.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1]; smooths cross-entropy and bonus alike. Torch path only.
        bonus: the loss of the gap, a `GapLoss`; None is plain cross-entropy. Default ``LogBonus(log_end=0.75)``.
        implementation: None chooses; ``"triton"``, ``"torch"`` and ``"reference"`` run or raise.
        validate: on a GPU, wait and raise for labels out of range; otherwise they make their row NaN. A CPU always
            raises.

    Returns:
        Loss in nats in the dtype of ``input`` (float32 under autocast): a scalar, or shaped like ``target`` for
        ``"none"``. Unlike cross-entropy it can be negative. Differentiable twice in ``input``.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError, NotImplementedError: what torch raises for the same fault;
            NotImplementedError also where ``implementation="triton"`` has no kernel for what was asked.

    Example:
        >>> import torch
        >>> from bonus_ops import bonus_cross_entropy
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> bonus_cross_entropy(logits, torch.tensor([0]), bonus=None)
        tensor(0.2395, grad_fn=<...>)
        >>> bonus_cross_entropy(logits, torch.tensor([0])).backward()
        >>> logits.grad
        tensor([[-0.8788,  0.4394,  0.4394]])

    References:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural Networks,
        AAAI 2022, https://arxiv.org/abs/2110.06537.
    """
    call = _Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 implementation, validate)  # fmt: skip
    return call.loss(scores=False, softmax=False)[0]


def bonus_cross_entropy_with_scores(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    bonus: GapLoss | None = _DEFAULT_BONUS,
    implementation: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Scores]:
    """Compute `bonus_cross_entropy` and the difficulty scores of every example from the same pass.

    Args: as in `bonus_cross_entropy`; ``target`` must hold class indices.

    Returns:
        The loss, and `Scores` shaped like ``target``: detached, of the plain softmax, NaN where ignored.

    Raises:
        As `bonus_cross_entropy`; NotImplementedError for probability targets, which have no label to score.

    Example:
        >>> import torch
        >>> from bonus_ops import bonus_cross_entropy_with_scores
        >>> loss, scores = bonus_cross_entropy_with_scores(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, 0]))
        >>> scores.margin
        tensor([ 2., -2.])
        >>> scores.difficulty("el2n").argmax()  # the hardest example
        tensor(1)
    """
    call = _Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 implementation, validate)  # fmt: skip
    return call.loss(scores=True, softmax=False)[:2]


def bonus_cross_entropy_with_softmax(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    bonus: GapLoss | None = _DEFAULT_BONUS,
    implementation: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Scores, Tensor]:
    """Compute `bonus_cross_entropy_with_scores` and the softmax of the logits.

    Args: as in `bonus_cross_entropy_with_scores`.

    Returns:
        The loss, the `Scores`, and the probabilities: shape and dtype of ``input``, detached, 0 where ignored.

    Raises:
        As `bonus_cross_entropy_with_scores`.
    """
    call = _Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 implementation, validate)  # fmt: skip
    return call.loss(scores=True, softmax=True)


def difficulty_scores(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    implementation: str | None = None,
    validate: bool = False,
) -> Scores:
    """Compute the difficulty scores of every example by one read of the logits, without a gradient.

    Args: as in `bonus_cross_entropy_with_scores`.

    Returns:
        `Scores` shaped like ``target``, detached.

    Raises:
        As `bonus_cross_entropy_with_scores`.
    """
    call = _Call(input.detach() if isinstance(input, Tensor) else input, target, None, None, ignore_index, None,
                 "none", 0.0, None, implementation, validate)  # fmt: skip
    scores: Scores = call.loss(scores=True, softmax=False)[1]
    return scores


class _Call:
    """The checked arguments of one call."""

    def __init__(
        self, input: Tensor, target: Tensor, weight: Tensor | None, size_average: bool | None, ignore_index: int,
        reduce: bool | None, reduction: str, label_smoothing: float, bonus: GapLoss | None,
        implementation: str | None, validate: bool,
    ) -> None:  # fmt: skip
        self.input, self.target, self.weight, self.ignore_index = input, target, weight, ignore_index
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        _check_options(reduction, label_smoothing, ignore_index, bonus)
        self.reduction = {"elementwise_mean": "mean"}.get(reduction, reduction)
        self.label_smoothing = float(label_smoothing)
        self.bonus: GapLoss = CrossEntropy() if bonus is None else bonus
        _check_tensors(input, target, weight)
        self.dense = input.shape == target.shape
        if self.dense:
            _check_dense(target, ignore_index)
        else:
            _check_hard(input, target)
        self.n_classes = input.shape[0] if input.dim() == 1 else input.shape[1]
        _check_weight(weight, input, self.n_classes)
        self.implementation = _choose(implementation, input.device, self.dense or self.label_smoothing > 0)
        if not self.dense and (validate or (input.device.type == "cpu" and input.numel() == 0)):
            reference.check_target(target, self.n_classes, ignore_index)
        autocast = torch.is_autocast_enabled(input.device.type) if input.device.type != "meta" else False
        half = input.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if half and autocast else input.dtype

    def loss(self, scores: bool, softmax: bool) -> tuple[Tensor, Any, Any]:
        """Return (loss, Scores or None, probabilities or None)."""
        if self.dense and (scores or softmax):
            raise NotImplementedError(
                "scores of probability targets are not defined.\nExpected class indices (int64) as target, got "
                f"{self.target.dtype} of shape {list(self.target.shape)}."
            )
        if self.dense or self.label_smoothing > 0:
            loss = self._dense_loss()
            if not scores:
                return loss, None, None
            plain = _Call(self.input.detach(), self.target, None, None, self.ignore_index, None, "none", 0.0, None,
                          self.implementation, False)  # fmt: skip
            return loss, *plain.loss(scores, softmax)[1:]
        return self._hard_loss(scores, softmax)

    def _hard_loss(self, scores: bool, softmax: bool) -> tuple[Any, Any, Any]:
        logits = _rows(self.input)
        target = self.target.reshape(logits.shape[:2])
        row_weight = self._row_weight(target)
        if self.implementation == "reference":
            loss, columns, probabilities = self._reference(logits, target, scores, softmax)
            if self.reduction != "none":
                loss = ops._weighted(loss, self._scale(target, row_weight, loss))
        else:
            options = (self.ignore_index, self.bonus, scores, softmax, self.implementation)
            if self.reduction == "none":
                out = ops.rows(logits, target, *options)
            else:
                out = ops.reduced_rows(logits, target, self._scale(target, row_weight, logits), *options)
            loss, probabilities = out.loss, out.softmax
            columns = Scores(*(c.view(self.target.shape) for c in (*out.scores, out.runner_up))) if scores else None
        if self.reduction == "none":
            loss = (loss if row_weight is None else loss * row_weight.reshape(-1)).view(self.target.shape)
        if softmax:
            probabilities = self._unrows(probabilities)
        return loss.to(self.dtype), columns, probabilities

    def _reference(self, logits: Tensor, target: Tensor, scores: bool, softmax: bool) -> tuple[Any, Any, Any]:
        if self.input.device.type == "cpu":
            reference.check_target(target, self.n_classes, self.ignore_index)
        loss = reference.rows(logits, target, self.ignore_index, self.bonus).reshape(-1)
        columns = reference.scores(logits, target, self.ignore_index) if scores else None
        if columns is not None:
            columns = Scores(*(c.reshape(self.target.shape) for c in columns))
        return loss, columns, reference.softmax(logits.detach(), target, self.ignore_index) if softmax else None

    def _unrows(self, x: Tensor) -> Tensor:
        if self.input.dim() == 1:
            return x[0, 0]
        return x[:, 0] if self.input.dim() == 2 else x.transpose(1, 2).reshape(self.input.shape)

    def _row_weight(self, target: Tensor) -> Tensor | None:
        """Return the class weight of every row, 0 where ignored or out of range."""
        if self.weight is None:
            return None
        inside = (target >= 0) & (target < self.n_classes) & (target != self.ignore_index)
        return torch.where(inside, self.weight[torch.where(inside, target, 0).long()], 0.0)

    def _scale(self, target: Tensor, row_weight: Tensor | None, like: Tensor) -> Tensor:
        """Return the factor of every row in the reduced loss: [N], or a scalar where all are alike."""
        dtype = reference.accumulation_dtype(like.dtype)
        if row_weight is None:
            if self.reduction == "sum":
                return torch.ones((), dtype=dtype, device=target.device)
            return (target != self.ignore_index).sum().to(dtype).reciprocal()
        row_weight = row_weight.reshape(-1).to(dtype)
        return row_weight if self.reduction == "sum" else row_weight / row_weight.sum()

    def _dense_loss(self) -> Tensor:
        """Return the loss of probabilities or smoothed labels, by the differentiable formula, as torch reduces it."""
        logits = _rows(self.input)
        n_classes = self.n_classes
        weight = None if self.weight is None else self.weight.to(reference.accumulation_dtype(logits.dtype))
        counts = None
        if self.dense:
            shares = _rows(self.target) * (1 - self.label_smoothing) + self.label_smoothing / n_classes
            divisor: Any = logits.shape[0] * logits.shape[1]
        else:
            target = self.target.reshape(logits.shape[:2])
            if self.input.device.type == "cpu":
                reference.check_target(target, n_classes, self.ignore_index)
            counts = target != self.ignore_index
            logits = logits.masked_fill(~counts[..., None], 0.0)
            is_label = torch.arange(n_classes, device=logits.device) == target[..., None]
            dtype = reference.accumulation_dtype(logits.dtype)
            shares = is_label.to(dtype) * (1 - self.label_smoothing) + self.label_smoothing / n_classes
            row_weight = self._row_weight(target)
            divisor = counts.sum() if row_weight is None else row_weight.sum()
        if weight is not None:
            shares = shares * weight
        loss = reference.dense_rows(logits, shares, self.bonus)
        if counts is not None:
            loss = torch.where(counts, loss, 0.0)
        dtype = torch.promote_types(self.dtype, self.target.dtype) if self.dense else self.dtype
        if self.reduction == "none":
            shape = self.target.shape if not self.dense else self._row_shape()
            return loss.reshape(shape).to(dtype)
        total = loss.sum()
        return (total if self.reduction == "sum" else total / divisor).to(dtype)

    def _row_shape(self) -> tuple[int, ...]:
        return tuple(self.input.shape[:1] + self.input.shape[2:]) if self.input.dim() > 1 else ()


def _rows(x: Tensor) -> Tensor:
    """Return logits (or probabilities) as [outer, inner, C]: a view wherever strides allow."""
    if x.dim() == 1:
        return x[None, None, :]
    return x[:, None, :] if x.dim() == 2 else x.flatten(2).transpose(1, 2)


# --- checks: torch's class and first line, then what was expected and what came ---------------------------------------

_DTYPE_NAMES = {
    torch.int64: "Long", torch.int32: "Int", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte",
    torch.bool: "Bool", torch.uint16: "UInt16", torch.uint32: "UInt32", torch.uint64: "UInt64",
    torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float64: "Double",
    torch.complex64: "ComplexFloat", torch.complex128: "ComplexDouble",
    torch.float8_e4m3fn: "Float8_e4m3fn", torch.float8_e5m2: "Float8_e5m2",
}  # fmt: skip


def _dtype_name(tensor: Tensor) -> str:
    return _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))


def _type_name(x: object) -> str:
    module = type(x).__module__
    return type(x).__name__ if module == "builtins" else f"{module}.{type(x).__name__}"


def _check_options(reduction: Any, label_smoothing: Any, ignore_index: Any, bonus: Any) -> None:
    _reduction.get_enum(reduction)  # raises torch's ValueError
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(
            f"cross_entropy_loss(): argument 'ignore_index' (position 5) must be int, not {type(ignore_index).__name__}"
        )
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(
            "cross_entropy_loss(): argument 'label_smoothing' (position 6) must be float, not "
            f"{_type_name(label_smoothing)}"
        )
    if math.isnan(label_smoothing) or not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if bonus is not None and not isinstance(bonus, GapLoss):
        raise TypeError(
            "bonus must be a GapLoss instance such as LogBonus(log_end=0.75), or None for plain cross-entropy, not "
            f"{bonus.__name__ if isinstance(bonus, type) else _type_name(bonus)}"
        )


def _check_tensors(input: Any, target: Any, weight: Any) -> None:
    for name, position, x in (("input", 1, input), ("target", 2, target), ("weight", 3, weight)):
        if not isinstance(x, Tensor) and not (name == "weight" and x is None):
            raise TypeError(
                f"cross_entropy_loss(): argument '{name}' (position {position}) must be Tensor, not {_type_name(x)}"
            )
    if input.layout != torch.strided:
        raise NotImplementedError(f"Could not run 'aten::_log_softmax' with layout {input.layout}; expected strided")
    if input.dtype not in ops.FLOATS:
        raise NotImplementedError(
            f"\"log_softmax_lastdim_kernel_impl\" not implemented for '{_dtype_name(input)}'\n"
            f"Expected input of float16, bfloat16, float32 or float64, got {input.dtype}."
        )
    for name, x in (("target", target), ("weight", weight)):
        if x is not None and x.device != input.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found input on {input.device} and {name} on "
                f"{x.device}"
            )


def _check_dense(target: Tensor, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(
            f"Expected floating point type for target with class probabilities, got {_dtype_name(target)}"
        )
    if ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")


def _check_hard(input: Tensor, target: Tensor) -> None:
    if input.dim() == 0:
        raise RuntimeError(f"Expected input with a class dimension, got shape []; target is {_dtype_name(target)}")
    expected = [*input.shape[:1], *input.shape[2:]] if input.dim() > 1 else []
    came = f"Expected target of shape {expected} for input of shape {list(input.shape)}, got {list(target.shape)}."
    if input.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise RuntimeError(f"0D or 1D target tensor expected, multi-target not supported\n{came}")
    elif input.dim() == 2:
        n_targets = target.shape[0] if target.dim() else 0
        if n_targets != input.shape[0]:
            raise ValueError(
                f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({n_targets}).\n{came}"
            )
        if target.dim() != 1:
            raise RuntimeError(f"0D or 1D target tensor expected, multi-target not supported\n{came}")
    else:
        n_targets = target.shape[0] if target.dim() else 0
        if n_targets != input.shape[0]:
            raise ValueError(
                f"Expected input batch_size ({input.shape[0]}) to match target batch_size ({n_targets}).\n{came}"
            )
        if list(target.shape) != expected:
            if input.dim() == 4:
                first = f"size mismatch (got input: {list(input.shape)} , target: {list(target.shape)}"
                raise RuntimeError(f"{first}\n{came}")
            raise RuntimeError(f"Expected target size {expected}, got {list(target.shape)}\n{came}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {_dtype_name(target)}")


def _check_weight(weight: Tensor | None, input: Tensor, n_classes: int) -> None:
    if weight is None:
        return
    if list(weight.shape) != [n_classes]:
        raise RuntimeError(
            f"weight tensor should be defined either for all {n_classes} classes or no classes but got weight tensor "
            f"of shape: {list(weight.shape)}"
        )
    if weight.dtype != input.dtype:
        raise RuntimeError(f"expected scalar type {_dtype_name(input)} but found {_dtype_name(weight)}")
    if weight.requires_grad:
        raise RuntimeError(
            "The function 'nll_loss_forward' is not differentiable with respect to argument 'weight'. This input "
            "cannot have requires_grad True."
        )


def _choose(requested: str | None, device: torch.device, dense: bool) -> str:
    if requested is None:
        return "torch" if dense else ops.default_implementation(device.type)
    if requested not in ("triton", "torch", "reference"):
        raise ValueError(f"implementation must be None, 'triton', 'torch' or 'reference', got {requested!r}")
    if requested == "triton":
        if dense:
            raise NotImplementedError(
                "implementation='triton' has no kernel for probability targets or label_smoothing > 0 yet; "
                "implementation=None or 'torch' computes them"
            )
        why = ops.why_not_triton(device.type)
        if why is not None:
            raise RuntimeError(f"implementation='triton' cannot run: {why}")
    return requested
