"""Machine code of the kernels, compiled offline for GPUs that need not be here, against the bounds of `bench.codegen`.

The suite compiles each path once; `python -m bench codegen --gate` checks every class count, dtype and target.
"""

from __future__ import annotations

import copy
import json

import pytest

from bench.codegen import gates, machine_code, predict, report
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
    """A gate over an empty list would pass."""
    assert {(x["kernel"], x["target"]) for x in found["builds"]} >= {
        (kernel, target)
        for kernel in ("forward_kernel", "partial_kernel", "merge_kernel", "backward_kernel", "forward_softmax_kernel")
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    soft = [f"{target}, {what}" for target in ("smoothing", "probabilities")
            for what in ("forward", "one sweep", "backward")]  # fmt: skip
    assert {x["call"] for x in found["builds"]} >= {*soft, "sigmoid, sum", "sigmoid, losses", "sigmoid, backward"}
    for x in filter(gates.by_vectors, found["builds"]):
        n = 2 if x["kernel"] == "soft_forward_kernel" and "one sweep" not in x["call"] else 1
        assert predict.passes(x) == ["full", "masked"] * n or x["kernel"] != "soft_forward_kernel", gates.label(x)
        first, last = x["loops"][0], x["loops"][-1]
        backward = x["kernel"].endswith("backward_kernel")
        assert bool(last["stores"]) == (backward or x["kernel"] == "forward_softmax_kernel"), gates.label(x)
        assert bool(first["stores"]) == backward, gates.label(x)
        if x["constants"]["ROWS"] == 1:  # full tiles are the cheaper loop: what predictions charge most logits with
            assert predict.passes(x) == ["full", "masked"] * (len(x["loops"]) // 2), gates.label(x)


def a_build(found, call, kernel=None):
    for x in found["builds"]:
        here = (x["call"], x["target"], x["dtype"], x["misaligned"]) == (call, "sm_90", "bf16", False)
        if here and x["kernel"] == (kernel or x["kernel"]) and not gates.shares_a_warp(x):
            return copy.deepcopy(x)
    raise LookupError(call)


FAULTS = [
    (gates.no_spill, "forward", lambda x: x.update(stack=8)),
    (gates.registers, "forward", lambda x: x.update(registers=256)),
    (gates.loads_of_128_bits, "forward", lambda x: x["loops"][0].update(loads={"16": 8})),
    (gates.loads_of_128_bits, "sigmoid, sum", lambda x: x["loops"][0].update(loads={"16": 16})),
    (gates.stores_of_128_bits, "backward", lambda x: x["loops"][0].update(stores={"16": 8})),
    (gates.stores_of_128_bits, "probabilities, backward", lambda x: x["loops"][-1].update(stores={"64": 2})),
    (gates.each_logit_once, "forward", lambda x: x["loops"][0].update(logits=16)),
    (gates.each_logit_once, "probabilities, forward", lambda x: x["loops"][-1].update(logits=24)),
    (gates.one_exponential_a_logit, "forward", lambda x: x["loops"][0].update(exp=16)),
    (gates.one_exponential_a_logit, "smoothing, one sweep", lambda x: x["loops"][-1].update(exp=19)),
    (gates.no_barrier_in_a_loop, "forward", lambda x: x["loops"][0].update(barriers=1)),
    (gates.no_barrier_in_a_loop, "sigmoid, sum", lambda x: x["loops"][-1].update(barriers=1)),
    (gates.no_barrier_in_a_loop, "smoothing, forward", lambda x: x["loops"][-1].update(shuffles=1)),
    (gates.instructions_keep_up, "forward", lambda x: x["loops"][0].update(instructions=400)),
    (gates.loads_run_ahead, "forward", lambda x: x["loops"][0].update(ahead=3)),
]


@of_tested_compiler
@pytest.mark.parametrize(("gate", "call", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_gate_sees_its_fault(found, gate, call, fault):
    build = a_build(found, call, "partial_kernel" if call == "forward" else None)
    assert gate(build) is None
    fault(build)
    assert gate(build) is not None
    assert {gate for gate, _, _ in FAULTS} == set(gates.GATES)


def the_case(found, call, n_rows, n_classes):
    wanted = {"call": call, "dtype": "bf16", "n_rows": n_rows, "n_classes": n_classes, "target": "sm_90", "offset": 0}
    return next(case for case in found["cases"] if wanted.items() <= case.items())


# --- predictions ------------------------------------------------------------------------------------------------------


def test_a_streaming_row_is_bound_by_memory(found):
    """The promise in numbers: on an H200 a long row costs its bytes, forward and backward."""
    for call in ("forward", "backward"):
        predicted = predict.predict(the_case(found, call, 8192, 32000), found["builds"], MACHINES["H200"])
        assert predicted.once_ms == pytest.approx(8192 * 32000 * 2 / 4.32e9) and 1 < predicted.over_roof < 1.1


def test_fewer_bytes_in_flight_take_longer(found):
    case = the_case(found, "forward", 65536, 1000)
    normal = predict.predict(case, found["builds"], MACHINES["H200"])
    halved = [x | {"registers": 128} for x in found["builds"]]
    slower = predict.predict(case, halved, MACHINES["H200"])
    assert (normal.kib_in_flight, slower.kib_in_flight) == (16, 8) and 1 < normal.over_roof < slower.over_roof


def test_instructions_of_a_launch_by_hand():
    """100 outside, 10 a full tile, 20 a masked one: 7 chunks over 2 lanes are 3 full tiles, one the label's, and 1.

    The last full one is loaded ahead of the masked ones and goes with them.
    """
    loops = [{"instructions": n, "stores": {}} for n in (10, 20)]
    build = {"kernel": "forward_kernel", "constants": {"ROWS": 1, "LANES": 2}, "loops": loops, "instructions": 130}
    launch = {"programs": 3, "threads": 32, "constants": build["constants"]}
    assert predict.instructions(build, launch, n_rows=3, n_classes=56) == 3 * 32 * (100 + 1 * 10 + 3 * 20)


def test_the_page_has_every_build_and_goal(found, tmp_path):
    text = report.markdown(found, tmp_path)
    assert all(f"| {x['kernel']}" in text for x in found["builds"]) and "not measured" in text
    assert "| share of copy bandwidth, forward | 64 x 262144 bf16 | >= 0.6 | 0.5" in text


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
    code = machine_code.parse(SKETCH, machine_code.NVIDIA)
    spans = machine_code.streaming_loops(code, machine_code.NVIDIA)
    assert spans == code.loops == [(2, 7)] and len(code.instructions) == 11
    assert machine_code.least(code, machine_code.NVIDIA, 2, 7, []) == 4
    assert machine_code.least(code, machine_code.NVIDIA, 0, 10, spans) == 4
