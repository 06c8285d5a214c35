"""What becomes of logits before the softmax, and what their logsumexp costs: scale, softcap and z-loss.

    z = logit_scale input                                     the logits that everything else is of
    z = softcap tanh(logit_scale input / softcap)             where there is a softcap
    loss + z_loss logsumexp(z)^2                              of every row that counts

Loss, softmax and scores are of z; gradients are of the input, exact also where tanh has saturated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.results import accumulation_dtype
from .number_checks import check_number

__all__ = ["PLAIN", "LogitOptions", "checked_options"]


class LogitOptions(NamedTuple):
    """The checked options of a call."""

    scale: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0

    @property
    def kernel(self) -> str:
        """The pair of ``formulas.logits`` that computes z and its slope."""
        if self.softcap is None:
            return "as_given" if self.scale == 1.0 else "scaled"
        return "capped"

    def numbers(self) -> tuple[float, float]:
        """Return the numbers of that pair."""
        return self.scale, 1.0 if self.softcap is None else self.softcap

    def applied(self, logits: Tensor) -> Tensor:
        """Return z, in the accumulation dtype where it is not the input itself; differentiable at any order."""
        if self.kernel == "as_given":
            return logits
        scaled = logits.to(accumulation_dtype(logits.dtype)) * self.scale
        if self.softcap is None:
            return scaled
        t = scaled / self.softcap
        # far from 0 by what the derivative is made of: 1 - tanh^2 of the rounded tanh has lost it
        x = torch.exp(-2.0 * t.abs())
        far = torch.copysign((1.0 - x) / (1.0 + x), t)
        return self.softcap * torch.where(t.abs() < 0.25, torch.tanh(torch.where(t.abs() < 0.25, t, 0.0)), far)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return dz/dinput, differentiable too."""
        if self.softcap is None:
            return self.scale
        x = torch.exp(-2.0 * (logits.to(accumulation_dtype(logits.dtype)) * (self.scale / self.softcap)).abs())
        return self.scale * (4.0 * x / (1.0 + x).square())


PLAIN = LogitOptions()


def checked_options(logit_scale: Any, softcap: Any, z_loss: Any) -> LogitOptions:
    """Return the options, or raise TypeError or ValueError for what is no number or out of range."""
    if softcap is None and type(logit_scale) is type(z_loss) is float and logit_scale == 1.0 and z_loss == 0.0:
        return PLAIN
    owner = "bonus_cross_entropy"
    check_number(owner, "logit_scale", logit_scale, "(0, inf)")
    check_number(owner, "softcap", softcap, "(0, inf) or None")
    check_number(owner, "z_loss", z_loss, "[0, inf)")
    return LogitOptions(float(logit_scale), None if softcap is None else float(softcap), float(z_loss))
