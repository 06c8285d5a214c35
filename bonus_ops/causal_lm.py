"""The loss of next-token prediction, with the signature that Hugging Face transformers calls.

`causal_lm_loss` takes the place of a model's ``loss_function``, `trainer_loss` is a Trainer's ``compute_loss_func``.
transformers itself is not needed. Options are bound with `functools.partial`.

Two traps of a Trainer. ``TrainingArguments(label_smoothing_factor=...)`` has a loss of its own, which takes the place
of ``model.loss_function``, bonus and all, and is itself ignored next to a ``compute_loss_func``: leave it 0 and bind
``label_smoothing`` here. And some models never ask for their ``loss_function`` (the classification heads of BERT build
an ``nn.CrossEntropyLoss``): setting it does nothing. ``compute_loss_func=partial(trainer_loss, shift=False)`` reaches
every model whose labels are not shifted. `bonus_ops.integrations.transformers` refuses the first and tracks examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
from typing import Any

import torch
from torch import Tensor

from .checks import checked_ignore_index
from .functional import _DEFAULT_BONUS, bonus_cross_entropy, bonus_cross_entropy_with_scores
from .losses import ClassLoss, GapLoss, LogBonus
from .number_checks import check_number
from .scores import Scores
from .signatures import takes_what
from .watchers import constant_when_compiled

__all__ = ["causal_lm_loss", "causal_lm_loss_with_scores", "trainer_loss"]

_CROSS_ENTROPYS = frozenset(inspect.signature(bonus_cross_entropy).parameters)
_FIELDS = frozenset(field.name for field in dataclasses.fields(LogBonus))


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS,
    bonus_smoothing: float | None = None,
    bonus_weight: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    implementation: str | None = None,
    validate: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Compute the loss of predicting token t + 1 from the logits at t; the twin of transformers' ``ForCausalLMLoss``.

    The labels are shifted, not the logits, and the logits are read in their own dtype: no copy of them is made, where
    transformers makes a float32 one. Half-precision logits still give a float32 loss, and a gradient in their dtype.

    Args: as in `bonus_cross_entropy`, but for
        logits: [..., T, V], or [T, V].
        labels: tokens [..., T], int64, aligned with the inputs; unused if ``shift_labels`` is given.
        vocab_size: V, checked if given.
        num_items_in_batch: what the sum of the losses is divided by, such as the tokens of all accumulation steps and
            ranks; None divides by the tokens of this call that are not ignored.
        ignore_index: label that costs nothing.
        shift_labels: labels [..., T] already aligned with the logits, as sequence parallelism needs.
        weight: the weighted sum too is divided by ``num_items_in_batch``, if given, and so is that of ``z_loss``.
        bonus: None is what transformers computes.
        softcap: for a model whose head does not cap its logits itself.
        kwargs: whatever else a model hands its loss; ignored, as by transformers. Names of `bonus_cross_entropy`
            that are not taken here, such as ``reduction``, misspelt options and fields of `LogBonus` raise.

    Returns:
        A scalar in nats, float32, or float64 for float64 logits.

    Raises:
        TypeError: for logits or labels that are no tensors, or an option of `bonus_cross_entropy` not taken here.
        ValueError: for a ``vocab_size`` other than V, or labels that do not fit the logits.
        Otherwise as `bonus_cross_entropy`.

    Example:
        >>> import functools, torch
        >>> from bonus_ops import LogBonus
        >>> from bonus_ops.causal_lm import causal_lm_loss
        >>> logits, labels = torch.zeros(2, 5, 11, dtype=torch.bfloat16), torch.arange(10).view(2, 5)
        >>> causal_lm_loss(logits, labels, vocab_size=11, num_items_in_batch=8, bonus=None)  # log 11
        tensor(2.3979)
        >>> loss_function = functools.partial(causal_lm_loss, bonus=LogBonus(log_end=0.5))  # model.loss_function = ...
    """
    loss: Tensor = _computed(
        bonus_cross_entropy, logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, weight=weight,
        label_smoothing=label_smoothing, bonus=bonus, bonus_smoothing=bonus_smoothing, bonus_weight=bonus_weight,
        logit_scale=logit_scale, softcap=softcap, z_loss=z_loss, implementation=implementation, validate=validate,
        **kwargs,
    )  # fmt: skip
    return _per_item(loss, num_items_in_batch)


@takes_what(causal_lm_loss)
def causal_lm_loss_with_scores(
    logits: Tensor, labels: Tensor | None, vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None, *further: Any, **options: Any,
) -> tuple[Tensor, Scores]:  # fmt: skip
    """Compute `causal_lm_loss` and the difficulty scores of every token from the same pass.

    Args and errors: as in `causal_lm_loss`.

    Returns:
        The loss, and `Scores` shaped like the labels: at t, those of predicting token t + 1. Where that token is
        ignored, and at the last position unless ``shift_labels`` is given, they hold what ignored rows do, NaN. Their
        ``target`` are the shifted labels, so that ``scores.accuracy()`` is right and ``scores.correct(labels)`` not.
    """
    loss, scores = _computed(
        bonus_cross_entropy_with_scores, logits, labels, vocab_size, num_items_in_batch, *further, **options
    )
    tokens = logits.shape[:-1]
    scores = Scores(*(column.view(tokens) for column in scores), target=scores.target.view(tokens))
    return _per_item(loss, num_items_in_batch), scores


def trainer_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, shift: bool = True, **options: Any
) -> Tensor:
    """Compute the loss of a model's outputs: ``Trainer(..., compute_loss_func=trainer_loss)``.

    Args:
        outputs: has ``logits`` as an attribute or a key, or is a tuple whose first member they are (not the loss).
        labels: [..., T], or [N] for ``shift=False`` and logits [N, V].
        num_items_in_batch: as in `causal_lm_loss`; the Trainer gives it.
        shift: whether the label of a position is the token after it; False for masked language models and classifiers.
        options: further options of `causal_lm_loss`, such as ``bonus``, by their names; no others.

    Returns:
        A scalar, as `causal_lm_loss`.

    Raises:
        TypeError: for an option that `causal_lm_loss` does not name.
        ValueError: for a tuple whose first member is a loss, or outputs without logits.
        Otherwise as `causal_lm_loss`.

    Example:
        >>> import functools
        >>> from bonus_ops.causal_lm import trainer_loss
        >>> classify = functools.partial(trainer_loss, shift=False)  # Trainer(..., compute_loss_func=classify)
    """
    if unknown := [name for name in options if name not in _OPTIONS]:
        raise TypeError(
            f"trainer_loss() got an unexpected option {unknown[0]!r}.\nExpected options of causal_lm_loss: "
            f"{', '.join(_OPTIONS)}."
        )
    logits = logits_of(outputs)
    aligned = None if shift else labels
    return causal_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch, shift_labels=aligned, **options)


def logits_of(outputs: Any) -> Any:
    """Return the logits among a model's outputs, as `trainer_loss` finds them; raises as it."""
    if isinstance(outputs, dict):
        if "logits" not in outputs:
            raise ValueError(f"expected outputs with the key 'logits', got the keys {', '.join(map(repr, outputs))}")
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(f"expected outputs with logits, or a tuple that begins with them, got {type(outputs).__name__}")
    if not outputs:
        raise ValueError("expected a tuple that begins with the logits, got an empty one")
    if isinstance(outputs[0], Tensor) and outputs[0].dim() == 0:
        raise ValueError(
            "expected outputs whose first member is the logits [..., V], got a scalar there, as of a model that "
            "has computed a loss: give the members from the logits on"
        )
    return outputs[0]


_OPTIONS = [
    name
    for name, parameter in inspect.signature(causal_lm_loss).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
    and name not in ("logits", "labels", "num_items_in_batch", "shift_labels")
]


def _computed(
    function: Any, logits: Tensor, labels: Tensor | None, vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None, ignore_index: int = -100, shift_labels: Tensor | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Return what a cross-entropy ``function`` says of the shifted labels, before it is divided by a number of items.

    Raises for what is meant for this loss among what a model hands its loss: to ignore it would change the loss.
    """
    for name in [name for name in options if name not in _OPTIONS]:
        if (hint := _meant(name)) is not None:
            raise TypeError(
                f"causal_lm_loss() got an unexpected option {name!r}.{hint}\nExpected options: {', '.join(_OPTIONS)}; "
                "of other names only those unlike these and those of bonus_cross_entropy are ignored."
            )
        del options[name]
    input, target = _aligned(logits, labels, vocab_size, ignore_index, shift_labels)
    reduction = "mean" if num_items_in_batch is None else "sum"
    with _float32_loss(logits):
        return function(input, target, ignore_index=ignore_index, reduction=reduction, **options)


@constant_when_compiled
def _meant(name: str) -> str | None:
    """Return what to say of a name that is meant for this loss, None of any other."""
    if name in _FIELDS:
        return f" It goes into the loss: bonus=LogBonus({name}=...)."
    if close := difflib.get_close_matches(name, inspect.signature(causal_lm_loss).parameters, n=1, cutoff=0.8):
        return f" Did you mean {close[0]!r}?"
    return "" if name in _CROSS_ENTROPYS else None


def _aligned(
    logits: Tensor, labels: Tensor | None, vocab_size: int | None, ignore_index: int, shift_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return input and target of cross-entropy: every position's logits and label, without a copy of the logits."""
    for position, (name, x) in enumerate((("logits", logits), ("labels", labels), ("shift_labels", shift_labels)), 1):
        if not isinstance(x, Tensor) and (x is not None or name == "logits"):
            kind = type(x)
            came = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
            where = "" if name == "shift_labels" else f" (position {position})"
            raise TypeError(f"causal_lm_loss(): argument '{name}'{where} must be Tensor, not {came}")
    if logits.dim() == 0:
        raise ValueError("expected logits [..., V], got shape []")
    if vocab_size is not None and logits.shape[-1] != vocab_size:
        raise ValueError(f"expected logits [..., vocab_size = {vocab_size}], got shape {list(logits.shape)}")
    ignore_index = checked_ignore_index(ignore_index)
    target = shift_labels
    if target is None:
        if labels is None:
            raise ValueError("expected labels or shift_labels, got neither")
        target = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected labels of shape {list(logits.shape[:-1])} for logits of shape {list(logits.shape)}, got "
            f"{list(target.shape)}"
        )
    target = target.to(logits.device)
    if logits.is_contiguous():
        return logits.view(-1, logits.shape[-1]), target.reshape(-1)
    return (logits, target) if logits.dim() < 3 else (logits.movedim(-1, 1), target)  # a slice of a longer sequence


def _float32_loss(logits: Tensor) -> Any:
    """Return a context in which half-precision logits give a float32 loss without being converted: autocast."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    if half and torch.amp.is_autocast_available(logits.device.type):
        return torch.autocast(logits.device.type, dtype=logits.dtype)
    return contextlib.nullcontext()


def _per_item(loss: Tensor, n_items: Tensor | int | None) -> Tensor:
    if n_items is None:
        return loss
    if isinstance(n_items, Tensor):
        return loss / n_items.to(loss.device)
    check_number("causal_lm_loss", "num_items_in_batch", n_items, "[0, inf) or a Tensor")
    return loss / float(n_items)
