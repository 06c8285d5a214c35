"""Bounds that the machine code must keep; bounds and not equalities, since counts move between versions of Triton.

Each gate is a function of one build that returns what is wrong, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .predict import CHUNK, passes

Build = dict[str, Any]
MOST_REGISTERS = 64  # 1024 threads a multiprocessor
MOST_REGISTERS_SHORT = 80  # programs of one warp: 25 warps, of the 32 that are allowed
MOST_REGISTERS_SHORT_FLOAT32 = 100  # 20 warps, with twice the bytes in flight each
MOST_REGISTERS_FEW_CLASSES = 255  # a lane that holds whole rows: a chunk and an edge, 24 logits each
MOST_INSTRUCTIONS = 13.2  # a logit in the full-tile loop, bf16, sm_90; an H200 issues 15 while it reads one
LEAST_AHEAD = 70  # instructions from a load to its use; 80 are wanted, and kept but by rows that share a warp
MOST_INSTRUCTIONS_MASKED = 17.3  # where rows share a warp and every tile is masked
LEAST_AHEAD_LOSS_ALONE = 40  # not met: of several rows without scores the compiler sinks the load to 44 before its use
# Soft targets, elements: what they take, to keep it from growing. Shares and the sigmoid family
# are bound by the instructions that they issue; `above` says so.
MOST_REGISTERS_SHARES = 104  # 16 warps in programs of 8
MOST_REGISTERS_ELEMENTS = 128  # 16 warps
MOST_INSTRUCTIONS_OF = {
    "soft_forward_kernel": 28.5,  # a sweep
    "soft_backward_kernel": 21.0,
}
# bytes of stack, outside the loops or not: not met yet, and printed as such
STACK_OF = {("soft_forward_kernel", "sm_100"): 16}
MERGED = 2 * (CHUNK + 3) + 12  # exponentials of the edge, the merge of lanes and the scalar functions of the gap


def label(build: Build) -> str:
    misaligned = " misaligned" if build["misaligned"] else ""
    return f"{build['kernel']} ({build['call']}) {build['dtype']} {build['n_classes']} {build['target']}{misaligned}"


def streams(build: Build) -> bool:
    """Return whether rows are long enough to matter; float64 is not what the gates are for."""
    # on AMD the branch around the edge of several rows reads like one more loop
    fewest = 32 if build["target"].startswith("gfx") else 8
    return build["constants"].get("LANES", 0) >= fewest and build["dtype"] != "fp64"


def by_vectors(build: Build) -> bool:
    merges = build["kernel"] == "merge_kernel"
    return streams(build) and not merges and build["constants"].get("VECTOR", 1) > 1


def shares_a_warp(build: Build) -> bool:
    return build["constants"].get("ROWS", 1) > 1


def by_elements(build: Build) -> bool:
    return "BLOCK" in build["constants"]


def chunks(build: Build) -> int:
    """Return how many chunks a thread has of a tile."""
    constants = build["constants"]
    return max(constants.get("ROWS", 1) * constants.get("LANES", 1) // build["threads"], 1)


def arrays(build: Build) -> int:
    """Return how many arrays like the logits a turn reads."""
    return 2 if by_elements(build) or build["call"].startswith("probabilities") else 1


def streaming(build: Build) -> list[dict[str, Any]]:
    """Return the loop of each sweep that most logits of a long row pass."""
    names = passes(build)
    most = next((name for name in ("full", "masked", "all") if name in names), None)
    return [loop for name, loop in zip(names, build["loops"], strict=True) if name == most]


def no_spill(build: Build) -> str | None:
    bad = build["stack"] > STACK_OF.get((build["kernel"], build["target"]), 0) or build["spills"] and not build["stack"]
    return f"{build['stack']} bytes of stack, {build['spills']} spills" if bad else None


def registers(build: Build) -> str | None:
    most = MOST_REGISTERS_SHORT if shares_a_warp(build) or build["threads"] == 32 else MOST_REGISTERS
    if build["dtype"] == "fp32" and shares_a_warp(build):
        most = MOST_REGISTERS_SHORT_FLOAT32
    if build["kernel"].startswith("soft"):
        most = MOST_REGISTERS_SHARES
    if not by_vectors(build):
        most = MOST_REGISTERS_ELEMENTS if by_elements(build) else MOST_REGISTERS_FEW_CLASSES
    # a float64 counts twice, and a wave of 64 on AMD has 512 registers a lane
    most *= 2 if build["dtype"] == "fp64" or build["target"].startswith("gfx") else 1
    return f"{build['registers']} registers, at most {most}" if build["registers"] > most else None


def loads_of_128_bits(build: Build) -> str | None:
    if by_elements(build):  # a whole tile and one that a mask cuts, each once
        wide = sum(code["loads"].get("128", 0) for code in build["loops"] or [build])
        return None if wide == arrays(build) else f"{wide} loads of 128 bits, not {arrays(build)}"
    if not by_vectors(build):
        return None
    narrow = [loop["loads"] for loop in build["loops"] if set(loop["loads"]) != {"128"}]
    return f"loads {narrow}" if narrow else None


def stores_of_128_bits(build: Build) -> str | None:
    if not by_vectors(build):
        return None
    bad = [
        loop["stores"]
        for loop in build["loops"]
        if loop["stores"] and loop["stores"] != {"128": loop["loads"].get("128", 0) // arrays(build)}
    ]
    return f"stores {bad}" if bad else None


def each_logit_once(build: Build) -> str | None:
    if not by_vectors(build):
        return None
    most = CHUNK * arrays(build) * chunks(build)
    bad = [loop["logits"] for loop in build["loops"] if loop["logits"] != most]
    return f"a turn reads {bad} logits, not {most}" if bad else None


def one_exponential_a_logit(build: Build) -> str | None:
    """One a logit and, where the max moves, one a lane to rescale; the same where a loop writes, without the second.

    The power bonus of shares in one sweep takes as many again; their second sweep is checked as a first.
    """
    if not by_vectors(build):
        return None
    each = CHUNK * chunks(build)
    first_most = each if build["kernel"].endswith("backward_kernel") else each + 1
    if build["constants"].get("POWER"):
        first_most *= 2
    for number, loop in enumerate(build["loops"]):
        most = each if loop["stores"] else first_most
        checked = number == 0 or loop["stores"] or build["kernel"].startswith("soft")
        if checked and loop["exp"] > most:
            return f"{loop['exp']} exponentials a turn, at most {most}"
    inside = sum(loop["exp"] for loop in build["loops"])
    if build["kernel"].startswith("soft"):
        return None  # more functions of the gap
    return f"{build['exp']} exponentials in all" if build["exp"] > inside + MERGED + CHUNK + 1 else None


def no_barrier_in_a_loop(build: Build) -> str | None:
    if not by_vectors(build) and build["kernel"] != "sigmoid_sum_kernel":
        return None
    waits = [(loop["barriers"], loop["shuffles"]) for loop in build["loops"]]
    return f"barriers, shuffles {waits}" if any(map(any, waits)) else None


def instructions_keep_up(build: Build) -> str | None:
    if not by_vectors(build) or build["target"] != "sm_90" or build["dtype"] != "bf16":
        return None
    each = max(loop["instructions"] for loop in streaming(build)) / CHUNK / chunks(build)
    most = MOST_INSTRUCTIONS_OF.get(build["kernel"], MOST_INSTRUCTIONS)
    most = MOST_INSTRUCTIONS_MASKED if shares_a_warp(build) else most
    return f"{each:.2f} instructions a logit, at most {most:g}" if each > most else None


def loads_run_ahead(build: Build) -> str | None:
    """What a turn loads is used in the next: 80 instructions are some 300 ns of a multiprocessor that is kept busy."""
    from_memory = build["kernel"] in ("forward_kernel", "partial_kernel", "backward_kernel")
    if not by_vectors(build) or not from_memory or build["target"] != "sm_90" or build["dtype"] != "bf16":
        return None
    fewest = min(loop["ahead"] for loop in streaming(build))
    least = LEAST_AHEAD_LOSS_ALONE if build["call"] == "loss only" and shares_a_warp(build) else LEAST_AHEAD
    return f"{fewest} instructions from load to use, at least {least}" if fewest < least else None


GATES: tuple[Callable[[Build], str | None], ...] = (
    no_spill,
    registers,
    loads_of_128_bits,
    stores_of_128_bits,
    each_logit_once,
    one_exponential_a_logit,
    no_barrier_in_a_loop,
    instructions_keep_up,
    loads_run_ahead,
)


def failures(builds: list[Build]) -> Iterator[str]:
    for gate in GATES:
        for build in builds:
            if wrong := gate(build):
                yield f"{gate.__name__}: {label(build)}: {wrong}"


def above(builds: list[Build]) -> Iterator[tuple[str, float]]:
    """Yield what takes more than MOST_INSTRUCTIONS in its streaming loops together, sm_90, bf16."""
    for build in builds:
        here = (build["target"], build["dtype"]) == ("sm_90", "bf16")
        if here and not build["misaligned"] and not shares_a_warp(build):
            loops = [loop for loop in streaming(build) if loop["logits"] == CHUNK * arrays(build)]
            name = f"{build['kernel']}, {build['call']}, {build['n_classes']} classes"
            each, least = (sum(loop[key] for loop in loops) / CHUNK for key in ("instructions", "shortest"))
            if each > MOST_INSTRUCTIONS:
                yield name, each
            if least < each and by_elements(build):
                yield f"{name}, hard targets alone", least
