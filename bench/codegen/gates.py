"""Bounds that the machine code must keep; bounds and not equalities, since counts move between versions of Triton.

Each gate is a function of one build that returns what is wrong, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .launches import READS_TWO
from .predict import CHUNK, passes

Build = dict[str, Any]
MOST_REGISTERS = 64  # 1024 threads a multiprocessor
MOST_REGISTERS_SHORT = 80  # programs of one warp: 25 warps, of the 32 that are allowed
MOST_REGISTERS_SHARES = 104  # soft targets: 16 warps in programs of 8
MOST_REGISTERS_ELEMENTS = 128  # 16 warps
MOST_REGISTERS_FEW_CLASSES = 255  # a lane that holds whole rows: a chunk and an edge, 24 logits each
MOST_INSTRUCTIONS = 13.2  # a logit in the full-tile loop, bf16, sm_90; an H200 issues 15 while it reads one
MOST_INSTRUCTIONS_MASKED = 17.3  # where rows share a warp and every tile is masked
MOST_INSTRUCTIONS_OF = {"soft_forward_kernel": 28.5, "soft_backward_kernel": 21.0}  # a sweep: to keep it from growing
MOST_EXPONENTIALS = 20  # outside the loops: of the edge, the merge of lanes and the functions of the gap
LEAST_AHEAD = 70  # instructions from a load to its use; 80 are wanted, and kept but by rows that share a warp
LEAST_AHEAD_LOSS_ALONE = 40  # not met: of several rows without scores the compiler sinks the load to 44 before its use


def label(build: Build) -> str:
    misaligned = " misaligned" if build["offset"] else ""
    return f"{build['kernel']} ({build['call']}) {build['dtype']} {build['n_classes']} {build['target']}{misaligned}"


def by_vectors(build: Build) -> bool:
    """Return whether logits are read by whole vectors, of rows long enough to matter."""
    merges, constants = build["kernel"] == "merge_kernel", build["constants"]
    return constants.get("LANES", 0) >= 8 and constants["VECTOR"] > 1 and build["dtype"] != "fp64" and not merges


def on_amd(build: Build) -> bool:
    """Return whether nothing is known of loops."""
    return build["target"].startswith("gfx")


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
    return 1 + build["call"].startswith(READS_TWO)


def loops(build: Build) -> list[dict[str, Any]]:
    """Return the loops over whole vectors."""
    return build["loops"] if by_vectors(build) else []


def streaming(build: Build) -> list[dict[str, Any]]:
    """Return the loop of each sweep that most logits of a long row pass."""
    names = passes(build)
    most = next((name for name in ("full", "masked", "all") if name in names), None)
    return [loop for name, loop in zip(names, build["loops"], strict=True) if name == most]


def timed(build: Build) -> bool:
    """Return whether instructions are bounded: where times are predicted."""
    return by_vectors(build) and (build["target"], build["dtype"]) == ("sm_90", "bf16")


def no_spill(build: Build) -> str | None:
    bad = build["stack"] or build["spills"]
    return f"{build['stack']} bytes of stack, {build['spills']} spills" if bad else None


def registers(build: Build) -> str | None:
    most = MOST_REGISTERS_SHORT if shares_a_warp(build) or build["threads"] == 32 else MOST_REGISTERS
    if build["kernel"].startswith("soft"):
        most = MOST_REGISTERS_SHARES
    if not by_vectors(build):
        most = MOST_REGISTERS_ELEMENTS if by_elements(build) else MOST_REGISTERS_FEW_CLASSES
    most *= 1 + on_amd(build)  # a wave of 64 has 512 registers a lane
    return f"{build['registers']} registers, at most {most}" if build["registers"] > most else None


def loads_of_128_bits(build: Build) -> str | None:
    if by_elements(build) or on_amd(build) and by_vectors(build):  # of long rows ahead of the loop and in it
        wide = sum(code["loads"].get("128", 0) for code in build["loops"] or [build])
        fewest = arrays(build) * chunks(build) * (1 if by_elements(build) or shares_a_warp(build) else 2)
        return f"{wide} loads of 128 bits, at least {fewest}" if wide < fewest else None
    narrow = [loop["loads"] for loop in loops(build) if set(loop["loads"]) != {"128"}]
    return f"loads {narrow}" if narrow else None


def stores_of_128_bits(build: Build) -> str | None:
    bad = [loop["stores"] for loop in loops(build)
           if loop["stores"] and loop["stores"] != {"128": loop["loads"].get("128", 0) // arrays(build)}]  # fmt: skip
    return f"stores {bad}" if bad else None


def each_logit_once(build: Build) -> str | None:
    most = CHUNK * arrays(build) * chunks(build)
    bad = [loop["logits"] for loop in loops(build) if loop["logits"] != most]
    return f"a turn reads {bad} logits, not {most}" if bad else None


def one_exponential_a_logit(build: Build) -> str | None:
    """One a logit and, where nothing is written, one a lane to rescale; the power bonus of shares takes twice that."""
    for loop in loops(build):
        most = (CHUNK * chunks(build) + (not loop["stores"])) * (1 + build["constants"].get("POWER", False))
        if loop["exp"] > most:
            return f"{loop['exp']} exponentials a turn, at most {most}"
    outside = build["exp"] - sum(loop["exp"] for loop in build["loops"])
    return f"{outside} outside the loops" if by_vectors(build) and outside > MOST_EXPONENTIALS else None


def no_barrier_in_a_loop(build: Build) -> str | None:
    of = build["loops"] if build["kernel"] == "sigmoid_sum_kernel" else loops(build)
    waits = [(loop["barriers"], loop["shuffles"]) for loop in of]
    return f"barriers, shuffles {waits}" if any(map(any, waits)) else None


def instructions_keep_up(build: Build) -> str | None:
    if not timed(build):
        return None
    each = max(loop["instructions"] for loop in streaming(build)) / CHUNK / chunks(build)
    most = MOST_INSTRUCTIONS_OF.get(build["kernel"], MOST_INSTRUCTIONS)
    most = MOST_INSTRUCTIONS_MASKED if shares_a_warp(build) else most
    return f"{each:.2f} instructions a logit, at most {most:g}" if each > most else None


def loads_run_ahead(build: Build) -> str | None:
    """What a turn loads is used in the next: 80 instructions are some 300 ns of a multiprocessor that is kept busy."""
    if not timed(build) or build["kernel"] not in ("forward_kernel", "partial_kernel", "backward_kernel"):
        return None
    fewest = min(loop["ahead"] for loop in streaming(build))
    least = LEAST_AHEAD_LOSS_ALONE if build["call"] == "loss only" and shares_a_warp(build) else LEAST_AHEAD
    return f"{fewest} instructions from load to use, at least {least}" if fewest < least else None


GATES: tuple[Callable[[Build], str | None], ...] = (
    no_spill, registers, loads_of_128_bits, stores_of_128_bits, each_logit_once, one_exponential_a_logit,
    no_barrier_in_a_loop, instructions_keep_up, loads_run_ahead,
)  # fmt: skip


def failures(builds: Iterable[Build]) -> Iterator[str]:
    for build in builds:
        for gate in GATES:
            if wrong := gate(build):
                yield f"{gate.__name__}: {label(build)}: {wrong}"
