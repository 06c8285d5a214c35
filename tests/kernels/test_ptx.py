"""The machine that executes PTX: its arithmetic, its threads, and that it sees what hardware would not forgive."""

from __future__ import annotations

import math
import re
import struct

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests import compilers
from tests.ptx.machine import Machine
from tests.ptx.memory import Fault
from tests.ptx.program import parse

HEAD = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry sketch(
	.param .u64 .ptr .global .align 1 sketch_param_0,
	.param .u64 .ptr .global .align 1 sketch_param_1,
	.param .u32 sketch_param_2
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<99>;
	.reg .f32 	%f<9>;
	.reg .b64 	%rd<99>;
	ld.param.b64 	%rd1, [sketch_param_0];
	ld.param.b64 	%rd2, [sketch_param_1];
	ld.param.b32 	%r90, [sketch_param_2];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mov.u32 	%r91, global_smem;
	mul.lo.s32 	%r3, %r2, {threads};
	add.s32 	%r3, %r3, %r1;               // number of the thread
	mul.wide.s32 	%rd3, %r3, 4;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd2, %rd3;
	shl.b32 	%r4, %r1, 2;
	add.s32 	%r5, %r91, %r4;              // its word of shared memory
{body}
	ret;
}}
"""


def run(body, x=None, n_programs=1, threads=32, shared=1024, number=0):
    """Run a body on int32 words ``x``, one a thread in %rd4; return what it stored through %rd5."""
    n = n_programs * threads
    x = torch.arange(n, dtype=torch.int32) if x is None else x
    out = torch.full((n,), -1, dtype=torch.int32)
    program = parse(HEAD.format(threads=threads, body=body))
    Machine(program, [x, out, number], shared).run((n_programs,), np.arange(n_programs))
    return out.tolist()


def bits(x):
    return struct.unpack("i", struct.pack("f", x))[0]


def number(x):
    return struct.unpack("f", struct.pack("i", x))[0]


STORE = "st.global.b32 [%rd5], %r10;"
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mul.lo.s32 %r10, 65537, 65537;", 131073),
        ("mul.hi.u32 %r10, -1, -1;", -2),
        ("mul.wide.s32 %rd9, -3, 5; cvt.u32.u64 %r10, %rd9;", -15),
        ("mad.lo.s32 %r10, 3, -4, 5;", -7),
        ("div.s32 %r10, -7, 2;", -3),
        ("rem.s32 %r10, -7, 2;", -1),
        ("shr.s32 %r10, -8, 1;", -4),
        ("shr.u32 %r10, -8, 1;", 2**31 - 4),
        ("shr.u32 %r10, -8, 32;", 0),
        ("shl.b32 %r10, 3, 30;", -(2**30)),
        ("bfe.u32 %r10, 0xABCD, 4, 8;", 0xBC),
        ("bfe.s32 %r10, 0xABCD, 4, 8;", 0xBC - 256),
        ("prmt.b32 %r10, 0x33221100, 0x77665544, 0x7531;", 0x77553311),
        ("min.s32 %r10, -1, 1;", -1),
        ("min.u32 %r10, -1, 1;", 1),
        ("min.relu.s32 %r10, -5, 3;", 0),
        ("not.b32 %r10, 5;", -6),
        ("neg.s32 %r10, 5;", -5),
        ("cvt.s32.s8 %r10, 200;", -56),
        ("cvt.u32.u8 %r10, 456;", 200),
        ("mov.b32 %r9, 0xFFFF0003; mov.b32 {%rs1, %rs2}, %r9; cvt.s32.s16 %r10, %rs2;", -1),
        ("mov.b16 %rs1, 5; mov.b16 %rs2, 1; mov.b32 %r10, {%rs1, %rs2};", 65541),
        ("mov.b64 %rd9, {7, 1}; shr.u64 %rd9, %rd9, 1; cvt.u32.u64 %r10, %rd9;", 3 - 2**31),
        ("{ .reg .b32 tmp; mov.b64 {tmp, %r10}, 0x500000001; }", 5),
        ("cvt.rn.bf16x2.f32 %r10, 0f3F800000, 0f40000000;", 0x3F804000),
        ("mov.b16 %rs1, 0x3FC0; sub.rn.f32.bf16 %r10, %rs1, 0f3F000000;", bits(1.0)),
        ("mov.b16 %rs1, 0x3E00; fma.rn.f32.f16 %r10, %rs1, %rs1, 0f3F000000;", bits(2.75)),
        ("mov.b16 %rs1, 0x3FC0; cvt.f32.bf16 %r10, %rs1;", bits(1.5)),
        ("mov.b16 %rs1, 0x3E00; cvt.f32.f16 %r10, %rs1;", bits(1.5)),
        ("cvt.rn.f32.s32 %r10, 16777217;", bits(16777216.0)),
        ("mov.b64 %rd9, {0f40000000, 0f3F800000}; fma.rn.f32x2 %rd9, %rd9, %rd9, %rd9; mov.b64 {_, %r10}, %rd9;",
         bits(2.0)),
        ("mov.b64 %rd9, {0f40000000, 0f3F800000}; add.f32x2 %rd9, %rd9, %rd9; mov.b64 {%r10, _}, %rd9;", bits(4.0)),
        ("add.s16x2 %r10, 0x0001FFFF, 0x00010001;", 0x00020000),
        ("mov.b32 %r10, 3; setp.lt.s32 %p1, 1, 2; @!%p1 mov.b32 %r10, 4;", 3),
    ],
)  # fmt: skip
def test_integers_and_formats(line, expected):
    assert set(run(line + STORE)) == {expected}


@pytest.mark.parametrize(
    ("line", "a", "b", "expected"),
    [
        ("max.f32 %r10, %r8, %r9;", NAN, -1.0, -1.0),
        ("max.f32 %r10, %r8, %r9, 0f40A00000;", NAN, -1.0, 5.0),
        ("max.NaN.f32 %r10, %r8, %r9;", NAN, -1.0, NAN),
        ("min.f32 %r10, %r8, %r9;", 2.0, NAN, 2.0),
        ("fma.rn.f32 %r10, %r8, %r8, %r9;", 1 + 2.0**-12, -1 - 2.0**-11, 2.0**-24),
        ("add.f32 %r10, %r8, %r9;", 2.0**-127, 2.0**-128, 2.0**-127 + 2.0**-128),
        ("add.ftz.f32 %r10, %r8, %r9;", 2.0**-127, 2.0**-128, 0.0),
        ("ex2.approx.ftz.f32 %r10, %r8;", 0.0, 0.0, 1.0),
        ("ex2.approx.ftz.f32 %r10, %r8;", -INF, 0.0, 0.0),
        ("div.full.f32 %r10, %r8, %r9;", 1.0, INF, 0.0),
        ("selp.f32 %r10, %r8, %r9, %p1;", 3.0, 4.0, 4.0),
    ],
)
def test_numbers(line, a, b, expected):
    given = f"mov.b32 %r8, 0f{bits(a) % 2**32:08X}; mov.b32 %r9, 0f{bits(b) % 2**32:08X}; mov.pred %p1, 0;"
    (found,) = set(run(given + line + STORE))
    assert number(found) == expected or math.isnan(expected) and math.isnan(number(found))


@pytest.mark.parametrize(
    ("compare", "of_numbers", "with_nan"),
    [("eq", False, False), ("ne", True, False), ("neu", True, True), ("equ", False, True), ("lt", True, False),
     ("geu", False, True), ("num", True, False), ("nan", False, True)],
)  # fmt: skip
def test_comparisons_know_nan(compare, of_numbers, with_nan):
    for b, expected in ((2.0, of_numbers), (NAN, with_nan)):
        line = f"setp.{compare}.f32 %p1, 0f3F800000, 0f{bits(b) % 2**32:08X}; selp.b32 %r10, 1, 0, %p1;"
        assert set(run(line + STORE)) == {int(expected)}


@pytest.mark.parametrize("name", ["ex2", "rsqrt", "sqrt", "rcp"])
def test_approximations_err_by_what_the_documents_allow(name):
    """Not less, or tests that pass here would say little, and never more."""
    exact = {"ex2": np.exp2, "rsqrt": lambda x: x**-0.5, "sqrt": np.sqrt, "rcp": lambda x: 1 / x}[name]
    x = torch.rand(256) * 3 + 1.1
    found = run(f"ld.global.b32 %r9, [%rd4]; {name}.approx.ftz.f32 %r10, %r9;{STORE}", x.view(torch.int32), threads=256)
    truth = exact(x.double().numpy())
    error = np.abs(np.array([number(i) for i in found]) / truth - 1)
    assert 2.0**-24 < np.median(error) < error.max() < 2.0**-21.6
    assert len({number(i) > t for i, t in zip(found, truth, strict=True)}) == 2


def test_bfloat16_is_rounded_to_nearest_even():
    x = torch.cat([torch.randn(95), torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, INF, NAN])])
    x = torch.cat([x, torch.zeros(128 - len(x))])
    found = run(f"ld.global.b32 %r9, [%rd4]; cvt.rn.bf16.f32 %rs1, %r9; cvt.u32.u16 %r10, %rs1;{STORE}",
                x.view(torch.int32), threads=128)  # fmt: skip
    ours = torch.tensor(found, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(ours.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


# --- threads together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operands", "source"),
    [
        ("bfly.b32 %r10, %r1, 5, 31, -1", lambda i: i ^ 5),
        ("idx.b32 %r10, %r1, 7, 31, -1", lambda i: 7),
        ("idx.b32 %r10, %r1, 3, 6175, -1", lambda i: i // 8 * 8 + 3),  # segments of 8: mask 24 << 8 | 31
    ],
)
def test_shuffles(operands, source):
    assert run(f"shfl.sync.{operands};{STORE}", threads=64) == [
        (source(i % 32) + i // 32 * 32) for i in range(64)
    ]  # fmt: skip


def test_a_warp_reduces():
    assert run(f"redux.sync.max.s32 %r10, %r1, -1;{STORE}", threads=64) == [31] * 32 + [63] * 32


LOOP = """
	mov.u32 %r10, 0;
	setp.eq.s32 %p1, %r1, 0;
	@%p1 bra $L__DONE;
	bra.uni $L__HEAD;
$L__LATCH:
	setp.lt.s32 %p2, %r10, %r1;
	@!%p2 bra $L__DONE;
$L__HEAD:
	add.s32 %r10, %r10, 1;
	and.b32 %r11, %r10, 1;
	setp.eq.s32 %p3, %r11, 0;
	@%p3 bra $L__LATCH;
	bra.uni $L__LATCH;
$L__DONE:
"""


def test_threads_leave_a_loop_one_by_one_and_meet():
    """Its latch stands before its head, as the compiler likes it."""
    assert run(LOOP + "redux.sync.add.s32 %r10, %r10, -1;" + STORE) == [sum(range(32))] * 32


def test_programs_do_not_meet():
    body = "setp.eq.s32 %p1, %r2, 1; @%p1 bra $L__X; bar.sync 0;\n$L__X: mov.u32 %r10, %r2;" + STORE
    assert run(body, n_programs=3) == [0] * 32 + [1] * 32 + [2] * 32


@pytest.mark.parametrize("together", ["bar.sync 0", "bar.warp.sync -1", "shfl.sync.bfly.b32 %r10, %r1, 1, 31, -1",
                                      "redux.sync.max.s32 %r10, %r1, -1"])  # fmt: skip
def test_a_missing_thread_is_seen(together):
    with pytest.raises(Fault, match="missing"):
        run(f"setp.lt.s32 %p1, %r1, 7; @%p1 bra $L__X; {together};\n$L__X: mov.u32 %r10, 0;")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ld.global.b32 %r10, [%rd4+4]", "belong to no tensor"),
        ("ld.global.b32 %r10, [%rd4+-4]", "belong to no tensor"),
        ("st.global.b32 [%rd5+4], %r1", "belong to no tensor"),
        ("ld.global.b32 %r10, [%rd99]", "."),  # a register that nobody wrote
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
    body = "setp.lt.s32 %p1, %r1, 31; mov.u32 %r10, 9; @%p1 ld.global.b32 %r10, [%rd4+4];" + STORE
    assert run(body) == [*range(1, 32), 9]


NEIGHBOUR = """
	xor.b32 %r6, %r4, {bytes};
	add.s32 %r6, %r91, %r6;
"""
WRITE, READ = "st.shared.b32 [%r5], %r1;", "ld.shared.b32 %r10, [%r6];"
PROGRAM, WARP = "bar.sync 0;", "bar.warp.sync -1;"


@pytest.mark.parametrize(
    ("distance", "order", "clean"),
    [
        (32, (WRITE, PROGRAM, READ), True),
        (32, (WRITE, READ), False),
        (32, (WRITE, WARP, READ), False),  # the neighbour is in another warp
        (1, (WRITE, WARP, READ), True),
        (1, (WRITE, PROGRAM, READ), True),
        (1, (WRITE, READ), False),
        (32, (WRITE, PROGRAM, READ, PROGRAM, WRITE), True),
        (32, (WRITE, PROGRAM, READ, WRITE), False),
        (1, (WRITE, WARP, READ, WRITE), False),
        (1, (WRITE, WARP, READ, WARP, WRITE), True),
    ],
)
def test_threads_that_no_barrier_parts_must_not_meet(distance, order, clean):
    body = NEIGHBOUR.format(bytes=4 * distance) + "\n".join(order) + STORE
    if clean:
        assert run(body, threads=64) == [i ^ distance for i in range(64)]
    else:
        with pytest.raises(Fault, match="before a barrier"):
            run(body, threads=64)


def test_reads_by_several_warps_are_all_remembered():
    """The last reader is not the only one that a write must wait for."""
    everyone_reads = "ld.shared.b32 %r10, [global_smem];"
    first_writes = "setp.eq.s32 %p1, %r1, {thread}; @%p1 st.shared.b32 [global_smem], %r1;"
    body = first_writes.format(thread=0) + PROGRAM + everyone_reads
    for thread in (0, 63):
        with pytest.raises(Fault, match="before a barrier"):
            run(body + first_writes.format(thread=thread), threads=64)
        run(body + PROGRAM + first_writes.format(thread=thread), threads=64)


EIGHT_ROWS = """
	mul.lo.s32 %r7, %r1, 16;
	and.b32 %r7, %r7, 127;
	add.s32 %r7, %r91, %r7;               // row of the lane, modulo 8
	st.shared.b32 [%r5], %r1;
	bar.warp.sync -1;
"""


def test_matrices_of_eight_rows():
    """Four lanes share a row of 16 bytes whose address another lane gives."""
    body = (
        EIGHT_ROWS
        + """
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r7];
	bar.warp.sync -1;
	add.s32 %r11, %r10, 100;
	stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r11};
	bar.warp.sync -1;
	ld.shared.b32 %r12, [%r5];
	add.s32 %r10, %r10, %r12;
"""
    )
    assert run(body + STORE) == [2 * i + 100 for i in range(32)]


@pytest.mark.slow
def test_compiled_kernels_pass_the_tests_of_interpreted_ones(compiled):
    """A choice of those tests; with EMULATE=sm_90 in the environment any of them runs so."""
    passed = re.match(r"(\d+) passed in", compiled.splitlines()[-1])  # and none skipped
    assert passed and int(passed[1]) > len(compilers.EMULATED)


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match=r"tensor\.core"):
        run("tensor.core.f32 %r10, %r1;")
