"""RestStats is a commutative monoid: its laws, through small kernels, against float64."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bonus_ops.kernels.formulas.rest import RestStats, merge
from bonus_ops.kernels.gpu.rest import absorb, across, empty

LANES, K = 4, 8
LAST = 2**31 - 1  # the class of nothing


class State(NamedTuple):
    """RestStats of [LANES] lanes (or of one, after `across_all`) on the host."""

    sums: Tensor  # [4, LANES] max, sum_exp, sum_exp2, sum_exp_z
    argmax: Tensor  # [LANES] int32


@triton.jit
def load_state(sums_ptr, argmax_ptr, LANES: tl.constexpr):
    at = tl.arange(0, 1)[:, None] + tl.arange(0, LANES)[None, :]
    return RestStats(
        tl.load(sums_ptr + at),
        tl.load(argmax_ptr + at),
        tl.load(sums_ptr + LANES + at),
        tl.load(sums_ptr + 2 * LANES + at),
        tl.load(sums_ptr + 3 * LANES + at),
    )


@triton.jit
def store_state(rest, at, sums_ptr, argmax_ptr, LANES: tl.constexpr):
    tl.store(sums_ptr + at, rest.max)
    tl.store(sums_ptr + LANES + at, rest.sum_exp)
    tl.store(sums_ptr + 2 * LANES + at, rest.sum_exp2)
    tl.store(sums_ptr + 3 * LANES + at, rest.sum_exp_z)
    tl.store(argmax_ptr + at, rest.argmax)


@triton.jit
def absorb_kernel(z_ptr, sums_ptr, argmax_ptr, n_tiles, LANES: tl.constexpr, K: tl.constexpr):
    lane = tl.arange(0, 1)[:, None] + tl.arange(0, LANES)[None, :]
    rest = empty(tl.zeros([1, LANES], z_ptr.dtype.element_ty))
    for tile in range(0, n_tiles):
        chunk = tile * LANES + lane
        z = tl.load(z_ptr + (chunk * K)[:, :, None] + tl.arange(0, K)[None, None, :])
        rest = absorb(rest, z, chunk)
    store_state(rest, lane, sums_ptr, argmax_ptr, LANES)


@triton.jit
def merge_kernel(a_ptr, a_argmax_ptr, b_ptr, b_argmax_ptr, sums_ptr, argmax_ptr, LANES: tl.constexpr):
    rest = merge(load_state(a_ptr, a_argmax_ptr, LANES), load_state(b_ptr, b_argmax_ptr, LANES))
    at = tl.arange(0, 1)[:, None] + tl.arange(0, LANES)[None, :]
    store_state(rest, at, sums_ptr, argmax_ptr, LANES)


@triton.jit
def across_kernel(a_ptr, a_argmax_ptr, sums_ptr, argmax_ptr, LANES: tl.constexpr):
    store_state(across(load_state(a_ptr, a_argmax_ptr, LANES)), tl.arange(0, 1), sums_ptr, argmax_ptr, 1)


def new_state(like: Tensor, lanes: int = LANES) -> State:
    return State(like.new_empty(4, lanes), torch.empty(lanes, dtype=torch.int32, device=like.device))


def absorbed(z: Tensor) -> State:
    """Run tiles [tiles, LANES, K] through `absorb`; argmax counts chunks."""
    z = z.contiguous()
    out = new_state(z)
    absorb_kernel[(1,)](z, *out, z.shape[0], LANES=LANES, K=K)
    return out


def merged(a: State, b: State) -> State:
    out = new_state(a.sums)
    merge_kernel[(1,)](*a, *b, *out, LANES=LANES)
    return out


def across_all(a: State) -> State:
    out = new_state(a.sums, 1)
    across_kernel[(1,)](*a, *out, LANES=LANES)
    return out


def moved(state: State, chunks: int) -> State:
    """Return the state as if its tiles stood ``chunks`` further on."""
    return state._replace(argmax=torch.where(state.argmax == LAST, LAST, state.argmax + chunks))


def truth(z: Tensor) -> State:
    """Return the definition in float64 for tiles [tiles, LANES, K]."""
    z = z.double()
    n_tiles, lanes, _ = z.shape
    maximum = z.amax((0, 2))
    d = z - maximum.masked_fill(maximum == -math.inf, 0.0)[None, :, None]
    e = d.exp()
    e_d = torch.where(e == 0, 0.0, e * d)
    chunk = torch.arange(n_tiles * lanes, device=z.device).view(n_tiles, lanes)
    holds_max = (z.amax(2) == maximum) & (maximum > -math.inf)
    argmax = torch.where(holds_max, chunk, LAST).amin(0)
    return State(torch.stack([maximum, e.sum((0, 2)), (e * e).sum((0, 2)), e_d.sum((0, 2))]), argmax.int())


def assert_same(a: State, b: State) -> None:
    """Max and argmax alike to the bit, sums to a few units in the last place."""
    assert torch.equal(a.argmax, b.argmax)
    assert torch.equal(a.sums[0].double(), b.sums[0].double())
    # exp2(d log2 e) rounds relative to |d|, up to 100 here
    tolerance = 5e-6 if a.sums.dtype == torch.float32 else 1e-13
    torch.testing.assert_close(a.sums.double(), b.sums.double(), rtol=tolerance, atol=1e-30)


def draw(kind: str, dtype: torch.dtype, device: str, n_tiles: int = 3) -> Tensor:
    """Return tiles [n_tiles, LANES, K], multiples of 1/256 so that adding a power of two is exact."""
    z = (3 * torch.randn(n_tiles, LANES, K)).mul(256).round().div(256)
    if kind == "ties":
        z = z.round()
    elif kind == "late":  # the first tile, and one whole lane, hold nothing
        z[0] = -math.inf
        z[:, 1] = -math.inf
    elif kind == "nothing":
        z[:] = -math.inf
    elif kind == "one_class":
        z[:] = -math.inf
        z[n_tiles - 1, 2, 5] = 7.0
    elif kind == "far_apart":  # rescaling underflows, beyond what LOWEST bounds too
        z += torch.tensor([0.0, 200.0, -3000.0])[:n_tiles, None, None]
    return z.to(dtype).to(device)


KINDS = ("typical", "ties", "late", "nothing", "one_class", "far_apart")
over_kinds = pytest.mark.parametrize("kind", KINDS)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


@over_dtypes
@over_kinds
def test_absorb_is_the_definition(kernel_device, dtype, kind):
    z = draw(kind, dtype, kernel_device)
    assert_same(absorbed(z), truth(z))


@over_dtypes
@over_kinds
def test_empty_is_the_identity(kernel_device, dtype, kind):
    state = absorbed(draw(kind, dtype, kernel_device))
    nothing = absorbed(draw(kind, dtype, kernel_device)[:0])
    assert_same(merged(nothing, state), state)
    assert_same(merged(state, nothing), state)


@over_dtypes
@over_kinds
def test_merge_is_commutative(kernel_device, dtype, kind):
    a = absorbed(draw(kind, dtype, kernel_device))
    b = moved(absorbed(draw("typical", dtype, kernel_device)), 100)
    assert_same(merged(a, b), merged(b, a))


@over_dtypes
@over_kinds
def test_merge_is_associative(kernel_device, dtype, kind):
    z = draw(kind, dtype, kernel_device)
    a, b, c = (moved(absorbed(tile[None]), i * LANES) for i, tile in enumerate(z))
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))


@over_dtypes
@over_kinds
def test_absorb_is_merge_of_a_tile(kernel_device, dtype, kind):
    z = draw(kind, dtype, kernel_device)
    parts = [moved(absorbed(tile[None]), i * LANES) for i, tile in enumerate(z)]
    assert_same(absorbed(z), functools.reduce(merged, parts))


@over_dtypes
@over_kinds
def test_across_is_merge_of_all_lanes(kernel_device, dtype, kind):
    state = absorbed(draw(kind, dtype, kernel_device))
    total = state
    for shift in range(1, LANES):  # every lane meets every other one
        total = merged(total, State(state.sums.roll(shift, 1), state.argmax.roll(shift)))
    total = State(total.sums[:, :1], total.argmax[:1])
    assert_same(across_all(state), total)
    order = torch.randperm(LANES, device=kernel_device)
    assert_same(across_all(State(state.sums[:, order].contiguous(), state.argmax[order])), total)


@over_dtypes
@over_kinds
@pytest.mark.parametrize("offset", [-4096.0, 1024.0])
def test_sums_do_not_see_a_common_offset(kernel_device, dtype, kind, offset):
    z = draw(kind, dtype, kernel_device)
    plain, shifted = absorbed(z), absorbed(z + offset)
    assert torch.equal(shifted.sums[0], plain.sums[0] + offset)
    assert_same(shifted._replace(sums=torch.cat([plain.sums[:1], shifted.sums[1:]])), plain)


@over_dtypes
def test_sums_hold_at_an_offset_of_1e8(kernel_device, dtype):
    z = 8 * draw("ties", dtype, kernel_device) + 1e8
    assert_same(absorbed(z), truth(z))


def test_argmax_of_ties_is_the_smallest(kernel_device):
    state = absorbed(torch.zeros(3, LANES, K, device=kernel_device))
    assert state.argmax.tolist() == list(range(LANES))
    assert merged(moved(state, 40), state).argmax.tolist() == list(range(LANES))
    assert across_all(moved(state, 9)).argmax.tolist() == [9]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_or_infinite_logit_spoils_the_sum(kernel_device, bad):
    z = draw("typical", torch.float32, kernel_device)
    z[1, 2, 3] = bad
    state = absorbed(z)
    assert state.sums[1].isnan().tolist() == [False, False, True, False]
    assert across_all(state).sums[1].isnan().all()
    assert merged(absorbed(z[:1]), state).sums[1].isnan().tolist() == [False, False, True, False]
