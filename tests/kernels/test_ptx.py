"""The machine that executes PTX sees what hardware would not forgive; its arithmetic is seen in the kernels it runs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.ptx.machine import Machine
from tests.ptx.memory import Fault
from tests.ptx.program import parse

KERNELS, GPU = "tests/kernels/test_kernels.py::", "tests/kernels/test_gpu.py::"
EMULATED = (  # every kernel, a dtype of each size, rows of each kind of length; any other case may be asked for
    "tests/kernels/test_emulated.py",
    *(f"{GPU}test_half_precision_is_rounded_once[{x}]" for x in ("600-10-bf16", "70-1003-fp16", "5-50257-bf16")),
    *(f"{GPU}test_rows_and_targets_at_any_address[{x}]" for x in ("1000-fp16", "1003-fp32", "5003-bf16")),
    *(f"{KERNELS}test_every_regime_and_path[fp32-typical-{n}]" for n in (1, 3, 8, 10, 64, 65, 1003, 2056, 16391)),
    *(f"{KERNELS}test_every_regime_and_path[{x}]" for x in ("bf16-masked-65", "bf16-confident-10", "fp64-masked-65")),
    *(f"{KERNELS}test_every_layout[{x}-torch.float32-1003]" for x in ("transposed", "padded_rows")),
    f"{KERNELS}test_a_bad_logit_spoils_its_row_alone[rest-nan-10]",
    "tests/api/test_soft.py::test_kernels[log_bonus-smoothing-torch.float32-9]",
    "tests/api/test_soft.py::test_kernels[log_bonus-probabilities-torch.float32-9]",
    "tests/api/test_sigmoid.py::test_any_layout[triton-none-in order-sliced]",
)
COMMAND = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *EMULATED)
ENVIRONMENT = {"EMULATE": "sm_90", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}

SKETCH = """
.visible .entry sketch(
	.param .u64 .ptr .global .align 1 sketch_param_0,
	.param .u64 .ptr .global .align 1 sketch_param_1
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;
	ld.param.b64 	%rd1, [sketch_param_0];
	ld.param.b64 	%rd2, [sketch_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.s32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;            // a word each of input
	add.s64 	%rd5, %rd2, %rd3;            // of output
	mov.u32 	%r91, global_smem;
	shl.b32 	%r4, %r1, 2;
	add.s32 	%r5, %r91, %r4;              // and of shared memory
{body}
	ret;
}}
"""
STORE = "st.global.b32 [%rd5], %r10;"


def run(body, x=None):
    """Run 64 threads on int32 words ``x``; return those that they stored."""
    x = torch.arange(64, dtype=torch.int32) if x is None else x
    out = torch.full_like(x, -1)
    Machine(parse(SKETCH.format(body=body)), [x, out], 1024).run((1,), np.arange(1))
    return out


NAN, ONE, PREDICATE = "0f7FC00000", "0f3F800000", "selp.b32 %r10, 1, 0, %p1;"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (f"max.f32 %r10, {NAN}, {ONE};", 0x3F800000),
        (f"setp.ne.f32 %p1, {NAN}, {ONE};{PREDICATE}", 0),
        (f"setp.neu.f32 %p1, {NAN}, {ONE};{PREDICATE}", 1),
        (f"setp.equ.f32 %p1, {NAN}, {ONE};{PREDICATE}", 1),
        (f"setp.geu.f32 %p1, {NAN}, {ONE};{PREDICATE}", 1),
        ("fma.rn.f32 %r10, 0f3F800800, 0f3F800800, 0fBF801000;", 0x33800000),  # (1 + 2^-12)^2 - 1 - 2^-11
        ("cvt.rn.bf16x2.f32 %r10, 0f3F808000, 0f3F818000;", 0x3F803F82),  # ties to even
        ("add.ftz.f32 %r10, 0f00400000, 0f00200000;", 0),
        ("shr.s32 %r10, -8, 1;", -4),
        ("shr.u32 %r10, -8, 32;", 0),
        ("bfe.s32 %r10, 0xABCD, 4, 8;", 0xBC - 256),
        ("div.s32 %r10, -7, 2;", -3),
        ("cvt.s64.s32 %rd9, -1; shr.u64 %rd9, %rd9, 32; cvt.u32.u64 %r10, %rd9;", -1),
        ("prmt.b32 %r10, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
    ],
)
def test_what_kernels_would_hardly_show(line, expected):
    """NaN, ties, signs and the smallest numbers."""
    assert set(run(line + STORE).tolist()) == {expected}


@pytest.mark.parametrize("name", ["ex2.approx.ftz", "rsqrt.approx.ftz", "sqrt.approx.ftz", "div.full"])
def test_approximations_err_by_what_the_documents_allow(name):
    """Not less, or tests that pass here would say little, and never more."""
    exact = {"ex2": torch.exp2, "rsqrt": torch.rsqrt, "sqrt": torch.sqrt, "div": lambda x: 1 / x}[name.split(".")[0]]
    x, one = torch.rand(64) * 3 + 1.1, "0f3F800000, " * name.startswith("div")
    found = run(f"ld.global.b32 %r9, [%rd4]; {name}.f32 %r10, {one}%r9;{STORE}", x.view(torch.int32))
    error = found.view(torch.float32).double() / exact(x.double()) - 1
    assert 2.0**-24 < error.abs().median() < error.abs().max() < 2.0**-21.6 and error.min() < 0 < error.max()


@pytest.mark.parametrize("together", ["bar.sync 0", "bar.warp.sync -1", "shfl.sync.bfly.b32 %r10, %r1, 1, 31, -1",
                                      "redux.sync.max.s32 %r10, %r1, -1"])  # fmt: skip
def test_a_missing_thread_is_seen(together):
    with pytest.raises(Fault, match="missing"):
        run(f"setp.lt.s32 %p1, %r1, 7; @%p1 bra $L__X; {together};\n$L__X: mov.u32 %r10, 0;")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ld.global.b32 %r10, [%rd4+4]", "belong to no tensor"),
        ("ld.global.b32 %r10, [%rd4+-4]", "belong to no tensor"),
        ("st.global.b32 [%rd5+4], %r1", "belong to no tensor"),
        ("ld.global.b32 %r10, [%rd98]", "."),  # a register that nobody wrote
        ("ld.global.b16 %rs1, [%rd4+1]", "not a multiple"),
        ("ld.global.v2.b32 {%r10, %r11}, [%rd4]", "not a multiple"),
        ("st.global.v4.b32 [%rd5], {%r1, %r1, %r1, %r1}", "not a multiple"),
        ("ld.shared.b32 %r10, [%r5]", "before it was written"),
        ("st.shared.b32 [%r5+1024], %r1", "out of bounds"),
        ("st.shared.b32 [%r5+2], %r1", "not a multiple"),
        ("st.shared.b32 [global_smem], %r1", "different values"),
    ],
)
def test_a_bad_access_is_seen(line, fault):
    with pytest.raises(Fault, match=fault):
        run(line + ";")


def test_lanes_switched_off_touch_nothing():
    body = "setp.lt.s32 %p1, %r1, 63; mov.u32 %r10, 9; @%p1 ld.global.b32 %r10, [%rd4+4];" + STORE
    assert run(body).tolist() == [*range(1, 64), 9]


WRITE, READ = "st.shared.b32 [%r5], %r1;", "ld.shared.b32 %r10, [%r6];"  # a neighbour's
PROGRAM, WARP = "bar.sync 0;", "bar.warp.sync -1;"


@pytest.mark.parametrize(
    ("distance", "order", "clean"),
    [
        (32, (WRITE, PROGRAM, READ, PROGRAM, WRITE), True),
        (32, (WRITE, PROGRAM, READ, WRITE), False),
        (32, (WRITE, READ), False),
        (32, (WRITE, WARP, READ), False),  # the neighbour is in another warp
        (1, (WRITE, WARP, READ, WARP, WRITE), True),
        (1, (WRITE, PROGRAM, READ), True),
        (1, (WRITE, WARP, READ, WRITE), False),
        (1, (WRITE, READ), False),
    ],
)
def test_threads_that_no_barrier_parts_must_not_meet(distance, order, clean):
    body = f"xor.b32 %r6, %r4, {4 * distance}; add.s32 %r6, %r91, %r6;" + "".join(order) + STORE
    if clean:
        assert run(body).tolist() == [i ^ distance for i in range(64)]
    else:
        with pytest.raises(Fault, match="before a barrier"):
            run(body)


@pytest.mark.parametrize("thread", [0, 63])
def test_reads_by_several_warps_are_all_remembered(thread):
    """The last reader is not the only one that a write must wait for."""
    write = "setp.eq.s32 %p1, %r1, {}; @%p1 st.shared.b32 [global_smem], %r1;"
    body = write.format(0) + PROGRAM + "ld.shared.b32 %r10, [global_smem];"
    run(body + PROGRAM + write.format(thread))
    with pytest.raises(Fault, match="before a barrier"):
        run(body + write.format(thread))


@pytest.mark.parametrize("line", ["tensor.core.f32 %r10, %r1", "max.NaN.f32 %r10, %r1, %r1", "mov.u32 %r10, %clock"])
def test_what_is_unknown_is_named(line):
    with pytest.raises(NotImplementedError, match=line.split()[-1]):
        run(line + ";")


@pytest.mark.slow
def test_compiled_kernels_pass_the_tests_of_interpreted_ones(compiled):
    """A choice of those tests; with EMULATE=sm_90 in the environment any of them runs so."""
    passed = re.match(r"(\d+) passed in", compiled.splitlines()[-1])  # and none skipped
    assert passed and int(passed[1]) > len(EMULATED)
