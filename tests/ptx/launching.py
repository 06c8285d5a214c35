"""Every launch inside a context compiled for an NVIDIA GPU as on one, and its PTX executed here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
from triton.runtime.jit import JITFunction

from bench.codegen import launches

from .machine import Machine
from .program import parse

LANES = 1 << 14  # threads side by side: fewer waste numpy's calls, more its caches
_watched: list[tuple[int | None, list[Machine]]] = []


@contextlib.contextmanager
def watched(ends: int | None = None) -> Iterator[list[Machine]]:
    """Collect what launches did: a machine each, whose memory counted its traffic.

    Of inputs too large to be walked through run the ``ends`` first and last programs of the grid's first axis.
    """
    _watched.append((ends, []))
    try:
        yield _watched[-1][1]
    finally:
        _watched.pop()


def launch(kernel: JITFunction, run: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
    """Compile as the JIT would for these arguments, and execute."""
    built = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    device = triton.runtime.driver.active.get_current_device()
    bound, _, _ = kernel.device_caches[device][4](*args, **({"debug": False} | kwargs))
    program, signature = parse(built.asm["ptx"]), built.src.signature
    arguments = [leaf for name, x in bound.items() if name in signature for leaf in leaves(signature[name], x)]
    scratch = [0, 0]  # for what a kernel may ask for, and these do not
    machine = Machine(program, [*arguments, *scratch], built.metadata.shared, bool(_watched))
    programs = np.arange(math.prod(grid))
    for ends, machines in _watched:
        machines.append(machine)
        if ends is not None:
            along = programs % grid[0]
            programs = programs[(along < ends) | (along >= grid[0] - ends)]
    at_once = max(LANES // program.n_threads, 1)
    for first in range(0, len(programs), at_once):
        machine.run(grid, programs[first : first + at_once])


def leaves(kind: Any, x: Any) -> list[Any]:
    """Return what of an argument is passed: no constants, tuples one by one."""
    if isinstance(kind, tuple):
        return [leaf for k, item in zip(kind, x, strict=True) for leaf in leaves(k, item)]
    return [] if kind == "constexpr" else [x]


@contextlib.contextmanager
def emulated(target: str) -> Iterator[None]:
    """Run launches on tensors of the CPU as the GPU ``target`` would."""
    run = JITFunction.run
    with launches.caught(target, lambda kernel, args, grid, kwargs: launch(kernel, run, args, grid, kwargs)):
        yield
