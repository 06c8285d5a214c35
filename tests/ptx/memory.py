"""Global and shared memory of the emulated GPU, and what may go wrong there: bounds, alignment, order.

Global memory is that of the tensors a kernel was given, and no byte more. Of shared memory every byte knows who wrote
and who read it last: two threads that no barrier parts must not meet there.
"""

from __future__ import annotations

import collections
import ctypes

import numpy as np
from torch import Tensor

from .operations import Array

WARP = 32
SECTOR = 32  # bytes: the least that a GPU moves
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(AssertionError):
    """What hardware would answer with an error, or leave undefined."""


class Region:
    """The bytes from the first to the last element of a tensor."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.traffic = name, collections.Counter[str]()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.begin = tensor.data_ptr()
        self.end = self.begin + (last + 1) * tensor.element_size()
        self._floor = self.begin & ~15  # words of any size are whole from here on; those outside are never used
        whole = -(-(self.end - self._floor) // 16) * 16
        self._bytes = np.ctypeslib.as_array((ctypes.c_uint8 * whole).from_address(self._floor))

    def words(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Return all words of a size, and which of them lie at the addresses."""
        return self._bytes.view(WORDS[size]), (addresses - np.uint64(self._floor)) // np.uint64(size)


class GlobalMemory:
    """``counts``: note in each region's traffic the bytes moved, and the sectors that its warps asked for."""

    def __init__(self, tensors: dict[str, Tensor], counts: bool = False) -> None:
        self.regions = [Region(name, x) for name, x in tensors.items() if x.numel()]
        self._counts = counts

    def load(self, lanes: Array, addresses: Array, size: int, n: int) -> list[Array]:
        """Return ``n`` words from each address."""
        found = [np.empty(len(addresses), WORDS[size]) for _ in range(n)]
        for region, here in self._regions(addresses, size * n):
            self._count(region, "loaded", lanes[here], addresses[here], size * n)
            words, at = region.words(addresses[here], size)
            for i in range(n):
                found[i][here] = words[at + np.uint64(i)]
        return found

    def store(self, lanes: Array, addresses: Array, values: list[Array]) -> None:
        size = values[0].dtype.itemsize
        for region, here in self._regions(addresses, size * len(values)):
            self._count(region, "stored", lanes[here], addresses[here], size * len(values))
            words, at = region.words(addresses[here], size)
            for i, value in enumerate(values):
                words[at + np.uint64(i)] = value[here]

    def _count(self, region: Region, what: str, lanes: Array, addresses: Array, size: int) -> None:
        if self._counts:
            sectors = (addresses - np.uint64(region.begin & -SECTOR)).astype(np.int64) // SECTOR
            region.traffic[f"bytes {what}"] += size * len(lanes)
            region.traffic[f"sectors {what}"] += len(np.unique(np.stack([lanes // WARP, sectors]), axis=1)[0])

    def _regions(self, addresses: Array, size: int) -> list[tuple[Region, Array]]:
        if (addresses % np.uint64(size)).any():
            raise Fault(f"address not a multiple of the {size} bytes accessed")
        left, found = np.ones(len(addresses), bool), []
        for region in self.regions:
            here = left & (addresses >= region.begin) & (addresses + np.uint64(size) <= region.end)
            if here.any():
                found.append((region, here))
                left &= ~here
        if left.any():
            raise Fault(f"{size} bytes at {int(addresses[left][0]):#x} belong to no tensor")
        return found


class SharedMemory:
    """Bytes of every program; ``lanes`` number threads of all programs."""

    def __init__(self, n_programs: int, n_threads: int, size: int) -> None:
        self.n_threads = n_threads
        self.bytes = np.zeros((n_programs, size), np.uint8)
        n_warps = -(-n_threads // WARP)
        self._program_epoch = np.zeros(n_programs, np.int64)  # barriers passed
        self._warp_epoch = np.zeros((n_programs, n_warps), np.int64)
        self._written = _Trace(self.bytes.shape)
        self._read = _Trace(self.bytes.shape)

    def load(self, lanes: Array, addresses: Array, size: int, n: int) -> list[Array]:
        program, at = self._places(lanes, addresses, size * n)
        who = self._who(lanes, at.shape)
        if (self._written.thread[program, at] == NOBODY).any():
            raise Fault("shared memory read before it was written")
        self._part(self._written, program, at, who, "read before a barrier parts it from another thread's write")
        self._read.note(program, at, who)
        found = np.ascontiguousarray(self.bytes[program, at])
        return [found[:, i * size : (i + 1) * size].copy().view(WORDS[size])[:, 0] for i in range(n)]

    def store(self, lanes: Array, addresses: Array, values: list[Array]) -> None:
        new = np.concatenate([np.ascontiguousarray(v)[:, None].view(np.uint8) for v in values], axis=1)
        program, at = self._places(lanes, addresses, new.shape[1])
        who = self._who(lanes, at.shape)
        for trace in (self._written, self._read):
            self._part(trace, program, at, who, "written before a barrier parts it from another thread's use")
        self.bytes[program, at] = new
        if (self.bytes[program, at] != new).any():
            raise Fault("two threads write different values to one place of shared memory")
        self._written.note(program, at, who)

    def barrier(self, programs: Array) -> None:
        self._program_epoch[programs] += 1
        self._warp_epoch[programs] += 1

    def warp_barrier(self, lanes: Array) -> None:
        programs, threads = np.divmod(lanes, self.n_threads)
        pairs = np.unique(np.stack([programs, threads // WARP]), axis=1)
        self._warp_epoch[pairs[0], pairs[1]] += 1

    def _places(self, lanes: Array, addresses: Array, size: int) -> tuple[Array, Array]:
        if (addresses % size).any():
            raise Fault(f"shared address not a multiple of the {size} bytes accessed")
        if (addresses + size > self.bytes.shape[1]).any():
            raise Fault("shared address out of bounds")
        at = addresses.astype(np.int64)[:, None] + np.arange(size)
        return np.broadcast_to((lanes // self.n_threads)[:, None], at.shape), at

    def _who(self, lanes: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
        programs, threads = np.divmod(lanes, self.n_threads)
        warps = threads // WARP
        who = threads, warps, self._program_epoch[programs], self._warp_epoch[programs, warps]
        return tuple(np.broadcast_to(x[:, None], shape) for x in who)  # type: ignore[return-value]

    def _part(self, trace: _Trace, program: Array, at: Array, who: tuple[Array, ...], what: str) -> None:
        """Raise where another thread was there and no barrier of its warp or program has passed since."""
        thread, warp, program_epoch, warp_epoch = who
        other = (trace.thread[program, at] != thread) & (trace.thread[program, at] != NOBODY)
        same_warp = trace.warp[program, at] == warp
        unparted = np.where(
            same_warp, trace.warp_epoch[program, at] == warp_epoch, trace.program_epoch[program, at] == program_epoch
        )
        if (other & unparted).any():
            raise Fault(f"shared memory {what}")


NOBODY, SEVERAL = -1, -2


class _Trace:
    """Who touched each byte last, and after how many barriers."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.thread, self.warp = np.full(shape, NOBODY), np.full(shape, NOBODY)
        self.program_epoch, self.warp_epoch = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def note(self, program: Array, at: Array, who: tuple[Array, ...]) -> None:
        thread, warp, program_epoch, warp_epoch = who
        place = program, at
        same_program_epoch = (self.program_epoch[place] == program_epoch) & (self.thread[place] != NOBODY)
        several_warps = same_program_epoch & (self.warp[place] != warp)
        same_epoch = same_program_epoch & (several_warps | (self.warp_epoch[place] == warp_epoch))
        several_threads = same_epoch & (self.thread[place] != thread)
        self.thread[place], self.warp[place] = thread, warp
        self.program_epoch[place], self.warp_epoch[place] = program_epoch, warp_epoch
        # lanes of this very instruction share a place where they do not find themselves there
        several_threads |= self.thread[place] != thread
        several_warps |= self.warp[place] != warp
        self.thread[program[several_threads], at[several_threads]] = SEVERAL
        self.warp[program[several_warps], at[several_warps]] = SEVERAL
