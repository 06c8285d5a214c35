"""What the compiler makes of the kernels, for GPUs that are not here: registers, spills, load widths, instructions.

    python -m bench.codegen

compiles offline and prints a table. Runs without TRITON_INTERPRET, which must be unset when triton is imported.
"""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bonus_ops import LogBonus
from bonus_ops.kernels import backward, forward, gap_losses, launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "bf16": 2}
CLASS_COUNTS = (10, 1000, 32000, 50257)
MANY_ROWS, FEW_ROWS = 4096, 8  # a program a row or more; several programs a row
NVIDIA_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Case(NamedTuple):
    kernel: str
    dtype: str
    n_classes: int
    target: str


def cases() -> list[Case]:
    """Return every kernel at the class counts it serves: split rows are long ones."""
    counts = {
        "forward_kernel": CLASS_COUNTS,
        "backward_kernel": CLASS_COUNTS,
        "forward_softmax_kernel": (50257,),
        "partial_kernel": (50257,),
        "merge_kernel": (50257,),
    }
    return [
        Case(kernel, dtype, n_classes, target)
        for target in TARGETS
        for dtype in BYTES
        for kernel, n_of in counts.items()
        for n_classes in n_of
    ]


def compile_all(only: list[Case] | None = None) -> list[dict[str, Any]]:
    """Compile every case and return what was found, a dict each: see `describe`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    todo = only or cases()
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        return [case._asdict() | found for case, found in zip(todo, pool.map(inspect_kernel, todo), strict=True)]


# --- the launch as ops.py makes it, with types for tensors ------------------------------------------------------------


def arguments(case: Case) -> tuple[Any, dict[str, Any], int]:
    """Return (kernel, arguments by name, warps); a string is the type of a pointer or number."""
    dtype, n_classes = case.dtype, case.n_classes
    vector = 16 // BYTES[dtype]
    logits, stats, strides = f"*{dtype}", "*fp32", (n_classes, n_classes, 1)
    params = (("fp32",) * len(LogBonus().parameters()),) * 2
    common = {
        "logits_ptr": logits, "target_ptr": "*i64", "shape": ("i32", n_classes, 1), "strides": strides,
        "ignore_index": -100,
    }  # fmt: skip
    outputs = {"outputs": (stats, "*fp32", "*i32", stats), "loss_params": params, "VALUE": gap_losses.log_bonus_value}
    sums = {"sums_ptr": stats, "argmax_ptr": "*i32"}
    warp_size = TARGETS[case.target].warp_size
    how = launch.forward(MANY_ROWS, n_classes, warp_size)
    split = launch.forward(FEW_ROWS, n_classes, warp_size)
    tile = {"ROWS": how.rows, "LANES": how.lanes, "VECTOR": vector}
    if case.kernel == "forward_kernel":
        return forward.forward_kernel, common | outputs | tile, how.num_warps
    if case.kernel == "forward_softmax_kernel":
        softmax = {"softmax_ptr": logits, "softmax_strides": strides}
        return forward.forward_softmax_kernel, common | outputs | softmax | tile, how.num_warps
    if case.kernel == "partial_kernel":
        return forward.partial_kernel, common | sums | {"LANES": split.lanes, "VECTOR": vector}, split.num_warps
    if case.kernel == "merge_kernel":
        return forward.merge_kernel, common | outputs | sums | {"PARTS": split.parts}, 1
    how = launch.backward(MANY_ROWS, n_classes, warp_size)
    gradient = {
        "saved_ptr": stats, "grad_loss_ptr": stats, "grad_ptr": logits, "grad_strides": strides, "grad_loss_stride": 1,
        "loss_params": params, "SLOPE": gap_losses.log_bonus_slope,
        "ROWS": how.rows, "LANES": how.lanes, "VECTOR": vector,
    }  # fmt: skip
    return backward.backward_kernel, common | gradient, how.num_warps


def compile_kernel(case: Case) -> Any:
    """Compile as the JIT would specialise the arguments: 1 is a constant, multiples of 16 are known as such.

    No pointer is promised to be aligned.
    """
    kernel, given, num_warps = arguments(case)
    assert set(given) == set(kernel.arg_names), set(given) ^ set(kernel.arg_names)
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}

    def type_of(x: Any, path: tuple[int, ...], constant: bool) -> Any:
        if isinstance(x, tuple):
            return tuple(type_of(item, (*path, i), constant) for i, item in enumerate(x))
        if isinstance(x, str):
            return x
        if constant or x == 1:
            constants[path] = x
            return "constexpr"
        if x % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32"

    signature = {p.name: type_of(given[p.name], (i,), p.is_constexpr) for i, p in enumerate(kernel.params)}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=TARGETS[case.target], options={"num_warps": num_warps})


# --- reading machine code ---------------------------------------------------------------------------------------------


class Isa(NamedTuple):
    """How to read one assembly language: line patterns with the groups named in `parse`, opcode patterns."""

    label: str  # (name)
    instruction: str  # (opcode)(operands)
    branch: str  # (label) in the operands of a branch
    exp: str
    load: str  # the width is read by `width`
    store: str
    barrier: str
    shuffle: str
    spill: str


NVIDIA = Isa(
    label=r"^(\.L_\w+):",
    instruction=r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*)",
    branch=r"^BRA.*`\((\.L_\w+)\)",
    exp=r"^MUFU\.EX2",
    load=r"^LDG",
    store=r"^STG",
    barrier=r"^BAR",
    shuffle=r"^(SHFL|LDS|STS)",
    spill=r"^(LDL|STL)",
)
AMD = Isa(
    label=r"^(\.LBB\w+):",
    instruction=r"^\s+([sv]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+|scratch_\w+)\s*(.*)",
    branch=r"^s_c?branch\w*\s+(\.LBB\w+)",
    exp=r"^v_exp_f32",
    load=r"^(global|buffer|flat)_load",
    store=r"^(global|buffer|flat)_store",
    barrier=r"^s_barrier",
    shuffle=r"^ds_",
    spill=r"^scratch_",
)


def width(opcode: str) -> int:
    """Return the bytes a lane moves by a load or store."""
    wide = re.search(r"\.(128|64)\b|dwordx(\d)|_b(128|96|64|32|16)\b", opcode)
    if wide:
        nvidia, dwords, bits = wide.groups()
        return int(dwords) * 4 if dwords else int(nvidia or bits) // 8
    return 2 if re.search(r"16|short", opcode) else 1 if re.search(r"[US]8|byte", opcode) else 4


def inspect_kernel(case: Case) -> dict[str, Any]:
    """Compile one case and read its machine code."""
    built = compile_kernel(case)
    if case.target.startswith("gfx"):
        isa, text = AMD, built.asm["amdgcn"]
        keys = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        registers, stack, spills = (int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in keys)
    else:
        isa, (usage, text) = NVIDIA, disassemble(built.asm["cubin"])
        registers, stack, spills = *map(int, re.findall(r"(?:REG|STACK):(\d+)", usage)), 0
    opcodes, loops = parse(text, isa)
    found = describe(opcodes, isa, BYTES[case.dtype])
    found["spills"] += spills
    loops = [describe(body, isa, BYTES[case.dtype]) for body in loops]
    return found | {"registers": registers, "stack": stack, "loops": loops}


def disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (["cuobjdump", "-res-usage"], ["nvdisasm", "-c"])
        usage, text = (
            subprocess.run(
                [os.path.join(NVIDIA_TOOLS, tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in commands
        )
    return usage, text


def parse(text: str, isa: Isa) -> tuple[list[str], list[list[str]]]:
    """Return all opcodes and those of every loop that streams logits: from a label to the last branch back to it.

    Code moved behind its use is reached by a backward branch too: a loop must load and exponentiate, and hold no other.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}
    for line in text.splitlines():
        if label := re.match(isa.label, line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(isa.instruction, line):
            branch = re.match(isa.branch, " ".join(instruction.groups()))
            if branch and branch[1] in labels:
                loops[labels[branch[1]]] = len(opcodes)
            opcodes.append(instruction[1])

    def streams(first: int, last: int) -> bool:
        body = opcodes[first : last + 1]
        return all(any(re.match(pattern, op) for op in body) for pattern in (isa.load, isa.exp))

    spans = [span for span in sorted(loops.items()) if streams(*span)]
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return opcodes, [opcodes[first : last + 1] for first, last in inner]


def describe(opcodes: list[str], isa: Isa, element: int) -> dict[str, Any]:
    """Count what matters; ``logits`` are those a lane loads if every load is of logits, widths are bits to numbers."""

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, op)) for op in opcodes)

    def widths(pattern: str) -> dict[str, int]:
        return dict(collections.Counter(str(8 * width(op)) for op in opcodes if re.match(pattern, op)))

    loads = widths(isa.load)
    return {
        "instructions": len(opcodes),
        "exp": count(isa.exp),
        "loads": loads,
        "stores": widths(isa.store),
        "barriers": count(isa.barrier),
        "shuffles": count(isa.shuffle),
        "spills": count(isa.spill),
        "logits": sum(int(bits) // 8 * n for bits, n in loads.items()) // element,
    }


def main() -> None:
    """Print a row a case; with ``--json`` the whole result."""
    found = compile_all()
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    print(f"triton {triton.__version__}; exponentials and instructions a logit in the first loop, over full tiles")
    print(f"{'kernel':24}{'dtype':6}{'classes':>8} {'target':8}{'registers':>9}{'loads':>12}{'exp':>7}{'instr.':>8}")
    for x in found:
        line = f"{x['kernel']:24}{x['dtype']:6}{x['n_classes']:>8} {x['target']:8}{x['registers']:>9}"
        if x["loops"]:
            loop = x["loops"][0]
            loads = " + ".join(f"{n} x {bits}" for bits, n in loop["loads"].items())
            line += f"{loads:>12}{loop['exp'] / loop['logits']:>7.3f}{loop['instructions'] / loop['logits']:>8.1f}"
        print(line)


if __name__ == "__main__":
    main()
