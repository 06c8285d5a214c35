"""The public functions of losses on a softmax."""

from __future__ import annotations

from typing import NamedTuple, cast

from torch import Tensor

from .call import Call
from .logit_options import checked_options
from .losses import ClassLoss, GapLoss, LogBonus
from .ops import labels, soft
from .scores import Scores

__all__ = [
    "CrossEntropyWithSoftmax",
    "bonus_cross_entropy",
    "bonus_cross_entropy_with_scores",
    "bonus_cross_entropy_with_softmax",
    "difficulty_scores",
]

_DEFAULT_BONUS = LogBonus()
_WAYS = {"labels": labels.WAYS, "soft": soft.WAYS}  # for each implementation


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    implementation: str | None = None,
    validate: bool = False,
) -> Tensor:
    """Compute cross-entropy with a bonus for well-classified examples.

    A drop-in for `torch.nn.functional.cross_entropy`, whose signature is the prefix of this one; with ``bonus=None``
    it is that function. Where cross-entropy stops teaching (p -> 1), the bonus goes on:

        L = -log p + strength * b(p),        b(p) = log(1 - min(p, LE)) - max(p - LE, 0) / (1 - LE),  LE = log_end

    Models trained with a bonus are surer of what they say, right or wrong: not for probabilities that are used as they
    are. `LogBonus` says which ``log_end`` to take, at what price, and when to take cross-entropy.

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
            ``LogBonus(log_end=0.5)``.
        bonus_smoothing: in [0, 1], a smoothing of the bonus of its own; None is ``label_smoothing``.
        bonus_weight: factor of each class for the bonus alone, [C]; ``mean`` divides the bonus by the number of rows.
            None is ``weight``.
        logit_scale: in (0, inf); the logits are ``logit_scale * input``.
        softcap: in (0, inf), a bound of the logits' size; they are ``softcap * tanh(logit_scale * input / softcap)``.
            None is none. A masked logit of -inf becomes ``-softcap``.
        z_loss: in [0, inf); ``z_loss * logsumexp(logits)^2`` is added to the loss of every row that counts, whatever
            its class weight; of a mean, divided by the number of these rows. `Scores.z_loss` reports it.
        implementation: None chooses; ``"triton"``, ``"numba"`` and ``"reference"`` run or raise.
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
        tensor([[-0.5483,  0.2741,  0.2741]])

    References:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural Networks,
        AAAI 2022, https://arxiv.org/abs/2110.06537.
    """
    options = checked_options(logit_scale, softcap, z_loss)
    call = Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 bonus_smoothing, bonus_weight, options, implementation, validate, False, False)  # fmt: skip
    return _WAYS[call.kind][call.implementation](call).loss


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
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
        >>> scores.hardest(1, by="el2n")
        tensor([1])
    """
    options = checked_options(logit_scale, softcap, z_loss)
    call = Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 bonus_smoothing, bonus_weight, options, implementation, validate, True, False)  # fmt: skip
    out = _WAYS[call.kind][call.implementation](call)
    return out.loss, cast(Scores, out.scores)


class CrossEntropyWithSoftmax(NamedTuple):
    """What `bonus_cross_entropy_with_softmax` returns.

    Attributes:
        loss: in nats, as `bonus_cross_entropy` returns it.
        scores: the `Scores`, shaped like ``target``, detached.
        softmax: probabilities [0, 1] in the shape and dtype of ``input``, detached, 0 where ignored.
    """

    loss: Tensor
    scores: Scores
    softmax: Tensor


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
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    implementation: str | None = None,
    validate: bool = False,
) -> CrossEntropyWithSoftmax:
    """Compute `bonus_cross_entropy_with_scores` and the softmax of the logits.

    Args: as in `bonus_cross_entropy_with_scores`.

    Returns:
        A named tuple of the loss, the `Scores` and the probabilities, see `CrossEntropyWithSoftmax`.

    Raises:
        As `bonus_cross_entropy_with_scores`.

    Example:
        >>> import torch
        >>> from bonus_ops import bonus_cross_entropy_with_softmax
        >>> bonus_cross_entropy_with_softmax(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).softmax
        tensor([[0.8808, 0.1192]])
    """
    options = checked_options(logit_scale, softcap, z_loss)
    call = Call(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, bonus,
                 bonus_smoothing, bonus_weight, options, implementation, validate, True, True)  # fmt: skip
    out = _WAYS[call.kind][call.implementation](call)
    return CrossEntropyWithSoftmax(out.loss, cast(Scores, out.scores), cast(Tensor, out.softmax))


def difficulty_scores(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
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
    options = checked_options(logit_scale, softcap, 0.0)
    call = Call(input.detach() if isinstance(input, Tensor) else input, target, None, None, ignore_index, None,
                "none", 0.0, None, None, None, options, implementation, validate, True, False)  # fmt: skip
    return cast(Scores, _WAYS[call.kind][call.implementation](call).scores)
