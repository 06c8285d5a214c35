"""Launches pass the JIT's binder and compile, to what fits: what the interpreter cannot show and only a GPU would."""

import json

import pytest

pytest.importorskip("triton")
from tests.conftest import of_tested_compiler

COMMAND = ("-m", "tests.compile_launches")


@pytest.fixture(scope="module")
def builds(compiled):
    return json.loads(compiled.splitlines()[-1])


def too_many(builds, what, most):
    return [(x["target"], x["kernel"], x["case"], what(x)) for x in builds if what(x) > most(x)]


def test_every_launch_binds_and_compiles(builds):
    """An argument called `params`, `None` in a tuple, a number below the smallest float32: interpreted all pass."""
    of_labels = {"forward", "forward_softmax", "backward", "partial", "merge", "deep_partial", "held"}
    kernels = of_labels | {"soft_forward", "soft_backward", "sigmoid", "sigmoid_sum", "sigmoid_backward"}
    compiled = {"sm_90": kernels, "gfx942": {"soft_forward", "soft_backward"}}
    assert {(x["target"], x["kernel"]) for x in builds} == {
        (target, f"{kernel}_kernel") for target, kernels in compiled.items() for kernel in kernels
    }


@of_tested_compiler
def test_no_stack_and_no_spill(builds):
    """But in an experiment whose rows are not aligned and, a little, in the softmax of a lane that holds whole rows."""
    checked = [x for x in builds if x["case"] != "held"]
    stack = {"forward_softmax_kernel": 24}
    assert too_many(checked, lambda x: x["stack"] + x["spills"], lambda x: stack.get(x["kernel"], 0)) == []


def test_registers_leave_room_for_many_lanes(builds):
    """float64 aside; of shares a transposed row, and one whose weights are read class by class, take most.

    512 threads of 128 registers fill a multiprocessor's file.
    """

    def most(x):
        if not x["kernel"].startswith("soft"):
            return 128
        return 104 if x["case"] == "by vectors" else 192

    checked = [x for x in builds if x["kernel"].startswith(("soft", "sigmoid")) and x["case"] != "float64"]
    assert checked and too_many(checked, lambda x: x["registers"], most) == []


def test_rows_and_elements_move_by_whole_vectors_and_no_lane_waits(builds):
    """Odd numbers of classes too; class weights are read one by one, and their lanes wait in forward."""
    checked = [x for x in builds if x["target"] == "sm_90" and "by vectors" in x["case"]]
    assert {x["kernel"][:4] for x in checked} == {"soft", "sigm"}
    for x in checked:
        backward, weighted = "backward" in x["kernel"], "weights" in x["case"]
        for loop in x["loops"] if x["kernel"].startswith("soft") else ():
            assert set(loop["loads"]) <= ({"128", "16"} if weighted else {"128"}), x
            assert loop["loads"]["128"] == 1 + ("probabilities" in x["case"]), x
            assert loop["stores"] == ({"128": 1} if backward else {}), x
            # since a tile is loaded ahead, weights are shuffled to the lanes of its logits
            assert weighted or loop["barriers"] == loop["shuffles"] == 0, x
        if x["kernel"].startswith("sigmoid"):  # the tail by elements, 8 a thread of each operand; the upstream twice
            assert x["loads"].pop("128") >= 2 and sum(x["loads"].values()) <= 2 * 8 + 2, x
            assert x["kernel"] == "sigmoid_sum_kernel" or x["stores"]["128"] >= 1, x
