"""What GPUs can do, from public tables, for predictions: none of these numbers was measured here.

Units of a multiprocessor (SM; CU on AMD). Results a clock of 32-bit exp2, log2, reciprocal on NVIDIA: 16, table
"Throughput of Native Arithmetic Instructions" of the CUDA C++ Programming Guide, the same for 8.0, 9.0, 10.0 and 12.0.
Issue on NVIDIA: four schedulers, each one instruction of 32 lanes a clock (Hopper and Blackwell tuning guides).
Derived, not in a table: on AMD four SIMD units, each a wave of 64 in 4 clocks, so 64 lanes a clock, and transcendentals
at a quarter of that rate (CDNA 3 instruction set guide); scalar instructions, issued beside, are counted as if they
cost a slot, so AMD's issue times are upper bounds.
"""

from __future__ import annotations

from typing import NamedTuple

REACHABLE = 0.9  # of the table's bandwidth that a large copy reaches; derived: an H200 copies at 4.3 of 4.8 TB/s
LAUNCH_US = 2.0  # a kernel's start and end in a stream or replayed graph; an assumption


class Machine(NamedTuple):
    target: str
    multiprocessors: int
    clock_ghz: float  # boost
    tb_per_s: float
    source: str
    special_per_clock: int = 16  # exponentials and the like a clock and multiprocessor
    lanes_per_clock: int = 128  # lanes issued to a clock and multiprocessor

    @property
    def special_per_s(self) -> float:
        return self.multiprocessors * self.special_per_clock * self.clock_ghz * 1e9

    @property
    def lanes_per_s(self) -> float:
        return self.multiprocessors * self.lanes_per_clock * self.clock_ghz * 1e9

    @property
    def bytes_per_s(self) -> float:
        return self.tb_per_s * 1e12 * REACHABLE


MACHINES = {
    "A100": Machine("sm_80", 108, 1.41, 2.04, "A100 80GB SXM data sheet; A100 whitepaper (SMs, clock)"),
    "H100": Machine(
        "sm_90", 132, 1.98, 3.35, "H100 SXM data sheet; clock derived from its 67 TFLOP/s of fp32 = SMs x 256 x clock"
    ),
    "H200": Machine("sm_90", 132, 1.98, 4.8, "H200 SXM data sheet; clock as H100"),
    "B200": Machine(
        "sm_100",
        148,
        1.98,
        7.7,
        "HGX B200 data sheet; clock derived from its 75 TFLOP/s of fp32; SMs: public databases",
    ),
    "RTX 5090": Machine("sm_120", 170, 2.41, 1.79, "RTX Blackwell GPU architecture whitepaper"),
    "RTX PRO 6000": Machine(
        "sm_120", 188, 2.6, 1.79, "RTX PRO Blackwell data sheet; clock derived from its 125 TFLOP/s of fp32"
    ),
    "MI300X": Machine("gfx942", 304, 2.1, 5.3, "Instinct MI300X data sheet", 16, 64),
    "MI355X": Machine("gfx950", 256, 2.4, 8.0, "Instinct MI355X data sheet", 16, 64),
}
