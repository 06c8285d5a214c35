"""The programs of a grid: registers are arrays with a place for every thread of all of them.

What a warp or a program must do together raises if a thread is missing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .memory import WARP, Fault, GlobalMemory, SharedMemory
from .operations import NUMPY, Array, operation, unknown
from .program import Address, Instruction, Operand, Program, meetings

PARAMETER_BYTES = {"u64": "Q", "u32": "I", "u16": "H", "u8": "B", "f32": "f", "f64": "d", "s32": "i", "s64": "q"}
GARBAGE = 0xA5A5A5A5FFC0FFEE  # what an unwritten register holds: no number, no address
SHARED = "global_smem"


class Machine:
    """Runs programs of one kernel; ``arguments`` are tensors, integers and floats in the order of its parameters."""

    def __init__(
        self, program: Program, arguments: Sequence[Any], shared_bytes: int, counts_traffic: bool = False
    ) -> None:
        self.program, self.shared_bytes = program, shared_bytes
        self.parameters: dict[str, int] = {}
        tensors: dict[str, Tensor] = {}
        assert len(arguments) == len(program.parameters), (len(arguments), program.parameters)
        for (name, kind), x in zip(program.parameters.items(), arguments, strict=True):
            if isinstance(x, Tensor):
                tensors[name] = x
                x = x.data_ptr()
            packed = struct.pack(PARAMETER_BYTES[kind], x if kind in ("f32", "f64") else x % 2 ** (8 * _bytes(kind)))
            self.parameters[name] = int.from_bytes(packed, "little")
        self.memory = GlobalMemory(tensors, counts_traffic)
        self.steps = [self._step(x) for x in program.instructions]
        self.meetings = meetings(program)

    def run(self, grid: tuple[int, ...], programs: Array) -> None:
        """Run those programs of the grid, side by side."""
        n = len(programs) * self.program.n_threads
        self.n_lanes, self.n_programs = n, len(programs)
        lanes = np.arange(n)
        thread, block = lanes % self.program.n_threads, np.repeat(programs, self.program.n_threads)
        x, y, z = (*grid, 1, 1)[:3]
        self.special = {
            "%tid.x": thread, "%tid.y": 0 * thread, "%tid.z": 0 * thread, "%laneid": thread % WARP,
            "%ctaid.x": block % x, "%ctaid.y": block // x % y, "%ctaid.z": block // (x * y),
            "%nctaid.x": np.full(n, x), "%nctaid.y": np.full(n, y), "%nctaid.z": np.full(n, z),
        }  # fmt: skip
        self.registers: dict[str, Array] = {}
        self.shared = SharedMemory(len(programs), self.program.n_threads, self.shared_bytes)
        with np.errstate(all="ignore"):
            self._follow(np.ones(n, bool))

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
                if not taken.any():
                    continue
                if (taken == active).all():
                    at = target
                    continue
                meeting = self.meetings[at - 1]
                stack += [(meeting, until, active), (at, meeting, active & ~taken), (target, meeting, taken)]
                break

    # --- registers ---

    def read(self, x: Operand, kind: str) -> Array:
        """Return an operand as an array of the type; a wider register gives its low bits."""
        wanted = NUMPY[kind]
        if isinstance(x, int):
            if kind == "pred":
                return np.array(bool(x))
            bits = np.array(x % 2**64, np.uint64)
        elif x == SHARED:
            bits = np.array(0, np.uint64)
        elif x in self.special:
            bits = self.special[x].astype(np.uint64)
        else:
            bits = self._register(x)
            if bits.dtype.itemsize == np.dtype(wanted).itemsize:
                return bits.view(wanted)
        width = np.dtype(wanted).itemsize
        return bits.astype(f"u{width}").view(wanted)

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            width = self.program.registers[name.rstrip("0123456789")] // 8
            garbage = np.array(GARBAGE & (2 ** (8 * width) - 1 if width > 1 else 1), f"u{width}")
            self.registers[name] = np.full(self.n_lanes, garbage)
        return self.registers[name]

    def write(self, name: str, value: Array, active: Array) -> None:
        width = self.program.registers[name.rstrip("0123456789")] // 8
        if value.dtype == np.bool_:
            bits = value.view(np.uint8)
        elif value.dtype.itemsize == width:
            bits = value.view(f"u{width}")
        elif value.dtype.kind == "i":
            bits = value.astype(f"i{width}").view(f"u{width}")
        else:
            bits = value.view(f"u{value.dtype.itemsize}").astype(f"u{width}")
        if active.all():
            self.registers[name] = np.array(np.broadcast_to(bits, self.n_lanes))
        else:
            np.copyto(self._register(name), bits, where=active)

    # --- instructions ---

    def _step(self, x: Instruction) -> Callable[[Array], tuple[int, Array] | None]:
        """Return what an instruction does to the active lanes; a branch returns where which of them go."""
        if x.name in ("ld", "st"):
            (space,) = {"param", "shared", "global"} & set(x.modifiers)
            act = getattr(self, f"_{x.name}_{space}")
        elif x.name == "mov" and any(isinstance(o, tuple) for o in x.operands):
            act = self._move_parts
        else:
            act = getattr(self, f"_{x.name}", None) or self._compute(x)

        def step(active: Array) -> tuple[int, Array] | None:
            if x.guard is not None:
                guard = self._register(x.guard).view(np.bool_)
                active = active & (~guard if x.negated else guard)
            try:
                return act(x, active)
            except Fault as fault:
                raise Fault(f"{self.program.name}: {x.line}: {fault}") from None

        return step

    def _compute(self, x: Instruction) -> Callable[[Instruction, Array], None]:
        known = operation(x)

        def act(x: Instruction, active: Array) -> None:
            result, *arguments = x.operands
            values = [self.read(o, kind) for o, kind in zip(arguments, known.arguments, strict=True)]
            found = np.asarray(known.function(*values))
            assert isinstance(result, str)
            self.write(result, found.astype(NUMPY[known.result], copy=False), active)

        return act

    def _move_parts(self, x: Instruction, active: Array) -> None:
        into, out = x.operands
        if isinstance(into, tuple):
            width = 8 * _bytes(x.type) // len(into)
            bits = self.read(out, x.type)
            for i, name in enumerate(into):
                if name != "_":
                    self.write(name, (bits >> bits.dtype.type(i * width)).astype(f"u{width // 8}"), active)
            return
        width, bits = 8 * _bytes(x.type) // len(out), np.zeros((), NUMPY[x.type])
        for i, part in enumerate(out):
            bits = bits | (self.read(part, f"b{width}").astype(bits.dtype) << bits.dtype.type(i * width))
        self.write(into, bits, active)

    def _bra(self, x: Instruction, active: Array) -> tuple[int, Array]:
        return self.program.labels[x.operands[0]], active

    def _ret(self, x: Instruction, active: Array) -> tuple[int, Array]:
        return len(self.steps), active

    def _ld_param(self, x: Instruction, active: Array) -> None:
        into, where = x.operands
        self.write(into, np.array(self.parameters[where.base] % 2 ** (8 * _bytes(x.type)), f"u{_bytes(x.type)}").view(
            NUMPY[x.type]), active)  # fmt: skip

    def _ld_global(self, x: Instruction, active: Array) -> None:
        self._load(x, active, self.memory.load)

    def _ld_shared(self, x: Instruction, active: Array) -> None:
        self._load(x, active, self.shared.load)

    def _load(self, x: Instruction, active: Array, load: Callable[..., list[Array]]) -> None:
        lanes = np.flatnonzero(active)
        if not lanes.size:
            return
        into, where = x.operands
        names = into if isinstance(into, tuple) else (into,)
        for name, part in zip(names, load(lanes, self._address(where)[lanes], _bytes(x.type), len(names)), strict=True):
            value = np.zeros(self.n_lanes, part.dtype)
            value[lanes] = part
            self.write(name, value.view(NUMPY[x.type]), active)

    def _st_global(self, x: Instruction, active: Array) -> None:
        self._store(x, active, self.memory.store)

    def _st_shared(self, x: Instruction, active: Array) -> None:
        self._store(x, active, self.shared.store)

    def _store(self, x: Instruction, active: Array, store: Callable[..., None]) -> None:
        lanes = np.flatnonzero(active)
        if not lanes.size:
            return
        where, out = x.operands
        parts = out if isinstance(out, tuple) else (out,)
        kind = f"b{8 * _bytes(x.type)}"
        values = [np.broadcast_to(self.read(part, kind), self.n_lanes)[lanes] for part in parts]
        store(lanes, self._address(where)[lanes], values)

    def _address(self, where: Address) -> Array:
        base = np.broadcast_to(self.read(where.base, "b64"), self.n_lanes)
        return base + np.uint64(where.offset % 2**64)

    # --- threads together ---

    def _bar(self, x: Instruction, active: Array) -> None:
        if x.modifiers[0] == "warp":
            self._whole(active, WARP, "warp")
            self.shared.warp_barrier(np.flatnonzero(active))
        else:
            self._whole(active, self.program.n_threads, "program")
            self.shared.barrier(np.flatnonzero(active.reshape(self.n_programs, -1)[:, 0]))

    def _whole(self, active: Array, size: int, what: str) -> None:
        groups = active.reshape(-1, size)
        if (groups.any(axis=1) & ~groups.all(axis=1)).any():
            raise Fault(f"a thread of the {what} is missing")

    def _shfl(self, x: Instruction, active: Array) -> None:
        """The value of another lane; segments and the lane past which none is taken as PTX says."""
        into, value, b, c, _ = x.operands
        self._whole(active, WARP, "warp")
        lane = np.arange(self.n_lanes) % WARP
        b, c = (np.broadcast_to(self.read(o, "u32"), self.n_lanes).astype(np.int64) for o in (b, c))
        segment, ways = (c >> 8) & 31, {"bfly": lane ^ b, "idx": (lane & ((c >> 8) & 31)) | (b & ~((c >> 8) & 31))}
        if x.modifiers[1] not in ways:
            raise unknown(x)
        source, last = ways[x.modifiers[1]], (lane & segment) | (c & 31 & ~segment)
        source = np.where(source <= last, source, lane) + np.arange(self.n_lanes) // WARP * WARP
        self.write(into, np.broadcast_to(self.read(value, "b32"), self.n_lanes)[source], active)

    def _ldmatrix(self, x: Instruction, active: Array) -> None:
        names, where = x.operands
        lanes = np.flatnonzero(active)
        for name, at in zip(names, self._matrices(x, where, active), strict=False):
            value = np.zeros(self.n_lanes, np.uint32)
            (value[lanes],) = self.shared.load(lanes, at, 4, 1)
            self.write(name, value, active)

    def _stmatrix(self, x: Instruction, active: Array) -> None:
        where, names = x.operands
        lanes = np.flatnonzero(active)
        for name, at in zip(names, self._matrices(x, where, active), strict=False):
            self.shared.store(lanes, at, [np.broadcast_to(self.read(name, "b32"), self.n_lanes)[lanes]])

    def _matrices(self, x: Instruction, where: Address, active: Array) -> list[Array]:
        """Return for up to four 8 x 8 matrices of 2 bytes where each lane's word lies: four lanes share a row.

        8 lanes give the addresses of the rows, 16 bytes each.
        """
        if x.type != "b16" or "trans" in x.modifiers:
            raise unknown(x)
        self._whole(active, WARP, "warp")
        lanes, address = np.flatnonzero(active), self._address(where)
        lane, warp = lanes % WARP, lanes // WARP * WARP
        return [address[warp + 8 * i + lane // 4] + (4 * (lane % 4)).astype(np.uint64) for i in range(4)]

    def _redux(self, x: Instruction, active: Array) -> None:
        into, value, _ = x.operands
        self._whole(active, WARP, "warp")
        over = {"min": np.minimum, "max": np.maximum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}
        rows = np.broadcast_to(self.read(value, x.type), self.n_lanes).reshape(-1, WARP)
        found = over[x.modifiers[1]].reduce(rows, axis=1).astype(rows.dtype)
        self.write(into, np.repeat(found, WARP), active)


def _bytes(kind: str) -> int:
    return np.dtype(NUMPY[kind]).itemsize
