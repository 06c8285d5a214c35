"""Loops that add tiles of classes to the sums of rows, against the sums of all classes in float64."""

import math

import pytest
import torch

from bonus_ops import row_sums
from bonus_ops.logit_options import PLAIN, LogitOptions
from bonus_ops.ops import room

TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-13}


def rows(dtype):
    z = 4 * torch.randn(40, 301, dtype=dtype, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 301, (40,), generator=torch.Generator().manual_seed(1))
    z[0] = -math.inf
    z[1, 7] = math.nan
    z[2, :200] = -math.inf  # whole tiles of nothing
    z[3, 100:] = 20.0  # ties, the label among them
    target[3] = 100
    z[4, 250] = 60.0  # the last tile outdoes all others
    z[5, 3] = math.inf
    target[6:8] = torch.tensor([0, 300])
    return z, target


def added(z, target, tile, options):
    sums = row_sums.of_nothing(len(z), z.dtype, z.device)
    for first in range(0, z.shape[1], tile):
        room("numba", "sums").add(sums, z[:, first : first + tile], target, first, options)  # rows far apart
    return sums


@pytest.mark.parametrize("options", [PLAIN, LogitOptions(1.3, 5.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("tile", [1, 64, 301])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_of_tiles_are_those_of_all_classes(dtype, tile, options):
    z, target = rows(dtype)
    found, true = added(z, target, tile, options), row_sums.of_logits(options.applied(z.double()), target, 0)
    nan = true.sum_exp.isnan()
    assert nan[1] and (options is not PLAIN or nan[5]) and nan.sum() <= 2
    assert torch.equal(found.sum_exp.isnan(), nan)
    if options is PLAIN:  # a softcap rounds what are no ties to ties
        assert torch.equal(found.argmax[~nan], true.argmax[~nan])
    for name in ("z_target", "max", "sum_exp", "sum_exp2", "sum_exp_z"):
        x, y = getattr(found, name).double()[~nan], getattr(true, name)[~nan]
        torch.testing.assert_close(x, y, rtol=TOLERANCE[dtype] * 4, atol=TOLERANCE[dtype] * 4, msg=name)


def test_of_nothing_changes_nothing_it_is_merged_with():
    z, target = rows(torch.float64)
    z[1] = 0.0  # a row with NaN has no largest class
    sums = row_sums.of_logits(z, target, 0)
    for x, y in zip(row_sums.merged([row_sums.of_nothing(len(z), z.dtype, z.device), sums]), sums, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_the_label_of_another_tile_is_not_found_here():
    z, target = rows(torch.float64)
    some = row_sums.of_nothing(len(z), z.dtype, z.device)
    room("numba", "sums").add(some, z[:, 50:90], target, 50, PLAIN)
    here = (target >= 50) & (target < 90)
    assert here.any() and torch.equal(some.z_target[here], z[here, target[here]])
    assert (some.z_target[~here] == -math.inf).all()
