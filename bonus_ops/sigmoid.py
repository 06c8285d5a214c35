"""Losses on a sigmoid, element by element: multi-label classification and detection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import _reduction
from torch.nn.functional import binary_cross_entropy_with_logits

from . import reference
from .binary_scores import BinaryScores
from .call import decide
from .checks import FLOATS, by_keyword, check_gap_loss, check_implementation, check_reduction, raise_as_torch
from .functional import _DEFAULT_BONUS
from .kernels.elements import Elements
from .losses import CrossEntropy, GapLoss
from .number_checks import check_number
from .ops import sigmoid
from .schedules import KeepsEpoch
from .signatures import options_of, takes_what
from .watchers import is_plain_eager, is_transformed

__all__ = [
    "BonusBCEWithLogitsLoss",
    "PositiveCount",
    "binary_difficulty_scores",
    "bonus_binary_cross_entropy_with_logits",
    "bonus_binary_cross_entropy_with_logits_and_scores",
]

_NAME = "bonus_binary_cross_entropy_with_logits"


def bonus_binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
    *,
    bonus: GapLoss | None = _DEFAULT_BONUS,
    alpha: float | None = None,
    normalizer: float | Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute binary cross-entropy with a bonus for well-classified elements, or any other loss of the gap.

    A drop-in for `torch.nn.functional.binary_cross_entropy_with_logits`, whose signature is the prefix of this one;
    with ``bonus=None`` it is that function. A logit x with target 1 has the gap x, with target 0 the gap -x, and
    ``p = sigmoid(gap)`` is the probability of its target, so every loss of the gap is a loss on a sigmoid:

        L = weight (pos_weight t value(x) + (1 - t) value(-x))        dL/dx = -weight pos_weight slope(x)  for t = 1

    Detectors' losses are ``bonus=Focal(gamma)``, `FocalStar`, `HaltedFocal`, `PowerBonus` and `LogBonus` with ``alpha``
    and ``normalizer``; `SquaredError` and `AbsoluteError` are those of ``sigmoid(x) - t``.

    Args: as in torch's function, but for
        input: logits of any shape, float16, bfloat16, float32 or float64, any strides. Not written.
        target: shaped like ``input``, of a floating type, in [0, 1]: 1 positive, 0 negative, between them soft.
        weight, pos_weight: factor of each element, and of its positive share; broadcastable to ``input``.
        bonus: the loss of the gap, a `GapLoss`; None is plain cross-entropy. Default ``LogBonus(log_end=0.5)``.
        alpha: balance in [0, 1]: factor alpha of the positive share, 1 - alpha of the negative one. None: both 1.
        normalizer: what ``"mean"`` divides the sum by, instead of the number of elements: a number > 0 or a 0-d tensor.
            Detectors take the number of positives, see `PositiveCount`.
        implementation: None chooses; ``"triton"``, ``"numba"`` and ``"reference"`` run or raise.

    Returns:
        Loss in nats in the dtype of ``target``, as torch (half types give float32 under autocast): a scalar, or shaped
        like ``input`` for ``"none"``. Differentiable twice in ``input``, once in ``target``. An infinite logit costs
        the limit, where torch's value may be NaN beside a gradient that is this limit's.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: what torch raises for the same fault;
            NotImplementedError also where ``implementation="triton"`` has no kernel for what was asked.

    Example:
        >>> import torch
        >>> from bonus_ops import Focal, bonus_binary_cross_entropy_with_logits
        >>> logits, target = torch.tensor([[2.0, -1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
        >>> bonus_binary_cross_entropy_with_logits(logits, target, bonus=None)
        tensor(0.3778)
        >>> bonus_binary_cross_entropy_with_logits(logits, target, bonus=Focal(2.0), alpha=0.25, normalizer=1.0)
        tensor(0.1474)

    References:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural Networks,
        AAAI 2022, https://arxiv.org/abs/2110.06537, the object-detection experiments.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    check_gap_loss(bonus)
    _check_call(input, target, weight, reduction, pos_weight)
    reduction = "mean" if reduction == "elementwise_mean" else reduction
    divisor = _divisor(normalizer, reduction, input)
    dtype = target.dtype
    if dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    loss = CrossEntropy() if bonus is None else bonus
    of = Elements(input, target, _on(weight, input), _on(pos_weight, input), loss, _scales(alpha))
    implementation = decide(implementation, input, "sigmoid", loss, _only_by_formula(target))
    if reduction == "none":
        return sigmoid.losses(of, dtype, implementation)
    return sigmoid.total(of, divisor, implementation).to(dtype)


@takes_what(bonus_binary_cross_entropy_with_logits)
def bonus_binary_cross_entropy_with_logits_and_scores(
    input: Tensor, target: Tensor, *further: Any, **options: Any
) -> tuple[Tensor, BinaryScores]:
    """Compute `bonus_binary_cross_entropy_with_logits` and the difficulty scores of every element.

    Args and errors: as in `bonus_binary_cross_entropy_with_logits`.

    Returns:
        The loss, and the `BinaryScores` shaped like ``target``, by one more read of logits and target.
    """
    loss = bonus_binary_cross_entropy_with_logits(input, target, *further, **options)
    return loss, _scores(input, target)


def binary_difficulty_scores(input: Tensor, target: Tensor) -> BinaryScores:
    """Compute the difficulty scores of every element of a sigmoid, without a gradient.

    Args and errors: as in `bonus_binary_cross_entropy_with_logits`.

    Returns:
        `BinaryScores` shaped like ``target``, detached.
    """
    _check_call(input, target, None, "none", None)
    return _scores(input, target)


def _scores(input: Tensor, target: Tensor) -> BinaryScores:
    x, t = input.detach().to(torch.float32), target.detach()
    return BinaryScores(torch.where(t.isnan(), t, torch.where(t > 0.5, x, -x)).to(torch.float32))


_KEPT = options_of(bonus_binary_cross_entropy_with_logits, without=("size_average", "reduce"))


class BonusBCEWithLogitsLoss(KeepsEpoch):
    """Binary cross-entropy with a bonus; a drop-in for `torch.nn.BCEWithLogitsLoss`.

    Args: as in `bonus_binary_cross_entropy_with_logits`, without input and target. ``weight`` and ``pos_weight`` are
    buffers, so ``.to()`` moves them. ``normalizer`` may also be given to each call, where it changes by the batch.
    The epoch of a `Scheduled` bonus is in the ``state_dict``; see there.

    Raises:
        TypeError, ValueError: an option of a wrong type or out of range, at once; the rest when called.

    Shape:
        input and target alike, any shape; output a scalar, or that shape for ``reduction="none"``.

    Example:
        >>> import torch
        >>> from bonus_ops import BonusBCEWithLogitsLoss
        >>> BonusBCEWithLogitsLoss(bonus=None)(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.0]))
        tensor(0.2201)
    """

    weight: Tensor | None
    pos_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        bonus: GapLoss | None = _DEFAULT_BONUS,
        alpha: float | None = None,
        normalizer: float | Tensor | None = None,
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        check_reduction(reduction)
        self.reduction = reduction
        for name, x in (("weight", weight), ("pos_weight", pos_weight)):
            if x is not None and not isinstance(x, Tensor):
                came = f"{type(x).__name__}.{by_keyword(x)}"
                raise TypeError(f"BonusBCEWithLogitsLoss: {name} must be a Tensor or None, got {came}")
            self.register_buffer(name, x)
        check_gap_loss(bonus)
        _scales(alpha)
        _check_normalizer(normalizer, reduction)
        check_implementation(implementation)
        self.bonus, self.alpha, self.normalizer, self.implementation = bonus, alpha, normalizer, implementation

    def forward(self, input: Tensor, target: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        """Return the loss of ``input`` against ``target``."""
        options = {name: getattr(self, name) for name in _KEPT}
        if normalizer is not None:
            options["normalizer"] = normalizer
        return bonus_binary_cross_entropy_with_logits(input, target, **options)

    def extra_repr(self) -> str:
        """Return the options that differ between instances."""
        own = {"normalizer": self.normalizer, "implementation": self.implementation}
        given = "".join(f", {name}={x!r}" for name, x in own.items() if x is not None)
        return f"bonus={self.bonus}, alpha={self.alpha}, reduction={self.reduction!r}{given}"


class PositiveCount(nn.Module):
    """Moving average of the number of positives in a batch, what detectors divide their loss by.

    ``average = momentum average + (1 - momentum) max(count, 1)``, updated by each call in training mode. The average
    is a buffer, so checkpoints keep it; nothing waits for the device. Each process counts its own batches; inside a
    `DistributedDataParallel` model all begin a step with the average of rank 0.

    Args:
        momentum: in [0, 1). Default .9.
        initial: average before the first batch, > 0. Default 100.

    Shape:
        target any shape, positive where > 1/2; output the average, a 0-d float32 tensor.

    Raises:
        TypeError, ValueError: momentum or initial is no number, or outside its range.

    Example:
        >>> import torch
        >>> from bonus_ops import PositiveCount
        >>> positives = PositiveCount(momentum=0.9, initial=100.0)
        >>> positives(torch.tensor([1.0, 0.0, 1.0]))
        tensor(90.2000)
    """

    average: Tensor

    def __init__(self, momentum: float = 0.9, initial: float = 100.0) -> None:
        super().__init__()
        check_number("PositiveCount", "momentum", momentum, "[0, 1)")
        check_number("PositiveCount", "initial", initial, "(0, inf)")
        self.momentum = float(momentum)
        self.register_buffer("average", torch.tensor(float(initial), dtype=torch.float32))

    @torch.no_grad()
    def forward(self, target: Tensor) -> Tensor:
        """Count ``target`` into the average and return it."""
        if not isinstance(target, Tensor):
            raise TypeError(f"PositiveCount: target must be a Tensor, got {type(target).__name__}")
        if self.training:
            count = (target > 0.5).sum().clamp(min=1).float()
            # a new tensor: the last one may be awaiting its backward
            self.average = self.average.float() * self.momentum + count * (1 - self.momentum)
        return self.average.float()  # a module made half rounds its buffers

    def extra_repr(self) -> str:
        """Return the momentum."""
        return f"momentum={self.momentum}"


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_call(input: Any, target: Any, weight: Any, reduction: Any, pos_weight: Any) -> None:
    """Raise what torch raises for a wrong type, device, dtype or shape, nothing having been computed."""
    check_reduction(reduction)
    fault = _fault(input, target, weight, pos_weight)
    if fault is None:
        return
    for position, (name, x) in enumerate((("input", input), ("target", target)), 1):
        if hasattr(x, "__array__") and not isinstance(x, Tensor):  # torch stumbles over an attribute of NumPy's
            raise TypeError(
                f"binary_cross_entropy_with_logits(): argument '{name}' (position {position}) must be Tensor, not "
                f"{type(x).__name__}\n{fault}"
            )
    raise_as_torch(
        fault, binary_cross_entropy_with_logits, input, target, weight, reduction=reduction, pos_weight=pos_weight
    )


def _fault(input: Any, target: Any, weight: Any, pos_weight: Any) -> str | None:
    for name, x in (("input", input), ("target", target), ("weight", weight), ("pos_weight", pos_weight)):
        given = name in ("input", "target")
        if x is None and not given:
            continue
        if not isinstance(x, Tensor):
            return f"Expected {name} to be a Tensor, got {type(x).__name__}.{by_keyword(x)}"
        if x.layout != torch.strided:
            return f"Expected {name} to be dense (torch.strided), got {x.layout}."
        if x.dtype not in FLOATS if given else x.is_complex():
            return f"Expected {name} of float16, bfloat16, float32 or float64, got {x.dtype}."
        if x.device != input.device and (given or x.dim() > 0):
            return f"Expected {name} on the device of input, {input.device}, got {x.device}."
        if given and x.shape != input.shape:
            return f"Expected target of the shape of input, {list(input.shape)}, got {list(x.shape)}."
        spread = (n in (1, m) for n, m in zip(reversed(x.shape), reversed(input.shape), strict=False))
        if not given and not (x.dim() <= input.dim() and all(spread)):
            return f"Expected {name} to broadcast to the shape of input, {list(input.shape)}, got {list(x.shape)}."
        if not given and x.requires_grad and torch.is_grad_enabled():
            return f"Expected {name} not to require a gradient."
    return None


def _on(weight: Tensor | None, input: Tensor) -> Tensor | None:
    """Return a weight as kernels read it: floating, on the device of the input (torch takes 0-d ones from anywhere)."""
    if weight is None:
        return None
    dtype = weight.dtype if weight.dtype in FLOATS else reference.accumulation_dtype(input.dtype)
    return weight.to(input.device, dtype)


def _scales(alpha: float | None) -> tuple[float, float]:
    check_number(_NAME, "alpha", alpha, "[0, 1] or None")
    return (1.0, 1.0) if alpha is None else (float(alpha), 1 - float(alpha))


def _check_normalizer(normalizer: Any, reduction: str) -> None:
    if normalizer is None:
        return
    if reduction not in ("mean", "elementwise_mean"):
        raise ValueError(f"normalizer is what reduction='mean' divides by, got it with reduction={reduction!r}")
    if not isinstance(normalizer, Tensor):
        check_number(_NAME, "normalizer", normalizer, "(0, inf) or a 0-d tensor")
    elif normalizer.dim() > 0:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}")
    elif normalizer.device.type == "cpu" and is_plain_eager(normalizer):  # elsewhere a look would wait
        check_number(_NAME, "normalizer", normalizer.item(), "(0, inf)")


def _divisor(normalizer: Any, reduction: str, input: Tensor) -> float | Tensor:
    """Return what the sum of the losses is divided by."""
    _check_normalizer(normalizer, reduction)
    if normalizer is None:
        return float(input.numel()) if reduction == "mean" else 1.0
    return normalizer if isinstance(normalizer, Tensor) else float(normalizer)


def _only_by_formula(target: Tensor) -> str | None:
    """Return what no kernel does of a call, if anything."""
    if target.requires_grad and torch.is_grad_enabled():
        return "the gradient of target"
    return "torch.func and forward mode" if is_transformed() else None
