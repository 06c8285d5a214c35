"""Machine code of the kernels, compiled offline for GPUs that need not be here, against the bounds of `bench.codegen`.

The suite compiles each path once; `python -m bench codegen` checks every class count, dtype and target.
"""

from __future__ import annotations

import copy
import json

import pytest

from bench.codegen import gates, launches, machine_code, predict, report
from bench.codegen.predict import MACHINES
from tests.conftest import of_tested_compiler

COMMAND = ("-m", "bench", "codegen", "--quick", "--json")


@pytest.fixture(scope="module")
def found(compiled):
    return json.loads(compiled)


@of_tested_compiler
def test_every_bound_is_kept(found):
    assert found["failures"] == []


def test_nothing_is_missing(found):
    """A gate over an empty list would pass, and one that takes the loops of a sweep for others."""
    builds = found["builds"].values()
    assert {(x["kernel"], x["target"]) for x in builds} >= {
        (kernel, target)
        for kernel in ("forward_kernel", "partial_kernel", "merge_kernel", "backward_kernel", "forward_softmax_kernel")
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    assert {x["call"] for x in builds} == set(launches.CALLS) - {"loss only"}
    for x in builds:
        if gates.by_vectors(x) and not gates.on_amd(x):
            backward, softmax = x["kernel"].endswith("backward_kernel"), x["kernel"] == "forward_softmax_kernel"
            sweeps = 1 + (softmax or x["call"] in ("smoothing, forward", "probabilities, forward"))
            assert predict.passes(x) == ["full", "masked"] * sweeps or gates.shares_a_warp(x), gates.label(x)
            stores = [bool(x["loops"][at]["stores"]) for at in (0, -1)]
            assert stores == [backward, backward or softmax], gates.label(x)


def a_build(found, call, kernel, target):
    for x in found["builds"].values():
        here = (x["call"], x["target"], x["dtype"], x["offset"]) == (call, target, "bf16", 0)
        if here and x["kernel"] == (kernel or x["kernel"]) and not gates.shares_a_warp(x):
            return copy.deepcopy(x)
    raise LookupError(call)


FAULTS = [
    (gates.no_spill, "forward", lambda x: x.update(stack=8)),
    (gates.registers, "forward", lambda x: x.update(registers=256)),
    (gates.loads_of_128_bits, "forward", lambda x: x["loops"][0].update(loads={"16": 8})),
    (gates.loads_of_128_bits, "sigmoid, sum", lambda x: x["loops"][0].update(loads={"16": 16})),
    (gates.loads_of_128_bits, "on AMD", lambda x: x.update(loads={"16": 24})),
    (gates.stores_of_128_bits, "backward", lambda x: x["loops"][0].update(stores={"16": 8})),
    (gates.stores_of_128_bits, "probabilities, backward", lambda x: x["loops"][-1].update(stores={"64": 2})),
    (gates.each_logit_once, "forward", lambda x: x["loops"][0].update(logits=16)),
    (gates.each_logit_once, "probabilities, forward", lambda x: x["loops"][-1].update(logits=24)),
    (gates.one_exponential_a_logit, "forward", lambda x: x["loops"][0].update(exp=16)),
    (gates.one_exponential_a_logit, "backward", lambda x: x["loops"][0].update(exp=17)),
    (gates.one_exponential_a_logit, "smoothing, one sweep", lambda x: x["loops"][-1].update(exp=19)),
    (gates.one_exponential_a_logit, "smoothing, forward", lambda x: x.update(exp=100)),
    (gates.no_barrier_in_a_loop, "forward", lambda x: x["loops"][0].update(barriers=1)),
    (gates.no_barrier_in_a_loop, "sigmoid, sum", lambda x: x["loops"][-1].update(barriers=1)),
    (gates.no_barrier_in_a_loop, "smoothing, forward", lambda x: x["loops"][-1].update(shuffles=1)),
    (gates.instructions_keep_up, "forward", lambda x: x["loops"][0].update(instructions=400)),
    (gates.loads_run_ahead, "forward", lambda x: x["loops"][0].update(ahead=3)),
]


@of_tested_compiler
@pytest.mark.parametrize(("gate", "call", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_gate_sees_its_fault(found, gate, call, fault):
    call, target = ("forward", "gfx942") if call == "on AMD" else (call, "sm_90")
    build = a_build(found, call, "partial_kernel" if call == "forward" else None, target)
    assert gate(build) is None
    fault(build)
    assert gate(build) is not None
    assert {gate for gate, _, _ in FAULTS} == set(gates.GATES)


def test_a_streaming_row_is_bound_by_memory(found):
    """The promise in numbers: on an H200 a long row costs its bytes, forward and backward."""
    of = {(x["call"], x["n_classes"]): x for x in found["cases"] if (x["dtype"], x["target"]) == ("bf16", "sm_90")}
    for call in ("forward", "backward"):
        predicted = predict.predict(of[call, 32000], found["builds"], MACHINES["H200"])
        assert predicted.once_ms == pytest.approx(8192 * 32000 * 2 / 4.32e9) and 1 < predicted.over_roof < 1.1


def test_the_page_has_every_build_and_goal(found, tmp_path):
    text = report.markdown(found, tmp_path)
    assert all(f"| {x['kernel']}" in text for x in found["builds"].values())
    assert "| share of copy bandwidth, forward | 64 x 262144 bf16 | >= 0.6 | 0.5" in text and "| not measured |" in text


SKETCH = """
	/*0010*/ IMAD R1, R2, R3 ;
	/*0020*/ @!P0 BRA `(.L_loop_end) ;
.L_loop:
	/*0030*/ LDG.E.128 R4, desc[UR4][R2.64] ;
	/*0040*/ @!P1 BRA `(.L_no_label) ;
	/*0050*/ FSEL R4, R4, -INF, P1 ;
	/*0060*/ FSEL R5, R5, -INF, P1 ;
.L_no_label:
	/*0070*/ MUFU.EX2 R4, R4 ;
	/*0080*/ @P0 BRA `(.L_loop) ;
.L_loop_end:
	/*0090*/ @!P2 BRA `(.L_no_edge) ;
	/*00a0*/ FADD R4, R4, R5 ;
.L_no_edge:
	/*00b0*/ EXIT ;
.L_hardly_ever:
	/*00c0*/ BRA `(.L_loop_end) ;
"""


def test_what_a_branch_skips_is_not_counted():
    """Neither a label's mask nor an edge; the loop is counted apart, and what stands behind the end not at all."""
    code = machine_code.parse(SKETCH)
    spans = machine_code.streaming_loops(code)
    assert spans == code.loops == [(2, 7)] and len(code.instructions) == 11
    assert machine_code.least(code, 2, 7, []) == machine_code.least(code, 0, 10, spans) == 4
    assert machine_code.instructions_ahead(code.instructions[2:8]) == 2
