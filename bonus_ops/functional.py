"""The public functions: check, choose an implementation, reduce."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import _reduction

from . import reference
from .autograd import labels as autograd
from .autograd.shares import share_rows
from .checks import (
    check_bonus,
    check_call,
    check_shares,
    check_validate,
    checked_bonus_smoothing,
    checked_ignore_index,
    checked_label_smoothing,
)
from .losses import ClassLoss, CrossEntropy, GapLoss, LogBonus, Loss
from .operators.implementation import chosen, why_not_triton
from .operators.shares import has_terms
from .scores import Scores
from .shares import Shares
from .watchers import is_plain_eager

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
    bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
    bonus_smoothing: float | None = None,
    bonus_weight: Tensor | None = None,
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
        label_smoothing: a in [0, 1]; cross-entropy is paid by shares ``(1 - a) onehot + a / C``, and the bonus too.
        bonus: the loss of the gap, a `GapLoss`, or a `ClassLoss` of all classes; None is plain cross-entropy. Default
            ``LogBonus(log_end=0.75)``.
        bonus_smoothing: in [0, 1], a smoothing of the bonus of its own; None is ``label_smoothing``.
        bonus_weight: factor of each class for the bonus alone, [C]; ``mean`` divides the bonus by the number of rows.
            None is ``weight``.
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
        tensor([[-0.8836,  0.4418,  0.4418]])

    References:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural Networks,
        AAAI 2022, https://arxiv.org/abs/2110.06537.
    """
    call = _Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 bonus_smoothing, bonus_weight, implementation, validate)  # fmt: skip
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
    bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
    bonus_smoothing: float | None = None,
    bonus_weight: Tensor | None = None,
    implementation: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Scores]:
    """Compute `bonus_cross_entropy` and the difficulty scores of every example from the same pass.

    Args: as in `bonus_cross_entropy`. The label of probabilities is their largest, the lowest index on ties.

    Returns:
        The loss, and `Scores` shaped like ``target``: detached, of the plain softmax, NaN where ignored.

    Raises:
        As `bonus_cross_entropy`.

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
                 bonus_smoothing, bonus_weight, implementation, validate)  # fmt: skip
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
    bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
    bonus_smoothing: float | None = None,
    bonus_weight: Tensor | None = None,
    implementation: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, Scores, Tensor]:
    """Compute `bonus_cross_entropy_with_scores` and the softmax of the logits.

    Args: as in `bonus_cross_entropy_with_scores`.

    Returns:
        The loss, the `Scores`, and the probabilities: shape and dtype of ``input``, detached, 0 where ignored.

    Raises:
        As `bonus_cross_entropy_with_scores`.

    Example:
        >>> import torch
        >>> from bonus_ops import bonus_cross_entropy_with_softmax
        >>> bonus_cross_entropy_with_softmax(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))[2]
        tensor([[0.8808, 0.1192]])
    """
    call = _Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 bonus_smoothing, bonus_weight, implementation, validate)  # fmt: skip
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

    Example:
        >>> import torch
        >>> from bonus_ops import difficulty_scores
        >>> scores = difficulty_scores(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([0, -100]))
        >>> scores.el2n
        tensor([0.1686,    nan])
    """
    call = _Call(input.detach() if isinstance(input, Tensor) else input, target, None, None, ignore_index, None,
                 "none", 0.0, None, None, None, implementation, validate)  # fmt: skip
    scores: Scores = call.loss(scores=True, softmax=False)[1]
    return scores


class _Call:
    """The checked arguments of one call."""

    def __init__(
        self, input: Tensor, target: Tensor, weight: Tensor | None, size_average: bool | None, ignore_index: int,
        reduce: bool | None, reduction: str, label_smoothing: float,
        bonus: GapLoss | ClassLoss | None, bonus_smoothing: float | None, bonus_weight: Tensor | None,
        implementation: str | None, validate: bool,
    ) -> None:  # fmt: skip
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        check_bonus(bonus)
        check_validate(validate)
        self.bonus: Loss = CrossEntropy() if bonus is None else bonus
        self.ignore_index = checked_ignore_index(ignore_index)
        self.label_smoothing = checked_label_smoothing(label_smoothing)
        self.bonus_smoothing = checked_bonus_smoothing(bonus_smoothing, self.label_smoothing)
        autocast = isinstance(input, Tensor) and input.device.type != "meta"
        autocast = autocast and torch.is_autocast_enabled(input.device.type)
        if autocast and isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16):
            weight = weight.to(torch.float32)
        check_call(input, target, weight, self.ignore_index, reduction, self.label_smoothing, autocast)
        check_shares(input, self.bonus, weight, bonus_smoothing, bonus_weight)
        self.input, self.target, self.weight, self.bonus_weight = input, target, weight, bonus_weight
        self.reduction = "mean" if reduction == "elementwise_mean" else reduction
        self.dense = input.shape == target.shape
        if not self.dense:
            self.target = target.to(torch.int64)  # comparisons with a uint8 would wrap
        self.n_classes = input.shape[0] if input.dim() == 1 else input.shape[1]
        self.row_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
        self.requested = implementation
        self.implementation = self._choose(implementation)
        if not self.dense and (validate or (input.device.type == "cpu" and input.numel() == 0)):
            reference.check_target(self.target, self.n_classes, self.ignore_index)
        half = input.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if half and autocast else input.dtype

    def _is_hard(self) -> bool:
        """Return whether the target is one label a row, with one weight for all of the loss."""
        smooth = self.label_smoothing > 0 or self.bonus_smoothing > 0
        return isinstance(self.bonus, GapLoss) and not (self.dense or smooth or self.bonus_weight is not None)

    def _choose(self, requested: str | None) -> str:
        if self._is_hard():
            return chosen(requested, self.input.device, self.bonus.kernel is not None)
        known = why_not_triton(self.input.device.type) is not None or has_terms(self.bonus)
        if requested == "triton" and not known:
            raise NotImplementedError(
                f"implementation='triton' has no kernel for {type(self.bonus).__name__} with targets that are shares "
                "of classes.\nExpected a loss of bonus_ops; None or 'torch' computes any by its formulas."
            )
        return chosen(requested, self.input.device, known)

    def loss(self, scores: bool, softmax: bool) -> tuple[Tensor, Any, Any]:
        """Return (loss, Scores or None, probabilities or None)."""
        return self._hard_loss(scores, softmax) if self._is_hard() else self._share_loss(scores, softmax)

    def _hard_loss(self, scores: bool, softmax: bool) -> tuple[Any, Any, Any]:
        bonus = cast(GapLoss, self.bonus)
        if self._mean_by_kernels(softmax):
            if self.input.device.type == "cpu":
                reference.check_target(self.target, self.n_classes, self.ignore_index)
            asked = (self.ignore_index, bonus.current, scores, self.dtype)
            made: Any = autograd.MeanByKernels.apply(self.input, self.target, *asked)  # type: ignore[no-untyped-call]
            if not scores:
                return made, None, None
            mean, columns, runner_up = made
            return mean, Scores(*(c.view(self.row_shape) for c in (*columns, runner_up))), None
        logits = _rows(self.input)
        target = self.target.reshape(logits.shape[:2])
        row_weight = self._row_weight(target)
        divisor = self._divisor(target, row_weight) if self.reduction == "mean" else None
        if self.implementation == "reference":
            loss, columns, probabilities = self._reference(logits, target, bonus, scores, softmax)
            if self.reduction != "none":
                loss = autograd.reduced(loss, row_weight, divisor)
        else:
            options = (self.ignore_index, bonus, scores, softmax, self.implementation)
            if self.reduction == "none":
                out = autograd.rows(logits, target, *options)
            else:
                out = autograd.reduced_rows(logits, target, row_weight, divisor, *options)
            loss, probabilities = out.loss, out.softmax
            columns = Scores(*(c.view(self.row_shape) for c in (*out.scores, out.runner_up))) if scores else None
        if self.reduction == "none":
            loss = (loss if row_weight is None else loss * row_weight).view(self.row_shape)
        if softmax:
            probabilities = self._unrows(probabilities)
        return loss.to(self.dtype), columns, probabilities

    def _mean_by_kernels(self, softmax: bool) -> bool:
        """Return whether nobody but the tape watches a plain mean of rows by kernels."""
        plain = self.implementation == "triton" and self.reduction == "mean" and self.weight is None and not softmax
        return plain and self.input.dim() > 1 and is_plain_eager(self.input)

    def _reference(
        self, logits: Tensor, target: Tensor, bonus: GapLoss, scores: bool, softmax: bool
    ) -> tuple[Any, Any, Any]:
        if self.input.device.type == "cpu":
            reference.check_target(target, self.n_classes, self.ignore_index)
        loss = reference.rows(logits, target, self.ignore_index, bonus).reshape(-1)
        columns = reference.scores(logits, target, self.ignore_index) if scores else None
        if columns is not None:
            columns = Scores(*(c.reshape(self.row_shape) for c in columns))
        return loss, columns, reference.softmax(logits.detach(), target, self.ignore_index) if softmax else None

    def _unrows(self, x: Tensor) -> Tensor:
        if self.input.dim() == 1:
            return x[0, 0]
        return x[:, 0] if self.input.dim() == 2 else x.transpose(1, 2).reshape(self.input.shape)

    def _row_weight(self, target: Tensor) -> Tensor | None:
        """Return the class weight of every row [N], 0 where ignored or out of range."""
        if self.weight is None:
            return None
        target = target.reshape(-1)
        inside = (target >= 0) & (target < self.n_classes) & (target != self.ignore_index)
        weight = self.weight.to(reference.accumulation_dtype(self.weight.dtype))
        return torch.where(inside, weight[torch.where(inside, target, 0)], 0.0)

    def _divisor(self, target: Tensor, row_weight: Tensor | None) -> Tensor:
        """Return what the mean divides by: the weight in use, or the number of rows not ignored."""
        if row_weight is not None:
            return row_weight.sum()
        return (target != self.ignore_index).sum().to(reference.accumulation_dtype(self.input.dtype))

    def _share_loss(self, scores: bool, softmax: bool) -> tuple[Any, Any, Any]:
        logits = _rows(self.input)
        label, given, dtype = None, None, self.dtype
        bonus_weight = self.bonus_weight
        if self.dense:
            given = _rows(self.target)
            divisor = torch.full((), logits.shape[0] * logits.shape[1], device=logits.device)
            for other in (self.target, self.weight, self.bonus_weight):
                dtype = dtype if other is None else torch.promote_types(dtype, other.dtype)
        else:
            label = self.target.reshape(logits.shape[:2])
            divisor = self._divisor(label, self._row_weight(label))
            if self.bonus_weight is not None and self.reduction == "mean" and self.weight is not None:
                # a weighted cross-entropy is divided by its weights, the bonus by the number of rows
                bonus_weight = self.bonus_weight * (divisor / self._divisor(label, None))
        if isinstance(self.bonus, ClassLoss):
            divisor = divisor * self.n_classes  # a mean over classes too
        shares = Shares(given, self.weight, bonus_weight, self.label_smoothing, self.bonus_smoothing)
        out = share_rows(
            logits, label, self.ignore_index, self.bonus, shares, scores, divisor if self.reduction == "mean" else None,
            self.reduction != "none", self.implementation,
        )  # fmt: skip
        loss = out.loss if self.reduction != "none" else out.loss.view(self.row_shape)
        if isinstance(self.bonus, ClassLoss) and self.reduction != "mean":
            loss = loss / self.n_classes
        columns = None
        if scores and out.scores is not None and out.runner_up is not None:
            columns = Scores(*(c.view(self.row_shape) for c in (*out.scores, out.runner_up)))
        return loss.to(dtype), columns, self._softmax(logits, label) if softmax else None

    def _softmax(self, logits: Tensor, label: Tensor | None) -> Tensor:
        """Return the probabilities of the logits, detached, by a sweep of their own."""
        if label is None:
            label = logits.new_zeros(logits.shape[:2], dtype=torch.int64)
        plain = (self.ignore_index, CrossEntropy(), False, True)
        if self.implementation == "reference":
            return self._unrows(reference.softmax(logits.detach(), label, self.ignore_index))
        return self._unrows(autograd.rows(logits.detach(), label, *plain, self.implementation).softmax)


def _rows(x: Tensor) -> Tensor:
    """Return logits (or probabilities) as [outer, inner, C]: a view wherever strides allow."""
    if x.dim() == 1:
        return x[None, None, :]
    return x[:, None, :] if x.dim() == 2 else x.flatten(2).transpose(1, 2)
