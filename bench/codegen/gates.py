"""Bounds that the machine code must keep; bounds and not equalities, since counts move between versions of Triton.

Each gate is a function of one build that returns what is wrong, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Build = dict[str, Any]
CHUNK = 8
MOST_REGISTERS = 64  # 1024 threads a multiprocessor
MOST_REGISTERS_SHORT = 80  # rows that share a warp: 25 warps, of the 32 that programs of one warp allow
MOST_REGISTERS_FEW_CLASSES = 255  # a lane that holds whole rows: a chunk and an edge, 24 logits each
MOST_INSTRUCTIONS = 13.0  # a logit in the full-tile loop, bf16, sm_90; an H200 issues 15 while it reads one
MOST_INSTRUCTIONS_MASKED = 17.0  # where rows share a warp and every tile is masked
MERGED = 2 * (CHUNK + 3) + 12  # exponentials of the edge, the merge of lanes and the scalar functions of the gap


def label(build: Build) -> str:
    misaligned = " misaligned" if build["misaligned"] else ""
    return f"{build['kernel']} {build['dtype']} {build['n_classes']} {build['target']}{misaligned}"


def streams(build: Build) -> bool:
    """Return whether rows are long enough to matter; float64 is not what the gates are for."""
    # on AMD the branch around the edge of several rows reads like one more loop
    fewest = 32 if build["target"].startswith("gfx") else 8
    return build["constants"].get("LANES", 0) >= fewest and build["dtype"] != "fp64"


def by_vectors(build: Build) -> bool:
    return streams(build) and build["constants"].get("VECTOR", 1) > 1


def shares_a_warp(build: Build) -> bool:
    return build["constants"].get("ROWS", 1) > 1


def no_spill(build: Build) -> str | None:
    bad = build["stack"] or build["spills"]
    return f"{build['stack']} bytes of stack, {build['spills']} spills" if bad else None


def registers(build: Build) -> str | None:
    most = MOST_REGISTERS_SHORT if shares_a_warp(build) else MOST_REGISTERS
    if not by_vectors(build):
        most = MOST_REGISTERS_FEW_CLASSES
    # a float64 counts twice, and a wave of 64 on AMD has 512 registers a lane
    most *= 2 if build["dtype"] == "fp64" or build["target"].startswith("gfx") else 1
    return f"{build['registers']} registers, at most {most}" if build["registers"] > most else None


def loads_of_128_bits(build: Build) -> str | None:
    if not by_vectors(build):
        return None
    narrow = [loop["loads"] for loop in build["loops"] if set(loop["loads"]) != {"128"}]
    return f"loads {narrow}" if narrow else None


def stores_of_128_bits(build: Build) -> str | None:
    if not by_vectors(build):
        return None
    bad = [loop["stores"] for loop in build["loops"] if loop["stores"] and loop["stores"] != loop["loads"]]
    return f"stores {bad}" if bad else None


def each_logit_once(build: Build) -> str | None:
    if not by_vectors(build):
        return None
    bad = [loop["logits"] for loop in build["loops"] if loop["logits"] != CHUNK]
    return f"a turn reads {bad} logits, not {CHUNK}" if bad else None


def one_exponential_a_logit(build: Build) -> str | None:
    """One a logit and, where the max moves, one a lane to rescale; the same where a loop writes, without the second."""
    if not by_vectors(build):
        return None
    first_most = CHUNK if build["kernel"] == "backward_kernel" else CHUNK + 1
    for loop in build["loops"]:
        most = CHUNK if loop["stores"] else first_most
        if loop["exp"] > most and loop is build["loops"][0] or loop["stores"] and loop["exp"] > most:
            return f"{loop['exp']} exponentials a turn, at most {most}"
    inside = build["loops"][0]["exp"] + (build["loops"][-1]["exp"] if build["loops"][-1]["stores"] else 0)
    return f"{build['exp']} exponentials in all" if build["exp"] > inside + MERGED + CHUNK + 1 else None


def no_barrier_in_a_loop(build: Build) -> str | None:
    if not by_vectors(build):
        return None
    waits = [(loop["barriers"], loop["shuffles"]) for loop in build["loops"]]
    return f"barriers, shuffles {waits}" if any(map(any, waits)) else None


def instructions_keep_up(build: Build) -> str | None:
    if not by_vectors(build) or build["target"] != "sm_90" or build["dtype"] != "bf16":
        return None
    each = build["loops"][0]["instructions"] / CHUNK
    most = MOST_INSTRUCTIONS_MASKED if shares_a_warp(build) else MOST_INSTRUCTIONS
    return f"{each:.2f} instructions a logit, at most {most:g}" if each > most else None


GATES: tuple[Callable[[Build], str | None], ...] = (
    no_spill,
    registers,
    loads_of_128_bits,
    stores_of_128_bits,
    each_logit_once,
    one_exponential_a_logit,
    no_barrier_in_a_loop,
    instructions_keep_up,
)


def failures(builds: list[Build]) -> Iterator[str]:
    for gate in GATES:
        for build in builds:
            if wrong := gate(build):
                yield f"{gate.__name__}: {label(build)}: {wrong}"
