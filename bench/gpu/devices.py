"""The GPU that measures, and a stand-in on the CPU whose times mean nothing: it only shows that every path runs."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from bonus_ops import call

from .. import measure

PEERS_PACKAGES = ("liger-kernel", "flash-attn", "quack-kernels", "cut-cross-entropy")


class Gpu:
    """The current CUDA device."""

    dry = False
    name = "cuda"

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda or torch.version.hip or "unknown",
            **_versions(),
        }

    def kernels(self) -> str | None:
        """Return the implementation whose launch parameters are swept, or None for whichever runs."""
        return "triton"

    def shape(self, n_rows: int, n_classes: int) -> tuple[int, int]:
        return n_rows, n_classes

    def copies(self, size: int) -> int:
        """Return how many inputs of ``size`` bytes to use in turn so that none is found in L2."""
        return min(1 + 4 * measure.cache_bytes(True) // size, 64)

    def interleave(self, steps: dict[Any, measure.Step], budget_s: float) -> dict[Any, list[float]]:
        for step in steps.values():  # compile, and fill the allocator's cache
            for _ in range(2):
                step.prepare()
                step.run()
        return measure.interleave(steps, True, budget_s, (7, 51))

    def host_us(self, step: Callable[[], object], n: int = 300) -> float:
        """Return the host's time of a call, as the median over rounds that the GPU keeps up with."""
        for _ in range(20):
            step()
        rounds = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(n):
                step()
            rounds.append((time.perf_counter() - start) / n * 1e6)
            torch.cuda.synchronize()
        return statistics.median(rounds)

    def replay_us(self, step: Callable[[], object], n: int = 200) -> float:
        """Return the GPU's time of a call, ten to a graph: starting a graph takes as long as a small call."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(10):
                step()
        rounds = []
        for _ in range(7):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(n // 10):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            rounds.append(begin.elapsed_time(end) / n * 1e3)
        return statistics.median(rounds)

    def copy_gb_per_s(self) -> float:
        return measure.copy_gb_per_s()

    def gemm_tflop_per_s(self, n: int = 8192) -> float:
        """Return the rate of a square bf16 product of random matrices."""
        a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        times = self.interleave({"gemm": measure.Step(lambda: None, lambda: a @ b)}, 1.0)["gemm"]
        return 2 * n**3 / statistics.median(times) / 1e9

    def reset(self) -> None:
        torch.cuda.empty_cache()


class StandIn(Gpu):
    """A CPU that plays the part: toy sizes, counters for clocks."""

    dry = True
    name = "cpu"

    def __init__(self) -> None:
        self.ticks = 0

    def _tick(self) -> float:
        self.ticks += 1
        return 1.0 + self.ticks % 7 / 10

    def describe(self) -> dict[str, Any]:
        return {"gpu": "none: dry run, no number here is a measurement", "multiprocessors": 0, "memory_gb": 0,
                "l2_mb": 0, "driver": "none", "cuda": "none", **_versions()}  # fmt: skip

    def kernels(self) -> str | None:
        return None if call.why_not_triton("cpu") else "triton"

    def shape(self, n_rows: int, n_classes: int) -> tuple[int, int]:
        return min(n_rows, 4), min(n_classes, 40)

    def copies(self, size: int) -> int:
        return 2

    def interleave(self, steps: dict[Any, measure.Step], budget_s: float) -> dict[Any, list[float]]:
        for step in steps.values():
            step.prepare()
            step.run()
        return {name: [self._tick() for _ in range(3)] for name in steps}

    def host_us(self, step: Callable[[], object], n: int = 300) -> float:
        step()
        return self._tick()

    def replay_us(self, step: Callable[[], object], n: int = 200) -> float:
        step()
        return self._tick()

    def copy_gb_per_s(self) -> float:
        return 1e-6

    def gemm_tflop_per_s(self, n: int = 8192) -> float:
        return math.nan

    def reset(self) -> None:
        pass


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _versions() -> dict[str, str]:
    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
    peers = {name: version(name) for name in PEERS_PACKAGES}
    return found | {name: number for name, number in peers.items() if number != "not installed"}
