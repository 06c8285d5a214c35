"""The only home of tuned numbers: pure functions of the problem's size.

Provenance: derived from register counts and occupancy of offline compiles, not yet measured on a GPU.
"""

from typing import NamedTuple

CHUNK = 8  # classes a lane reads at a time: one 16-byte vector of a 2-byte type, two of float32


class Launch(NamedTuple):
    rows: int  # rows a program
    lanes: int  # chunks of a row read at a time
    parts: int  # programs a row
    num_warps: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward(n_rows: int, n_classes: int) -> Launch:
    """Return the shape of a forward program.

    A long row gets 8 warps to itself, a short one shares 4 warps with others. Where rows alone leave multiprocessors
    idle, a row is split; the split depends on sizes only, so results repeat bit by bit.
    """
    n_chunks = max(n_classes // CHUNK, 1)
    if n_chunks < 256:
        lanes = _power_of_two(n_chunks)
        return Launch(max(128 // lanes, 1), lanes, 1, 4)
    lanes, parts = 256, 1
    # 528 programs of 8 warps fill 132 multiprocessors; a part below 4 tiles is not worth its merge
    while parts * n_rows < 528 and n_chunks // (lanes * parts * 2) >= 4:
        parts *= 2
    return Launch(1, lanes, parts, 8)


def backward(n_rows: int, n_classes: int) -> Launch:
    """Return the shape of a backward program: elementwise, so a long row is always cut into parts of 8 tiles."""
    n_chunks = max(n_classes // CHUNK, 1)
    if n_chunks < 256:
        lanes = _power_of_two(n_chunks)
        return Launch(max(128 // lanes, 1), lanes, 1, 4)
    return Launch(1, 256, max(n_chunks // (256 * 8), 1), 8)
