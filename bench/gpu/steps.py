"""The timings of `python -m bench gpu`, a step a process: a crash or a hang costs no other step.

    python -m bench.gpu.steps STEP FILE cuda|cpu

appends what it measured to FILE, a line of JSON each. On a CPU everything is run once, small, and no time is taken.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..record import plain
from . import cases, losses
from .cases import LLAMA2, LLAMA3, Case, Layer
from .goals import DEPTHS
from .losses import OURS, Loss, Named

Call = Callable[[], object]


class Timer:
    """Times what is asked for and writes it down; ``device`` is "cuda", or "cpu" to run without timing."""

    def __init__(self, device: str, add: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.add, self.on_gpu = device, add, device == "cuda"

    def ms(self, run: Call, by_graph: bool = True) -> list[float] | None:
        """Return the GPU's time of a call: median and the fifths at both ends.

        A graph is replayed, without Python; what may wait for the GPU or takes many ms is timed as it is called.
        """
        if not self.on_gpu:
            run()
            return None
        from triton.testing import do_bench, do_bench_cudagraph

        torch.cuda.synchronize()  # a graph is timed on another stream: what it reads must be there
        bench = do_bench_cudagraph if by_graph else functools.partial(do_bench, rep=300)
        return bench(run, quantiles=[0.5, 0.2, 0.8])

    def peak(self, run: Call) -> dict[str, float]:
        """Return the most memory that a call holds beside what was there."""
        if not self.on_gpu:
            return {}
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}

    def in_turn(self, case: Case | Layer, of: Callable[..., Call], by_graph: bool = True) -> dict[str, Any]:
        """Time a call that ``of`` the inputs returns, on inputs in turn that together outgrow L2 four times."""
        n = 1
        if self.on_gpu:
            n = min(1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // case.n_bytes, 64)
        calls = [of(*case.inputs(self.device)) for _ in range(n)]
        times = self.ms(lambda: [call() for call in calls], by_graph and isinstance(case, Case))
        return {"ms": times and [t / n for t in times]} | self.peak(calls[0])

    def row(self, case: object, name: str, mode: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a line of what ``measure`` returns, or why it could not."""
        try:
            found = measure()
        except Exception as error:  # out of memory, not capturable: the others still count
            found = {"skipped": losses.reason(error)}
        self.add({"case": str(case), "loss": name, "mode": mode} | found)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def load(self, named: dict[str, Named], inputs: tuple[Tensor, ...]) -> dict[str, Loss]:
        """Return the losses that are there and agree with float64 on ``inputs``; add why the others are left out."""
        found = {}
        for name, it in named.items():
            try:
                loss = it.load()
                losses.check(it, loss, inputs)
                found[name] = loss
            except Exception as error:  # not installed, not for this device, or wrong
                self.add({"loss": name, "skipped": losses.reason(error)})
        return found

    def losses(self, named: dict[str, Named], of_cases: Iterable[Case | Layer], checked: Case | Layer) -> None:
        """Time those that are right on the inputs of ``checked``."""
        found = self.load(named, checked.inputs(self.device))
        for case in of_cases:
            for name, loss in found.items():
                for mode in named[name].modes:
                    of = functools.partial(call, loss, mode, named[name].upstream)
                    self.row(case, name, mode, functools.partial(self.in_turn, case, of, not named[name].waits))


def call(loss: Loss, mode: str, upstream: float, *inputs: Tensor) -> Call:
    """Return a call of a loss, with its backward where ``mode`` is "train"."""
    *leaves, target = inputs
    if mode == "forward":
        return torch.no_grad()(lambda: loss(*(x.detach() for x in leaves), target))
    start = torch.full_like(loss(*leaves, target), upstream)  # made here, or its kernel would be timed
    return lambda: torch.autograd.grad(loss(*leaves, target), leaves, start)


CHECKED = Case((16, 1000), "fp32")


def speed(timer: Timer) -> None:
    """Time the losses of labels and of other targets."""
    one = torch.ones(1 << (28 if timer.on_gpu else 4), device=timer.device)
    copied = timer.ms(functools.partial(torch.empty_like(one).copy_, one))
    timer.add({"copy_gb_per_s": copied and 2 * one.nbytes / copied[0] / 1e6})
    timer.losses({name: x for name, x in losses.OF_LOGITS.items() if not x.slow_start}, cases.LABELS, CHECKED)
    timer.losses(losses.OF_SMOOTHED, cases.TARGETS, CHECKED)
    shares = [case._replace(shares=True) for case in (CHECKED, *cases.TARGETS)]
    timer.losses(losses.OF_SHARES, shares[1:], shares[0])
    # last, since they compile for seconds, and one that crashes takes nothing with it
    timer.losses({name: x for name, x in losses.OF_LOGITS.items() if x.slow_start}, cases.SLOW_STARTS, CHECKED)


def linear(timer: Timer) -> None:
    """Time hidden states to loss and both gradients, beside three bare products."""

    def bare(x: Tensor, w: Tensor, y: Tensor) -> Call:
        return torch.no_grad()(lambda: ((z := x @ w.t()) @ w, z.t() @ x))

    for layer in cases.LAYERS:
        timer.row(layer, losses.BARE, "train", functools.partial(timer.in_turn, layer, bare))
    timer.losses(losses.OF_LAYERS, cases.LAYERS, Layer(64, 64, 512))


def variants(timer: Timer) -> None:
    """Time the experiments, and what launch.py might say instead."""
    from bonus_ops.kernels.gpu.launch import Launch

    from .experiments import with_depth, with_launch

    def under(context: Any, case: Case, name: str, mode: str) -> None:
        of = functools.partial(call, losses.OF_LOGITS[OURS].load(), mode, 0.5)
        with context:
            timer.row(case, name, mode, functools.partial(timer.in_turn, case, of))

    for depth in DEPTHS:
        for case in (LLAMA2, LLAMA3, cases.FEW_ROWS):
            under(with_depth(depth), case, f"depth {depth}", "forward")
    timer.losses(losses.IN_FORWARD, (LLAMA2, cases.CLASSES_1000), CHECKED)
    # rows, lanes, programs a row, warps
    short = [Launch(32 * w // n, n, 1, w) for n in (4, 8, 16) for w in (1, 4)]
    few = [Launch(1, lanes, parts, lanes // 32) for lanes in (64, 128) for parts in (8, 16, 32)]
    long = [Launch(1, lanes, parts, lanes // 32) for lanes in (32, 64, 128) for parts in (1, 4)]
    writing = [Launch(1, lanes, parts, lanes // 64) for lanes in (128, 256, 512) for parts in (4, 16)]
    forward = ((cases.CLASSES_1000, short), (cases.FEW_ROWS, few), (LLAMA2, long), (LLAMA3, long))
    backward = ((cases.CLASSES_1000, short), (LLAMA2, writing), (LLAMA3, writing))
    for kernel, mode, tried in (("forward", "forward", forward), ("backward", "train", backward)):
        for case, shapes in tried:
            for shape in shapes:
                under(with_launch(kernel, shape), case, f"{kernel} {tuple(shape)}", mode)


STEPS = {"speed": speed, "linear": linear, "variants": variants}


def main(step: str, path: str, device: str) -> None:
    rows: list[dict[str, Any]] = []
    with open(path, "a") as file:

        def add(row: dict[str, Any]) -> None:
            rows.append(row)
            print(row, flush=True)
            print(json.dumps(plain(row)), file=file, flush=True)

        STEPS[step](Timer(device, add))
    if wrong := [row for row in rows if "skipped" in row and "case" not in row and row["loss"].startswith(OURS)]:
        sys.exit(f"not timed: {wrong}")  # a peer may be absent or wrong, ours may not


if __name__ == "__main__":
    main(*sys.argv[1:])
