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
from .program import Program, parse

LANES = 1 << 14  # threads side by side: fewer waste numpy's calls, more its caches
_programs: dict[str, Program] = {}
_ends: list[int] = []
_watchers: list[list[Machine]] = []


@contextlib.contextmanager
def watched() -> Iterator[list[Machine]]:
    """Collect what launches did: a machine each, whose memory counted its traffic."""
    _watchers.append([])
    try:
        yield _watchers[-1]
    finally:
        _watchers.pop()


@contextlib.contextmanager
def only_ends(n: int) -> Iterator[None]:
    """Run the first and the last ``n`` programs of the grid's first axis: of inputs too large to be walked through."""
    _ends.append(n)
    try:
        yield
    finally:
        _ends.pop()


def launch(kernel: JITFunction, run: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
    """Compile as the JIT would for these arguments, and execute."""
    built = run(kernel, *args, grid=grid, warmup=True, **kwargs)
    device = triton.runtime.driver.active.get_current_device()
    bound, _, _ = kernel.device_caches[device][4](*args, **({"debug": False} | kwargs))
    text = built.asm["ptx"]
    if text not in _programs:
        _programs[text] = parse(text)
    program = _programs[text]
    signature = built.src.signature
    arguments = [leaf for name, x in bound.items() if name in signature for leaf in leaves(signature[name], x)]
    scratch = [0] * (len(program.parameters) - len(arguments))  # for what a kernel may ask for, and these do not
    assert len(scratch) == 2, (kernel.__name__, arguments, program.parameters)
    machine = Machine(program, [*arguments, *scratch], built.metadata.shared, bool(_watchers))
    for machines in _watchers:
        machines.append(machine)
    at_once = max(LANES // program.n_threads, 1)
    programs = np.arange(math.prod(grid))
    if _ends:
        along = programs % grid[0]
        programs = programs[(along < _ends[-1]) | (along >= grid[0] - _ends[-1])]
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
