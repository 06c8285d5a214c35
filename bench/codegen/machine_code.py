"""Reading machine code: registers, spills, load widths, instructions, and the loops that stream logits."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton

NVIDIA_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


class Instruction(NamedTuple):
    opcode: str
    operands: str


class Isa(NamedTuple):
    """How to read one assembly language: line patterns with the groups named in `parse`, opcode patterns."""

    label: str  # (name)
    instruction: str  # (opcode)(operands)
    branch: str  # (label) in the operands of a branch
    exp: str
    special: str  # exponentials and whatever shares their unit
    load: str  # the width is read by `width`
    store: str
    barrier: str
    shuffle: str
    spill: str
    end: str


NVIDIA = Isa(
    label=r"^(\.L_\w+):",
    instruction=r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*)",
    branch=r"^BRA(?!\.DIV).*`\((\.L_\w+)\)",
    exp=r"^MUFU\.EX2",
    special=r"^MUFU",
    load=r"^LDG",
    store=r"^STG",
    barrier=r"^BAR",
    shuffle=r"^(SHFL|LDS|STS)",
    spill=r"^(LDL|STL)",
    end=r"^EXIT",
)
AMD = Isa(
    label=r"^(\.LBB\w+):",
    instruction=r"^\s+([sv]_\w+|global_\w+|buffer_\w+|flat_\w+|ds_\w+|scratch_\w+)\s*(.*)",
    branch=r"^s_c?branch\w*\s+(\.LBB\w+)",
    exp=r"^v_exp_f32",
    special=r"^v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    load=r"^(global|buffer|flat)_load",
    store=r"^(global|buffer|flat)_store",
    barrier=r"^s_barrier",
    shuffle=r"^ds_",
    spill=r"^scratch_",
    end=r"^s_endpgm",
)


def width(opcode: str) -> int:
    """Return the bytes a lane moves by a load or store."""
    wide = re.search(r"\.(128|64)\b|dwordx(\d)|_b(128|96|64|32|16)\b", opcode)
    if wide:
        nvidia, dwords, bits = wide.groups()
        return int(dwords) * 4 if dwords else int(nvidia or bits) // 8
    return 2 if re.search(r"16|short", opcode) else 1 if re.search(r"[US]8|byte", opcode) else 4


def inspect(built: Any, target: str, element: int) -> dict[str, Any]:
    """Return what a compiled kernel needs and does; ``element`` is the bytes of a logit."""
    amd = target.startswith("gfx")
    isa, text = (AMD, built.asm["amdgcn"]) if amd else (NVIDIA, _said_of(built.asm["cubin"], "nvdisasm", "-c"))
    needs = resources(built, target)
    code = parse(text, isa)
    found = describe(code.instructions, isa, element)
    found["spills"] += needs.pop("spills")
    spans, loops = streaming_loops(code, isa), []
    for first, last in spans:
        body = code.instructions[first : last + 1]
        ahead = None if amd else instructions_ahead(body, isa)
        loops.append(describe(body, isa, element) | {"shortest": least(code, isa, first, last, []), "ahead": ahead})
    found["outside"] = least(code, isa, 0, len(code.instructions) - 1, spans)
    return found | needs | {"shared": built.metadata.shared, "loops": loops}


def instructions_ahead(body: list[Instruction], isa: Isa) -> int:
    """Return how many instructions pass, round the loop, from a load to the first that reads what it loads.

    The fewest of its loads; a move to another register reads too.
    """

    def first_use(at: int) -> int:
        opcode, operands = body[at]
        first = int(re.match(r"R(\d+)", operands)[1])  # type: ignore[index]
        loaded = {str(first + i) for i in range(-(-width(opcode) // 4))}
        after = [*body[at + 1 :], *body[: at + 1]]
        uses = (i for i, x in enumerate(after, 1) if loaded & set(re.findall(r"(?<!U)R(\d+)", x.operands)))
        return next(uses, len(body))

    return min(first_use(i) for i, x in enumerate(body) if re.match(isa.load, x.opcode))


def resources(built: Any, target: str) -> dict[str, int]:
    """Return what a compiled kernel needs, at once: disassembling takes 0.4 s. NVIDIA counts spills in the stack."""
    if target.startswith("gfx"):
        text, keys = built.asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        numbers = [int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in keys]
    else:
        usage = _said_of(built.asm["cubin"], "cuobjdump", "-res-usage")
        numbers = [*map(int, re.findall(r"(?:REG|STACK):(\d+)", usage)), 0]
    return dict(zip(("registers", "stack", "spills"), numbers, strict=True))


def _said_of(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.path.join(NVIDIA_TOOLS, tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Code(NamedTuple):
    """Instructions and, by the number of one, where a branch ahead goes."""

    instructions: list[Instruction]
    ahead: dict[int, int]
    loops: list[tuple[int, int]]  # first and last instruction, outer ones before inner ones


def parse(text: str, isa: Isa) -> Code:
    """Return what the text holds but for its last part, which touches no memory and hardly ever runs.

    A loop goes from a label to the last branch back to it.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if re.search(r"\bNOP\b|\bs_nop\b|\bs_code_end\b", line):
            continue  # padding
        if label := re.match(isa.label, line):
            labels[label[1]] = len(code)
        elif instruction := re.match(isa.instruction, line):
            branch = re.match(isa.branch, " ".join(instruction.groups()))
            if branch:
                branches.append((len(code), branch[1]))
            code.append(Instruction(*instruction.groups()))
    touching = [at for at, x in enumerate(code) if re.match(f"{isa.end}|{isa.load}|{isa.store}", x.opcode)]
    last = touching[-1] if touching else len(code) - 1
    at, label = next((branch for branch in branches if branch[0] > last), (last, ""))
    if labels.get(label, last + 1) <= last and not any(last < x <= at for x in labels.values()):
        last = at  # the end of a loop that stands last
    code = code[: last + 1]
    loops: dict[int, int] = {}
    ahead = {}
    for at, label in branches:
        if at >= len(code) or label not in labels:
            continue
        if labels[label] <= at:
            loops[labels[label]] = at
        elif labels[label] < len(code):
            ahead[at] = labels[label]
    return Code(code, ahead, sorted(loops.items()))


def streaming_loops(code: Code, isa: Isa) -> list[tuple[int, int]]:
    """Return the loops that load and exponentiate, and hold no other."""

    def streams(first: int, last: int) -> bool:
        body = code.instructions[first : last + 1]
        return all(any(re.match(pattern, x.opcode) for x in body) for pattern in (isa.load, isa.exp))

    spans = [span for span in code.loops if streams(*span)]
    return [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]


def least(code: Code, isa: Isa, first: int, last: int, apart: list[tuple[int, int]]) -> int:
    """Return how many instructions run from ``first`` to ``last`` where every branch ahead is taken.

    The loops ``apart`` are not counted, and no branch passes over one. So run rows without an edge, and tiles without a
    label: a branch that is not taken only does more.
    """
    n, at = 0, first
    while at <= last:
        inside = next((end for start, end in apart if start == at), None)
        if inside is not None:
            at = inside + 1
            continue
        n += 1
        to = code.ahead.get(at, at + 1)
        if to > at + 1 and (to > last + 1 or any(at < start < to for start, _ in apart)):
            to = at + 1
        if apart and re.match(isa.end, code.instructions[at].opcode) and not any(start > at for start, _ in apart):
            break
        at = to
    return n


def describe(code: list[Instruction], isa: Isa, element: int) -> dict[str, Any]:
    """Count what matters; ``logits`` are those a lane loads if every load is of logits, widths are bits to numbers."""

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, x.opcode)) for x in code)

    def widths(pattern: str) -> dict[str, int]:
        return dict(collections.Counter(str(8 * width(x.opcode)) for x in code if re.match(pattern, x.opcode)))

    loads = widths(isa.load)
    return {
        "instructions": len(code),
        "exp": count(isa.exp),
        "special": count(isa.special),
        "loads": loads,
        "stores": widths(isa.store),
        "barriers": count(isa.barrier),
        "shuffles": count(isa.shuffle),
        "spills": count(isa.spill),
        "logits": sum(int(bits) // 8 * n for bits, n in loads.items()) // element,
    }
