"""Machine code of the kernels, compiled offline for GPUs that need not be here.

Bounds, not equalities: registers and instructions move between versions of Triton.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

LONG = (1000, 32000, 50257)  # divisible by 8, by 16, odd: all must stream alike
STREAMING = ("forward_kernel", "forward_softmax_kernel", "partial_kernel", "backward_kernel")
WRITERS = ("forward_softmax_kernel", "backward_kernel")
CHUNK = 8


@pytest.fixture(scope="module")
def builds():
    """Compile in another process: under TRITON_INTERPRET nothing can be."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "bench.codegen", "--json"], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def label(build):
    return "{kernel} {dtype} {n_classes} {target}".format(**build)


def long_rows(builds):
    """Return the kernels that stream rows long enough to matter."""
    return [x for x in builds if x["n_classes"] in LONG and x["kernel"] in STREAMING]


def test_nothing_is_missing(builds):
    """A gate over an empty list would pass."""
    assert len(builds) == 4 * 2 * (4 + 4 + 1 + 1 + 1)
    assert {x["target"] for x in builds} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    # full tiles first, then the label's and the last tile (unrolled on some targets), then the sweep that writes
    for x in long_rows(builds):
        first, *_, last = [x["loops"][0], *x["loops"]]
        assert bool(last["stores"]) == (x["kernel"] in WRITERS), label(x)
        assert bool(first["stores"]) == (x["kernel"] == "backward_kernel"), label(x)


def test_no_stack_and_no_spill(builds):
    assert [label(x) for x in builds if x["stack"] or x["spills"]] == []


def test_registers_leave_room_for_many_lanes(builds):
    # a lane of the 10-class shape holds whole rows, 24 logits each: a chunk and an edge
    limits = {label(x): 64 if x["n_classes"] in LONG else 192 for x in builds}
    assert {label(x): x["registers"] for x in builds if x["registers"] > limits[label(x)]} == {}


def test_logits_are_loaded_by_128_bits(builds):
    narrow = {label(x): x["loops"] for x in long_rows(builds) if any(set(y["loads"]) != {"128"} for y in x["loops"])}
    assert narrow == {}


def test_outputs_of_a_row_are_stored_by_128_bits(builds):
    for x in long_rows(builds):
        stores = [y["stores"] for y in x["loops"] if y["stores"]]
        assert len(stores) == (x["kernel"] in WRITERS), label(x)
        # as many vectors out as in
        assert all(y == x["loops"][-1]["loads"] and set(y) == {"128"} for y in stores), label(x)


def test_a_loop_reads_each_of_its_logits_once(builds):
    assert {label(x): x["loops"] for x in long_rows(builds) if any(y["logits"] != CHUNK for y in x["loops"])} == {}


def test_one_exponential_a_logit_and_one_a_lane(builds):
    """8 a chunk and one to rescale in the sweep of full tiles, 8 in the one that writes, a bounded number elsewhere."""
    for x in long_rows(builds):
        full, writing = CHUNK + 1, CHUNK
        if x["kernel"] == "backward_kernel":
            full = 0
        else:
            assert x["loops"][0]["exp"] <= full, label(x)
        if x["kernel"] in WRITERS:
            assert x["loops"][-1]["exp"] <= writing, label(x)
        else:
            writing = 0
        # twice a merged tile (the label's, the last one), the edge, lanes, and the scalar functions of the gap
        assert x["exp"] <= full + writing + 2 * (CHUNK + 3) + 12, label(x)


def test_instructions_keep_up_with_bf16_logits(builds):
    """An H200 issues about 15 instructions a lane in the time that memory delivers a bf16 logit."""
    forward = [x for x in long_rows(builds) if x["kernel"] == "forward_kernel" and x["dtype"] == "bf16"]
    for x in forward:
        if x["target"] == "sm_90":
            assert x["loops"][0]["instructions"] <= 15 * CHUNK, label(x)


def test_lanes_do_not_wait_for_each_other_in_a_loop(builds):
    assert [label(x) for x in long_rows(builds) if any(y["barriers"] or y["shuffles"] for y in x["loops"])] == []


def test_hints_do_not_change_the_loop(builds):
    """An odd number of classes streams by the same instructions as a multiple of 16."""
    loops = {label(x): [(y["exp"], y["loads"], y["stores"]) for y in x["loops"]] for x in long_rows(builds)}
    for name, found in loops.items():
        assert found == loops.get(name.replace(" 1000 ", " 50257 ").replace(" 32000 ", " 50257 ")), name
