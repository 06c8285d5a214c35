"""The error budget: no worse than the same formula run eagerly in the same dtype, up to a stated slack."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.conftest import COMPILED

FLOAT32_FLOOR = (6 if COMPILED else 2) * 2.0**-23  # a GPU's exp2 and division err by 2 units
FLOAT64_FLOOR = 2.0**-48


def assert_within_budget(
    actual: Tensor,
    truth: Tensor,
    eager: Tensor | None,
    *,
    factor: float = 1.0,
    floor: float | Tensor = FLOAT32_FLOOR,
    what: str,
    unit: float = 1.0,
) -> None:
    """Fail unless ``|actual - truth| <= factor * max|eager - truth| + floor * max(|truth|, unit)`` everywhere.

    Args:
        actual: the result under test, any floating dtype.
        truth: float64, computed from the inputs after they were rounded to the tested dtype.
        eager: the plain formula in the tested dtype; None leaves the floor alone.
        factor: how many times worse than ``eager`` is accepted.
        floor: slack relative to the magnitude of each element, a number or one for each.
        what: named in the message.
        unit: magnitude below which the slack no longer shrinks; 0 makes it purely relative.
    """
    assert truth.dtype == torch.float64, f"{what}: the truth must be float64, got {truth.dtype}"
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    truth = truth.detach().cpu()
    got = actual.detach().cpu().double()
    eager_error = 0.0
    if eager is not None and truth.numel() > 0:
        eager_error = float(_error(eager.detach().cpu().double(), truth).nan_to_num().max())
    floor = torch.as_tensor(floor, dtype=torch.float64).cpu().expand(truth.shape)
    allowed = factor * eager_error + floor * truth.abs().clamp(min=unit)
    allowed = torch.where(truth.isfinite(), allowed, 0.0)
    error = _error(got, truth)
    bad = ~(error <= allowed)
    if bad.any():
        # the worst is an unlike infinity or NaN, else the largest overrun
        overrun = torch.where(error.isnan(), torch.inf, error / allowed.clamp(min=1e-300)).masked_fill(~bad, -1.0)
        at = tuple(int(i) for i in torch.unravel_index(overrun.argmax(), overrun.shape))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} outside the budget, worst at {at}: got {got[at].item()!r}, "
            f"truth {truth[at].item()!r}, error {error[at].item():.3e}, allowed {allowed[at].item():.3e}, "
            f"ratio {overrun[at].item():.3g} "
            f"(eager error {eager_error:.3e}, factor {factor}, floor {floor[at].item():.3e})"
        )


def _error(x: Tensor, truth: Tensor) -> Tensor:
    """Return |x - truth|: 0 for like infinities and for NaN where NaN is true, NaN where one is finite alone."""
    like = (x == truth) | (x.isnan() & truth.isnan())
    comparable = x.isfinite() & truth.isfinite()
    return torch.where(like, 0.0, torch.where(comparable, (x - truth).abs(), torch.nan))
