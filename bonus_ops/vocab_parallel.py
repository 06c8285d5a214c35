"""Losses on a softmax whose classes are spread over the ranks of a group, as tensor-parallel output layers leave them.

Every rank holds its own classes of the logits, or of the last layer, and the same target. What travels is a few floats
a row, in one all-gather; no logit does. All ranks must make the same calls with the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .call import Call
from .checks import check_validate
from .functional import _DEFAULT_BONUS
from .linear import LinearScores
from .linear_call import LinearCall
from .logit_options import checked_options
from .losses import ClassLoss, GapLoss
from .ops import shards
from .ops import vocab_parallel as ops
from .ops.shards import Facts
from .reference import check_target
from .scores import Scores
from .signatures import takes_what
from .watchers import is_transformed

__all__ = [
    "bonus_cross_entropy",
    "bonus_cross_entropy_with_scores",
    "linear_bonus_cross_entropy",
    "linear_bonus_cross_entropy_with_scores",
]


def bonus_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: Any,
    class_range: tuple[int, int] | None = None,
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
    validate: bool = False,
) -> Tensor:
    """Compute `bonus_ops.bonus_cross_entropy` of logits whose classes are spread over the ranks of ``group``.

    With ``rest`` all classes but the label, of all ranks,

        gap = z_y - logsumexp(rest)      L = value(gap)      dL/dz_y = -A      dL/dz_k = A exp(z_k - logsumexp(rest))

    One all-gather in forward carries 12 bytes a row of every rank (24 with scores, 4 more with smoothing; twice that
    for float64); backward sends nothing. A bonus that is smoothed depends on every probability, as a `ClassLoss` does,
    which the ranks know when the first has come: it takes 8 bytes a row more (4 with scores) and a second all-gather of
    8. The loss has the same bits on every rank.

    Args: as in `bonus_ops.bonus_cross_entropy`, but for
        input: logits of this rank's classes, [C_local], [N, C_local] or [N, C_local, d1, ...], float16, bfloat16,
            float32 or float64. A rank may have none. The same rows on every rank.
        target: class indices [N, d1, ...] among all classes, int64 or uint8, the same on every rank.
        group: the process group, None for all processes.
        class_range: ``(first, stop)``, which classes ``input`` holds. The ranges of the ranks hold every class once, in
            any order and of any size. None: equal shards in the order of the ranks.
        weight: factor of each class, [C] of all ranks, the same on every rank, dtype of ``input``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``; over rows: every rank returns the whole loss.
        bonus_smoothing: None is ``label_smoothing``; 0 spares the second all-gather.
        bonus_weight: factor of each class's bonus, [C] of all ranks, the same on every rank.
        validate: first ask all ranks what their arguments are, by a small all-gather, and raise on all of them where a
            single one is at fault or has other rows; on a GPU also wait, and raise for labels out of range and class
            ranges that do not fit, which otherwise make rows NaN. A CPU always raises for these, on every rank.

    Returns:
        Loss in nats in the dtype of ``input`` (float32 under autocast), the same on every rank: a scalar, or shaped
        like ``target`` for ``"none"``. The gradient is that of this rank's logits, for an upstream gradient that is
        the same on every rank.

    Raises:
        As `bonus_ops.bonus_cross_entropy`.
        ValueError: the class ranges overlap, leave out a class or do not fit the shards; on every rank.
        IndexError: a label of no class; on every rank.
        NotImplementedError: probabilities as target; `torch.func` and forward mode. RuntimeError for a second
            derivative.

    Example:
        >>> import torch.distributed as dist
        >>> from bonus_ops import vocab_parallel
        >>> logits = hidden @ weight_of_this_rank.T  # doctest: +SKIP
        >>> vocab_parallel.bonus_cross_entropy(logits, target, group=dist.group.WORLD).backward()  # doctest: +SKIP

    References:
        Shoeybi et al., Megatron-LM, 2019, https://arxiv.org/abs/1909.08053, section 3: parallel cross-entropy.
    """
    return _of_logits(
        input, target, False, group=group, class_range=class_range, weight=weight, reduction=reduction,
        ignore_index=ignore_index, label_smoothing=label_smoothing, bonus=bonus, bonus_smoothing=bonus_smoothing,
        bonus_weight=bonus_weight, logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, validate=validate,
    )[0]  # fmt: skip


@takes_what(bonus_cross_entropy)
def bonus_cross_entropy_with_scores(input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Scores]:
    """Compute `bonus_cross_entropy` of spread classes and the difficulty scores of every row, from one all-gather.

    Args and errors: as in `bonus_cross_entropy`.

    Returns:
        The loss, and `Scores` shaped like ``target``, of all classes: detached, the same bits on every rank, NaN where
        ignored. ``runner_up`` counts classes as ``target`` does.
    """
    loss, scores = _of_logits(input, target, True, **options)
    return loss, cast(Scores, scores)


def linear_bonus_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: Any,
    class_range: tuple[int, int] | None = None,
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
    reduce_input_grad: bool = True,
    budget: int | None = None,
) -> Tensor:
    """Compute `bonus_ops.linear_bonus_cross_entropy` of a last layer whose classes are spread over ``group``.

    As `bonus_cross_entropy` of ``linear(input, linear_weight, linear_bias)``, by chunks of rows whose logits become
    gradients in the forward pass. One all-gather of a few bytes before any product finds what does not fit, one a chunk
    carries the sums of its rows while the next chunk's logits are made, and one all-reduce adds up the gradient of
    ``input``: in forward, or in backward for ``reduction="none"``. A smoothed bonus, or a `ClassLoss`, takes a second
    all-gather a chunk, which nothing overlaps.

    Args: as in `bonus_cross_entropy` and `bonus_ops.linear_bonus_cross_entropy`, but for
        input: what the last layer takes, [..., H], the same on every rank.
        linear_weight: [C_local, H], this rank's classes, dtype of ``input``. A rank may have none.
        target: class indices [...] among all classes, the same on every rank.
        linear_bias: [C_local], or None.
        row_weight: factor of each row's loss, the same on every rank.
        reduce_input_grad: add up the gradient of ``input`` over the ranks. False leaves each with the share of its
            classes, for a caller who adds up elsewhere, by a reduce-scatter say.
        budget: two chunks share it. The rank with the least room decides how many rows a chunk has.

    Returns:
        Loss in nats in the dtype of ``input`` (float32 under autocast), the same bits on every rank: a scalar, or
        shaped like ``target`` for ``"none"``. Gradients are of ``input`` and of this rank's weight and bias.

    Raises:
        As these; where one rank finds a fault in its own arguments, the others raise RuntimeError.

    Example:
        >>> from bonus_ops import vocab_parallel
        >>> loss = vocab_parallel.linear_bonus_cross_entropy(
        ...     hidden, weight_of_this_rank, target, group=None, class_range=(first, stop)
        ... )  # doctest: +SKIP
    """
    return of_layer(
        input, linear_weight, target, group=group, class_range=class_range, linear_bias=linear_bias, weight=weight,
        reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing, bonus=bonus,
        bonus_smoothing=bonus_smoothing, bonus_weight=bonus_weight, row_weight=row_weight, logit_scale=logit_scale,
        softcap=softcap, z_loss=z_loss, reduce_input_grad=reduce_input_grad, budget=budget,
    ).loss  # fmt: skip


@takes_what(linear_bonus_cross_entropy)
def linear_bonus_cross_entropy_with_scores(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, LinearScores]:
    """Compute `linear_bonus_cross_entropy` of spread classes and the difficulty scores of every row.

    Args and errors: as in `linear_bonus_cross_entropy`.

    Returns:
        The loss, and `LinearScores` shaped like ``target``, of all classes: detached, the same bits on every rank, NaN
        where ignored. Smoothing and softcap cost an all-reduce of a float a row, for ``last_layer_grad_norm``.
    """
    loss, scores, norm = of_layer(input, linear_weight, target, scores=True, norm=True, **options)
    return loss, LinearScores(*cast(Scores, scores), target=target, last_layer_grad_norm=cast(Tensor, norm))


# --- checks, and what ranks agree on before they compute --------------------------------------------------------------


_Checked = tuple[Any, shards.Shard, Tensor]  # call, shard, facts


def _of_logits(
    input: Any, target: Any, scores: bool, *, group: Any, class_range: Any = None, weight: Any = None,
    reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0, bonus: Any = _DEFAULT_BONUS,
    bonus_smoothing: float | None = None, bonus_weight: Any = None, logit_scale: float = 1.0,
    softcap: float | None = None, z_loss: float = 0.0, validate: bool = False,
) -> tuple[Tensor, Scores | None]:  # fmt: skip
    _check_alone()
    check_validate(validate)
    n_ranks = shards.ranks_of(group)

    def checked() -> _Checked:
        n_weights = _checked_weights(target, weight, bonus_weight)
        logits, n_local = input, 0
        if isinstance(input, Tensor) and input.dim():
            axis = min(input.dim() - 1, 1)
            n_local = input.shape[axis]
            # what the logits of all ranks would be, as far as checks can see: one number of memory
            shape = list(input.shape)
            shape[axis] = n_weights or n_local * n_ranks
            logits = input.new_empty(()).expand(shape)
        call = Call(
            logits, target, weight, None, ignore_index, None, reduction, label_smoothing, bonus, bonus_smoothing,
            bonus_weight, checked_options(logit_scale, softcap, z_loss), "reference", False, scores, False,
        )  # fmt: skip
        shard = shards.shard_of(group, class_range, n_local)
        return call, shard, shards.facts_of(shard, n_local, call.target)

    call, shard, _ = _agreed(group, input, checked)[0] if validate else checked()
    return ops.run(call, input, shard, validate)


def of_layer(
    input: Any, linear_weight: Any, target: Any, *, group: Any, class_range: Any = None, weight: Any = None,
    bonus: Any = _DEFAULT_BONUS, bonus_weight: Any = None, reduce_input_grad: bool = True, **options: Any,
) -> ops.LinearResult:  # fmt: skip
    """Return what `linear_bonus_cross_entropy` and its twin ask for; ``options`` are those of `LinearCall`."""
    _check_alone()
    shards.ranks_of(group)

    def checked() -> _Checked:
        n_weights = _checked_weights(target, weight, bonus_weight)
        call = LinearCall(input, linear_weight, target, weight=weight, bonus=bonus, bonus_weight=bonus_weight,
                          implementation="reference", n_classes=n_weights, **options)  # fmt: skip
        shard = shards.shard_of(group, class_range, len(linear_weight))
        return call, shard, shards.facts_of(shard, len(linear_weight), call.target, ops.chunk_rows(call))

    (call, shard, _), facts = _agreed(group, input, checked)
    n_classes = int((facts.stop - facts.first).sum())
    if call.input.device.type == "cpu":
        check_target(call.target, n_classes, call.ignore_index)
    return ops.run_linear(call, shard, n_classes, int(facts.chunk_rows.min()), reduce_input_grad)


def _check_alone() -> None:
    """Raise, before any exchange, where a compiler or a transform watches, which all ranks have alike."""
    if torch.compiler.is_compiling():
        raise NotImplementedError("classes spread over ranks: call it outside of torch.compile")
    if is_transformed():
        raise NotImplementedError("classes spread over ranks: no rule for torch.func, vmap and forward mode")


def _checked_weights(target: Any, weight: Any, bonus_weight: Any) -> int | None:
    """Return how many classes there are, where class weights tell; raise for what is not done at all."""
    if isinstance(target, Tensor) and target.is_floating_point():
        raise NotImplementedError(
            f"classes spread over ranks: expected class indices as target, got probabilities of {target.dtype}"
        )
    given = [(name, x) for name, x in (("weight", weight), ("bonus_weight", bonus_weight)) if x is not None]
    for name, x in given:
        if not (isinstance(x, Tensor) and x.dim() == 1):
            came = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(f"expected {name} of shape [C], one number for each class of all ranks, got {came}")
    return len(given[0][1]) if given else None


def _agreed(group: Any, input: Any, checked: Callable[[], _Checked]) -> tuple[_Checked, Facts]:
    """Return what ``checked`` returns and the facts of all ranks; raise on all where a rank raises."""
    try:
        mine = checked()
    except Exception:
        shards.facts_of_all(group, None, input.device if isinstance(input, Tensor) else torch.device("cpu"))
        raise
    facts = shards.facts_of_all(group, mine[2], mine[2].device)
    given = [x for x in (mine[0].weight, mine[0].bonus_weight) if x is not None]
    shards.check_facts(facts, len(given[0]) if given else None)
    return mine, facts
