"""Machine code of the kernels, compiled offline for GPUs that need not be here, against the bounds of `bench.codegen`.

The suite compiles each path once; `python -m bench codegen --gate` checks every class count, dtype and target.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from bench.codegen import gates, machine_code, report, roofline
from bench.machines import MACHINES
from tests.conftest import of_tested_compiler

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found(compiled):
    return json.loads(compiled)


@pytest.fixture(scope="module")
def committed():
    return json.loads((ROOT / "bench/results/codegen.json").read_text())


def kernels(found):
    return {(x["kernel"], x["target"]) for x in found["builds"]}


@of_tested_compiler
def test_every_bound_is_kept(found):
    assert found["failures"] == []


def test_nothing_is_missing(found):
    """A gate over an empty list would pass."""
    assert kernels(found) >= {
        (kernel, target)
        for kernel in ("forward_kernel", "partial_kernel", "merge_kernel", "backward_kernel", "forward_softmax_kernel")
        for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    }
    assert {x["call"] for x in found["builds"]} >= {
        f"{target}, {what}"
        for target, calls in {
            "smoothing": ("forward", "one sweep", "backward"), "probabilities": ("forward", "one sweep", "backward"),
            "sigmoid": ("sum", "losses", "backward"),
        }.items() for what in calls
    }  # fmt: skip
    sweeps = {x["call"]: len(x["loops"]) for x in found["builds"] if x["kernel"] == "soft_forward_kernel"}
    # a sweep is a loop over whole tiles and one over the others
    assert sweeps == {f"{target}, {what}": 2 * n for target in ("smoothing", "probabilities")
                      for what, n in (("forward", 2), ("one sweep", 1))}  # fmt: skip
    for x in filter(gates.by_vectors, found["builds"]):
        first, last = x["loops"][0], x["loops"][-1]
        backward = x["kernel"].endswith("backward_kernel")
        assert bool(last["stores"]) == (backward or x["kernel"] == "forward_softmax_kernel"), gates.label(x)
        assert bool(first["stores"]) == backward, gates.label(x)


def test_the_loops_of_a_long_row_are_told_apart(found):
    """Full tiles are the cheaper loop: what the predictions charge most logits with."""
    for x in found["builds"]:
        names = roofline.passes(x)
        assert len(names) == len(x["loops"]), gates.label(x)
        if {"full", "masked"} <= set(names):
            full, masked = (x["loops"][names.index(name)]["instructions"] for name in ("full", "masked"))
            assert full < masked, gates.label(x)


def a_build(found, kernel="partial_kernel"):
    for x in found["builds"]:
        here = (x["kernel"], x["target"], x["dtype"]) == (kernel, "sm_90", "bf16")
        if here and gates.by_vectors(x) and not gates.shares_a_warp(x):
            return copy.deepcopy(x)
    raise LookupError(kernel)


FAULTS = {
    gates.no_spill: lambda x: x | {"stack": 8},
    gates.registers: lambda x: x | {"registers": 256},
    gates.loads_of_128_bits: lambda x: x["loops"][0].update(loads={"16": 8}),
    gates.stores_of_128_bits: lambda x: x["loops"][0].update(stores={"16": 8}),
    gates.each_logit_once: lambda x: x["loops"][0].update(logits=16),
    gates.one_exponential_a_logit: lambda x: x["loops"][0].update(exp=16),
    gates.no_barrier_in_a_loop: lambda x: x["loops"][0].update(barriers=1),
    gates.instructions_keep_up: lambda x: x["loops"][0].update(instructions=400),
    gates.loads_run_ahead: lambda x: x["loops"][0].update(ahead=3),
}


@of_tested_compiler
@pytest.mark.parametrize("gate", gates.GATES, ids=lambda gate: gate.__name__)
def test_a_gate_sees_its_fault(found, gate):
    build = a_build(found)
    assert gate(build) is None
    assert gate(FAULTS[gate](build) or build) is not None


@of_tested_compiler
def test_a_gate_sees_the_faults_of_what_came_later(found):
    """A sum that waits in its loop, probabilities read twice, their gradient stored in halves."""
    builds = {x["call"]: x for x in found["builds"] if ", " in x["call"]}
    assert list(gates.failures([*builds.values()])) == []
    for call, gate, fault in (
        ("sigmoid, sum", gates.no_barrier_in_a_loop, {"barriers": 1}),
        ("sigmoid, sum", gates.loads_of_128_bits, {"loads": {"16": 16}}),
        ("probabilities, forward", gates.each_logit_once, {"logits": 24}),
        ("probabilities, backward", gates.stores_of_128_bits, {"stores": {"64": 2}}),
        ("smoothing, forward", gates.no_barrier_in_a_loop, {"shuffles": 1}),
        ("smoothing, one sweep", gates.one_exponential_a_logit, {"exp": 19}),
    ):
        build = copy.deepcopy(builds[call])
        build["loops"][-1].update(fault)
        assert gate(build) is not None, (call, gate.__name__)


def the_case(found, call, n_rows, n_classes):
    wanted = {"call": call, "dtype": "bf16", "n_rows": n_rows, "n_classes": n_classes, "target": "sm_90", "offset": 0}
    return next(case for case in found["cases"] if wanted.items() <= case.items())


# --- predictions ------------------------------------------------------------------------------------------------------


def test_a_streaming_row_is_bound_by_memory(committed):
    """The promise in numbers: on an H200 a long row costs its bytes, forward and backward."""
    for call in ("forward", "backward"):
        case = the_case(committed, call, 8192, 262144)
        predicted = roofline.predict(case, committed["builds"], MACHINES["H200"])
        assert predicted["binds"] == "bandwidth" and predicted["share_of_bandwidth"] > 0.95
        assert predicted["times_ms"]["bandwidth"] == pytest.approx(
            8192 * 262144 * 2 * (1 + (call == "backward")) / 4.32e9, rel=1e-3
        )


def test_work_of_a_launch_by_hand():
    """100 outside, 10 a full tile, 20 a masked one: 7 chunks over 2 lanes are 3 full tiles, one the label's, and 1.

    The last full one is loaded ahead of the masked ones and goes with them.
    """
    loops = [{"instructions": 10, "special": 1}, {"instructions": 20, "special": 2}]
    build = {"kernel": "forward_kernel", "constants": {"ROWS": 1, "LANES": 2}, "loops": loops,
             "instructions": 130, "special": 3}  # fmt: skip
    launch = {"programs": 3, "threads": 32, "constants": build["constants"]}
    done = roofline.work(build, launch, n_rows=3, n_classes=56)
    assert done.instructions == 3 * 32 * (100 + 1 * 10 + 3 * 20)
    assert done.special == 3 * 32 * (0 + 1 * 1 + 3 * 2)


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


def test_fewer_bytes_in_flight_take_longer(committed):
    case = the_case(committed, "forward", 65536, 1000)
    found = roofline.queued(case, committed["builds"], MACHINES["H200"])
    assert found.kib_in_flight == 16 and found.once_ms == pytest.approx(65536 * 1000 * 2 / 4.32e9)
    halved = [x | {"registers": 128} for x in committed["builds"]]
    slower = roofline.queued(case, halved, MACHINES["H200"])
    assert slower.kib_in_flight == 8 and 1 < found.over_roof < slower.over_roof


def test_a_machine_is_the_product_of_its_units():
    h200 = MACHINES["H200"]
    assert h200.special_per_s == pytest.approx(4.2e12, rel=0.01)
    assert h200.lanes_per_s == pytest.approx(3.3e13, rel=0.02)


# --- the committed table ----------------------------------------------------------------------------------------------


def test_the_committed_table_is_the_report_of_the_committed_json(committed):
    assert (ROOT / "bench/results/codegen.md").read_text() == report.markdown(committed)


def test_the_committed_json_covers_the_table(committed):
    cases = committed["cases"]
    assert {c["target"] for c in cases} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"}
    assert {c["n_classes"] for c in cases} >= {10, 1000, 1024, 32000, 50257, 50304, 128256, 151936, 262144}
    assert {c["dtype"] for c in cases} == {"fp16", "bf16", "fp32", "fp64"}
    assert list(gates.failures(committed["builds"])) == []
