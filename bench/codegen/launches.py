"""The launches that a call makes, caught before they reach a GPU, and compiled for GPUs that are not here.

A call runs on CPU tensors of the right shape whose memory nobody touches. The JIT's own binder specialises its
arguments (1 is a constant, multiples of 16 and 16-byte addresses are known as such): many shapes share a kernel.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Set
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bonus_ops import (
    PowerBonus,
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
)
from bonus_ops.ops import room

from ..gpu.cases import ROWS

TARGETS = {f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
PLANNED_ROWS = 1024  # more rows are more programs of the same kernel; few keep the untouched tensors small

SCORED, SIGMOID = bonus_cross_entropy_with_scores, bonus_binary_cross_entropy_with_logits
SMOOTH, ONE_SWEEP = {"label_smoothing": 0.1}, {"bonus": PowerBonus(2.0)}  # plain cross-entropy is that kernel too
READS_TWO = ("probabilities", "sigmoid")  # calls with a target shaped like the logits
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "forward": (SCORED, {}),
    "backward": (bonus_cross_entropy, {}),
    "loss only": (bonus_cross_entropy, {}),
    "softmax": (bonus_cross_entropy_with_softmax, {}),  # with scores and probabilities
    "smoothing, forward": (SCORED, SMOOTH),
    "smoothing, one sweep": (SCORED, SMOOTH | ONE_SWEEP),
    "smoothing, backward": (bonus_cross_entropy, SMOOTH),
    "probabilities, forward": (SCORED, {}),
    "probabilities, one sweep": (SCORED, ONE_SWEEP),
    "probabilities, backward": (bonus_cross_entropy, {}),
    "sigmoid, sum": (SIGMOID, {"reduction": "sum"}),
    "sigmoid, losses": (SIGMOID, {"reduction": "none"}),
    "sigmoid, backward": (SIGMOID, {"reduction": "sum"}),
}
MAIN = ("forward", "backward")
FEW_CLASSES, SHORT, WHOLE, LONG, FEW_ROWS = (65536, 10), (65536, 1000), (8192, 32000), (8192, 50257), (64, 262144)
SHAPES = (FEW_CLASSES, (65536, 1024), *(case.shape for case in ROWS))


class Case(NamedTuple):
    call: str
    dtype: str
    n_rows: int
    n_classes: int
    target: str
    offset: int = 0  # elements from an aligned address to the first logit


def cases() -> list[Case]:
    """Return forward and backward at every shape, dtype and target, and spots of what else there is."""
    found = [
        Case(call, dtype, *shape, target)
        for target in TARGETS
        for dtype in ("fp16", "bf16", "fp32")
        for call in CALLS
        for shape in SHAPES
        if call in MAIN or dtype == "bf16" and shape in (SHORT, LONG, FEW_ROWS)
    ]
    found += [Case(call, "fp64", *shape, target)
              for target in ("sm_90", "gfx942") for call in MAIN for shape in (SHORT, LONG)]  # fmt: skip
    return found + [Case(call, "bf16", *WHOLE, "sm_90", 1) for call in (*MAIN, "loss only", "softmax")]


def quick_cases() -> list[Case]:
    """Return what the test suite compiles: each path once."""
    found = [Case(call, "bf16", *shape, "sm_90") for call in MAIN for shape in (FEW_CLASSES, SHORT, WHOLE, LONG)]
    found += [Case("forward", "bf16", *FEW_ROWS, "sm_90"), Case("backward", "bf16", *WHOLE, "sm_90", 1)]
    for target, dtype in (*((x, "bf16") for x in ("sm_80", "sm_90", "sm_100", "gfx942")), ("sm_90", "fp32")):
        found += [Case(call, dtype, *LONG, target) for call in (*MAIN, "softmax")]
        found += [Case("forward", dtype, *SHORT, target)]
    return found + [Case(call, "bf16", *SHORT, "sm_90") for call in CALLS if ", " in call]


@contextlib.contextmanager
def caught(target: str, catch: Callable[[JITFunction, tuple[Any, ...], Any, dict[str, Any]], None]) -> Iterator[None]:
    """Hand every launch to ``catch`` in place of a GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        catch(self, args, grid, kwargs)

    def why_not_triton(device_type: str) -> str | None:
        return None if device_type == "cpu" else f"there are no kernels for device type {device_type}"

    for name in ("labels", "sigmoid", "soft"):
        room("triton", name)  # imported later, it would keep a stand-in
    stand_ins = {"WARP_SIZE": TARGETS[target].warp_size, "why_not_triton": why_not_triton}
    # whichever of our modules hold these names
    held = [(module, name) for module in list(sys.modules.values()) if module.__name__.startswith("bonus_ops")
            for name in stand_ins if hasattr(module, name)]  # fmt: skip
    assert {name for _, name in held} == set(stand_ins)
    driver = SimpleNamespace(  # what the JIT asks for before it compiles; a device number stands for each target
        get_current_target=lambda: TARGETS[target],
        get_current_device=lambda: list(TARGETS).index(target),
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)  # for good: this process compiles and runs nothing
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for module, name in held:
            stack.enter_context(mock.patch.object(module, name, stand_ins[name]))
        yield


class Launch(NamedTuple):
    kernel: str
    key: str  # what the JIT would compile: one a specialisation
    programs: int
    threads: int
    constants: dict[str, int]  # ROWS, LANES and the like


def of(case: Case, keys: Set[str] = frozenset()) -> list[tuple[Launch, Any]]:
    """Return what a call would launch, in order, and of each key asked for what it compiles to."""
    found: list[tuple[Launch, Any]] = []
    # elements in a row count no rows: how many a program takes depends on all of them
    n_rows = case.n_rows if case.call.startswith("sigmoid") else min(case.n_rows, PLANNED_ROWS)
    step, scale, run = _step(case, n_rows), case.n_rows // n_rows, JITFunction.run

    def catch(kernel: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        threads = kwargs["num_warps"] * TARGETS[case.target].warp_size
        constants = {name: x for name, x in kwargs.items() if name.isupper() and isinstance(x, int)}
        if tile := kwargs.get("TILE"):
            constants |= {name.upper(): n for name, n in tile._asdict().items()}
        launch = Launch(kernel.__name__, _key(kernel, args, kwargs), math.prod(grid) * scale, threads, constants)
        built = run(kernel, *args, grid=grid, warmup=True, **kwargs) if launch.key in keys else None
        found.append((launch, built))

    with caught(case.target, catch):
        step()
    return found


def _step(case: Case, n_rows: int) -> Callable[[], object]:
    """Return what is caught: a forward, or a backward alone."""
    loss, options = CALLS[case.call]
    backward = case.call.endswith("backward")
    flat = torch.empty(n_rows * case.n_classes + case.offset, dtype=DTYPES[case.dtype])
    z = flat[case.offset :].view(n_rows, case.n_classes).requires_grad_(backward)
    y = torch.empty_like(z) if case.call.startswith(READS_TWO) else torch.zeros(n_rows, dtype=torch.int64)
    if not backward:
        return lambda: loss(z, y, implementation="triton", **options)
    with caught(case.target, lambda *_: None):
        value = loss(z, y, implementation="triton", **options)
    return lambda: torch.autograd.grad(value, z)


def _key(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    device = triton.runtime.driver.active.get_current_device()
    target, binder = kernel.device_caches[device][2], kernel.device_caches[device][4]
    _, specialization, options = binder(*args, **({"debug": False} | kwargs))
    return f"{kernel.__name__} {target.arch} {specialization} {sorted(options.items())}"
