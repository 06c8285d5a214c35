"""The only home of tuned numbers: pure functions of the problem's size.

Provenance: derived from register counts and occupancy of offline compiles, not yet measured on a GPU.
"""

import functools
from typing import NamedTuple

CHUNK = 8  # classes a lane reads at a time: one 16-byte vector of a 2-byte type, two of float32


class Tile(NamedTuple):
    """What is read at a time, a constant of a kernel."""

    rows: int
    lanes: int
    vector: int  # how chunks are read, see `rows`
    ragged: bool = True  # whether a row may have classes before or after its chunks


class Launch(NamedTuple):
    rows: int  # rows a program
    lanes: int  # chunks of a row read at a time
    parts: int  # programs a row
    num_warps: int

    def tile(self, vector: int, ragged: bool = True) -> Tile:
        return Tile(self.rows, self.lanes, vector, ragged)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache(maxsize=256)
def forward(n_rows: int, n_classes: int, warp_size: int = 32, vector: int = 8) -> Launch:
    """Return the shape of a forward program: a thread a lane, so that it holds a whole chunk.

    Short rows share a warp, longer ones get one or two: every thread repeats the scalar work at a row's end, of about
    600 instructions, and its full tiles take 13 a logit. A row of 16384 classes or more is split over up to 16
    programs, whatever the number of rows, so that it is always merged by the same tree: its bits do not tell its batch.
    """
    n_chunks = max(n_classes // CHUNK, 1)
    parts = 1
    while parts < 16 and n_chunks // (256 * parts * 2) >= 4:  # a part below 4 tiles is not worth its merge
        parts *= 2
    if vector == 0:
        return _planes(n_chunks, parts, warp_size)
    if n_chunks < 256:
        return _short_rows(n_chunks, warp_size)
    lanes = max(32 if n_chunks // parts < 1024 else 64, warp_size)
    return Launch(1, lanes, parts, lanes // warp_size)


@functools.lru_cache(maxsize=256)
def backward(n_rows: int, n_classes: int, warp_size: int = 32, vector: int = 8) -> Launch:
    """Return the shape of a backward program: elementwise, so a long row is always cut into parts of 16 tiles.

    Two chunks of a 2-byte type a thread: a turn of one takes 67 instructions, too few for the next load to come back.
    """
    n_chunks = max(n_classes // CHUNK, 1)
    if vector == 0:
        return _planes(n_chunks, max(n_chunks // 64, 1), warp_size)
    if n_chunks < 256:
        return _short_rows(n_chunks, warp_size)
    return Launch(1, 256, max(n_chunks // (256 * 16), 1), (128 if vector == 8 else 256) // warp_size)


@functools.lru_cache(maxsize=256)
def merge(parts: int, warp_size: int = 32) -> Launch:
    """Return the shape of a program that merges the parts of rows: a warp, whose threads share out rows and parts."""
    return Launch(max(warp_size // parts, 1), parts, 1, 1)


def _planes(n_chunks: int, parts: int, warp_size: int) -> Launch:
    """Return a row a thread, where rows lie side by side; warps of a program share their classes."""
    lanes = min(_power_of_two(n_chunks), 8)
    return Launch(warp_size, lanes, parts, lanes)


@functools.lru_cache(maxsize=256)
def soft_forward(n_classes: int, warp_size: int = 32, vector: int = 8) -> Launch:
    """Return the shape of a forward program for soft targets: rows are not split.

    A warp for a row below 16384 classes: every thread repeats some 1200 instructions at its end, so fewer cost less;
    longer rows take 256 threads, so that few of them still fill a GPU.
    """
    n_chunks = max(n_classes // CHUNK, 1)
    if vector == 0:
        return _planes(n_chunks, 1, warp_size)
    return _soft_short_rows(n_chunks, warp_size) if n_chunks < 2048 else Launch(1, 256, 1, 256 // warp_size)


@functools.lru_cache(maxsize=256)
def soft_backward(n_classes: int, warp_size: int = 32, vector: int = 8) -> Launch:
    """Return the shape of a backward program for soft targets: as `backward`."""
    n_chunks = max(n_classes // CHUNK, 1)
    if vector > 0 and n_chunks < 256:
        return _soft_short_rows(n_chunks, warp_size)
    return backward(1, n_classes, warp_size, min(vector, 4))  # a chunk a thread


def _soft_short_rows(n_chunks: int, warp_size: int) -> Launch:
    """Return a warp a row, of few classes four for 32: more edges, and their shares, a thread could not hold."""
    lanes = _power_of_two(n_chunks)
    if lanes >= warp_size:
        return Launch(1, warp_size, 1, 1)
    return Launch(min(max(128 // lanes, 1), 32), lanes, 1, 128 // warp_size)


def _short_rows(n_chunks: int, warp_size: int) -> Launch:
    # a warp alone: no barriers, and few lanes repeat the scalar work of a row; 8 read 128 bytes, a cache line
    lanes = min(_power_of_two(n_chunks), 8)
    return Launch(warp_size // lanes, lanes, 1, 1)


class SigmoidLaunch(NamedTuple):
    block: int  # elements of a tile
    tiles: int  # tiles a program of a sum adds up
    num_warps: int


def sigmoid(n: int, warp_size: int = 32) -> SigmoidLaunch:
    """Return the shape of an elementwise program: 8 elements a thread, one 16-byte vector of a 2-byte type."""
    return SigmoidLaunch(1024, 1, 1024 // 8 // warp_size)


def sigmoid_sum(n: int, warp_size: int = 32) -> SigmoidLaunch:
    """Return the shape of a program of a sum: a warp alone, so that asking for soft targets is no barrier in its loop.

    A sum is cut into some 8000 programs, fewer where there is less, whose numbers are added apart.
    """
    block = 8 * warp_size
    return SigmoidLaunch(block, min(max(-(-n // (block * 8192)), 1), 1 << 16), 1)
