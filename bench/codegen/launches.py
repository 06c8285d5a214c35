"""The launches that a call makes, caught before they reach a GPU, and compiled for GPUs that are not here.

A call runs on CPU tensors of the right shape whose memory nobody touches. The JIT's own binder specialises its
arguments (1 is a constant, multiples of 16 and 16-byte addresses are known as such); what it would compile is recorded,
and compiled where asked. Many shapes give the same specialisation: `plan` names each once.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
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

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
PLANNED_ROWS = 1024  # more rows are more programs of the same kernel; few keep the untouched tensors small


# --- the calls whose kernels are compiled: a line each ----------------------------------------------------------------

Call = Callable[[Tensor, Tensor], Callable[[], object]]  # (logits, target) -> what is caught


def _forward_of(loss: Callable[..., object], likewise: bool = False, **options: Any) -> Call:
    """Return the call of a loss with options; ``likewise``: its target is shaped like the logits."""

    def call(z: Tensor, y: Tensor) -> Callable[[], object]:
        target = torch.empty_like(z) if likewise else y
        return lambda: loss(z, target, implementation="triton", **options)

    return call


def _backward_of(loss: Callable[..., Tensor], likewise: bool = False, **options: Any) -> Call:
    def call(z: Tensor, y: Tensor) -> Callable[[], object]:
        z = z.requires_grad_()
        value = loss(z, torch.empty_like(z) if likewise else y, implementation="triton", **options)
        return lambda: torch.autograd.grad(value, z)

    return call


ONE_SWEEP = PowerBonus(2.0)  # plain cross-entropy is this kernel too, with strength 0
SIGMOID = bonus_binary_cross_entropy_with_logits
HARD: dict[str, Call] = {
    "forward": _forward_of(bonus_cross_entropy_with_scores),
    "backward": _backward_of(bonus_cross_entropy),
    "loss only": _forward_of(bonus_cross_entropy),
    "softmax": _forward_of(bonus_cross_entropy_with_softmax),  # with scores and probabilities
}
OF_ROWS: dict[str, Call] = {  # forwards with all scores where there are scores
    "smoothing, forward": _forward_of(bonus_cross_entropy_with_scores, label_smoothing=0.1),
    "smoothing, one sweep": _forward_of(bonus_cross_entropy_with_scores, label_smoothing=0.1, bonus=ONE_SWEEP),
    "smoothing, backward": _backward_of(bonus_cross_entropy, label_smoothing=0.1),
    "probabilities, forward": _forward_of(bonus_cross_entropy_with_scores, True),
    "probabilities, one sweep": _forward_of(bonus_cross_entropy_with_scores, True, bonus=ONE_SWEEP),
    "probabilities, backward": _backward_of(bonus_cross_entropy, True),
}
OF_ELEMENTS: dict[str, Call] = {
    "sigmoid, sum": _forward_of(SIGMOID, True, reduction="sum"),
    "sigmoid, losses": _forward_of(SIGMOID, True, reduction="none"),
    "sigmoid, backward": _backward_of(SIGMOID, True, reduction="sum"),
}
CALLS = HARD | OF_ROWS | OF_ELEMENTS

SHAPES = ((65536, 10), (65536, 1024), *(case.shape for case in ROWS), (128, 10), (128, 1000))
MAIN, SPOTS = ("forward", "backward"), ((65536, 1000), (8192, 50257), (64, 262144))


class Case(NamedTuple):
    call: str
    dtype: str
    n_rows: int
    n_classes: int
    target: str
    offset: int = 0  # elements from an aligned address to the first logit


def cases() -> list[Case]:
    """Return forward and backward at every shape, dtype and target, and spots of what else there is."""
    everything = [
        Case(call, dtype, *shape, target)
        for target in TARGETS
        for dtype in ("fp16", "bf16", "fp32")
        for call in HARD
        for shape in SHAPES
        if call in MAIN or dtype == "bf16" and shape in SPOTS
    ]
    everything += [
        Case(call, "bf16", *shape, target)
        for target in TARGETS
        for call in (*OF_ROWS, *OF_ELEMENTS)
        for shape in (SPOTS[:2] if call in OF_ELEMENTS else SPOTS)
    ]
    spots = [
        Case(call, "fp64", *shape, target)
        for target in ("sm_90", "gfx942")
        for call in ("forward", "backward")
        for shape in ((65536, 1000), (8192, 50257))
    ]
    return everything + spots + [Case(call, "bf16", 8192, 32000, "sm_90", 1) for call in HARD]


def quick_cases() -> list[Case]:
    """Return what the test suite compiles: each path once."""
    shapes = (65536, 10), (65536, 1000), (8192, 32000), (8192, 50257)
    spot = shapes[3]
    found = [Case(call, "bf16", *shape, "sm_90") for call in MAIN for shape in shapes]
    found.append(Case("forward", "bf16", 64, 262144, "sm_90"))
    found += [Case("softmax", "bf16", *spot, "sm_90"), Case("backward", "bf16", 8192, 32000, "sm_90", 1)]
    for target, dtype in (("sm_90", "fp32"), ("sm_80", "bf16"), ("sm_100", "bf16"), ("gfx942", "bf16")):
        found += [Case(call, dtype, *spot, target) for call in (*MAIN, "softmax")]
        found += [Case("forward", dtype, *shapes[1], target)]
    found += [Case(call, "bf16", *shapes[1], "sm_90") for call in (*OF_ROWS, *OF_ELEMENTS)]
    return found


# --- catching ---------------------------------------------------------------------------------------------------------


class _Driver:
    """What the JIT asks a driver before it compiles; a device number stands for each target."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    kernel: str
    key: str  # what the JIT would compile: one a specialisation
    programs: int
    threads: int
    constants: dict[str, int]  # ROWS, LANES and the like


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
    # whichever of our modules hold these names
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("bonus_ops")]
    stand_ins = {"WARP_SIZE": TARGETS[target].warp_size, "why_not_triton": why_not_triton}
    saved = [(m, name, getattr(m, name)) for m in modules for name in stand_ins if hasattr(m, name)]
    assert {name for _, name, _ in saved} == set(stand_ins)
    original = JITFunction.run
    triton.runtime.driver.set_active(_Driver(target))  # for good: this process compiles and runs nothing
    JITFunction.run = run
    try:
        for module, name, _ in saved:
            setattr(module, name, stand_ins[name])
        yield
    finally:
        JITFunction.run = original
        for module, name, value in saved:
            setattr(module, name, value)


def _key(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    device = triton.runtime.driver.active.get_current_device()
    target, binder = kernel.device_caches[device][2], kernel.device_caches[device][4]
    _, specialization, options = binder(*args, **({"debug": False} | kwargs))
    return f"{kernel.__name__} {target.arch} {specialization} {sorted(options.items())}"


def planned_rows(case: Case) -> int:
    # elements in a row count no rows: how many a program takes depends on all of them
    return case.n_rows if case.call in OF_ELEMENTS else min(case.n_rows, PLANNED_ROWS)


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    n_rows = planned_rows(case)
    flat = torch.empty(n_rows * case.n_classes + case.offset, dtype=DTYPES[case.dtype])
    logits = flat[case.offset :].view(n_rows, case.n_classes)
    return logits, torch.zeros(n_rows, dtype=torch.int64)


def caught_of(case: Case, catch: Callable[[JITFunction, tuple[Any, ...], Any, dict[str, Any]], None]) -> None:
    """Hand what a call would launch to ``catch``, in order."""
    with caught(case.target, lambda *_: None):
        step = CALLS[case.call](*_inputs(case))
    with caught(case.target, catch):
        step()


def launches(case: Case) -> list[Launch]:
    """Return what a call would launch, in order."""
    found: list[Launch] = []
    scale = case.n_rows // planned_rows(case)

    def record(kernel: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        threads = kwargs["num_warps"] * TARGETS[case.target].warp_size
        constants = {name: x for name, x in kwargs.items() if name.isupper() and isinstance(x, int)}
        if tile := kwargs.get("TILE"):
            constants |= {name.upper(): n for name, n in tile._asdict().items()}
        found.append(Launch(kernel.__name__, _key(kernel, args, kwargs), math.prod(grid) * scale, threads, constants))

    caught_of(case, record)
    return found


def compile_case(case: Case, keys: set[str]) -> dict[str, Any]:
    """Compile those launches of a call whose keys are asked for; return compiled kernels by key."""
    built: dict[str, Any] = {}
    run = JITFunction.run

    def build(kernel: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        key = _key(kernel, args, kwargs)
        if key in keys and key not in built:
            built[key] = run(kernel, *args, grid=grid, warmup=True, **kwargs)

    caught_of(case, build)
    return built
