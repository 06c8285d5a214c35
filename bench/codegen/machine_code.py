"""Reading machine code: registers and spills, load widths, instructions, and the loops that stream logits.

Instructions and loops are those of NVIDIA, with which times are predicted; of AMD only what a whole kernel needs.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
LABEL = r"^(\.L_\w+):"
INSTRUCTION = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*)"
BRANCH = r"^BRA(?!\.DIV).*`\((\.L_\w+)\)"
LOAD, STORE, END = r"LDG|(global|buffer|flat)_load", r"STG|(global|buffer|flat)_store", r"EXIT"
COUNTED = {"exp": r"MUFU\.EX2", "barriers": r"BAR", "shuffles": r"SHFL|LDS|STS", "spills": r"LDL|STL"}


class Instruction(NamedTuple):
    opcode: str
    operands: str


def width(opcode: str) -> int:
    """Return the bytes a lane moves by a load or store."""
    if wide := re.search(r"\.(128|64)\b|dwordx(\d)", opcode):
        return int(wide[1]) // 8 if wide[1] else int(wide[2]) * 4
    return 2 if re.search(r"16|short", opcode) else 1 if re.search(r"[US]8|byte", opcode) else 4


def inspect(built: Any, target: str, element: int) -> dict[str, Any]:
    """Return what a compiled kernel needs and does; ``element`` is the bytes of a logit."""
    needs = resources(built, target)
    if target.startswith("gfx"):
        opcodes = re.findall(r"^\s+(\w+)", built.asm["amdgcn"], re.MULTILINE)
        return describe([Instruction(opcode, "") for opcode in opcodes], element) | needs | {"loops": []}
    code = parse(_said_of(built.asm["cubin"], "nvdisasm", "-c"))
    found, spans, loops = describe(code.instructions, element), streaming_loops(code), []
    for first, last in spans:
        body = code.instructions[first : last + 1]
        shortest = least(code, first, last, [])
        loops.append(describe(body, element) | {"shortest": shortest, "ahead": instructions_ahead(body)})
    found["outside"] = least(code, 0, len(code.instructions) - 1, spans)
    return found | needs | {"spills": found["spills"], "loops": loops}


def instructions_ahead(body: list[Instruction]) -> int:
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

    return min(first_use(i) for i, x in enumerate(body) if re.match(LOAD, x.opcode))


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
        command = [os.path.join(TOOLS, tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Code(NamedTuple):
    """Instructions and, by the number of one, where a branch ahead goes."""

    instructions: list[Instruction]
    ahead: dict[int, int]
    loops: list[tuple[int, int]]  # first and last instruction, outer ones before inner ones


def parse(text: str) -> Code:
    """Return what NVIDIA's disassembler says, but for the last part, which touches no memory and hardly ever runs.

    A loop goes from a label to the last branch back to it.
    """
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(LABEL, line):
            labels[label[1]] = len(code)
        elif (instruction := re.match(INSTRUCTION, line)) and instruction[1] != "NOP":  # padding
            if branch := re.match(BRANCH, " ".join(instruction.groups())):
                branches.append((len(code), branch[1]))
            code.append(Instruction(*instruction.groups()))
    end = 1 + max((at for at, x in enumerate(code) if re.match(f"{END}|{LOAD}|{STORE}", x.opcode)), default=len(code))
    at, label = next((branch for branch in branches if branch[0] >= end), (end, ""))
    if labels.get(label, end) < end and not any(end <= x <= at for x in labels.values()):
        end = at + 1  # a loop that stands last
    inside = [(at, labels[label]) for at, label in branches if at < end and labels.get(label, end) < end]
    loops = {to: at for at, to in inside if to <= at}
    return Code(code[:end], {at: to for at, to in inside if to > at}, sorted(loops.items()))


def streaming_loops(code: Code) -> list[tuple[int, int]]:
    """Return the loops that load and exponentiate, and hold no other."""

    def streams(first: int, last: int) -> bool:
        body = code.instructions[first : last + 1]
        return all(any(re.match(pattern, x.opcode) for x in body) for pattern in (LOAD, COUNTED["exp"]))

    spans = [span for span in code.loops if streams(*span)]
    return [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]


def least(code: Code, first: int, last: int, apart: list[tuple[int, int]]) -> int:
    """Return how many instructions run from ``first`` to ``last`` where every branch ahead is taken.

    The loops ``apart`` are not counted, and no branch passes over one. So run rows without an edge, and tiles without a
    label: a branch that is not taken only does more.
    """
    ends = dict(apart)
    n, at = 0, first
    while at <= last:
        if at in ends:
            at = ends[at] + 1
            continue
        n, later = n + 1, [start for start in ends if start > at]
        if apart and not later and re.match(END, code.instructions[at].opcode):
            break
        to = code.ahead.get(at, at + 1)
        at = at + 1 if to > last + 1 or any(start < to for start in later) else to
    return n


def describe(code: list[Instruction], element: int) -> dict[str, Any]:
    """Count what matters; ``logits`` are those a lane loads if every load is of logits, widths are bits to numbers."""

    def widths(pattern: str) -> dict[str, int]:
        return dict(collections.Counter(str(8 * width(x.opcode)) for x in code if re.match(pattern, x.opcode)))

    loads = widths(LOAD)
    counted = {name: sum(bool(re.match(pattern, x.opcode)) for x in code) for name, pattern in COUNTED.items()}
    logits = sum(int(bits) // 8 * n for bits, n in loads.items()) // element
    return {"instructions": len(code), "loads": loads, "stores": widths(STORE), "logits": logits} | counted
