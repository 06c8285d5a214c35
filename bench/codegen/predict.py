"""Predicted times of the compiled kernels: instructions from the code, bytes in flight, latency.

A call moves every logit once each way; what it executes is counted from the code: the instructions outside the loops
that stream logits (all of them, an upper bound, where rows may be ragged), those of each loop times its turns. The
warps of a scheduler are then customers of two queues, its share of the memory and its issue slots, and of a delay; one
that loads a tile ahead counts twice. Mean values of such a network are exact for exponential service, so pessimistic.

Not modelled: cache hits of a second read, uneven waves, clocks under load. No number here was measured.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .launches import BYTES, READS_TWO

CHUNK = 8
LATENCY_NS = 650.0  # of a load from memory under load; public microbenchmarks say 400 to 700
LAUNCH_US = 2.0  # a kernel's start and end in a stream or replayed graph; an assumption
REACHABLE = 0.9  # of the table's bandwidth that a large copy reaches: an H200 copies at 4.3 of 4.8 TB/s
SCHEDULERS = 4  # of a multiprocessor: each issues an instruction of 32 lanes a clock (Hopper tuning guide)
BYTES_A_ROW = {"forward": 48, "loss only": 24, "softmax": 48, "backward": 24}  # of targets and columns
WRITES = ("softmax", "sigmoid, losses")  # and every backward: calls that write an array like the logits


class Machine(NamedTuple):
    """Multiprocessors, boost clock and bandwidth, from data sheets; the clock from 67 TFLOP/s of fp32."""

    multiprocessors: int
    clock_ghz: float
    bytes_per_s: float


MACHINES = {"H100": Machine(132, 1.98, 3.35e12 * REACHABLE), "H200": Machine(132, 1.98, 4.8e12 * REACHABLE)}  # SXM


def passes(build: dict[str, Any]) -> list[str]:
    """Name each loop of a build, in the order of the code.

    A sweep is a loop over full tiles, without a mask, and a dearer one over those that need one, or one over all tiles.
    """
    names: list[str] = []
    loops = build["loops"]
    while len(names) < len(loops):
        loop, *after = loops[len(names) : len(names) + 2]
        two = after and bool(after[0]["stores"]) == bool(loop["stores"])
        names += ["full", "masked"] if two and after[0]["instructions"] > loop["instructions"] else ["all"]
    return names


def turns(build: dict[str, Any], launch: dict[str, Any], n_rows: int, n_classes: int) -> list[float]:
    """Return how often each loop of a program turns."""
    constants = launch["constants"]
    if "LANES" not in constants:
        return [float(constants.get("TILES", 1))] * len(build["loops"])
    rows, lanes = constants["ROWS"], constants["LANES"]
    parts = max(round(launch["programs"] / -(-n_rows // rows)), 1)
    tiles, full = -(-(n_classes // CHUNK) // lanes), n_classes // CHUNK // lanes
    # the label's tile leaves the full ones, and that of the runner-up or a second label; the last of them goes with the
    # masked ones, since its turn loads the first of these; of several rows those that are whole whatever the head
    apart = min(1 + build["kernel"].startswith("soft"), full)
    whole = (full - apart) / parts if rows == 1 else (n_classes - CHUNK + 1) // (CHUNK * lanes)
    plain = max(whole - 1, 0)
    of = {"full": plain, "masked": tiles / parts - plain, "all": tiles / parts}
    return [of[name] for name in passes(build)]


def instructions(build: dict[str, Any], launch: dict[str, Any], n_rows: int, n_classes: int) -> float:
    """Return what the lanes of a launch execute, in total."""
    loops, rows = build["loops"], build["constants"].get("ROWS", 1)
    n = build["instructions"] - sum(loop["instructions"] for loop in loops)
    if not build["constants"].get("RAGGED", True):
        n = build["outside"]
    for loop, count in zip(loops, turns(build, launch, n_rows, n_classes), strict=True):
        n += count * loop["instructions"]
        if rows > 1:  # only tiles with a label mask one
            n -= max(count - (min(rows, count) if count > 2 else 0), 0) * (loop["instructions"] - loop["shortest"])
    return launch["programs"] * launch["threads"] * n


class Predicted(NamedTuple):
    once_ms: float  # R: the logits read once
    ms: float
    over_roof: float  # of the bytes that the call moves
    kib_in_flight: float  # a multiprocessor
    instructions: float  # a logit


def predict(case: dict[str, Any], builds: dict[str, dict[str, Any]], machine: Machine) -> Predicted:
    n_rows, n_classes, call = case["n_rows"], case["n_classes"], case["call"]
    n_bytes, n_logits = BYTES[case["dtype"]], n_rows * n_classes
    launch = max(case["launches"], key=lambda x: x["programs"] * x["threads"])
    build = builds[launch["key"]]
    each = sum(instructions(builds[x["key"]], x, n_rows, n_classes) for x in case["launches"]) / n_logits
    once = 1e3 * n_logits * n_bytes / machine.bytes_per_s
    reads = 1 + call.startswith(READS_TWO)
    arrays = reads + (call in WRITES or call.endswith("backward"))
    by_row = n_rows * BYTES_A_ROW.get(call, 0 if call.startswith("sigmoid") else 56)
    roof = arrays * once + 1e3 * by_row / machine.bytes_per_s
    # logits that a thread reads at a time: of the loop that reads most, or the one tile there is
    logits = max((loop["logits"] // reads for loop in build["loops"]), default=0)
    logits = logits or max(build["constants"].get("BLOCK", 0) // launch["threads"], 1)
    warps = launch["threads"] // 32
    by_registers = 65536 // (math.ceil(build["registers"] / 8) * 8 * launch["threads"])
    resident = min(by_registers, 32, 2048 // launch["threads"], launch["programs"] / machine.multiprocessors)
    clock = machine.clock_ghz * 1e9
    of_logits = logits * n_bytes * 32  # bytes that a warp reads a turn
    memory = of_logits * roof / once / (machine.bytes_per_s / machine.multiprocessors / SCHEDULERS) * clock
    issue = each * logits
    waiting, rate = [0.0, 0.0], 0.0
    for customers in range(1, max(round(2 * resident * warps / SCHEDULERS), 1) + 1):
        times = [service * (1 + queue) for service, queue in zip((memory, issue), waiting, strict=True)]
        rate = customers / (LATENCY_NS * machine.clock_ghz + sum(times))
        waiting = [rate * time for time in times]
    ms = roof / (rate * memory) + 1e-3 * LAUNCH_US * len(case["launches"])
    return Predicted(once, ms, ms / roof, resident * warps * of_logits * reads / 1024, each)
