"""The programs of a grid: a register is an array of 64 bits for every thread of all of them.

What a warp or a program must do together raises if a thread is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .memory import WARP, Fault, GlobalMemory, SharedMemory
from .operations import NUMPY, Array, decode, encode, operation, size_of, unknown
from .program import Address, Instruction, Operand, Program, meetings

GARBAGE = 0xA5A5A5A5FFC0FFEE  # what an unwritten register holds: no number, no address
Jump = tuple[int, Array] | None  # where to, and which threads go


class Machine:
    """Runs programs of one kernel; ``arguments`` are tensors, integers and floats in the order of its parameters."""

    def __init__(
        self, program: Program, arguments: Sequence[Any], shared_bytes: int, counts_traffic: bool = False
    ) -> None:
        self.program, self.shared_bytes = program, shared_bytes
        self.constants = {"global_smem": np.zeros(1, np.uint64)}
        tensors = {name: x for name, x in zip(program.parameters, arguments, strict=True) if isinstance(x, Tensor)}
        for (name, kind), x in zip(program.parameters.items(), arguments, strict=True):
            bits = encode(np.array([x.data_ptr() if name in tensors else x]), kind)
            self.constants[name] = bits.astype(np.uint64)
        self.memory = GlobalMemory(tensors, counts_traffic)
        self.steps = [self._step(x) for x in program.instructions]
        self.meetings = meetings(program)

    def run(self, grid: tuple[int, ...], programs: Array) -> None:
        """Run those programs of the grid, side by side."""
        self.n_lanes = len(programs) * self.program.n_threads
        self.lanes = np.arange(self.n_lanes)
        thread, block = self.lanes % self.program.n_threads, np.repeat(programs, self.program.n_threads)
        x, y, z = (*grid, 1, 1)[:3]
        special = {
            "%tid.x": thread, "%tid.y": 0 * thread, "%tid.z": 0 * thread, "%laneid": thread % WARP,
            "%ctaid.x": block % x, "%ctaid.y": block // x % y, "%ctaid.z": block // (x * y),
            "%nctaid.x": 0 * thread + x, "%nctaid.y": 0 * thread + y, "%nctaid.z": 0 * thread + z,
        }  # fmt: skip
        self.registers = self.constants | {name: value.astype(np.uint64) for name, value in special.items()}
        self.shared = SharedMemory(len(programs), self.program.n_threads, self.shared_bytes)
        with np.errstate(all="ignore"):
            self._follow(np.ones(self.n_lanes, bool))

    def _follow(self, everyone: Array) -> None:
        """Run all threads to the end: those that part at a branch meet where all ways from it do, as on hardware."""
        stack = [(0, len(self.steps), everyone)]  # where, until where, who
        while stack:
            at, until, active = stack.pop()
            while at != until:
                jump = self.steps[at](active)
                at += 1
                if jump is None:
                    continue
                target, taken = jump
                if (taken == active).all():
                    at = target
                    continue
                meeting = self.meetings[at - 1]
                stack += [(meeting, until, active), (at, meeting, active & ~taken), (target, meeting, taken)]
                break

    # --- registers ---

    def read(self, x: Operand) -> Array:
        """Return the bits of a register, or of a constant for all threads."""
        if isinstance(x, int):
            return np.array([x % 2**64], np.uint64)
        if x not in self.registers:
            if x.rstrip("0123456789") not in self.program.registers:
                raise NotImplementedError(f"register not known to the tests' machine: {x}")
            self.registers[x] = np.full(self.n_lanes, GARBAGE, np.uint64)
        return self.registers[x]

    def write(self, name: str, numbers: Array, kind: str, active: Array) -> None:
        """Fill a register: signed integers keep their sign, all else is followed by zeros."""
        bits = encode(numbers, kind)
        np.copyto(self.read(name).view(np.int64 if bits.dtype.kind == "i" else np.uint64), bits, where=active)

    def _spread(self, x: Operand, kind: str) -> Array:
        return np.broadcast_to(decode(self.read(x), kind), self.n_lanes)

    # --- instructions ---

    def _step(self, x: Instruction) -> Callable[[Array], Jump]:
        """Return what an instruction does to the active lanes; a branch returns where which of them go."""
        parts = x.name == "mov" and any(isinstance(o, tuple) for o in x.operands)
        act = self._mov_parts if parts else getattr(self, f"_{x.name}", None) or self._compute(x)

        def step(active: Array) -> Jump:
            if x.guard is not None:
                active = active & (decode(self.read(x.guard), "pred") != x.negated)
                if not active.any():
                    return None
            try:
                return act(x, active)
            except Fault as fault:
                raise Fault(f"{self.program.name}: {x.line}: {fault}") from None

        return step

    def _compute(self, x: Instruction) -> Callable[[Instruction, Array], None]:
        known = operation(x)

        def act(x: Instruction, active: Array) -> None:
            result, *arguments = x.operands
            values = (decode(self.read(o), kind) for o, kind in zip(arguments, known.arguments, strict=True))
            self.write(result, known.function(*values), known.result, active)

        return act

    def _mov_parts(self, x: Instruction, active: Array) -> None:
        into, out = x.operands
        n = len(into if isinstance(into, tuple) else out)
        part = f"b{8 * size_of(x.type) // n}"
        if isinstance(into, tuple):
            for name, bits in zip(into, decode(self.read(out), f"{part}x{n}").T, strict=True):
                if name != "_":
                    self.write(name, bits, part, active)
        else:
            bits = np.stack([self._spread(o, part) for o in out], axis=1)
            self.write(into, bits, f"{part}x{n}", active)

    def _bra(self, x: Instruction, active: Array) -> Jump:
        return self.program.labels[x.operands[0]], active

    def _ret(self, x: Instruction, active: Array) -> Jump:
        return len(self.steps), active

    def _ld(self, x: Instruction, active: Array) -> None:
        into, where = x.operands
        if "param" in x.modifiers:
            self.write(into, decode(self.read(where.base), x.type), x.type, active)
            return
        names, memory = into if isinstance(into, tuple) else (into,), self._memory(x)
        lanes = np.flatnonzero(active)
        self._fill(names, memory.load(lanes, self._address(where)[lanes], size_of(x.type), len(names)), x.type, active)

    def _fill(self, names: Sequence[str], words: Array, kind: str, active: Array) -> None:
        for name, some in zip(names, words.T, strict=True):
            everywhere = np.zeros(self.n_lanes, some.dtype)
            everywhere[active] = some
            self.write(name, everywhere.view(NUMPY[kind]), kind, active)

    def _st(self, x: Instruction, active: Array) -> None:
        where, out = x.operands
        lanes, kind = np.flatnonzero(active), f"b{8 * size_of(x.type)}"
        words = [self._spread(part, kind)[lanes] for part in (out if isinstance(out, tuple) else (out,))]
        self._memory(x).store(lanes, self._address(where)[lanes], np.stack(words, axis=1))

    def _memory(self, x: Instruction) -> GlobalMemory | SharedMemory:
        return self.shared if "shared" in x.modifiers else self.memory

    def _address(self, where: Address) -> Array:
        return self._spread(where.base, "b64") + np.uint64(where.offset % 2**64)

    # --- threads together ---

    def _whole(self, active: Array, size: int = WARP, what: str = "warp") -> Array:
        """Return the lanes of whole groups."""
        groups = active.reshape(-1, size)
        if (groups.any(axis=1) & ~groups.all(axis=1)).any():
            raise Fault(f"a thread of the {what} is missing")
        return np.flatnonzero(active)

    def _bar(self, x: Instruction, active: Array) -> None:
        if x.modifiers[0] == "warp":
            self.shared.warp_barrier(self._whole(active))
        else:
            self.shared.barrier(self._whole(active, self.program.n_threads, "program"))

    def _shfl(self, x: Instruction, active: Array) -> None:
        """The value of another lane of the warp."""
        into, value, b, c, _ = x.operands
        self._whole(active)
        lane, way = self._spread(b, "u32").astype(np.int64), x.modifiers[1]
        if way not in ("bfly", "idx") or c != WARP - 1:
            raise unknown(x)
        source = self.lanes ^ lane if way == "bfly" else self.lanes // WARP * WARP + lane % WARP
        self.write(into, self._spread(value, "b32")[source], "b32", active)

    def _redux(self, x: Instruction, active: Array) -> None:
        into, value, _ = x.operands
        self._whole(active)
        over = {"min": np.fmin, "max": np.fmax, "or": np.bitwise_or}.get(x.modifiers[1])
        if over is None or len(x.modifiers) != 3:
            raise unknown(x)
        found = over.reduce(self._spread(value, x.type).reshape(-1, WARP), axis=1)
        self.write(into, np.repeat(found, WARP), x.type, active)

    def _ldmatrix(self, x: Instruction, active: Array) -> None:
        names, where = x.operands
        for name, lanes, at in self._matrices(x, names, where, active):
            self._fill([name], self.shared.load(lanes, at, 4, 1), "b32", active)

    def _stmatrix(self, x: Instruction, active: Array) -> None:
        where, names = x.operands
        for name, lanes, at in self._matrices(x, names, where, active):
            self.shared.store(lanes, at, self._spread(name, "b32")[lanes, None])

    def _matrices(self, x: Instruction, names: tuple[str, ...], where: Address, active: Array) -> Any:
        """Return for each 8 x 8 matrix of 2 bytes where each lane's word lies: four lanes share a row.

        8 lanes give the addresses of the rows, 16 bytes each.
        """
        if x.type != "b16" or "trans" in x.modifiers:
            raise unknown(x)
        lanes, address = self._whole(active), self._address(where)
        row, column = lanes // WARP * WARP + lanes % WARP // 4, (lanes % 4 * 4).astype(np.uint64)
        return [(name, lanes, address[row + 8 * i] + column) for i, name in enumerate(names)]
