"""Launches pass the JIT's binder and compile: what the interpreter cannot show and only a GPU would."""

import json

import pytest

pytest.importorskip("triton")
from bonus_ops.kernels.gpu import launch


def test_every_launch_binds_and_compiles(compiled):
    """A kernel argument called `params` once shadowed a name of the binder's; the interpreter ran it all the same."""
    assert json.loads(compiled.splitlines()[-1]) == [
        "backward_kernel", "deep_partial_kernel", "forward_kernel", "forward_softmax_kernel", "from_l2_kernel",
        "held_kernel", "merge_kernel", "partial_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("warp_size", [32, 64])
def test_a_lane_is_a_thread(warp_size):
    """Otherwise chunks spread over threads, or threads repeat loads; sizes are powers of two, as Triton wants."""
    for n_classes in (1, 8, 10, 63, 64, 1000, 2047, 2048, 4096, 8191, 8192, 50257, 65536, 262144, 2**24):
        for shape in (launch.forward, launch.backward):
            for n_rows in (1, 64, 65536):
                how = shape(n_rows, n_classes, warp_size)
                two = 1 + (shape is launch.backward and n_classes >= 2048)  # chunks a thread
                assert how.rows * how.lanes == two * how.num_warps * warp_size, (shape, n_classes, how)
                apart = shape(n_rows, n_classes, warp_size, 0)
                assert apart.rows == warp_size and apart.lanes == apart.num_warps
                assert all(x & (x - 1) == 0 for x in (how.rows, how.lanes, how.num_warps))
                assert how.parts >= 1 and (how.rows == 1 or how.parts == 1)
