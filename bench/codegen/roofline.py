"""Predicted times from machine code and a table of machines: which unit binds, and by how much.

Four times of a call, each as if nothing else took any: memory moves every logit once each way, the special-function
units do every exponential, the schedulers issue every instruction, the launches start. The first three overlap, so the
longest of them plus the launches is a lower bound. What runs is counted from the code: the instructions outside the
loops that stream logits (all of them, an upper bound, where rows may be ragged), those of each loop times its turns.

A second sweep of a row is charged no traffic: it is one only as far as the cache reaches.

`queued` adds latency with few bytes in flight: the warps of a scheduler are customers of two queues, its share of the
memory and its issue slots, and of a delay; one that loads a tile ahead counts twice. Mean values of such a network are
exact for exponential service, so pessimistic.

Not modelled: cache hits of a second read, uneven waves, clocks under load.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..machines import LAUNCH_US, Machine
from .launches import BYTES

CHUNK = 8
COLUMNS_OUT = {
    "forward": 4 * (1 + 5 + 1 + 3), "loss only": 4 * (1 + 3), "softmax": 4 * (1 + 5 + 1 + 3), "backward": 0,
} | {f"{target}, {what}": 4 * (1 + 5 + 1 + 5) for target in ("smoothing", "probabilities")
     for what in ("forward", "one sweep")}  # fmt: skip
COLUMNS_IN = {
    "forward": 8, "loss only": 8, "softmax": 8, "backward": 8 + 4 * (3 + 1),
    "smoothing, backward": 8 + 4 * (5 + 1 + 1),
    "probabilities, backward": 8 + 4 * (5 + 1 + 1), "sigmoid, sum": 0, "sigmoid, losses": 0, "sigmoid, backward": 0,
}  # fmt: skip
WRITES = ("softmax", "sigmoid, losses")  # and every backward: calls that write an array like the logits
READS_TWO = ("probabilities", "sigmoid")  # targets are one more

# What the loops of a kernel are, in the order of the code: `full` tiles without a mask, `masked` ones (the label's and
# the last of one row, all tiles of several), `all` tiles. A kernel not named here streams all tiles in each loop.
PASSES = {
    "forward_kernel": ("full", "masked"),
    "forward_softmax_kernel": ("full", "masked", "full", "masked"),
    "partial_kernel": ("full", "masked"),
    "merge_kernel": (),
    "backward_kernel": ("full", "masked"),
    "soft_forward_kernel": ("full", "masked", "full", "masked"),  # of its second sweep too
    "soft_backward_kernel": ("full", "masked"),
}
# of several rows by vectors, where "full" ones may hold a label; others have masked tiles alone
PASSES_OF_ROWS = {"forward_kernel": ("full", "masked"), "forward_softmax_kernel": ("full", "masked", "all")}


class Work(NamedTuple):
    """What the lanes of a launch execute, in total."""

    instructions: float
    special: float
    binding: str  # the loop most logits go through, or "masked tile" where rows are too short for one


def passes(build: dict[str, Any]) -> list[str]:
    """Name each loop of a build; a compiler may have made two of a masked one."""
    names = list(PASSES.get(build["kernel"], ("all",) * len(build["loops"])))
    if build["constants"].get("POWER"):
        names = names[:2]  # one sweep
    if build["constants"].get("ROWS", 1) > 1:
        of_rows = PASSES_OF_ROWS.get(build["kernel"], ())
        if len(of_rows) == len(build["loops"]):
            return list(of_rows)
        names = [name for name in names if name != "full"]  # several rows a program: no tile is free of labels
    found = len(build["loops"])
    while len(names) > found:  # unrolled: counted with what is outside the loops
        names.remove("masked" if "masked" in names else names[0])
    if "masked" in names:
        names[names.index("masked") : names.index("masked")] = ["masked"] * (found - len(names))
    return names + ["all"] * (found - len(names))


def turns(build: dict[str, Any], launch: dict[str, Any], n_rows: int, n_classes: int) -> list[float]:
    """Return how often each loop of a program turns."""
    constants = launch["constants"]
    if "BLOCK" in constants:
        return [float(constants.get("TILES", 1))] * len(build["loops"])
    if "LANES" not in constants:
        return [0.0] * len(build["loops"])
    rows, lanes = constants.get("ROWS", 1), constants["LANES"]
    n_parts = max(round(launch["programs"] / -(-n_rows // rows)), 1)
    n_chunks = n_classes // CHUNK
    tiles, full = -(-n_chunks // lanes), n_chunks // lanes
    names = passes(build)
    # the label's tile leaves the full ones, and that of the runner-up or a second label; the last of them goes with the
    # masked ones, since its turn loads the first of these
    held = min(1 + build["kernel"].startswith("soft"), full)
    copies = names.count("masked") / max(names.count("full"), 1)
    plain = max((full - held) / n_parts - 1, 0)
    if rows > 1:
        plain = max((n_classes - CHUNK + 1) // (CHUNK * lanes) - 1, 0) if "full" in names else 0
        copies = 1
    per_program = {
        "full": plain,
        "masked": (tiles / n_parts - plain) / max(copies, 1),
        "all": tiles / n_parts,
    }
    return [per_program[name] for name in names]


def turn(build: dict[str, Any], loop: dict[str, Any], n: float, key: str) -> float:
    """Return what ``n`` turns of a loop execute; of several rows a program only the tiles with a label mask one."""
    rows = build["constants"].get("ROWS", 1)
    if key != "instructions" or rows == 1:
        return n * float(loop[key])
    masked = min(rows, n) if n > 2 else 0  # the loop that most tiles pass
    return masked * float(loop[key]) + (n - masked) * float(loop.get("shortest", loop[key]))


def work(build: dict[str, Any], launch: dict[str, Any], n_rows: int, n_classes: int) -> Work:
    loops, counts = build["loops"], turns(build, launch, n_rows, n_classes)
    lanes = launch["programs"] * launch["threads"]

    def total(key: str) -> float:
        outside = build[key] - sum(loop[key] for loop in loops)
        if key == "instructions" and not build["constants"].get("RAGGED", True):
            outside = build["outside"]
        return lanes * (outside + sum(turn(build, loop, n, key) for n, loop in zip(counts, loops, strict=True)))

    names = passes(build)
    most = max(range(len(loops)), key=lambda i: counts[i] * loops[i]["instructions"], default=None)
    binding = "none" if most is None else names[most]
    return Work(total("instructions"), total("special"), "masked tile" if binding == "masked" else binding)


LATENCY_NS = 650.0  # of a load from memory under load; public microbenchmarks say 400 to 700
SCHEDULERS = 4


class Queued(NamedTuple):
    once_ms: float  # R: the logits read once
    ms: float
    over_roof: float  # of the bytes that the call moves
    kib_in_flight: float  # a multiprocessor
    instructions: float  # a logit


def queued(case: dict[str, Any], builds: list[dict[str, Any]], machine: Machine) -> Queued:
    """Return the time of a case with its bytes in flight and latency, for NVIDIA's schedulers of 32 lanes."""
    launch = max(case["launches"], key=lambda x: x["programs"] * x["threads"])
    build, found = builds[launch["build"]], predict(case, builds, machine)
    loop = max(build["loops"], key=lambda loop: loop["logits"], default=None)
    n_logits = case["n_rows"] * case["n_classes"]
    once = 1e3 * n_logits * BYTES[case["dtype"]] / machine.bytes_per_s
    roof = found["times_ms"]["bandwidth"]
    if loop is None:
        return Queued(once, found["ms"], found["ms"] / roof, 0.0, found["instructions_per_logit"])
    a_program = launch["threads"] // 32
    by_registers = 65536 // (-(-build["registers"] // 8) * 8 * launch["threads"])
    resident = min(by_registers, 32, 2048 // launch["threads"], launch["programs"] / machine.multiprocessors)
    read = loop["logits"] * BYTES[case["dtype"]] * 32  # by a warp and turn, ahead of its use
    n = max(round(2 * resident * a_program / SCHEDULERS), 1)
    clock, share = machine.clock_ghz * 1e9, machine.bytes_per_s / machine.multiprocessors / SCHEDULERS
    memory = read * roof / once / share * clock
    issue = found["instructions_per_logit"] * loop["logits"]
    waiting, rate = [0.0, 0.0], 0.0
    for customers in range(1, n + 1):
        times = [service * (1 + queue) for service, queue in zip((memory, issue), waiting, strict=True)]
        rate = customers / (LATENCY_NS * machine.clock_ghz + sum(times))
        waiting = [rate * time for time in times]
    ms = roof / (rate * memory) + found["times_ms"]["launch"]
    in_flight = resident * a_program * read / 1024
    return Queued(once, ms, ms / roof, in_flight, found["instructions_per_logit"])


def predict(case: dict[str, Any], builds: list[dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """Return the times of a case in ms, which unit binds, and lane instructions a logit of the whole call."""
    n_rows, n_classes, call = case["n_rows"], case["n_classes"], case["call"]
    done = [work(builds[launch["build"]], launch, n_rows, n_classes) for launch in case["launches"]]
    n_logits = n_rows * n_classes
    passes_over = 1 + call.startswith(READS_TWO) + (call in WRITES or call.endswith("backward"))
    moved = n_logits * BYTES[case["dtype"]] * passes_over
    moved += n_rows * (COLUMNS_IN.get(call, 8) + COLUMNS_OUT.get(call, 0))
    instructions, special = sum(w.instructions for w in done), sum(w.special for w in done)
    busy = min(max(launch["programs"] for launch in case["launches"]) / machine.multiprocessors, 1.0)
    times = {
        "bandwidth": 1e3 * moved / machine.bytes_per_s,
        "exp": 1e3 * special / machine.special_per_s / busy,
        "issue": 1e3 * instructions / machine.lanes_per_s / busy,
        "launch": 1e-3 * LAUNCH_US * len(case["launches"]),
    }
    overlapping = max(times[unit] for unit in ("bandwidth", "exp", "issue"))
    return {
        "times_ms": times,
        "binds": max(times, key=lambda unit: times[unit]),
        "ms": overlapping + times["launch"],
        "share_of_bandwidth": times["bandwidth"] / (overlapping + times["launch"]),
        "instructions_per_logit": instructions / n_logits,
    }
