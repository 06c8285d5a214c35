"""The text of a compiled kernel as a list of instructions."""

from __future__ import annotations

import re
from typing import NamedTuple

WIDTHS = {"pred": 8, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}  # bits; a predicate is a byte


class Address(NamedTuple):
    base: str  # a register, a parameter, or the name of shared memory
    offset: int


Operand = str | int | Address | tuple["Operand", ...]  # register or special name, bits of a constant, ...


class Instruction(NamedTuple):
    line: str
    name: str  # "add", "ld", ...
    modifiers: tuple[str, ...]  # "rn", "f32"
    operands: tuple[Operand, ...]
    guard: str | None  # a predicate register: lanes where it is not set do nothing
    negated: bool

    @property
    def type(self) -> str:
        return self.modifiers[-1]


class Program(NamedTuple):
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # position of the instruction that follows
    parameters: dict[str, str]  # name to type, in order
    registers: dict[str, int]  # prefix to width in bits
    n_threads: int


def parse(text: str) -> Program:
    """Read one kernel; debug sections and directives about lines are passed over."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text.split(".section")[0], flags=re.DOTALL)
    head, _, body = text.partition(".entry ")
    name, _, body = body.partition("(")
    declared, _, body = body.partition(")")
    parameters = {x: kind for kind, x in re.findall(r"\.param \.(\w+).*? (\w+)\s*(?:,|$)", declared)}
    threads = re.search(r"\.reqntid (\d+)", body)
    assert threads, "a kernel without .reqntid"
    registers = {prefix: WIDTHS[kind] for kind, prefix in re.findall(r"\.reg \.(\w+)\s+(%?\w+?)(?:<\d+>)?;", body)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    body = body[body.index("{") + 1 : body.rindex("}")]
    for line in re.split(r"[;\n]", body):
        while label := re.match(r"\s*(\$?[\w$]+):", line):
            labels[label[1]] = len(instructions)
            line = line[label.end() :]
        line = line.strip("{} \t") if line.count("{") != line.count("}") else line.strip()  # of a scope
        if not line or line.startswith("."):
            continue
        instructions.append(_instruction(line))
    return Program(name.strip(), instructions, labels, parameters, registers, int(threads[1]))


def _instruction(line: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", line)
    assert found, line
    negated, guard, opcode, rest = found.groups()
    name, *modifiers = opcode.replace("::", ".").split(".")
    return Instruction(line, name, tuple(modifiers), tuple(map(_operand, _split(rest))), guard, bool(negated))


def _split(text: str) -> list[str]:
    """Cut at commas outside of brackets."""
    return [x.strip() for x in re.split(r",(?![^{\[]*[}\]])", text) if x.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(map(_operand, _split(text.strip("{} "))))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
        return int(found[1], 16)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def meetings(program: Program) -> dict[int, int]:
    """Return for every branch the first place that all ways from it pass: its block's immediate postdominator."""
    end, code = len(program.instructions), program.instructions
    jumps = {i: end if x.name == "ret" else program.labels[x.operands[0]]
             for i, x in enumerate(code) if x.name in ("bra", "ret")}  # fmt: skip
    starts = sorted({0, *jumps.values(), *(i + 1 for i in jumps)} - {end})
    last = {start: stop - 1 for start, stop in zip(starts, [*starts[1:], end], strict=True)}
    follows = {start: _follows(code[i], i, jumps) for start, i in last.items()}
    passed = {start: {*starts, end} for start in starts} | {end: {end}}  # on every way to the end
    changed = True
    while changed:
        changed = False
        for start in reversed(starts):
            new = {start} | set.intersection(*(passed[x] for x in follows[start]))
            changed |= new != passed[start]
            passed[start] = new
    return {i: max(passed[start] - {start}, key=lambda x: len(passed[x])) for start, i in last.items() if i in jumps}


def _follows(x: Instruction, i: int, jumps: dict[int, int]) -> list[int]:
    if i not in jumps:
        return [i + 1]
    return [jumps[i], i + 1] if x.guard else [jumps[i]]
