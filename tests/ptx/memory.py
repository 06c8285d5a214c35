"""Global and shared memory of the emulated GPU, and what may go wrong there: bounds, alignment, order.

Global memory is that of the tensors a kernel was given, and no byte more. Of shared memory every byte knows who wrote
and who read it: two threads that no barrier parts must not meet there.
"""

from __future__ import annotations

import collections
import ctypes
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from .operations import Array

WARP = 32
SECTOR = 32  # bytes: the least that a GPU moves
NOBODY, SEVERAL = -1, -2


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

    def words(self, addresses: Array, size: int, n: int) -> tuple[Array, Array]:
        """Return all words of a size, and which of them, ``n`` each, lie at the addresses."""
        first = (addresses - np.uint64(self._floor)) // np.uint64(size)
        return self._bytes.view(f"u{size}"), first[:, None] + np.arange(n, dtype=np.uint64)


class GlobalMemory:
    """``counts``: note in each region's traffic the bytes moved, and the sectors that its warps asked for."""

    def __init__(self, tensors: dict[str, Tensor], counts: bool = False) -> None:
        self.regions = [Region(name, x) for name, x in tensors.items() if x.numel()]
        self._counts = counts

    def load(self, lanes: Array, addresses: Array, size: int, n: int) -> Array:
        """Return ``n`` words of ``size`` bytes from each address."""
        found = np.empty((len(addresses), n), f"u{size}")
        for here, words, at in self._reached("loaded", lanes, addresses, size, n):
            found[here] = words[at]
        return found

    def store(self, lanes: Array, addresses: Array, values: Array) -> None:
        for here, words, at in self._reached("stored", lanes, addresses, values.itemsize, values.shape[1]):
            words[at] = values[here]

    def _reached(
        self, what: str, lanes: Array, addresses: Array, size: int, n: int
    ) -> Iterator[tuple[Array, Array, Array]]:
        """Yield which lanes reach a region, its words, and which of them."""
        whole, left = size * n, np.ones(len(addresses), bool)
        if (addresses % whole).any():
            raise Fault(f"address not a multiple of the {whole} bytes accessed")
        for region in self.regions:
            here = left & (addresses >= region.begin) & (addresses + np.uint64(whole) <= region.end)
            left &= ~here
            if self._counts and here.any():
                sectors = (addresses[here] - np.uint64(region.begin & -SECTOR)).astype(np.int64) // SECTOR
                region.traffic[f"bytes {what}"] += whole * len(sectors)
                region.traffic[f"sectors {what}"] += len(np.unique((lanes[here] // WARP << 40) + sectors))
            if here.any():
                yield here, *region.words(addresses[here], size, n)
        if left.any():
            raise Fault(f"{whole} bytes at {int(addresses[left][0]):#x} belong to no tensor")


class SharedMemory:
    """Bytes of every program; ``lanes`` number threads of all programs."""

    def __init__(self, n_programs: int, n_threads: int, size: int) -> None:
        self.n_threads = n_threads
        self.bytes = np.zeros((n_programs, size), np.uint8)
        self._filled = np.zeros(self.bytes.shape, bool)
        self._written, self._read = _Trace(self.bytes.shape), _Trace(self.bytes.shape)

    def load(self, lanes: Array, addresses: Array, size: int, n: int) -> Array:
        at, who = self._places(lanes, addresses, size * n)
        if not self._filled[at].all():
            raise Fault("shared memory read before it was written")
        self._written.check(at, who, "read before a barrier parts it from another thread's write")
        self._read.note(at, who)
        return self.bytes[at].view(f"u{size}")

    def store(self, lanes: Array, addresses: Array, values: Array) -> None:
        new = np.ascontiguousarray(values).view(np.uint8)
        at, who = self._places(lanes, addresses, new.shape[1])
        for trace in (self._written, self._read):
            trace.check(at, who, "written before a barrier parts it from another thread's use")
        self.bytes[at], self._filled[at] = new, True
        if (self.bytes[at] != new).any():
            raise Fault("two threads write different values to one place of shared memory")
        self._written.note(at, who)

    def barrier(self, lanes: Array) -> None:
        programs = np.unique(lanes // self.n_threads)
        for trace in (self._written, self._read):
            trace.warp[programs] = trace.thread[programs] = NOBODY

    def warp_barrier(self, lanes: Array) -> None:
        """What threads of a warp did is parted from each other, not from other warps."""
        for trace in (self._written, self._read):
            trace.thread[np.isin(trace.warp, lanes // WARP)] = NOBODY

    def _places(self, lanes: Array, addresses: Array, size: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Return program and address of each byte, and who is there: thread and warp, numbered through programs."""
        if (addresses % size).any():
            raise Fault(f"shared address not a multiple of the {size} bytes accessed")
        if (addresses + size > self.bytes.shape[1]).any():
            raise Fault("shared address out of bounds")
        at = addresses.astype(np.int64)[:, None] + np.arange(size)
        program, thread, warp = (
            np.broadcast_to(x[:, None], at.shape) for x in (lanes // self.n_threads, lanes, lanes // WARP)
        )
        return (program, at), (thread, warp)


class _Trace:
    """Who touched each byte since a barrier: ``thread`` is nobody again after one of the warp."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.thread, self.warp = np.full(shape, NOBODY), np.full(shape, NOBODY)

    def check(self, at: tuple[Array, Array], who: tuple[Array, Array], what: str) -> None:
        """Raise where another thread was."""
        thread, warp = self.thread[at], self.warp[at]
        of_warp = (thread != NOBODY) & (thread != who[0])
        if ((warp != NOBODY) & ((warp != who[1]) | of_warp)).any():
            raise Fault(f"shared memory {what}")

    def note(self, at: tuple[Array, Array], who: tuple[Array, Array]) -> None:
        for marks, own in zip((self.thread, self.warp), who, strict=True):
            before = marks[at]
            marks[at] = own
            # lanes of this very instruction share a place where they do not find themselves there
            several = (before != NOBODY) & (before != own) | (marks[at] != own)
            marks[at[0][several], at[1][several]] = SEVERAL
