"""Losses of the gap: frozen dataclasses with their torch formulas.

For logits ``z`` with label ``y`` let the *rest* be every other class and

    gap = z_y - logsumexp(z_k, k != y)        p = p_y = sigmoid(gap)        1 - p = sigmoid(-gap)

A hard-label loss is a scalar function of the gap, given by two formulas:

    value(gap) = L                            slope(gap) = A = -dL/dgap

and its row gradient is ``dL/dz_y = -A``, ``dL/dz_k = A exp(z_k - logsumexp(rest))``.

To add a loss, subclass `GapLoss`: fields are numbers (or None), `value` and `slope` are torch formulas, and for
the GPU `kernel` is a pair of ``@triton.jit`` functions ``(gap, params) -> tensor`` fed by `parameters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

__all__ = [
    "AbsoluteError",
    "CosineBonus",
    "CrossEntropy",
    "Focal",
    "FocalStar",
    "GapLoss",
    "GeneralizedCrossEntropy",
    "HaltedFocal",
    "LogBonus",
    "Poly1",
    "PowerBonus",
    "SquaredError",
    "SubDataBonus",
]

_CLASSES: dict[str, type[Loss]] = {}
_PRODUCTS = (1.0, 2.0, 3.0)  # powers that torch computes as products


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
        # numbered: a class defined again, in a notebook say, must not take the place of one still in use
        cls._name = f"{cls.__module__}.{cls.__qualname__}#{len(_CLASSES)}"
        _CLASSES[cls._name] = cls

    def is_cross_entropy(self) -> bool:
        """Return whether nothing is added to plain cross-entropy."""
        return False

    def parameters(self) -> tuple[float, ...]:
        """Return the numbers handed to the kernel pair at run time; by default the fields in order."""
        return tuple(encode(self)[1].tolist()) or (0.0,)

    @property
    def current(self) -> Any:
        """The loss whose numbers are fixed: itself, or what a schedule makes of it now."""
        return self

    def _encoded(self) -> tuple[str, Tensor]:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        values = [math.nan if x is None else float(x) for x in values]
        return self._name, torch.tensor(values, dtype=torch.float64, device="cpu")

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        """Return what a class of probability ``p = 1 - rest`` costs for its ``share`` of the target.

        Cross-entropy itself is left out where the loss adds to it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define class_value(p, rest, log_p, share)")

    def class_pull(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        """Return ``-p d class_value / dp``."""
        raise NotImplementedError(f"{type(self).__name__} does not define class_pull(p, rest, log_p, share)")


class GapLoss(Loss):
    """A loss that is a scalar function of the gap."""

    def value(self, gap: Tensor) -> Tensor:
        """Return the loss in nats, shaped like ``gap``."""
        raise NotImplementedError(f"{type(self).__name__} does not define value(gap)")

    def slope(self, gap: Tensor) -> Tensor:
        """Return ``A = -d value / d gap``, shaped like ``gap``."""
        raise NotImplementedError(f"{type(self).__name__} does not define slope(gap)")

    def excess(self, gap: Tensor) -> Tensor:
        """Return ``value``, less cross-entropy where the loss adds to it."""
        return self.value(gap)

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return share * self.value(log_p - torch.log(rest))

    def class_pull(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return share * self.slope(log_p - torch.log(rest)) / rest

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Return both for finite gaps, not differentiable; a loss may share terms where passes count."""
        return self.value(gap), self.slope(gap)


def encode(loss: Loss) -> tuple[str, Tensor]:
    """Return the class name and fields of ``loss``, which is what an operator can carry.

    The fields are a float64 tensor on the CPU (None travels as NaN), not numbers: a graph takes numbers for constants
    and is compiled again when one changes.
    """
    return loss._encoded()


def decode(name: str, values: Tensor) -> Any:
    """Rebuild the loss that `encode` described."""
    cls = _CLASSES[name]
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: None if math.isnan(x) else x for name, x in zip(names, values.tolist(), strict=True)})


def _check(loss: Loss, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{type(loss).__name__}: {name} must be {expected}, got {getattr(loss, name)!r}")


def _check_numbers(loss: Loss, *optional: str) -> None:
    for field in fields(loss):  # type: ignore[arg-type]
        x = getattr(loss, field.name)
        if x is None and field.name in optional:
            continue
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{type(loss).__name__}: {field.name} must be a number, got {type(x).__name__}")


def logit(p: float) -> float:
    """Return the gap at which the target probability is ``p``."""
    return math.inf if p >= 1 else -math.inf if p <= 0 else math.log(p) - math.log1p(-p)


def _shared(gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return (-log p, 1 - p) of finite gaps, the terms of most losses."""
    negative = -gap
    return softplus(negative, threshold=40.0), negative.sigmoid_()


@dataclass(frozen=True)
class CrossEntropy(GapLoss):
    """Plain cross-entropy, what ``bonus=None`` means.

    ``L = -log p = softplus(-gap)``, ``A = 1 - p``. Range [0, inf) nats.
    """

    kernel: ClassVar[Any] = "cross_entropy"
    adds_to_cross_entropy: ClassVar[bool] = True

    def is_cross_entropy(self) -> bool:
        return True

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(gap)

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-gap)

    def excess(self, gap: Tensor) -> Tensor:
        return torch.zeros_like(gap)

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return torch.zeros_like(p)

    def class_pull(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return torch.zeros_like(p)

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        return _shared(gap)


@dataclass(frozen=True, kw_only=True)
class Bonus(GapLoss):
    """Cross-entropy plus ``strength`` times a bonus ``b(p) <= 0``, with the paper's window on p.

    ``L = -log p + strength (b(p) - b(start)) [start <= p <= abrupt]``. Subclasses give ``b`` and ``-db/dgap``,
    and for targets that are shares of classes ``b`` and the odds ``-p db/dp`` as functions of p.
    """

    adds_to_cross_entropy: ClassVar[bool] = True
    strength: float = 1.0
    start: float = 0.0
    abrupt: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(self, "clamp")
        _check(self, "strength", math.isfinite(self.strength), "finite")
        _check(self, "start", 0 <= self.start < 1, "in [0, 1)")
        _check(self, "abrupt", 0 < self.abrupt <= 1, "in (0, 1]")
        _check(self, "start", self.start < self.abrupt, f"below abrupt={self.abrupt!r}")

    def bonus(self, gap: Tensor) -> Tensor:
        """Return b as a function of the gap."""
        raise NotImplementedError(f"{type(self).__name__} does not define bonus(gap)")

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        """Return ``-db/dgap >= 0`` from the gap, p = sigmoid(gap) and rest = 1 - p = sigmoid(-gap)."""
        raise NotImplementedError(f"{type(self).__name__} does not define bonus_slope(gap, p, rest)")

    def is_cross_entropy(self) -> bool:
        return self.strength == 0

    def has_window(self) -> bool:
        """Return whether the bonus is off for some p."""
        return self.start > 0 or self.abrupt < 1

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        """Return b as a function of p = 1 - rest."""
        raise NotImplementedError(f"{type(self).__name__} does not define class_bonus(p, rest)")

    def class_odds(self, p: Tensor, rest: Tensor) -> Tensor:
        """Return ``-p db/dp >= 0`` as a function of p = 1 - rest."""
        raise NotImplementedError(f"{type(self).__name__} does not define class_odds(p, rest)")

    def class_value(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        bonus = self.class_bonus(p, rest) - self._bonus_at_start()
        return self.strength * share * self._in_class_window(p, rest, bonus)

    def class_pull(self, p: Tensor, rest: Tensor, log_p: Tensor, share: Tensor | float) -> Tensor:
        return self.strength * share * self._in_class_window(p, rest, self.class_odds(p, rest))

    def _in_class_window(self, p: Tensor, rest: Tensor, x: Tensor) -> Tensor:
        if self.start > 0:
            x = torch.where(p >= self.start, x, 0.0)
        if self.abrupt < 1:
            x = torch.where(rest >= 1 - self.abrupt, x, 0.0)
        return x

    def bonus_parameters(self) -> tuple[float, ...]:
        """Return what the kernel pair needs beyond strength and window."""
        return ()

    def parameters(self) -> tuple[float, ...]:
        return self.strength, logit(self.start), self._bonus_at_start(), logit(self.abrupt), *self.bonus_parameters()

    def _bonus_at_start(self) -> float:
        if self.start == 0:
            return 0.0
        return float(self.bonus(torch.tensor(logit(self.start), dtype=torch.float64, device="cpu")))

    def _in_window(self, gap: Tensor, x: Tensor) -> Tensor:
        if self.start > 0:
            x = torch.where(gap >= logit(self.start), x, 0.0)
        if self.abrupt < 1:
            x = torch.where(gap <= logit(self.abrupt), x, 0.0)
        return x

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(gap) if self.strength == 0 else -logsigmoid(gap) + self.excess(gap)

    def excess(self, gap: Tensor) -> Tensor:
        if self.strength == 0:
            return torch.zeros_like(gap)  # of an infinite bonus too
        bonus = self.bonus(gap)
        if self.start > 0:
            bonus = bonus - self._bonus_at_start()
        return self.strength * self._in_window(gap, bonus)

    def slope(self, gap: Tensor) -> Tensor:
        p, rest = torch.sigmoid(gap), torch.sigmoid(-gap)
        return torch.add(rest, self._in_window(gap, self.bonus_slope(gap, p, rest)), alpha=self.strength)

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        plain, rest = _shared(gap)
        if self.strength == 0:
            return plain, rest
        bonus, slope = self._bonus_and_slope(gap, plain, rest)
        if self.start > 0:
            bonus = bonus - self._bonus_at_start()
        value = plain.add_(self._in_window(gap, bonus), alpha=self.strength)
        return value, rest.add_(self._in_window(gap, slope), alpha=self.strength)

    def _bonus_and_slope(self, gap: Tensor, plain: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return b and ``-db/dgap`` of finite gaps from plain = -log p and rest = 1 - p, exact beside these."""
        return self.bonus(gap), self.bonus_slope(gap, 1 - rest, rest)


@dataclass(frozen=True)
class LogBonus(Bonus):
    """The encouraging loss: cross-entropy plus the (conservative) logarithmic bonus.

    With ``LE = log_end`` the bonus is ``log(1 - p)`` up to ``p = LE`` and its tangent beyond:

        b(p) = log(1 - min(p, LE)) - max(p - LE, 0) / (1 - LE)
        A    = (1 - p) + strength * p * min(1, (1 - p) / (1 - LE))

    ``log_end=1`` never turns linear: ``b(p) = log(max(1 - p, clamp))``, whose gradient stops where ``1 - p < clamp``.
    That clamp bounds the loss from below and keeps training stable; ``clamp=None`` is the exact, unbounded
    ``L = -gap`` at strength 1. ``clamp`` has no effect for ``log_end < 1``.

    Args:
        log_end: in [0, 1]; the paper uses .75 (images) and .5 (graphs, translation). Default .75.
        clamp: lower bound of 1 - p inside the logarithm at ``log_end=1``, or None. Default 1e-5, the paper's.
        strength: factor on the bonus, the paper's bonus_rho. Default 1. Keyword only, like the next two.
        start: no bonus below this p; the bonus is shifted to start at 0 there. Default 0, off.
        abrupt: no bonus above this p (the paper's ablation). Default 1, off.

    Raises:
        ValueError: a parameter is outside its range.
        TypeError: a parameter is not a number.

    References:
        Zhao et al., Well-classified Examples are Underestimated in Classification with Deep Neural Networks,
        AAAI 2022, https://arxiv.org/abs/2110.06537, the conservative encouraging loss.
    """

    kernel: ClassVar[Any] = "log_bonus"
    log_end: float = 0.75
    clamp: float | None = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "log_end", 0 <= self.log_end <= 1, "in [0, 1]")
        if self.clamp is not None:
            _check(self, "clamp", 0 < self.clamp < 1, "in (0, 1) or None")

    def _floor(self) -> float:
        """Return the lowest log(1 - p) that is rewarded: only log_end=1 needs one."""
        return math.log(self.clamp) if self.log_end == 1 and self.clamp is not None else -math.inf

    def bonus(self, gap: Tensor) -> Tensor:
        log_rest = logsigmoid(-gap)  # log(1 - p)
        if self.log_end == 1:
            return log_rest if self.clamp is None else log_rest.clamp(min=self._floor())
        rest_end = 1 - self.log_end
        tangent = math.log(rest_end) - 1 + torch.sigmoid(-gap) / rest_end
        return torch.where(gap <= logit(self.log_end), log_rest, tangent)

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        if self.log_end == 1:
            return p if self.clamp is None else torch.where(logsigmoid(-gap) >= self._floor(), p, 0.0)
        return p * (rest / (1 - self.log_end)).clamp(max=1.0)

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        # min(p, LE) = 1 - max(1 - p, 1 - LE); at LE = 1 the clamp takes the place of 1 - LE and nothing is linear
        lowest = rest.clamp(min=self._lowest_rest())
        bonus = torch.log(lowest)
        return bonus if self.log_end == 1 else bonus - (lowest - rest) / (1 - self.log_end)

    def is_logarithm_below_half(self) -> bool:
        """Return whether the bonus is ``log(1 - p)`` for every p up to 1/2."""
        clamped = self.log_end == 1 and self.clamp is not None and self.clamp > 0.5
        return self.log_end >= 0.5 and not clamped and not self.has_window()

    def class_odds(self, p: Tensor, rest: Tensor) -> Tensor:
        odds = p / rest.clamp(min=self._lowest_rest())
        return torch.where(rest >= self._lowest_rest(), odds, 0.0) if self.log_end == 1 else odds

    def _lowest_rest(self) -> float:
        return 1 - self.log_end if self.log_end < 1 else self.clamp or torch.finfo(torch.float32).tiny

    def _bonus_and_slope(self, gap: Tensor, plain: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        p, log_rest = 1 - rest, torch.neg(gap).sub_(plain)
        if self.log_end == 1:
            floor = self._floor()
            return log_rest.clamp(min=floor), p if self.clamp is None else torch.where(log_rest >= floor, p, 0.0)
        # b = log(1 - min(p, LE)) + share - 1, where share = min(1, (1 - p) / (1 - LE))
        rest_end = 1 - self.log_end
        share = (rest * (1 / rest_end)).clamp_(max=1.0)
        return log_rest.clamp_(min=math.log(rest_end)).add_(share).sub_(1.0), p.mul_(share)

    def bonus_parameters(self) -> tuple[float, ...]:
        rest_end = 1 - self.log_end
        inverse, log_end = (1 / rest_end, math.log(rest_end)) if rest_end > 0 else (math.inf, -math.inf)
        return logit(self.log_end), log_end, inverse, self._floor()


@dataclass(frozen=True)
class PowerBonus(Bonus):
    """Cross-entropy plus the power bonus ``b(p) = -p^gamma``.

    ``A = (1 - p) (1 + strength gamma p^gamma)``. ``gamma=1`` is Poly-1 up to a constant.

    Args:
        gamma: exponent > 0, the paper's bonus_gamma. Default 1.
        strength, start, abrupt: as in `LogBonus`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, the power form of the encouraging loss.
    """

    kernel: ClassVar[Any] = "power_bonus"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "gamma", 0 < self.gamma < math.inf, "a positive finite number")

    def bonus(self, gap: Tensor) -> Tensor:
        return -torch.exp(self.gamma * logsigmoid(gap))

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        return self.gamma * torch.exp(self.gamma * logsigmoid(gap)) * rest

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        return -(p**self.gamma)

    def class_odds(self, p: Tensor, rest: Tensor) -> Tensor:
        return self.gamma * p**self.gamma

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        if self.start > 0 or self.abrupt < 1:
            return super().value_and_slope(gap)
        plain, rest = _shared(gap)
        power = (1 - rest).pow_(self.gamma) if self.gamma in _PRODUCTS else (plain * -self.gamma).exp_()
        slope = rest.addcmul_(power, rest, value=self.strength * self.gamma)
        return plain.sub_(power, alpha=self.strength), slope

    def bonus_parameters(self) -> tuple[float, ...]:
        return (self.gamma,)


@dataclass(frozen=True)
class CosineBonus(Bonus):
    """Cross-entropy plus the cosine bonus ``b(p) = cos(pi p) - 1``.

    ``A = (1 - p) (1 + strength pi p sin(pi p))``.

    Args:
        strength, start, abrupt: as in `LogBonus`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537; the form is bonus_gamma=-2 of the paper's code.
    """

    kernel: ClassVar[Any] = "cosine_bonus"

    def bonus(self, gap: Tensor) -> Tensor:
        return -2 * torch.sin(math.pi / 2 * torch.sigmoid(gap)) ** 2

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        return math.pi * torch.sin(math.pi * torch.minimum(p, rest)) * p * rest  # sin(pi p) = sin(pi (1 - p))

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        return -2 * torch.sin(math.pi / 2 * p) ** 2

    def class_odds(self, p: Tensor, rest: Tensor) -> Tensor:
        return math.pi * p * torch.sin(math.pi * torch.minimum(p, rest))


@dataclass(frozen=True)
class SubDataBonus(Bonus):
    """Cross-entropy plus the logarithmic bonus of a share ``k`` of the data.

    ``b(p) = log max(1 - k p, clamp)``, ``A = (1 - p) (1 + strength k p / (1 - k p))``; ``k=1`` is `LogBonus` at
    ``log_end=1``.

    Args:
        k: in (0, 1], the paper's sub-data factor. Default 1.
        clamp: lower bound inside the logarithm, or None. Default 1e-5.
        strength, start, abrupt: as in `LogBonus`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537; the form is an option of the paper's code.
    """

    kernel: ClassVar[Any] = "sub_data_bonus"
    k: float = 1.0
    clamp: float | None = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "k", 0 < self.k <= 1, "in (0, 1]")
        if self.clamp is not None:
            _check(self, "clamp", 0 < self.clamp < 1, "in (0, 1) or None")

    def _log_share(self, gap: Tensor) -> Tensor:
        """Return log(1 - k p), stable where p -> 1."""
        if self.k == 1:
            return logsigmoid(-gap)
        return torch.where(
            gap < 0, torch.log1p(-self.k * torch.sigmoid(gap)), torch.log((1 - self.k) + self.k * torch.sigmoid(-gap))
        )

    def bonus(self, gap: Tensor) -> Tensor:
        log_share = self._log_share(gap)
        return log_share if self.clamp is None else log_share.clamp(min=math.log(self.clamp))

    def bonus_slope(self, gap: Tensor, p: Tensor, rest: Tensor) -> Tensor:
        # at k = 1 the quotient rest / (1 - k p) is 0 / 0 for a huge gap
        slope = p if self.k == 1 else self.k * p * rest / ((1 - self.k) + self.k * rest)
        return slope if self.clamp is None else torch.where(self._log_share(gap) >= math.log(self.clamp), slope, 0.0)

    def class_bonus(self, p: Tensor, rest: Tensor) -> Tensor:
        return torch.log(((1 - self.k) + self.k * rest).clamp(min=self._lowest_share()))

    def class_odds(self, p: Tensor, rest: Tensor) -> Tensor:
        share = (1 - self.k) + self.k * rest
        return torch.where(share >= self._lowest_share(), self.k * p / share.clamp(min=self._lowest_share()), 0.0)

    def _lowest_share(self) -> float:
        return self.clamp or torch.finfo(torch.float32).tiny

    def bonus_parameters(self) -> tuple[float, ...]:
        return self.k, 1 - self.k, -math.inf if self.clamp is None else math.log(self.clamp)


@dataclass(frozen=True)
class Focal(GapLoss):
    """The focal loss on softmax: ``L = -(1 - p)^gamma log p``.

    ``A = (1 - p)^gamma ((1 - p) - gamma p log p)``; ``gamma=0`` is cross-entropy.

    Args:
        gamma: exponent >= 0. Default 2, the paper's.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, https://arxiv.org/abs/1708.02002, eq. 4.
    """

    kernel: ClassVar[Any] = "focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self, "gamma", 0 <= self.gamma < math.inf, "a finite number >= 0")

    def value(self, gap: Tensor) -> Tensor:
        return torch.exp(self.gamma * logsigmoid(-gap).clamp(min=-1000.0)) * -logsigmoid(gap)

    def slope(self, gap: Tensor) -> Tensor:
        damping = torch.exp(self.gamma * logsigmoid(-gap).clamp(min=-1000.0))
        log_p = logsigmoid(gap).clamp(min=-1000.0)  # p log p is 0 at p = 0, not 0 * -inf
        return damping * (torch.sigmoid(-gap) - self.gamma * torch.sigmoid(gap) * log_p)

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        plain, rest = _shared(gap)
        damping = rest**self.gamma if self.gamma in _PRODUCTS else ((gap + plain) * -self.gamma).exp_()
        slope = rest.addcmul_(1 - rest, plain, value=self.gamma).mul_(damping)
        return plain.mul_(damping), slope


@dataclass(frozen=True)
class HaltedFocal(GapLoss):
    """The halted focal loss: focal where the label is less likely than not, cross-entropy where it is more.

        L = -(1 - p)^gamma log p                   A = (1 - p)^gamma ((1 - p) - gamma p log p)      p <= 1/2
        L = -log p - log 2 (1 - 2^-gamma)          A = 1 - p                                        p > 1/2

    The value is continuous at ``p = 1/2``, where the slope steps up to that of cross-entropy. The paper's detector code
    switches on the sign of the logit instead, a defect: for negatives that is the reverse of the paper's figure.

    Args:
        gamma: exponent >= 0. Default 2.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, the halted focal loss.
    """

    kernel: ClassVar[Any] = "halted_focal"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self, "gamma", 0 <= self.gamma < math.inf, "a finite number >= 0")

    def _step(self) -> float:
        return math.log(2) * -math.expm1(-self.gamma * math.log(2))

    def parameters(self) -> tuple[float, ...]:
        return self.gamma, self._step()

    def value(self, gap: Tensor) -> Tensor:
        # each part sees its own side: the derivative of the other would be NaN at an infinite gap
        low = Focal(self.gamma).value(gap.clamp(max=0.0))
        return torch.where(gap > 0, -logsigmoid(gap.clamp(min=0.0)) - self._step(), low)

    def slope(self, gap: Tensor) -> Tensor:
        return torch.where(gap > 0, torch.sigmoid(-gap), Focal(self.gamma).slope(gap.clamp(max=0.0)))


@dataclass(frozen=True)
class FocalStar(GapLoss):
    """Focal loss star, focal's simpler twin: ``L = softplus(-(gamma gap + beta)) / gamma``.

    ``A = sigmoid(-(gamma gap + beta))``; ``gamma=1, beta=0`` is cross-entropy.

    Args:
        gamma: steepness > 0. Default 4.
        beta: shift of the gap. Default 0; the paper also uses ``gamma=2, beta=1``.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, https://arxiv.org/abs/1708.02002, appendix A.
    """

    kernel: ClassVar[Any] = "focal_star"
    gamma: float = 4.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self, "gamma", 0 < self.gamma < math.inf, "a positive finite number")
        _check(self, "beta", math.isfinite(self.beta), "finite")

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(self.gamma * gap + self.beta) / self.gamma

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-(self.gamma * gap + self.beta))

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        plain, rest = _shared(self.gamma * gap + self.beta)
        return plain.div_(self.gamma), rest


@dataclass(frozen=True, kw_only=True)
class _Error(GapLoss):
    """An error in p plus the mirror bonus ``-strength p^gamma``. Subclasses give the error and its slope."""

    strength: float = 0.0
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self, "strength", math.isfinite(self.strength), "finite")
        _check(self, "gamma", 0 < self.gamma < math.inf, "a positive finite number")

    def _error(self, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} does not define _error(p, rest)")

    def value(self, gap: Tensor) -> Tensor:
        error, _ = self._error(torch.sigmoid(gap), torch.sigmoid(-gap))
        return error - self.strength * torch.exp(self.gamma * logsigmoid(gap))

    def slope(self, gap: Tensor) -> Tensor:
        rest = torch.sigmoid(-gap)
        _, slope = self._error(torch.sigmoid(gap), rest)
        return slope + self.strength * self.gamma * torch.exp(self.gamma * logsigmoid(gap)) * rest

    def value_and_slope(self, gap: Tensor) -> tuple[Tensor, Tensor]:
        p, rest = torch.sigmoid(gap), torch.sigmoid(-gap)
        value, slope = self._error(p, rest)
        if self.strength == 0:
            return value, slope
        power = p**self.gamma if self.gamma in _PRODUCTS else torch.exp(self.gamma * logsigmoid(gap))
        mirror = torch.addcmul(slope, power, rest, value=self.strength * self.gamma)
        return torch.sub(value, power, alpha=self.strength), mirror


@dataclass(frozen=True)
class SquaredError(_Error):
    """The squared error with its mirror bonus: ``L = (1 - p)^2 - strength p^gamma``.

    ``A = 2 p (1 - p)^2 + strength gamma p^gamma (1 - p)``. On a sigmoid this is ``(sigmoid(x) - t)^2``, and
    at ``strength=1, gamma=2`` twice the absolute error less 1. On softmax rows it is of the label's probability
    alone, not of the distance to the one-hot row.

    Args:
        strength: factor on the mirror bonus. Default 0, the plain squared error; the paper uses 1. Keyword only.
        gamma: exponent > 0 of the mirror bonus. Default 2, the paper's. Keyword only.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, mirror bonus.
    """

    kernel: ClassVar[Any] = "squared_error"

    def _error(self, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        square = rest * rest
        return square, 2 * p * square


@dataclass(frozen=True)
class AbsoluteError(_Error):
    """The absolute error with its mirror bonus: ``L = (1 - p) - strength p^gamma``.

    ``A = p (1 - p) (1 + strength gamma p^(gamma - 1))``. On a sigmoid this is ``|sigmoid(x) - t|``. On softmax rows it
    is of the label's probability alone, half the distance to the one-hot row.

    Args:
        strength, gamma: as in `SquaredError`.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhao et al. 2022, https://arxiv.org/abs/2110.06537, mirror bonus.
    """

    kernel: ClassVar[Any] = "absolute_error"

    def _error(self, p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        return rest, p * rest


@dataclass(frozen=True)
class Poly1(GapLoss):
    """Poly-1: ``L = -log p + epsilon (1 - p)``.

    ``A = (1 - p) (1 + epsilon p)``; ``epsilon=0`` is cross-entropy.

    Args:
        epsilon: first polynomial coefficient, >= -1. Default 1.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Leng et al., PolyLoss, ICLR 2022, https://arxiv.org/abs/2204.12511, the Poly-1 form.
    """

    kernel: ClassVar[Any] = "poly1"
    epsilon: float = 1.0

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self, "epsilon", -1 <= self.epsilon < math.inf, "a finite number >= -1")

    def value(self, gap: Tensor) -> Tensor:
        return -logsigmoid(gap) + self.epsilon * torch.sigmoid(-gap)

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-gap) * (1 + self.epsilon * torch.sigmoid(gap))


@dataclass(frozen=True)
class GeneralizedCrossEntropy(GapLoss):
    """Generalized cross-entropy (GCE): ``L = (1 - p^q) / q``, robust to label noise.

    ``A = (1 - p) p^q``; ``q -> 0`` is cross-entropy, ``q=1`` is half the absolute error.

    Args:
        q: exponent in (0, 1]. Default .7, the paper's.

    Raises:
        ValueError, TypeError: as in `LogBonus`.

    References:
        Zhang and Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels,
        NeurIPS 2018, https://arxiv.org/abs/1805.07836, eq. 6.
    """

    kernel: ClassVar[Any] = "generalized_cross_entropy"
    q: float = 0.7

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check(self, "q", 0 < self.q <= 1, "in (0, 1]")

    def value(self, gap: Tensor) -> Tensor:
        return -torch.expm1(self.q * logsigmoid(gap)) / self.q

    def slope(self, gap: Tensor) -> Tensor:
        return torch.sigmoid(-gap) * torch.exp(self.q * logsigmoid(gap))
