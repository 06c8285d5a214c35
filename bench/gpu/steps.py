"""The timings of `python -m bench gpu`, a step a process: a crash or a hang costs no other step.

    python -m bench.gpu.steps STEP FILE cuda|cpu

appends what it measured to FILE, a line of JSON each. On a CPU everything is run once, small, and no time is taken.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import bonus_binary_cross_entropy_with_logits, bonus_cross_entropy_with_scores

from ..record import plain
from . import cases
from .cases import BONUS, Case, Layer
from .goals import DEPTHS
from .losses import (
    BARE,
    EAGER,
    FROM_L2,
    IN_FORWARD,
    LOSS_ONLY,
    OF_LAYERS,
    OF_LOGITS,
    OURS,
    Loss,
    Named,
    difference,
    reason,
)


class Timer:
    """Times what is asked for and writes it down; ``device`` is "cuda", or "cpu" to run without timing."""

    def __init__(self, device: str, add: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.add = device, add

    def of(self, case: Case | Layer) -> Any:
        return case if self.device == "cuda" else cases.small(case)

    def ms(self, run: Callable[[], object], by_graph: bool = True) -> list[float] | None:
        """Return the GPU's time of a call: median and the fifths at both ends.

        A graph is replayed, without Python; what may wait for the GPU or takes many ms is timed as it is called.
        """
        if self.device == "cpu":
            run()
            return None
        from triton.testing import do_bench, do_bench_cudagraph

        torch.cuda.synchronize()  # a graph is timed on another stream: what it reads must be there
        bench = do_bench_cudagraph if by_graph else functools.partial(do_bench, rep=300)
        return bench(run, quantiles=[0.5, 0.2, 0.8])

    def row(self, case: object, name: str, mode: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Add a line of what ``measure`` returns, or why it could not."""
        try:
            found = measure()
        except Exception as error:  # out of memory, not capturable: the others still count
            found = {"skipped": reason(error)}
        self.add({"case": str(case), "loss": name, "mode": mode} | found)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def losses(self, named: dict[str, Named], inputs: tuple[Tensor, ...]) -> dict[str, Loss]:
        """Return the losses that are there and agree with float64 on ``inputs``; add why the others are left out."""
        found = {}
        for name, it in named.items():
            try:
                loss = it.load()
                wrong = difference(it, loss, inputs)
            except Exception as error:  # not installed, or not for this device
                wrong = reason(error)
            if wrong:
                self.add({"loss": name, "skipped": wrong})
            else:
                found[name] = loss
        return found

    def in_turn(self, case: Case, of: Callable[..., Callable[[], object]], by_graph: bool = True) -> dict[str, Any]:
        """Time a call that ``of(logits, target)`` returns, on inputs in turn that together outgrow L2 four times."""
        small, n = self.of(case), 1
        if self.device == "cuda":
            n = min(1 + 4 * torch.cuda.get_device_properties(0).L2_cache_size // case.n_bytes, 64)
        calls = [of(*small.inputs(self.device)) for _ in range(n)]
        times = self.ms(lambda: [call() for call in calls], by_graph)
        return {"ms": times and [t / n for t in times]}


def call(loss: Loss, mode: str, upstream: float, *inputs: Tensor) -> Callable[[], object]:
    """Return a call of a loss, with its backward where ``mode`` is "train"."""
    *leaves, target = inputs
    if mode == "forward":
        return torch.no_grad()(lambda: loss(*(x.detach() for x in leaves), target))
    dtypes = torch.bfloat16, torch.float16, torch.float32
    starts = {dtype: torch.full((), upstream, device=target.device, dtype=dtype) for dtype in dtypes}

    def train() -> object:
        value = loss(*leaves, target)
        return torch.autograd.grad(value, leaves, starts[value.dtype])

    return train


def speed(timer: Timer) -> None:
    """Time the losses of labels, of other targets, and what a small call costs the host."""
    one = torch.ones(1 << (28 if timer.device == "cuda" else 4), device=timer.device)
    copied = timer.ms(functools.partial(torch.empty_like(one).copy_, one))
    timer.add({"copy_gb_per_s": copied and 2 * one.nbytes / copied[0] / 1e6})
    first = timer.of(Case((16, 1000), "fp32")).inputs(timer.device)
    losses = timer.losses({name: x for name, x in OF_LOGITS.items() if not x.slow_start}, first)
    for case in cases.LABELS:
        time_losses(timer, case, losses)
    for case in cases.TARGETS:
        for what, ours, eager in OTHERS:
            for name, loss in ((OURS, ours), (EAGER, eager)):
                of = functools.partial(call_of_shares, loss)
                timer.row(f"{case}, {what}", name, "train", lambda case=case, of=of: timer.in_turn(case, of))
    for case in cases.SMALL:
        for name in (OURS, LOSS_ONLY, EAGER):
            of = call(losses[name], "train", 0.5, *timer.of(case).inputs(timer.device))
            timer.row(case, name, "host", lambda of=of: {"ms": host_ms(of, timer.device)})
        time_losses(timer, case, {name: losses[name] for name in (OURS, LOSS_ONLY, EAGER)})
    # last, since they compile for seconds, and one that crashes takes nothing with it
    losses = timer.losses({name: x for name, x in OF_LOGITS.items() if x.slow_start}, first)
    for case in cases.SLOW_STARTS:
        time_losses(timer, case, losses)


def time_losses(timer: Timer, case: Case, losses: dict[str, Loss], named: dict[str, Named] = OF_LOGITS) -> None:
    for name, loss in losses.items():
        for mode in named[name].modes:
            of = functools.partial(call, loss, mode, named[name].upstream)
            by_graph = not named[name].waits
            timer.row(case, name, mode, lambda of=of, by_graph=by_graph: timer.in_turn(case, of, by_graph))


OTHERS = (  # of (logits, labels, probabilities)
    ("label smoothing 0.1", lambda z, y, t: bonus_cross_entropy_with_scores(z, y, bonus=BONUS, label_smoothing=0.1)[0],
     lambda z, y, t: F.cross_entropy(z, y, label_smoothing=0.1)),
    ("probabilities", lambda z, y, t: bonus_cross_entropy_with_scores(z, t, bonus=BONUS)[0],
     lambda z, y, t: F.cross_entropy(z, t)),
    ("sigmoid", lambda z, y, t: bonus_binary_cross_entropy_with_logits(z, t, bonus=BONUS),
     lambda z, y, t: F.binary_cross_entropy_with_logits(z, t)),
)  # fmt: skip


def call_of_shares(loss: Callable[..., Tensor], z: Tensor, y: Tensor) -> Callable[[], object]:
    shares = z.detach().softmax(1)
    return call(lambda z, y: loss(z, y, shares), "train", 0.5, z, y)


def host_ms(of: Callable[[], object], device: str, n: int = 300) -> list[float] | None:
    """Return what a call takes before the GPU is waited for, of rounds that it keeps up with."""
    rounds = []
    for _ in range(8 if device == "cuda" else 1):
        start = time.perf_counter()
        for _ in range(n if device == "cuda" else 1):
            of()
        rounds.append((time.perf_counter() - start) / n * 1e3)
        if device == "cuda":
            torch.cuda.synchronize()
    return None if device == "cpu" else [sorted(rounds[1:])[i] for i in (3, 1, 5)]


def linear(timer: Timer) -> None:
    """Time hidden states to loss and both gradients, over three bare products, with the most memory beside theirs."""
    losses = timer.losses(OF_LAYERS, timer.of(Layer(64, 64, 512)).inputs(timer.device))
    for layer in cases.LAYERS:
        x, w, y = timer.of(layer).inputs(timer.device)
        calls = {BARE: bare_products(x, w)}
        calls |= {name: call(loss, "train", OF_LAYERS[name].upstream, x, w, y) for name, loss in losses.items()}
        for name, run in calls.items():
            timer.row(layer, name, "train", lambda run=run: {"ms": timer.ms(run, False)} | peak(timer, run))


def bare_products(x: Tensor, w: Tensor) -> Callable[[], object]:
    """Return a call that multiplies logits and both gradients into outputs that are there."""
    z, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    @torch.no_grad()
    def run() -> None:
        torch.mm(x, w.t(), out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.t(), x, out=dw)

    return run


def peak(timer: Timer, run: Callable[[], object]) -> dict[str, float]:
    """Return the most memory that a call holds beside what was there."""
    if timer.device == "cpu":
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}


def variants(timer: Timer) -> None:
    """Time what launch.py might say instead, and the experiments; on a CPU the first of each."""
    from .experiments import with_depth, with_launch

    some, ours = slice(None if timer.device == "cuda" else 1), {OURS: OF_LOGITS[OURS].load()}

    def under(context: Any, case: Case, name: str, mode: str) -> None:
        with context:
            timer.row(case, name, mode, lambda: timer.in_turn(case, functools.partial(call, ours[OURS], mode, 0.5)))

    for depth in DEPTHS:
        for case in (cases.LLAMA2, cases.LLAMA3, cases.FEW_ROWS):
            under(with_depth(depth), case, f"depth {depth}", "forward")
    named = dict(list(IN_FORWARD.items())[: None if timer.device == "cuda" else 2])
    losses = timer.losses(named, timer.of(Case((16, 1000), "fp32")).inputs(timer.device))
    for case in (cases.LLAMA2, cases.CLASSES_1000)[some]:
        time_losses(timer, case, losses, IN_FORWARD)
    time_losses(timer, cases.LLAMA3, {FROM_L2: losses[FROM_L2]} if FROM_L2 in losses else {}, IN_FORWARD)
    for kernel, case, shapes in launch_shapes():
        for shape in shapes[some]:
            mode = "forward" if kernel == "forward" else "train"
            under(with_launch(kernel, shape), case, f"{kernel} {tuple(shape)}", mode)


def launch_shapes() -> Iterator[tuple[str, Case, list[Any]]]:
    """Yield launches to try: (rows, lanes, programs a row, warps)."""
    from bonus_ops.kernels.gpu.launch import Launch

    short = [Launch(32 * w // n, n, 1, w) for n in (4, 8, 16) for w in (1, 4)]
    few = [Launch(1, lanes, parts, lanes // 32) for lanes in (64, 128) for parts in (8, 16, 32)]
    long = [Launch(1, lanes, parts, lanes // 32) for lanes in (32, 64, 128) for parts in (1, 4)]
    writing = [Launch(1, lanes, parts, lanes // 64) for lanes in (128, 256, 512) for parts in (4, 16)]
    yield from (("forward", cases.CLASSES_1000, short), ("backward", cases.CLASSES_1000, short))
    yield from (("forward", cases.FEW_ROWS, few), ("forward", cases.LLAMA2, long), ("forward", cases.LLAMA3, long))
    yield from (("backward", case, writing) for case in (cases.LLAMA2, cases.LLAMA3))


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
