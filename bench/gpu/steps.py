"""The steps of `python -m bench gpu`; each is a function of (device, save) that saves what it has as it goes."""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bonus_ops import bonus_binary_cross_entropy_with_logits, bonus_cross_entropy_with_scores, difficulty_scores

from .. import measure
from .devices import Gpu
from .peers import (
    BONUS,
    COMPILED,
    EAGER,
    LOSS_ONLY,
    OURS,
    PEERS,
    Loss,
    check,
    cut_cross_entropy,
    logits,
)

ROOT = Path(__file__).resolve().parent.parent.parent
Save = Callable[[dict[str, Any]], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = (
    (65536, 1000),
    (8192, 32000),
    (8192, 50257),
    (8192, 50304),
    (8192, 128256),
    (8192, 151936),
    (8192, 262144),
    (64, 262144),
)
COMPILED_SHAPES = ((65536, 1000), (8192, 32000), (8192, 128256))
TARGET_SHAPES = ((65536, 1000), (8192, 32000))
SMALL = ((128, 10), (128, 1000), (1024, 1000))
LINEAR = (8192, 128256, 2048)  # rows, classes, hidden width


# --- ceilings ---------------------------------------------------------------------------------------------------------


def ceilings(device: Gpu, save: Save) -> None:
    """Measure the machine: what a copy moves and a matrix product computes."""
    found: dict[str, Any] = {"device": device.describe()}
    save(found)
    found["copy_gb_per_s"] = device.copy_gb_per_s()
    save(found)
    found["gemm_tflop_per_s"] = device.gemm_tflop_per_s()
    save(found)


# --- tests ------------------------------------------------------------------------------------------------------------


def gpu_tests(device: Gpu, save: Save) -> None:
    """Run what only a GPU can show."""
    _pytest(device, save, "tests/test_gpu.py")


def matrix(device: Gpu, save: Save) -> None:
    """Run the tests' matrix on compiled kernels."""
    _pytest(device, save, "tests/test_kernels.py", "tests/test_rest.py")


def parity(device: Gpu, save: Save) -> None:
    """Run the tests of the kernels for soft targets, two labels and the sigmoid family."""
    files = ("tests/test_soft.py", "tests/test_mixup.py", "tests/test_sigmoid.py")
    _pytest(device, save, *files, "-k", "kernel or triton")


def _pytest(device: Gpu, save: Save, *files: str) -> None:
    # the checkout's options ask for a plugin that may not be there
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-q", "-rf", "--tb=short"]
    command += ["-p", "no:cacheprovider", *files]
    env = dict(os.environ)
    if device.dry:
        env["TRITON_INTERPRET"] = "0"  # tests of kernels are skipped; one that forgets the device fails
    elif importlib.util.find_spec("xdist"):
        command += ["-n", str(min(os.cpu_count() or 1, 16))]  # compiling is what takes the time
    lines, marks = [], collections.Counter[str]()
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
            if re.fullmatch(r"[.sFExX]+( *\[ *\d+%\])?", lines[-1]):
                marks.update(lines[-1])  # what counts if the time runs out
                failed = marks["F"] + marks["E"]
                save({"summary": f"so far {marks['.']} passed, {failed} failed, {marks['s']} skipped"})
    save({"command": " ".join(command[1:]), "exit": run.returncode, **counts(lines)})
    if run.returncode:
        save({"said": first_failures(lines)})
        raise RuntimeError(f"pytest: exit {run.returncode}")


def counts(lines: list[str]) -> dict[str, Any]:
    """Return how many tests did what, from pytest's last line, and the names of those that failed."""
    last = next((line for line in reversed(lines) if re.search(r" in [\d.]+s|collected", line)), "")
    found: dict[str, Any] = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return found | {"summary": last, "failures": [line for line in lines if line.startswith("FAILED")][:20]}


def first_failures(lines: list[str]) -> list[str]:
    """Return what pytest said of the first tests that failed, or its last words: nobody may see the terminal."""
    at = next((i for i, line in enumerate(lines) if re.fullmatch(r"=+ (FAILURES|ERRORS) =+", line)), None)
    return lines[-SAID:] if at is None else lines[at : at + SAID]


def sanitizer(device: Gpu, save: Save) -> None:
    """Run compute-sanitizer's tools over a few dozen launches, where it is installed and supports the device."""
    binary = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not device.dry and not os.path.exists(binary):
        save({"skipped": "compute-sanitizer is not installed"})
        return
    program = [sys.executable, "-m", "bench.gpu.launches", *(["--cpu"] if device.dry else [])]
    # freed memory is returned, so that a stray access is seen
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end = time.monotonic() + SANITIZER_S
    found: dict[str, Any] = {}
    runs = {}
    for tool in TOOLS[:1] if device.dry else TOOLS:  # at once: nothing is timed
        # few errors: those of a later tool must fit a pipe that is not read yet
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "5"]
        command = program if device.dry else [binary, *options, *program]
        runs[tool] = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    for tool, run in runs.items():
        try:
            said, _ = run.communicate(timeout=max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            run.kill()
            found[tool] = {"verdict": "timed out"}
        else:
            found[tool] = said_by_a_tool(run.returncode, said)
        print(f"{tool}: {found[tool]}", flush=True)
        save({"tools": found})
    if wrong := [tool for tool in found if found[tool]["verdict"] not in ("clean", NOT_SUPPORTED)]:
        raise RuntimeError(f"compute-sanitizer: {', '.join(wrong)}")


TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_S = 100.0
NOT_SUPPORTED = "device not supported"
SAID = 120  # lines


def said_by_a_tool(code: int, said: str) -> dict[str, Any]:
    """Return the verdict of a tool, how many launches it saw, its last lines and, unless it is clean, its first."""
    launches = re.search(r"(\d+) launches", said)
    verdict = {0: "clean", 9: "errors"}.get(code, f"exit {code}")
    if NOT_SUPPORTED in said.lower():
        verdict = NOT_SUPPORTED
    elif verdict == "clean" and launches is None:
        verdict = "nothing ran"
    found = {"verdict": verdict, "launches": int(launches[1]) if launches else 0, "tail": said.splitlines()[-3:]}
    return found if verdict == "clean" else found | {"said": said.splitlines()[:SAID]}


# --- speed ------------------------------------------------------------------------------------------------------------


class Bench:
    """Inputs of one shape, used in turn, and the steps of each peer on them."""

    def __init__(self, device: Gpu, n_rows: int, n_classes: int, dtype: str) -> None:
        self.device = device
        self.shape = device.shape(n_rows, n_classes)
        first = logits(*self.shape, DTYPES[dtype], device.name)
        size = first[0].numel() * first[0].element_size()
        self.batches = [first] + [
            (first[0].detach().clone().requires_grad_(), first[1]) for _ in range(device.copies(size) - 1)
        ]
        # one turn for all steps: the next one never finds in L2 what the last one read
        self.turn = itertools.cycle(self.batches)

    def step(self, loss: Loss, trains: bool, overwrites: bool = False, upstream: float = 0.5) -> measure.Step:
        starts = {dtype: torch.full((), upstream, device=self.device.name, dtype=dtype) for dtype in DTYPES.values()}
        own = self.batches[0][0].detach().clone().requires_grad_() if overwrites else None
        now: list[tuple[Tensor, Tensor]] = [self.batches[0]]

        def prepare() -> None:
            now[0] = next(self.turn)
            if own is not None:
                own.detach().copy_(now[0][0].detach())
                for z, _ in self.batches:  # so that L2 holds nothing of what was just written
                    z.detach().amax()
                now[0] = own, now[0][1]

        def run() -> None:
            z, y = now[0]
            if trains:
                value = loss(z, y)
                torch.autograd.grad(value, z, starts[value.dtype])
            else:
                with torch.no_grad():
                    loss(z.detach(), y)

        return measure.Step(prepare, run)


def speed(device: Gpu, save: Save) -> None:
    """Time forward, and forward with backward, of ours and of every peer that is there."""
    found: dict[str, Any] = {"skipped": {}, "rows": []}
    losses, found["skipped"] = load_peers(device, [name for name in PEERS if not PEERS[name].slow_start])
    plain = {name: losses[name] for name in (OURS, LOSS_ONLY, EAGER) if name in losses}
    for shape in SHAPES:
        _add_speed(device, found, losses, shape, "bf16")
        save(found)
    for dtype in ("fp16", "fp32"):
        for n_classes in (32000, 128256):
            _add_speed(device, found, plain, (8192, n_classes), dtype)
            save(found)
    # last, since they compile for seconds, and one that crashes takes nothing with it; beside ours, timed already
    slow, skipped = load_peers(device, [name for name in PEERS if PEERS[name].slow_start])
    found["skipped"] |= skipped
    save(found)
    for shape in COMPILED_SHAPES if slow else ():
        _add_speed(
            device, found, {name: losses[name] for name in (OURS,) if name in losses} | slow, shape, "bf16", True
        )
        save(found)
    if wrong := [name for name in (OURS, LOSS_ONLY) if name not in losses]:
        raise RuntimeError(f"not timed: {'; '.join(wrong)}")


def _add_speed(
    device: Gpu, found: dict[str, Any], losses: dict[str, Loss], shape: tuple[int, int], dtype: str, again: bool = False
) -> None:
    """Add the times of a shape to ``found``; ``again`` leaves out forward alone and the second times of ours."""
    n_rows, n_classes = shape
    print(f"speed: {n_rows} x {n_classes} {dtype}: {', '.join(losses)}", flush=True)
    case = {"n_rows": n_rows, "n_classes": n_classes, "dtype": dtype}
    try:
        rows = _speed_of(device, losses, n_rows, n_classes, dtype, not again)
        found["rows"] += [case | row for row in rows if not (again and row["provider"] == OURS)]
    except Exception as error:  # out of memory: the other shapes still count
        found["skipped"][f"{n_rows} x {n_classes} {dtype}"] = _reason(error)
    device.reset()


TARGETS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # of (logits, label, probabilities)
    "label smoothing 0.1": (
        lambda z, y, t: bonus_cross_entropy_with_scores(z, y, bonus=BONUS, label_smoothing=0.1)[0],
        lambda z, y, t: F.cross_entropy(z, y, label_smoothing=0.1),
    ),
    "probabilities": (
        lambda z, y, t: bonus_cross_entropy_with_scores(z, t, bonus=BONUS)[0],
        lambda z, y, t: F.cross_entropy(z, t),
    ),
    "sigmoid": (
        lambda z, y, t: bonus_binary_cross_entropy_with_logits(z, t, bonus=BONUS),
        lambda z, y, t: F.binary_cross_entropy_with_logits(z, t),
    ),
}


def targets(device: Gpu, save: Save) -> None:
    """Time forward and backward of targets that are no labels beside torch's own, which have no bonus and no scores."""
    rows: list[dict[str, Any]] = []
    for n_rows, n_classes in TARGET_SHAPES:
        bench = Bench(device, n_rows, n_classes, "bf16")
        probabilities = bench.batches[0][0].detach().softmax(1)
        for target, losses in TARGETS.items():
            given = probabilities.round() if target == "sigmoid" else probabilities
            steps = {
                name: bench.step(functools.partial(_of_target, loss, given), True)
                for name, loss in zip((OURS, EAGER), losses, strict=True)
            }
            case = {"n_rows": n_rows, "n_classes": n_classes, "target": target}
            try:
                times = device.interleave(steps, 2.0)
                rows.append(case | {"ms": {name: measure.summary(values) for name, values in times.items()}})
            except Exception as error:
                rows.append(case | {"skipped": _reason(error)})
            print(f"targets: {rows[-1]}", flush=True)
            save({"rows": rows})
        device.reset()


def _of_target(loss: Callable[..., Tensor], given: Tensor, z: Tensor, y: Tensor) -> Tensor:
    return loss(z, y, given)


def load_peers(device: Gpu, names: list[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    losses, skipped = {}, {}
    for name in names:
        peer = PEERS[name]
        if device.dry and name == COMPILED:
            skipped[name] = "dry run: nothing is compiled"
            continue
        try:
            loss = peer.load()
            if wrong := check(peer, loss, 40 if device.dry else 1000, device.name):
                skipped[name] = wrong
            else:
                losses[name] = loss
        except Exception as error:  # not installed, or not for this device
            skipped[name] = _reason(error)
    print(f"peers: {', '.join(losses)}; skipped: {skipped}", flush=True)
    return losses, skipped


def _speed_of(
    device: Gpu, losses: dict[str, Loss], n_rows: int, n_classes: int, dtype: str, forward: bool
) -> list[dict[str, Any]]:
    bench, steps = Bench(device, n_rows, n_classes, dtype), {}
    for name, loss in losses.items():
        steps[name, "train"] = bench.step(loss, True, PEERS[name].overwrites, PEERS[name].upstream)
        if forward and not PEERS[name].trains_only:
            steps[name, "forward"] = bench.step(loss, False)
    if forward:
        steps["difficulty_scores", "forward"] = bench.step(lambda z, y: difficulty_scores(z, y).loss, False)
    rows = []
    for (name, mode), step in list(steps.items()):
        try:
            step.prepare()
            step.run()
        except Exception as error:
            del steps[name, mode]
            rows.append({"provider": name, "mode": mode, "skipped": _reason(error)})
    times = device.interleave(steps, 3.0)
    return rows + [{"provider": name, "mode": mode, "ms": measure.summary(values)}
                   for (name, mode), values in times.items()]  # fmt: skip


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


def linear(device: Gpu, save: Save) -> None:
    """Time hidden states to loss and gradients: a product and ours beside Cut Cross-Entropy, which takes no logits."""
    n_rows, n_classes, n_hidden = (4, 40, 8) if device.dry else LINEAR
    try:
        theirs = (lambda x, w, y: F.cross_entropy((x @ w.t()).float(), y)) if device.dry else cut_cross_entropy()
    except Exception as error:
        save({"skipped": _reason(error)})
        return
    # logits of deviation 1: of smaller ones every loss is log(n_classes), whatever the label
    hidden = torch.randn(n_rows, n_hidden, device=device.name, dtype=torch.bfloat16)
    weight = torch.randn(n_classes, n_hidden, device=device.name, dtype=torch.bfloat16) * n_hidden**-0.5
    target = torch.randint(n_classes, (n_rows,), device=device.name)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.no_grad():
        few, labels = hidden[:64], target[:64]
        error = float((theirs(few, weight, labels) - F.cross_entropy((few @ weight.t()).float(), labels)).abs())
    if not error < 0.02:  # of some 12.3, in bfloat16
        save({"skipped": f"wrong result: loss off by {error:.1e}"})
        return
    losses = {
        OURS: lambda: bonus_cross_entropy_with_scores(hidden @ weight.t(), target)[0],
        "Cut Cross-Entropy": lambda: theirs(hidden, weight, target),
    }

    def step(loss: Callable[[], Tensor]) -> measure.Step:
        return measure.Step(lambda: None, lambda: torch.autograd.grad(loss(), (hidden, weight)))

    times = device.interleave({name: step(loss) for name, loss in losses.items()}, 5.0)
    save({"n_rows": n_rows, "n_classes": n_classes, "n_hidden": n_hidden,
          "ms": {name: measure.summary(values) for name, values in times.items()}})  # fmt: skip


def small(device: Gpu, save: Save) -> None:
    """Time what a call costs the host, and what its kernels cost the GPU when a graph replays them."""
    rows: list[dict[str, Any]] = []
    losses = {name: PEERS[name].load() for name in (OURS, LOSS_ONLY, EAGER)}
    for n_rows, n_classes in SMALL:
        bench = Bench(device, n_rows, n_classes, "fp32")
        for name, loss in losses.items():
            step = bench.step(loss, True)
            step.prepare()
            row: dict[str, Any] = {"n_rows": n_rows, "n_classes": n_classes, "provider": name}
            for what, clock in (("host_us", device.host_us), ("replay_us", device.replay_us)):
                try:
                    row[what] = clock(step.run)
                except Exception as error:
                    row[f"{what} skipped"] = _reason(error)
            print(f"small: {row}", flush=True)
            rows.append(row)
            save({"rows": rows})


# --- launch parameters ------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    rows: int
    lanes: int
    parts: int
    num_warps: int


SHORT = tuple(Tile(32 * w // n, n, 1, w) for n in (4, 8, 16, 32) for w in (1, 2, 4)) + (Tile(1, 128, 1, 4),)
LONG = tuple(Tile(1, lanes, 1, lanes // 32) for lanes in (32, 64, 128, 256, 512)) + (
    Tile(1, 256, 1, 4),
    Tile(1, 512, 1, 8),
)
FEW = tuple(Tile(1, lanes, parts, lanes // 32) for lanes in (64, 128, 256) for parts in (8, 16, 32))
WRITING = tuple(Tile(1, lanes, parts, lanes // 32) for lanes in (128, 256, 512) for parts in (1, 4, 16))
SWEEP = (
    ("forward", 65536, 1000, SHORT),
    ("forward", 65536, 10, tuple(Tile(32 * w, 1, 1, w) for w in (1, 2, 4))),
    ("forward", 8192, 32000, LONG),
    ("forward", 8192, 128256, LONG),
    ("forward", 64, 262144, FEW),
    ("backward", 65536, 1000, SHORT),
    ("backward", 8192, 32000, WRITING),
    ("backward", 8192, 128256, WRITING),
)


def sweep(device: Gpu, save: Save) -> None:
    """Time other launch parameters than those of launch.py; the best are printed as it would say them."""
    from bonus_ops.kernels.gpu import launch

    found: list[dict[str, Any]] = []
    for kernel, n_rows, n_classes, tiles in SWEEP:
        bench = Bench(device, n_rows, n_classes, "bf16")
        loss = functools.partial(_with_scores, device.kernels())
        steps = {"now": bench.step(loss, kernel == "backward")}
        for tile in tiles[:1] if device.dry else tiles:
            with instead(launch, kernel, tile):
                step = bench.step(loss, kernel == "backward")
                try:
                    step.prepare()
                    step.run()  # compiles
                    steps[str(tuple(tile))] = _under(launch, kernel, tile, step)
                except Exception as error:  # too many registers, a size the kernel does not take
                    print(f"sweep: {kernel} {tile}: {_reason(error)}", flush=True)
        times = {name: measure.summary(values)["median"] for name, values in device.interleave(steps, 2.0).items()}
        best = min(times, key=lambda name: times[name])
        ours = f"{tuple(getattr(launch, kernel)(n_rows, n_classes))} {times['now']:.4f} ms"
        line = f"{kernel} {n_rows} x {n_classes}: (rows, lanes, parts, warps) {best} {times[best]:.4f} ms, now {ours}"
        print(f"sweep: {line}", flush=True)
        found.append(
            {"kernel": kernel, "n_rows": n_rows, "n_classes": n_classes, "ms": times, "best": best, "line": line}
        )
        save({"rows": found})
        device.reset()


def _with_scores(implementation: str | None, z: Tensor, y: Tensor) -> Tensor:
    return bonus_cross_entropy_with_scores(z, y, implementation=implementation)[0]


@contextlib.contextmanager
def instead(launch: Any, kernel: str, tile: Tile) -> Iterator[None]:
    """Launch ``kernel`` with ``tile`` while the context lasts."""
    original = getattr(launch, kernel)
    setattr(launch, kernel, lambda *_, **__: launch.Launch(*tile))
    try:
        yield
    finally:
        setattr(launch, kernel, original)


def _under(launch: Any, kernel: str, tile: Tile, step: measure.Step) -> measure.Step:
    def run() -> None:
        with instead(launch, kernel, tile):
            step.run()

    return measure.Step(step.prepare, run)
