"""A device that is no CPU and has no kernels: formulas of torch serve, with their gradients."""

from __future__ import annotations

import pytest
import torch

from bonus_ops import LogBonus
from bonus_ops.call import decide
from tests import on_meta


@pytest.mark.parametrize("loss", on_meta.LOSSES.values(), ids=on_meta.LOSSES)
def test_gradients_need_no_kernels(loss):
    assert on_meta.launches(loss) == 0
    assert decide(None, torch.empty(2, 3, device="meta"), "labels", LogBonus(), None) == "reference"
