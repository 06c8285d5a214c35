"""What a loss is: of the gap alone or of all classes; and how an operator carries it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..number_checks import check_number

__all__ = ["GapLoss", "Loss", "decode", "encode"]

_CLASSES: dict[str, type[Loss]] = {}
_FORMULAS = {"value", "slope", "excess", "excess_slope", "class_value", "bonus", "bonus_slope", "class_bonus", "error"}


class Loss:
    """A classification loss: a frozen dataclass whose fields are numbers or None.

    What every loss can do is serve targets that are shares of classes (smoothed labels, probabilities): each class
    pays by its share, see `class_value`.
    """

    #: Two ``@triton.jit`` functions, the stem of such a pair in ``kernels/``, or None.
    kernel: ClassVar[Any] = None
    #: Whether the loss is cross-entropy plus something, whose shares may then differ.
    adds_to_cross_entropy: ClassVar[bool] = False
    _name: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.kernel is not None and "kernel" not in vars(cls) and (own := sorted(_FORMULAS & vars(cls).keys())):
            parent = next(base for base in cls.__mro__ if "kernel" in vars(base))
            raise TypeError(
                f"{cls.__name__} defines {' and '.join(own)}, but would run the kernel of {parent.__name__}, which "
                "knows nothing of it.\nExpected a subclass of GapLoss that defines value and slope."
            )
        # numbered: a class defined again, in a notebook say, must not take the place of one still in use
        cls._name = f"{cls.__module__}.{cls.__qualname__}#{len(_CLASSES)}"
        _CLASSES[cls._name] = cls

    def check_fields(self, **expected: str) -> None:
        """Raise unless each field named is a number as expected, see `number_checks.check_number`."""
        for name, interval in expected.items():
            check_number(type(self).__name__, name, getattr(self, name), interval)

    def is_cross_entropy(self) -> bool:
        """Return whether nothing is added to plain cross-entropy."""
        return False

    def parameters(self) -> tuple[float, ...]:
        """Return the numbers handed to the kernel pair at run time; by default the fields in order."""
        return tuple(self._numbers()) or (0.0,)

    @property
    def current(self) -> Any:
        """The loss whose numbers are fixed: itself, or what a schedule makes of it now."""
        return self

    def _encoded(self) -> tuple[str, Tensor]:
        return self._name, torch.tensor(self._numbers(), dtype=torch.float64, device="cpu")

    def _numbers(self) -> list[float]:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return [math.nan if x is None else float(x) for x in values]

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        """Return what a class of probability ``p = 1 - rest`` costs for its ``share`` of the target.

        Cross-entropy itself is left out where the loss adds to it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define class_value(p, rest, log_p, share)")


class GapLoss(Loss):
    """A loss that is a scalar function of the gap ``z_y - logsumexp(z_k, k != y)``, so of ``p = sigmoid(gap)``.

    A loss of your own is a frozen dataclass of numbers with two formulas; for the GPU `kernel` is a pair of
    ``@triton.jit`` functions ``(gap, params) -> tensor``, fed by `parameters`. Without it the formulas run.
    `check_loss` tells whether the formulas belong together: a slope of the wrong sign trains the wrong way in silence.

    Raises:
        NotImplementedError: when called without a formula it needs.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from bonus_ops import GapLoss, bonus_cross_entropy
        >>> @dataclass(frozen=True)
        ... class Square(GapLoss):
        ...     scale: float = 1.0
        ...     def value(self, gap):
        ...         return self.scale * torch.sigmoid(-gap) ** 2
        ...     def slope(self, gap):  # -d value / d gap
        ...         return 2 * self.scale * torch.sigmoid(gap) * torch.sigmoid(-gap) ** 2
        >>> bonus_cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), bonus=Square(scale=100.0))
        tensor(1.4209)
    """

    def value(self, gap: Tensor) -> Tensor:
        """Return the loss in nats, shaped like ``gap``."""
        raise NotImplementedError(f"{type(self).__name__} does not define value(gap)")

    def slope(self, gap: Tensor) -> Tensor:
        """Return ``A = -d value / d gap``, shaped like ``gap``."""
        raise NotImplementedError(f"{type(self).__name__} does not define slope(gap)")

    def excess(self, gap: Tensor) -> Tensor:
        """Return ``value``, less cross-entropy where the loss adds to it."""
        return self.value(gap)

    def excess_slope(self, gap: Tensor) -> Tensor:
        """Return ``-d excess / d gap``."""
        return self.slope(gap) - torch.sigmoid(-gap) if self.adds_to_cross_entropy else self.slope(gap)

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return share * self.value(log_p - torch.log(rest))


def encode(loss: Loss) -> tuple[str, Tensor]:
    """Return the class name and fields of ``loss``, which is what an operator can carry.

    The fields are a float64 tensor on the CPU (None travels as NaN), not numbers: a graph takes numbers for constants
    and is compiled again when one changes.
    """
    return loss._encoded()


def class_of(name: str) -> Any:
    """Return the class whose name `encode` returned."""
    return _CLASSES[name]


def decode(name: str, values: Tensor) -> Any:
    """Rebuild the loss that `encode` described."""
    cls = class_of(name)
    names = [field.name for field in fields(cls)]
    return cls(**{name: None if math.isnan(x) else x for name, x in zip(names, values.tolist(), strict=True)})
