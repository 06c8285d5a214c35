"""The loss of a last layer, without its logits."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from .checks import check_bonus, check_implementation, check_reduction, check_validate, checked_label_smoothing
from .functional import _DEFAULT_BONUS
from .linear_call import LinearCall
from .logit_options import checked_options
from .losses import ClassLoss, GapLoss
from .ops import linear
from .scores import Scores
from .signatures import options_of, takes_what

__all__ = [
    "LinearBonusCrossEntropyLoss",
    "LinearScores",
    "linear_bonus_cross_entropy",
    "linear_bonus_cross_entropy_with_scores",
    "linear_difficulty_scores",
]


class LinearScores(Scores):
    """`Scores`, and of every row the norm of the gradient that its loss has for the last layer.

    Attributes:
        last_layer_grad_norm: ``||dL/d(weight, bias)||_F = ||dL/dz||_2 ||(hidden, 1)||_2``, exact, float32, [0, inf);
            higher is harder; NaN where ignored. Of what ``reduction="none"`` returns: with class weights and
            ``row_weight``; of ``"mean"`` with ``weight`` and ``bonus_weight`` the bonus weighs as it does in that.
    """

    last_layer_grad_norm: Tensor

    def __new__(cls, *columns: Tensor, last_layer_grad_norm: Tensor, **named: Any) -> LinearScores:
        scores = super().__new__(cls, *columns, **named)
        scores.last_layer_grad_norm = last_layer_grad_norm
        return scores

    def _beside(self) -> dict[str, Tensor]:
        return {**super()._beside(), "last_layer_grad_norm": self.last_layer_grad_norm}

    @classmethod
    def cat(cls, batches: Iterable[Scores]) -> Scores:
        """Join several batches as `Scores.cat` does; the norms too, where all have them."""
        several = list(batches)
        joined = Scores.cat(several)
        norms = [scores.last_layer_grad_norm for scores in several if isinstance(scores, LinearScores)]
        if len(norms) < len(several):
            return joined
        norm = torch.cat([x if x.dim() else x[None] for x in norms])
        return LinearScores(*joined, target=joined.target, last_layer_grad_norm=norm)


def linear_bonus_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
    bonus_smoothing: float | None = None,
    bonus_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    budget: int | None = None,
    implementation: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Compute `bonus_cross_entropy` of a linear layer's output, without keeping that.

    ``bonus_cross_entropy(linear(input, linear_weight, linear_bias), target)``. The logits, the largest tensor of a
    language model, are made by chunks of rows and turned into gradients while they are in memory: of input, weight and
    bias, in the forward pass, each only where it is required. Names and order are those of
    `torch.nn.functional.linear_cross_entropy`.

    Args: as in `bonus_cross_entropy`, of logits that are the layer's output, but for
        input: what the last layer takes, [..., H], float16, bfloat16, float32 or float64.
        linear_weight: [C, H], dtype of ``input``; it may be tied with an embedding. A DTensor whose classes are spread
            over ranks is served by `vocab_parallel` and the result is the same on each; ``input`` and ``target`` are
            then the same on every rank, plain or DTensors, and ``linear_bias`` is a DTensor.
        target: class indices [...], int64 or uint8.
        linear_bias: [C], or None.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The gradients of ``"none"`` wait for backward, which makes the
            logits a second time, unless ``linear_weight`` and ``linear_bias`` require none: a ``row_weight`` that is
            known in forward, with ``"sum"``, recomputes nothing.
        row_weight: factor of each row's loss, shaped like ``target``; the divisor of ``"mean"`` does not know it.
            Differentiable. It multiplies ``z_loss`` too.
        budget: bytes of logits that may exist at once, at least one row. None is 128 MiB and at most 512 rows on a CPU,
            which was measured to be enough, and 1 GiB elsewhere. Not counted: the gradients, that of a weight in halves
            as float32; 4 MiB of it widened at a time, for halves on a CPU; a few rows of work. Another budget gives the
            same result to rounding, the same budget the same bits.
        implementation: None chooses; ``"triton"``, ``"numba"`` and ``"reference"`` run or raise. The reference makes
            the logits, as do `torch.func`, forward mode and gradients that are differentiated again.

    Returns:
        Loss in nats in the dtype of ``input`` (float32 under autocast): a scalar, or shaped like ``target`` for
        ``"none"``. Sums over rows, the weight's gradient among them, are kept in float32 (float64) and rounded once.

    Raises:
        As `bonus_cross_entropy`; RuntimeError also for sizes of the layer that do not fit, ValueError for a ``budget``
            that does not hold one row.

    Example:
        >>> import torch
        >>> from bonus_ops import linear_bonus_cross_entropy
        >>> hidden, weight = torch.eye(2, 3), torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> linear_bonus_cross_entropy(hidden, weight, torch.tensor([0, 1]), bonus=None)
        tensor(0.2201)

    References:
        As `bonus_cross_entropy`. Chunks: Hsu et al., Liger Kernel, 2024, https://arxiv.org/abs/2410.10989; Wijmans et
        al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025, https://arxiv.org/abs/2411.09009.
    """
    return _computed(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, bonus=bonus, bonus_smoothing=bonus_smoothing,
        bonus_weight=bonus_weight, row_weight=row_weight, logit_scale=logit_scale, softcap=softcap, z_loss=z_loss,
        budget=budget, implementation=implementation, validate=validate,
    ).loss  # fmt: skip


@takes_what(linear_bonus_cross_entropy)
def linear_bonus_cross_entropy_with_scores(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, LinearScores]:
    """Compute `linear_bonus_cross_entropy` and the difficulty scores of every row from the same chunks.

    Args and errors: as in `linear_bonus_cross_entropy`.

    Returns:
        The loss, and `LinearScores` shaped like ``target``: detached, of the plain softmax, NaN where ignored.

    Example:
        >>> import torch
        >>> from bonus_ops import linear_bonus_cross_entropy_with_scores
        >>> hidden, weight = torch.eye(2, 3), torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> _, scores = linear_bonus_cross_entropy_with_scores(hidden, weight, torch.tensor([0, 1]), bonus=None)
        >>> scores.last_layer_grad_norm
        tensor([0.1686, 0.3803])
    """
    loss, scores, norm = _computed(input, linear_weight, target, scores=True, norm=True, **options)
    if _is_dtensor(linear_weight):
        target = cast(Scores, scores).label  # that of all ranks
    return loss, LinearScores(*cast(Scores, scores), target=target, last_layer_grad_norm=cast(Tensor, norm))


def linear_difficulty_scores(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    implementation: str | None = None,
    validate: bool = False,
) -> Scores:
    """Compute the difficulty scores of every row without a gradient, by tiles of classes.

    Args and errors: as in `linear_bonus_cross_entropy`.

    Returns:
        `Scores` shaped like ``target``, detached.
    """
    with torch.no_grad():
        found = _computed(
            input, linear_weight, target, linear_bias=linear_bias, reduction="none", ignore_index=ignore_index,
            bonus=None, logit_scale=logit_scale, softcap=softcap, implementation=implementation, validate=validate,
            scores=True,
        )  # fmt: skip
    return cast(Scores, found.scores)


def _is_dtensor(x: Any) -> bool:
    """Return whether this is a DTensor; who has one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _computed(
    input: Any, linear_weight: Any, target: Any, bonus: Any = _DEFAULT_BONUS, **options: Any
) -> linear.Result:
    """Return what a call asks for, by this process alone or, of a DTensor, by all that hold classes of the layer."""
    if not _is_dtensor(linear_weight):
        return linear.run(LinearCall(input, linear_weight, target, bonus=bonus, n_classes=None, **options))
    from .distributed import by_shards

    implementation = options.pop("implementation", None)
    check_implementation(implementation)
    check_validate(options.pop("validate", False))
    if implementation not in (None, "reference"):
        raise NotImplementedError(f"implementation={implementation!r} does not run for a DTensor; None does")
    return cast(linear.Result, by_shards(input, linear_weight, target, bonus=bonus, **options))


_KEPT = options_of(linear_bonus_cross_entropy)


class LinearBonusCrossEntropyLoss(torch.nn.Module):
    """A last layer and its loss; a twin of `torch.nn.LinearCrossEntropyLoss`.

    ``linear_weight`` [out_features, in_features] and ``linear_bias`` [out_features] are parameters, drawn as those of
    `torch.nn.Linear`. To tie the weight with an embedding, assign it: ``head.linear_weight = embedding.weight``.

    Args: ``in_features``, ``out_features``, ``bias``, ``device`` and ``dtype`` as in `torch.nn.Linear`, the others as
        in `linear_bonus_cross_entropy`. ``weight`` and ``bonus_weight`` are buffers.

    Shape:
        input [..., in_features]; target [...]; output a scalar, or shaped like target for ``reduction="none"``.

    Example:
        >>> import torch
        >>> from bonus_ops import LinearBonusCrossEntropyLoss
        >>> head = LinearBonusCrossEntropyLoss(8, 1000, bias=False)
        >>> head(torch.randn(4, 8), torch.tensor([1, 2, 3, 4])).backward()
        >>> head.linear_weight.grad.shape
        torch.Size([1000, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
        bonus_smoothing: float | None = None,
        bonus_weight: Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        budget: int | None = None,
        implementation: str | None = None,
        validate: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        check_bonus(bonus)
        checked_options(logit_scale, softcap, z_loss)
        self.in_features, self.out_features = in_features, out_features
        options = {"device": device, "dtype": dtype}
        self.linear_weight = torch.nn.Parameter(torch.empty((out_features, in_features), **options))
        self.linear_bias = torch.nn.Parameter(torch.empty(out_features, **options)) if bias else None
        self.register_buffer("weight", weight)
        self.register_buffer("bonus_weight", bonus_weight)
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing = checked_label_smoothing(label_smoothing)
        self.bonus, self.bonus_smoothing = bonus, bonus_smoothing
        self.logit_scale, self.softcap, self.z_loss = logit_scale, softcap, z_loss
        self.budget, self.implementation, self.validate = budget, implementation, validate
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `torch.nn.Linear` does: uniform within ``1 / sqrt(in_features)``."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
        for parameter in (self.linear_weight, self.linear_bias):
            if parameter is not None:
                torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, target: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Return the loss of the layer's logits of ``input`` against ``target``."""
        options: dict[str, Any] = {name: getattr(self, name) for name in _KEPT}
        return linear_bonus_cross_entropy(input, self.linear_weight, target, row_weight=row_weight, **options)

    def extra_repr(self) -> str:
        """Return the sizes and the options that differ between instances."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.linear_bias is not None}, "
            f"bonus={self.bonus}, reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}"
        )
