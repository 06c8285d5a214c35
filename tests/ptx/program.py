"""The text of a compiled kernel as a list of instructions."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import networkx


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
    registers: set[str]  # prefixes
    n_threads: int


@functools.cache
def parse(text: str) -> Program:
    """Read one kernel; debug sections and directives about lines are passed over."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text.split(".section")[0], flags=re.DOTALL)
    head, _, body = text.partition(".entry ")
    name, _, body = body.partition("(")
    declared, _, body = body.partition(")")
    parameters = {x: kind for kind, x in re.findall(r"\.param \.(\w+).*? (\w+)\s*(?:,|$)", declared)}
    threads = re.search(r"\.reqntid (\d+)", body)
    assert threads, "a kernel without .reqntid"
    registers = set(re.findall(r"\.reg \.\w+\s+(%?\w+?)(?:<\d+>)?;", body))
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
    """Return for every instruction the first place that all ways from it pass: its immediate postdominator."""
    end, backwards = len(program.instructions), networkx.DiGraph()
    for i, x in enumerate(program.instructions):
        to = [program.labels[x.operands[0]]] if x.name == "bra" else [end] if x.name == "ret" else []
        backwards.add_edges_from((j, i) for j in ([*to, i + 1] if x.guard or not to else to))
    return networkx.immediate_dominators(backwards, end)
