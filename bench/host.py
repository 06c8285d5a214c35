"""Host time of a call on a GPU, without one: tensors lie on the CPU, and a launch does all but start a kernel.

What is left of a step, forward and backward, is Python, torch's dispatcher and autograd, and Triton's way to a launch.
It is held against the whole of `F.cross_entropy` on the same tensors. Runs in a process of its own, since it stands in
for Triton's driver for good.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .bounds import Bounds, bound
from .command import Tell
from .measure import Effort
from .record import ROOT

AT_MOST = 3.0  # times F.cross_entropy, default mean of 64x10, forward and backward
SHAPE = (64, 10)


def run(effort: Effort, tell: Tell) -> dict[str, Any]:
    tell("launches mocked")
    if importlib.util.find_spec("triton") is None:
        return {"skipped": "triton is not installed", "bounds": []}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.host", effort.value]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"bounds": [] if effort is Effort.QUICK else _bounds(found)}


def _bounds(found: dict[str, Any]) -> Bounds:
    shape = "x".join(map(str, found["shape"]))
    ratio = next(row["ratio"] for row in found["rows"] if row["call"] == "loss")
    held = [bound("host time / F.cross_entropy", ratio, at_most=AT_MOST, case=shape, dtype="float32")]
    for row in found["launches"]:
        if row["call"] in ("loss", "loss and scores"):
            for which, most in (("forward", 3 + (row["dtype"] != "float32")), ("backward", 2)):
                n = row[which]["kernels"] + len(row[which]["operators"])
                where = {"case": f"{row['call']}, {shape}", "dtype": row["dtype"]}
                held.append(bound(f"launches {which}", n, at_most=most, **where))
    return held


# --- in the process of its own ----------------------------------------------------------------------------------------


class Kernel:
    """What the JIT launches, less the kernel."""

    function = 0
    packed_metadata = (0, 0, 0, 0)

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        Mocked.launches += 1


class Mocked:
    """Triton's driver and compiler for a GPU that is not here; ``compiled`` names each variant asked for."""

    launches = 0
    compiled: list[str] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def mock_launches() -> None:
    """Let calls take tensors of the CPU for tensors of a GPU, until the process ends."""
    import triton
    from triton.runtime.jit import JITFunction

    from bonus_ops import call, reference

    def compile_nothing(self: Any, key: str, signature: Any, device: int, *_: Any) -> Kernel:
        Mocked.compiled.append(f"{self.__name__} {key}")
        kernel = self.device_caches[device][0][key] = Kernel()
        return kernel

    def why_not_triton(device_type: str) -> None:
        return None

    triton.runtime.driver.set_active(Mocked())
    JITFunction._do_compile = compile_nothing
    call.why_not_triton = why_not_triton
    reference.check_target = lambda *_: None  # a GPU's labels are not looked at


# operators that launch nothing, unless what they call does
FREE = re.compile(
    "empty|view|expand|unbind|select|slice|squeeze|detach|alias|transpose|as_strided|reshape|resolve_|lift_fresh"
    "|^to$|^contiguous$"
)


def operators(step: Callable[[], object]) -> list[str]:
    """Return the operators of torch that would launch something."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    events = [e for e in profile.events() or () if e.name.startswith("aten::")]
    return [_name(e) for e in events if not _is_called_by_another(e) and _launches(e)]


def _name(event: Any) -> str:
    return str(event.name).removeprefix("aten::")


def _launches(event: Any) -> bool:
    return not FREE.search(_name(event)) or any(map(_launches, event.cpu_children))


def _is_called_by_another(event: Any) -> bool:
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith("aten::"):
            return True
    return False


def steps(dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    from bonus_ops import bonus_cross_entropy, bonus_cross_entropy_with_scores

    x = torch.randn(SHAPE).to(dtype).requires_grad_()
    y = torch.randint(0, SHAPE[1], SHAPE[:1])
    ours = {"implementation": "triton"}
    return {
        "F.cross_entropy": (lambda: F.cross_entropy(x, y), x),
        "loss": (lambda: bonus_cross_entropy(x, y, **ours), x),
        "loss and scores": (lambda: bonus_cross_entropy_with_scores(x, y, **ours)[0], x),
        "sum": (lambda: bonus_cross_entropy(x, y, reduction="sum", **ours), x),
        "weight": (lambda: bonus_cross_entropy(x, y, x.new_ones(SHAPE[1]), **ours), x),
        "smoothing": (lambda: bonus_cross_entropy(x, y, label_smoothing=0.1, **ours), x),
    }


def measured(effort: Effort) -> dict[str, Any]:
    torch.set_num_threads(1)
    mock_launches()
    times: dict[str, list[float]] = {}
    found = steps(torch.float32)
    calls, rounds = {Effort.QUICK: (10, 3), Effort.SHORT: (100, 8), Effort.FULL: (500, 20)}[effort]
    for call, x in found.values():
        torch.autograd.grad(call(), x)
    gc.collect()
    gc.disable()
    for _ in range(rounds):  # interleaved: a slow moment is everybody's
        for name, (call, x) in found.items():
            start = time.process_time()
            for _ in range(calls):
                x.grad = None
                call().backward()
            times.setdefault(name, []).append((time.process_time() - start) / calls * 1e6)
    gc.enable()
    best = {name: min(t) for name, t in times.items()}
    plain = best["F.cross_entropy"]
    rows = [{"call": name, "us": t, "median_us": statistics.median(times[name]), "ratio": t / plain}
            for name, t in best.items()]  # fmt: skip
    return {"shape": list(SHAPE), "at_most": AT_MOST, "rows": rows, "launches": counted()}


def counted() -> list[dict[str, Any]]:
    """Return for each call what it would launch, forward and backward: our kernels and torch's operators."""
    result = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, (call, x) in steps(dtype).items():
            if name == "F.cross_entropy":
                continue
            row: dict[str, Any] = {"call": name, "dtype": str(dtype).removeprefix("torch.")}
            losses: list[Tensor] = []
            passes = {
                "forward": lambda call=call, losses=losses: losses.append(call()),
                "backward": lambda x=x, losses=losses: torch.autograd.grad(losses[0], x),
            }
            for which, step in passes.items():
                Mocked.launches = 0
                torchs = operators(step)
                row[which] = {"kernels": Mocked.launches, "operators": torchs}
            result.append(row)
    return result


if __name__ == "__main__":
    print(json.dumps(measured(Effort(sys.argv[1]))))
