"""Schedules: a loss whose strength, or any other field, follows the epoch.

A schedule is a function of the epoch that returns a factor: `Linear`, `Exponential`, `Cosine` and `Deferred`, or any
callable ``int -> float`` (pickled only if it can be). `Scheduled` multiplies fields of a loss by such factors. A list
of factors is ``lambda epoch: factors[min(epoch, len(factors) - 1)]``: the `Scheduled.step` after the last epoch of
training asks for one more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .losses import GapLoss, encode
from .number_checks import check_integer, check_number

__all__ = ["Cosine", "Deferred", "Exponential", "Linear", "Scheduled"]

Schedule = Callable[[int], float]

_EPOCH = "bonus.epoch"  # in the state_dict of a module


@dataclass(frozen=True)
class _Ramp:
    """A factor that changes over ``epochs`` and then stays."""

    epochs: int

    def __post_init__(self) -> None:
        check_integer(type(self).__name__, "epochs", self.epochs, 1)

    def __call__(self, epoch: int) -> float:
        return self.factor(min(epoch, self.epochs) / self.epochs)

    def factor(self, progress: float) -> float:
        """Return the factor at ``progress = t / T`` in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} does not define factor(progress)")


@dataclass(frozen=True)
class Linear(_Ramp):
    """The factor ``t / T`` at epoch t, 1 from ``T = epochs`` on.

    Args:
        epochs: T, at least 1.

    Raises:
        TypeError, ValueError: ``epochs`` is no int, or below 1.

    Example:
        >>> from bonus_ops import Linear
        >>> [Linear(epochs=4)(t) for t in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    def factor(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Exponential(_Ramp):
    """An exponential factor, constant from ``T = epochs`` on: late for ``k > 0``, early for ``k < 0``.

        k > 0:  exp(k (t / T - 1)), from exp(-k) to 1
        k < 0:  1 - exp(k t / T), from 0 to 1 - exp(k)

    Args:
        epochs: T, at least 1.
        k: rate, finite and not 0. Default 5, the paper's code's.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    k: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("Exponential", "k", self.k, "(-inf, inf)")
        if self.k == 0:
            raise ValueError(f"Exponential: k must not be 0, got {self.k!r}")

    def factor(self, progress: float) -> float:
        return math.exp(self.k * (progress - 1)) if self.k > 0 else -math.expm1(self.k * progress)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """The factor ``(1 - cos(pi t / T)) / 2``, from 0 to 1, constant from ``T = epochs`` on.

    Args and errors: as in `Linear`.
    """

    def factor(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Deferred:
    """The factor 0 while ``epoch <= until``, then that of another schedule, or 1.

    Args:
        until: the last epoch without, at least 0.
        then: what follows, called with the same epoch; None is the factor 1.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.

    Example:
        >>> from bonus_ops import Deferred, Linear
        >>> [Deferred(1, then=Linear(epochs=4))(t) for t in range(5)]
        [0.0, 0.0, 0.5, 0.75, 1.0]
    """

    until: int
    then: Schedule | None = None

    def __post_init__(self) -> None:
        check_integer("Deferred", "until", self.until, 0)
        if self.then is not None and not callable(self.then):
            raise TypeError(f"Deferred: then must be a schedule or None, got {type(self.then).__name__}")

    def __call__(self, epoch: int) -> float:
        if epoch <= self.until:
            return 0.0
        return 1.0 if self.then is None else self.then(epoch)


class Scheduled(GapLoss):
    """A loss some of whose fields are multiplied by factors of the epoch.

    It goes wherever a loss goes. The epoch starts at 0; `step` after each epoch counts it up, as with
    `torch.optim.lr_scheduler`, and `set_epoch` sets it. An epoch is whatever you count: call `step` after every batch
    and give schedules batches. A new epoch compiles nothing, neither kernels nor a graph of `torch.compile`.

    `BonusCrossEntropyLoss` and `BonusBCEWithLogitsLoss` keep the epoch in their ``state_dict``; with the functions,
    `state_dict` and `load_state_dict` do. A module is often part of a model with checkpoints from before its schedule,
    or from after it: loading one without an epoch, even strictly, is no error and leaves the epoch as it is, and a
    module whose bonus has no schedule drops the epoch of a checkpoint.

    Args:
        loss: the loss at factor 1, a `GapLoss`.
        **schedules: for each scheduled field of ``loss`` a schedule, or any callable from the epoch to a factor:
            ``strength=Cosine(epochs=100)``, ``log_end=Linear(epochs=100)``.

    Raises:
        TypeError: ``loss`` is no `GapLoss`, or a schedule cannot be called or returns no number.
        ValueError: ``loss`` has no such field, or it is None or 0; at any epoch, the field leaves its range: a ramp
            from 0 fits only fields that may be 0.

    Example:
        >>> import torch
        >>> from bonus_ops import BonusCrossEntropyLoss, Linear, LogBonus, Scheduled
        >>> bonus = Scheduled(LogBonus(0.75), strength=Linear(epochs=2))
        >>> criterion = BonusCrossEntropyLoss(bonus=bonus)
        >>> for epoch in range(3):
        ...     print(criterion(torch.tensor([[2.0, 0.0]]), torch.tensor([0])).item())  # train here
        ...     bonus.step()
        0.126...
        -0.827...
        -1.782...

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537. The formulas are those of the paper's code, which differs
        in this: its copies count epochs from 0 or 1 and schedule ``log_end`` only for CIFAR; its translation code never
        moves the epoch on, so that the factor stays 1 / T or the first of a list; its EfficientNet-B0 code never
        sets it, so that linear and cosine leave no bonus and a deferred one never starts; its smoothed bonus ignores
        the schedule. Here the caller counts, and every form of the loss follows.
    """

    def __init__(self, loss: GapLoss, **schedules: Schedule) -> None:
        if not isinstance(loss, GapLoss) or isinstance(loss, Scheduled):
            raise TypeError(f"Scheduled: loss must be a GapLoss such as LogBonus(0.75), got {type(loss).__name__}")
        if not schedules:
            raise ValueError("Scheduled: expected a schedule of a field, such as strength=Cosine(epochs=100), got none")
        names = [field.name for field in dataclasses.fields(loss)]  # type: ignore[arg-type]
        for name, schedule in schedules.items():
            if name not in names or getattr(loss, name) is None:
                raise ValueError(
                    f"Scheduled: {type(loss).__name__} has no number {name!r} to schedule, expected one of "
                    f"{', '.join(n for n in names if getattr(loss, n) is not None)}"
                )
            if getattr(loss, name) == 0:
                raise ValueError(f"Scheduled: {name} of {loss!r} is 0, which no factor changes")
            if not callable(schedule):
                raise TypeError(f"Scheduled: {name} must be a schedule, got {type(schedule).__name__}")
        self.loss = loss
        self.schedules = schedules
        self.set_epoch(0)

    @property
    def epoch(self) -> int:
        """The epoch, from 0."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, an int >= 0; raise and change nothing where a field would leave its range.

        Raises:
            TypeError: the epoch is no int, or a schedule returns no number.
            ValueError: the epoch is negative, or a field would leave its range.
        """
        check_integer("Scheduled", "epoch", epoch, 0)
        factors = {name: schedule(epoch) for name, schedule in self.schedules.items()}
        for name, factor in factors.items():
            check_number("Scheduled", f"what the schedule of {name} returns at epoch {epoch}", factor, "(-inf, inf)")
        fields = {name: getattr(self.loss, name) * factor for name, factor in factors.items()}
        current = dataclasses.replace(self.loss, **fields)  # type: ignore[type-var]
        # a new tensor: a backward that is still to come has kept the old one
        self._epoch, self._current, self._fields = epoch, current, encode(current)[1]

    def step(self) -> None:
        """Go on to the next epoch."""
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, int]:
        """Return what `load_state_dict` needs: the epoch."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to the epoch of a `state_dict`."""
        if not isinstance(state_dict, dict) or "epoch" not in state_dict:
            raise ValueError(f"Scheduled: expected the state {{'epoch': int}}, got {state_dict!r}")
        self.set_epoch(state_dict["epoch"])

    @property
    def current(self) -> GapLoss:
        """The loss of this epoch."""
        return self._current

    @property
    def kernel(self) -> Any:
        """The kernel pair of the loss."""
        return self.loss.kernel

    @property
    def adds_to_cross_entropy(self) -> bool:  # type: ignore[override]
        """What the loss says."""
        return self.loss.adds_to_cross_entropy

    def value(self, gap: Tensor) -> Tensor:
        return self._current.value(gap)

    def excess(self, gap: Tensor) -> Tensor:
        return self._current.excess(gap)

    def slope(self, gap: Tensor) -> Tensor:
        return self._current.slope(gap)

    def parameters(self) -> tuple[float, ...]:
        return self._current.parameters()

    def _encoded(self) -> tuple[str, Tensor]:
        return self.loss._name, self._fields

    def __repr__(self) -> str:
        schedules = "".join(f", {name}={schedule!r}" for name, schedule in self.schedules.items())
        return f"Scheduled({self.loss!r}{schedules}, epoch={self.epoch})"


class KeepsEpoch(nn.Module):
    """A module whose ``state_dict`` has the epoch of its bonus, where that is `Scheduled`."""

    bonus: Any

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.bonus, Scheduled):
            destination[prefix + _EPOCH] = torch.tensor(self.bonus.epoch, device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *reported: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *reported)
        _metadata, _strict, _missing_keys, unexpected_keys, _messages = reported
        key = prefix + _EPOCH
        unexpected_keys[:] = [x for x in unexpected_keys if x != key]
        if key in state_dict and isinstance(self.bonus, Scheduled):
            saved = state_dict[key]
            epoch: Any = saved.item() if isinstance(saved, Tensor) else saved
            self.bonus.set_epoch(epoch)
