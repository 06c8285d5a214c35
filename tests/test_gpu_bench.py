"""`python -m bench gpu` as it will run on a GPU, on a stand-in that checks the order of calls as CUDA does."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import inspect
import io
import json
import os
import re
import statistics
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import gpu, measure
from bench.gpu import devices, goals, launches, peers, steps
from bench.gpu import report as gpu_report
from bonus_ops.kernels import launch
from bonus_ops.operators import implementation
from tests import conftest

pytest.importorskip("triton")
if conftest.ACCELERATOR is not None or not conftest.INTERPRETED:
    pytest.skip("the stand-in interprets kernels", allow_module_level=True)
from tests import cuda_stand_in, test_gpu
from tests.cuda_stand_in import MS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cuda():
    with cuda_stand_in.stand_in() as cuda:
        yield cuda


class Toy(devices.Gpu):
    """The GPU's own methods, on few numbers."""

    def kernels(self):
        return implementation.default_implementation(cuda_stand_in.PLACE)

    def shape(self, n_rows, n_classes):
        return min(n_rows, 4), min(n_classes, 40)

    def copies(self, size):
        assert super().copies(size) >= 1
        return 2

    def host_us(self, step, n=1):
        return super().host_us(step, n)

    def replay_us(self, step, n=10):
        return super().replay_us(step, n)

    def copy_gb_per_s(self):
        return measure.copy_gb_per_s(1 << 12)

    def gemm_tflop_per_s(self, n=16):
        return super().gemm_tflop_per_s(n)


# --- the stand-in -----------------------------------------------------------------------------------------------------


def timed():
    return torch.cuda.Event(enable_timing=True)


def captured(work):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()


def on_side(work, before=False, after=False):
    x = torch.ones(3, device="cuda")
    side = torch.cuda.Stream()
    if before:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(x)
    if after:
        torch.cuda.current_stream().wait_stream(side)
    work(x)


def read_without_recording():
    timed().elapsed_time(timed())


def read_without_waiting():
    begin, end = timed(), timed()
    begin.record()
    torch.ones(3, device="cuda")
    end.record()
    begin.elapsed_time(end)


def read_without_timing():
    begin, end = timed(), torch.cuda.Event()
    begin.record()
    end.record()
    torch.cuda.synchronize()
    begin.elapsed_time(end)


def waits(work):
    torch.cuda.set_sync_debug_mode("error")
    work(torch.ones(3, device="cuda"))


REFUSED = {
    "recorded": read_without_recording,
    "not ready": read_without_waiting,
    "enable_timing": read_without_timing,
    "capturing: the host waits": lambda: captured(torch.cuda.synchronize),
    "capturing: an event is timed": lambda: captured(lambda: timed().record()),
    "capturing: _local_scalar": lambda: captured(lambda: torch.ones(1, device="cuda").item()),
    "capturing: tensor": lambda: captured(lambda: torch.tensor(1.0, device="cuda")),
    "capturing: a graph is replayed": lambda: captured(torch.cuda.CUDAGraph().replay),
    "without a preceding": lambda: torch.cuda.CUDAGraph().replay(),
    "has not waited": lambda: on_side(lambda x: x + 1, after=True),
    "not waited": lambda: on_side(lambda x: x + 1, before=True),
    "same device": lambda: torch.ones(3, device="cuda") + torch.ones(3),
    "synchronizing.*_local_scalar": lambda: waits(lambda x: x.sum().item()),
    "synchronizing.*_to_copy": lambda: waits(lambda x: x.cpu()),
    "synchronizing.*copy_": lambda: waits(lambda x: x.copy_(torch.zeros(3))),
    "synchronizing.*index": lambda: waits(lambda x: x[x > 0]),
    "synchronizing.*tensor": lambda: waits(lambda x: torch.tensor([1.0], device="cuda")),
    "synchronizing.*equal": lambda: waits(lambda x: torch.equal(x, x)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_the_stand_in_refuses_what_cuda_refuses(cuda, said):
    with pytest.raises((RuntimeError, ValueError), match=said):
        REFUSED[said]()


def test_the_stand_in_lets_pass_what_is_in_order(cuda):
    on_side(lambda x: x.add_(1), before=True, after=True)
    begin, end = timed(), timed()
    begin.record()
    x = torch.zeros(3, device="cuda")
    end.record()
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) == pytest.approx(MS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + 1) * 2
    x.fill_(4.0)
    assert y.tolist() == [2.0] * 3  # as captured; torch leaves it unwritten
    graph.replay()
    assert y.tolist() == [10.0] * 3


def names_of_cuda(path):
    """Return what a file uses of `torch.cuda`, with the keywords of its calls."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            found.setdefault(node.attr, set())
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "torch.cuda":
            found.setdefault(called.attr, set()).update(keyword.arg for keyword in node.keywords)
    return found


USERS = ("bench/measure.py", "bench/gpu/devices.py", "bench/gpu/launches.py", "bench/gpu/peers.py", "tests/test_gpu.py")


@pytest.mark.parametrize("path", USERS)
def test_names_and_keywords_are_those_of_torch(path):
    """In the torch that is installed: with another name a run on a GPU would end."""
    used = names_of_cuda(ROOT / path)
    assert used
    for name, keywords in used.items():
        assert hasattr(torch.cuda, name), name
        if keywords:
            known = inspect.signature(getattr(torch.cuda, name).__new__).parameters
            assert keywords <= set(known), name
    stub = (Path(torch.__file__).parent / "_C/__init__.pyi").read_text()
    properties = re.search(r"class _CudaDeviceProperties:\n((?:    .*\n)+)", stub)[1]
    fields = set(re.findall(r"^    (\w+):", properties, re.MULTILINE))
    assert set(re.findall(r"properties\.(\w+)", (ROOT / path).read_text())) <= fields
    assert set(cuda_stand_in.PROPERTIES) <= fields


def test_the_stand_in_takes_what_torch_takes():
    """Its parameters have torch's names, in torch's order."""
    for ours, theirs in (
        (cuda_stand_in.Event.__init__, torch.cuda.Event.__new__),
        (cuda_stand_in.Event.elapsed_time, torch.cuda.Event.elapsed_time),
        (cuda_stand_in.Stream.wait_stream, torch.cuda.Stream.wait_stream),
        (cuda_stand_in.Cuda.graph, torch.cuda.graph.__init__),
        (cuda_stand_in.Cuda.on, torch.cuda.stream),
        (cuda_stand_in.Cuda.set_sync_debug_mode, torch.cuda.set_sync_debug_mode),
        (cuda_stand_in.Cuda.sleep, torch.cuda._sleep),
    ):
        named = [
            [x for x in inspect.signature(f).parameters if x not in ("self", "cls", "cuda")] for f in (ours, theirs)
        ]
        assert named[0] == named[1][: len(named[0])], theirs


# --- the clocks -------------------------------------------------------------------------------------------------------


def test_a_step_is_timed_without_what_prepares_it(cuda):
    x = torch.zeros(3, device="cuda")
    prepared, run = [], []

    def prepare():
        prepared.append(x + 1)

    def twice():
        run.append((x + 1) * 2)

    step = measure.Step(prepare, twice)
    assert measure.time_ms(step, True) == pytest.approx(2 * MS)
    times = Toy().interleave({"twice": step, "once": measure.Step(prepare, lambda: x + 1)}, 0.0)
    assert {name: len(values) for name, values in times.items()} == {"twice": 7, "once": 7}
    assert statistics.median(times["twice"]) == pytest.approx(2 * MS)
    assert statistics.median(times["once"]) == pytest.approx(MS)
    assert len(prepared) == 1 + 2 * 9 and len(run) == 1 + 9  # two rounds that nobody times


def test_the_device_is_asked_what_it_is(cuda):
    found = devices.Gpu().describe()
    assert found["gpu"] == "NVIDIA H200" and found["l2_mb"] == 62.9 and found["memory_gb"] == 150.0
    assert found["driver"] == "unknown"  # no nvidia-smi here
    assert devices.Gpu().kernels() == "triton" and devices.Gpu().shape(7, 9) == (7, 9)
    # four times the cache, at most 64
    assert [devices.Gpu().copies(size) for size in (1 << 30, 64 << 20, 32 << 20, 1 << 10)] == [1, 4, 8, 64]
    devices.Gpu().reset()


def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices._driver() == "580.1"
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert devices._driver() == "unknown"


def test_ceilings_are_bytes_and_products_over_time(cuda):
    assert measure.copy_gb_per_s(1 << 12) == pytest.approx(2 * 4096 / (MS * 1e-3) / 1e9)
    assert Toy().gemm_tflop_per_s(16) == pytest.approx(2 * 16**3 / (MS * 1e-3) / 1e12)


def test_host_time_is_that_of_a_call(cuda, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    calls = []
    assert devices.Gpu().host_us(lambda: calls.append(1), n=4) == 1e6 / 4
    assert len(calls) == 20 + 7 * 4


def test_replayed_time_is_that_of_a_call(cuda):
    x = torch.zeros(3, device="cuda")
    host = []

    def step():
        host.append(1)
        x.add_(1)
        x.mul_(1)

    assert devices.Gpu().replay_us(step, n=20) == pytest.approx(2 * MS * 1e3)
    assert len(host) == 3 + 10  # warmed up, captured; no replay asks the host
    assert x[0].item() == 3 + 10 + 7 * 20  # the stand-in runs what it captures


def test_a_step_leaves_nothing_to_the_garbage_collector():
    """Which is off while steps are timed: a cycle would hold the gradients of all of them."""
    z, y = peers.logits(3, 10, torch.float32, "cpu")
    losses = {name: peers.PEERS[name].load() for name in (peers.OURS, peers.LOSS_ONLY)}
    for loss in losses.values():
        torch.autograd.grad(loss(z, y), z)
    gc.collect()
    gc.disable()
    try:
        for loss in losses.values():
            torch.autograd.grad(loss(z, y), z)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_peak_memory_is_read_around_the_step(cuda):
    asked = []

    def run():
        asked.append("run")
        cuda.memory["peak"] = 900

    cuda.memory["now"] = 500
    assert measure.peak_bytes(measure.Step(lambda: asked.append("prepare"), run), True) == 400
    assert asked == ["prepare", "run"]
    assert measure.cache_bytes(True) == 62_914_560 and measure.cache_bytes(False) == 0


def test_memory_is_kept_where_malloc_agrees(monkeypatch):
    set_to = []
    libc = types.SimpleNamespace(mallopt=lambda option, value: set_to.append((option, value)) or 1)
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: libc)
    assert measure.keep_memory() and set_to == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not measure.keep_memory()


# --- the tests that only a GPU runs, on the stand-in ------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """One or two rounds of what a GPU does a hundred times."""
    monkeypatch.setattr(test_gpu, "range", lambda *ends: range(*(min(end, len(ends)) for end in ends)), raising=False)


@pytest.mark.parametrize("call", test_gpu.OTHERS.values(), ids=test_gpu.OTHERS)
def test_other_losses(cuda, few, monkeypatch, call):
    monkeypatch.setattr(test_gpu, "draw", lambda *_: peers.logits(3, 21, torch.float32, "cuda"))
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *_, **options: rand(3, 21, **options))
    test_gpu.test_other_losses_wait_for_nothing_and_replay(call)


def test_steps_of_the_gpu_tests(cuda, few):
    test_gpu.test_nothing_waits_for_the_device(10, "mean")
    test_gpu.test_a_captured_step_replays(4, 10)
    test_gpu.test_work_follows_the_current_stream(10)
    test_gpu.test_twenty_runs_agree_bit_by_bit(8, 10, torch.float32)
    test_gpu.test_the_kernels_are_what_runs()
    test_gpu.assert_far_rows_are_right(80, 10)


def test_values_of_the_gpu_tests(cuda, few):
    test_gpu.test_half_precision_is_rounded_once(4, 10, torch.float16)
    test_gpu.test_scores_are_those_of_float64(4, 10, torch.bfloat16)
    test_gpu.test_rows_and_targets_at_any_address(21, torch.float16)


def test_the_gpu_tests_refuse_a_wait_and_a_stale_replay(cuda, few, monkeypatch):
    """The rules of the stand-in reach what they call."""
    right = test_gpu.bonus_cross_entropy_with_scores

    def waiting(*args, **options):
        loss, scores = right(*args, **options)
        loss.sum().item()
        return loss, scores

    monkeypatch.setattr(test_gpu, "bonus_cross_entropy_with_scores", waiting)
    with pytest.raises(RuntimeError, match="synchronizing"):
        test_gpu.test_nothing_waits_for_the_device(10, "mean")
    with pytest.raises(RuntimeError, match="capturing"):
        test_gpu.test_a_captured_step_replays(4, 10)


def test_far_rows_are_skipped_where_memory_is_short(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    with pytest.raises(pytest.skip.Exception, match="not enough memory"):
        test_gpu.test_more_logits_than_a_32_bit_offset_reaches()


def test_the_launches_of_the_sanitizer(cuda, monkeypatch, capsys):
    monkeypatch.setattr(launches, "CLASSES", ((19, 1),))
    monkeypatch.setattr(launches, "N_CLASSES", 19)
    kernels = []
    submit = cuda.submit
    monkeypatch.setattr(
        cuda, "submit", lambda work, again=None: (kernels.append(again is None), submit(work, again))[1]
    )
    launches.main("cuda")
    said = re.fullmatch(r"(\d+) launches of our kernels\n", capsys.readouterr().out)
    assert int(said[1]) == sum(kernels) > 20


# --- the run ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def few_and_small():
    """Let steps run in this process on the stand-in, few shapes and few times each; formulas play the kernels."""
    interleave, find_spec = measure.interleave, importlib.util.find_spec

    def twice(step_of, on_gpu, budget_s, reps):
        assert on_gpu and budget_s > 0 and reps in ((7, 51), (20, 20))
        return interleave(step_of, True, budget_s, (2, 2) if reps[0] == 7 else (3, 3))

    with pytest.MonkeyPatch.context() as patch, cuda_stand_in.stand_in() as cuda:
        cuda.why_no_kernels = "formulas take less time"
        patch.setattr(devices, "Gpu", Toy)
        patch.setattr(measure, "interleave", twice)
        for name in ("SHAPES", "COMPILED_SHAPES", "TARGET_SHAPES", "SMALL"):
            patch.setattr(steps, name, getattr(steps, name)[1:2])
        patch.setattr(steps, "SWEEP", [(*case[:3], case[3][:2]) for case in steps.SWEEP[:5:4]])
        patch.setattr(steps, "LINEAR", (4, 40, 8))
        patch.setattr(steps, "TARGETS", {"sigmoid": steps.TARGETS["sigmoid"]})  # the others: `test_other_losses`
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(importlib.util, "find_spec", lambda name, *more: name == "xdist" or find_spec(name, *more))
        patch.setitem(sys.modules, "cut_cross_entropy", types.SimpleNamespace(linear_cross_entropy=linear_loss))
        yield patch, cuda


def linear_loss(e, c, targets):
    return F.cross_entropy((e @ c.t()).float(), targets)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def child_here(name, limit_s, command=None):
    """Run a step as its process would, in this one."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "saved.json"
        status = "done"
        try:
            gpu.main(["--step", name, "--save", str(saved)], Path(folder), lambda: "a commit")
        except Exception:
            status = "failed"
        return json.loads(saved.read_text()) | {"status": status, "seconds": 1.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of every step, on the stand-in: (its folder, what it printed, README)."""
    root = tmp_path_factory.mktemp("whole")
    (root / "bin").mkdir()
    readme, folder = root / "README.md", root / "bench/results"
    readme.write_text(f"before {gpu_report.BEGIN}{gpu_report.END} after")
    script(root / "bin/compute-sanitizer", "echo 64 launches of our kernels")
    python = script(root / "bin/python", "echo ..s; echo 2 passed, 1 skipped in 0.10s")
    said = io.StringIO()
    # it exits where a step is not done
    with few_and_small() as (patch, _), contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        patch.setenv("PATH", str(root / "bin"), prepend=os.pathsep)
        patch.setattr(steps, "sys", types.SimpleNamespace(executable=python))
        patch.setattr(gpu, "in_process", child_here)
        patch.setattr(gpu_report, "draw", lambda results, path: False)  # the dry run draws
        gpu.main([], folder, lambda: "a commit")
    return folder, said.getvalue(), readme.read_text()


def of_step(whole, name):
    return json.loads((whole[0] / "gpu-nvidia-h200.json").read_text())["steps"][name]


def test_a_whole_run_is_done_and_reported(whole):
    folder, said, readme = whole
    results = json.loads((folder / "gpu-nvidia-h200.json").read_text())
    assert not results["dry"] and {step["status"] for step in results["steps"].values()} == {"done"}, said
    assert list(results["steps"]) == list(gpu.STEPS)
    assert {path.name for path in folder.iterdir()} - {"gpu-nvidia-h200.png"} == {
        "gpu-nvidia-h200.json", "gpu-nvidia-h200.md",
    }  # fmt: skip
    written = (folder / "gpu-nvidia-h200.md").read_text()
    assert "- gpu: NVIDIA H200" in written and "dry" not in written.lower()
    for step in gpu.STEPS:
        assert f"| {step} | done |" in written
    assert "NVIDIA H200, " in readme and "**GPU: not measured.**" not in readme
    verdicts = {row["goal"]: row["verdict"] for row in goals.goals(results) if "Liger" not in row["goal"]}
    assert set(verdicts.values()) <= {goals.MET, goals.MISSED, goals.NOT_MEASURED}
    rows = [
        row for row in goals.goals(results) if "in the forward visit" in row["goal"] and "8192 x 32000" in row["at"]
    ]
    assert len(rows) == 2 and all(row["outcome"] > 0 for row in rows)
    assert "goals met" in said.splitlines()[-1]


def test_speed_times_every_peer_that_is_there(whole):
    found = of_step(whole, "speed")
    timed = {(row["provider"], row["mode"], row["dtype"]) for row in found["rows"]}
    both = {(name, mode, dtype) for name in (peers.OURS, peers.LOSS_ONLY, peers.EAGER)
            for mode in ("train", "forward") for dtype in ("bf16", "fp16", "fp32")}  # fmt: skip
    scores = {("difficulty_scores", "forward", dtype) for dtype in ("bf16", "fp16", "fp32")}
    assert timed == both | scores | {(peers.IN_FORWARD, "train", "bf16"), (peers.COMPILED, "train", "bf16")}
    assert all(row["ms"]["median"] > 0 and row["ms"]["reps"] == 2 for row in found["rows"])
    assert set(found["skipped"]) == {"Liger-Kernel", "flash-attention", "QuACK"}
    assert all("No module named" in why for why in found["skipped"].values())
    # one shape, and two of each other dtype; the times beside compiled ones are not kept
    assert sum(row["provider"] == peers.OURS and row["mode"] == "train" for row in found["rows"]) == 1 + 4


def test_the_other_steps_have_numbers(whole):
    assert of_step(whole, "ceilings")["copy_gb_per_s"] > 0 and of_step(whole, "ceilings")["gemm_tflop_per_s"] > 0
    for row in of_step(whole, "small")["rows"]:
        assert row["host_us"] > 0 and row["replay_us"] > 0, row
    for row in of_step(whole, "targets")["rows"]:
        assert set(row["ms"]) == {peers.OURS, peers.EAGER}, row
    assert set(of_step(whole, "linear")["ms"]) == {peers.OURS, "Cut Cross-Entropy"}
    swept = of_step(whole, "sweep")["rows"]
    assert [row["kernel"] for row in swept] == ["forward", "forward"] and all(len(row["ms"]) == 3 for row in swept)
    tools = of_step(whole, "sanitizer")["tools"]
    assert {name: (tool["verdict"], tool["launches"]) for name, tool in tools.items()} == dict.fromkeys(
        steps.TOOLS, ("clean", 64)
    )
    for name, file in (("gpu tests", "test_gpu.py"), ("matrix", "test_kernels.py"), ("parity", "test_sigmoid.py")):
        assert of_step(whole, name)["passed"] == 2 and file in of_step(whole, name)["command"]
        assert " -n " in of_step(whole, name)["command"]  # in parallel where a plugin can


# --- what goes wrong --------------------------------------------------------------------------------------------------


def options(**more):
    return types.SimpleNamespace(**{"steps": list(gpu.STEPS), "budget": gpu.BUDGET_S, "dry_run": False} | more)


def test_time_that_runs_out_skips_what_is_left(tmp_path, monkeypatch):
    now, limits = [0.0], {}
    in_process = gpu.in_process

    def takes_its_limit(name, limit_s):
        if limit_s < gpu.LEAST_S:
            return in_process(name, limit_s)
        limits[name] = limit_s
        now[0] += limit_s
        return {"status": "timed out", "seconds": limit_s, "error": "stopped"}

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "in_process", takes_its_limit)
    monkeypatch.setattr(gpu_report, "draw", lambda results, path: False)
    results = gpu.run(options(budget=200.0), tmp_path, "c", "d")
    assert limits == {"ceilings": 60, "gpu tests": 90, "speed": 50}
    assert {step["status"] for name, step in results["steps"].items() if name not in limits} == {"skipped"}
    assert "| sweep | skipped | 0 | no time left |" in (tmp_path / "gpu-unknown.md").read_text()
    assert "no time left" in gpu_report.summary(results)


def test_a_step_without_a_device_says_why(monkeypatch):
    """The command line of a step, in a process of its own."""
    found = gpu.in_process("ceilings", 60)
    assert found["status"] == "failed" and found["error"].split(":")[0] in ("AssertionError", "RuntimeError")
    assert "describe" in "".join(found["traceback"])


def test_memory_that_runs_out_costs_one_shape():
    with few_and_small() as (patch, _):
        shapes = []

        def once(device, losses, n_rows, n_classes, dtype, forward):
            shapes.append((n_rows, n_classes, dtype))
            if dtype == "fp32" and n_classes == 32000:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.00 GiB.")
            return [{"provider": name, "mode": "train", "ms": {}} for name in losses]

        cleared = []
        patch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(1))
        patch.setattr(steps, "_speed_of", once)
        patch.setitem(peers.PEERS, peers.IN_FORWARD, peers.PEERS[peers.EAGER])  # not interpreted here
        found = child_here("speed", 1)
    assert found["status"] == "done" and len(cleared) == len(shapes) == 6
    assert found["skipped"]["8192 x 32000 fp32"].startswith("OutOfMemoryError: CUDA out of memory")
    assert {(row["n_classes"], row["dtype"]) for row in found["rows"]} == {
        (32000, "bf16"), (32000, "fp16"), (128256, "fp16"), (128256, "fp32"),
    }  # fmt: skip


def test_a_peer_that_fails_costs_its_own_times():
    def out_of_memory(z, y):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with few_and_small():
        losses = {peers.EAGER: F.cross_entropy, peers.LOSS_ONLY: out_of_memory}
        rows = steps._speed_of(Toy(), losses, 8192, 32000, "bf16", True)
    assert {(row["provider"], row["mode"]): row.get("skipped") for row in rows} == {
        (peers.LOSS_ONLY, "train"): "OutOfMemoryError: CUDA out of memory.",
        (peers.LOSS_ONLY, "forward"): "OutOfMemoryError: CUDA out of memory.",
        (peers.EAGER, "train"): None, (peers.EAGER, "forward"): None, ("difficulty_scores", "forward"): None,
    }  # fmt: skip


def test_a_wrong_result_of_ours_is_no_success():
    with few_and_small() as (patch, _):
        wrong = peers.Peer(lambda: lambda z, y: 1.01 * F.cross_entropy(z, y), bonus=True)
        patch.setitem(peers.PEERS, peers.OURS, wrong)
        patch.setitem(peers.PEERS, peers.IN_FORWARD, peers.PEERS[peers.EAGER])
        patch.setattr(steps, "_speed_of", lambda device, losses, *_: [{"provider": name} for name in losses])
        found = child_here("speed", 1)
    assert found["status"] == "failed" and "not timed: ours" in found["error"]
    assert "wrong result" in found["skipped"][peers.OURS] and {row["provider"] for row in found["rows"]} >= {
        peers.EAGER
    }


def test_what_cannot_be_timed_is_said():
    """Of small batches, of other targets, of launch parameters."""

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    with few_and_small() as (patch, _):
        patch.setattr(Toy, "replay_us", fails)
        small = child_here("small", 1)
        patch.setitem(steps.TARGETS, "sigmoid", (fails, fails))
        targets = child_here("targets", 1)
        make, tiles = steps.Bench.step, steps.SWEEP[0][3]

        def too_large(bench, loss, trains):
            made = make(bench, loss, trains)

            def run():
                return fails() if launch.forward(4, 40) == tiles[1] else made.run()

            return made._replace(run=run)

        patch.setattr(steps.Bench, "step", too_large)
        patch.setattr(steps, "SWEEP", steps.SWEEP[:1])
        swept = child_here("sweep", 1)
    assert all("not permitted" in row["replay_us skipped"] and row["host_us"] > 0 for row in small["rows"])
    assert [("skipped" in row, row["target"]) for row in targets["rows"]][-1] == (True, "sigmoid")
    assert swept["status"] == "done" and set(swept["rows"][0]["ms"]) == {"now", str(tuple(tiles[0]))}


def test_the_first_failures_are_kept(monkeypatch, tmp_path):
    failing = "echo F; echo '=== FAILURES ==='; echo why; echo FAILED tests/x.py::y; echo 1 failed in 0.10s; exit 1"
    saved = {}
    monkeypatch.setattr(steps, "sys", types.SimpleNamespace(executable=script(tmp_path / "python", failing)))
    with pytest.raises(RuntimeError, match="pytest: exit 1"):
        steps.gpu_tests(devices.Gpu(), saved.update)
    assert saved["said"][:2] == ["=== FAILURES ===", "why"] and saved["failed"] == 1
    assert saved["failures"] == ["FAILED tests/x.py::y"]
    assert steps.first_failures(["INTERNALERROR", "a crash"]) == ["INTERNALERROR", "a crash"]
    assert len(steps.first_failures(["=== ERRORS ==="] + ["x"] * 999)) == steps.SAID


def test_tools_that_hang_or_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "SANITIZER_S", 0.5)
    monkeypatch.setattr(steps, "TOOLS", ("memcheck", "racecheck"))
    tool = script(tmp_path / "compute-sanitizer", '[ $2 = memcheck ] && exec sleep 60; echo "$@"; echo 64 launches')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    saved = {}
    with pytest.raises(RuntimeError, match="compute-sanitizer: memcheck$"):
        steps.sanitizer(devices.Gpu(), saved.update)
    assert saved["tools"]["memcheck"] == {"verdict": "timed out"}
    assert saved["tools"]["racecheck"]["verdict"] == "clean"
    asked = saved["tools"]["racecheck"]["tail"][0]
    assert asked.startswith("--tool racecheck --error-exitcode 9 --print-limit 5 ")
    assert asked.endswith("-m bench.gpu.launches")
    Path(tool).unlink()
    monkeypatch.setattr(steps.os.path, "exists", lambda path: False)
    saved.clear()
    steps.sanitizer(devices.Gpu(), saved.update)
    assert saved == {"skipped": "compute-sanitizer is not installed"}


def test_a_tool_says_what_it_found():
    found = steps.said_by_a_tool(9, "\n".join(["========= Invalid read", *["x"] * 999]))
    assert found["verdict"] == "errors" and found["said"][0] == "========= Invalid read"
    assert len(found["said"]) == steps.SAID and "said" not in steps.said_by_a_tool(0, "64 launches")


def test_a_wrong_linear_loss_is_skipped(monkeypatch):
    monkeypatch.setattr(steps, "LINEAR", (64, 40, 8))

    def shifted(e, c, targets):
        return linear_loss(e, c, (targets + 1) % len(c))

    for loss, expected in ((shifted, "wrong result"), (linear_loss, None), (None, "ModuleNotFoundError")):
        if loss is None:
            monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
        else:
            monkeypatch.setitem(sys.modules, "cut_cross_entropy", types.SimpleNamespace(linear_cross_entropy=loss))
        saved = {}
        steps.linear(Elsewhere(), saved.update)
        assert (expected in saved["skipped"]) if expected else set(saved["ms"]) == {peers.OURS, "Cut Cross-Entropy"}


class Elsewhere(devices.StandIn):
    """As a GPU does, of the sizes asked for."""

    dry = False


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Return a function that installs a package of files until the test ends."""
    roots = set()

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in roots]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def install(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
            roots.add(name.split("/")[0])
        monkeypatch.syspath_prepend(str(tmp_path))
        forget()

    yield install
    forget()


CROSS_ENTROPY = "from torch.nn.functional import cross_entropy as f\n"
# what each package offers, with the parameters of its own, see its source
INSTALLED = {
    "Liger-Kernel": {
        "liger_kernel/__init__.py": "",
        "liger_kernel/transformers/__init__.py": CROSS_ENTROPY + "class LigerCrossEntropyLoss:\n"
        "    def __init__(self, weight=None, ignore_index=-100, reduction='mean'): pass\n"
        "    def __call__(self, _input, target): return f(_input, target)\n",
    },
    "flash-attention": {
        "flash_attn/__init__.py": "raise ImportError('flash_attn_2_cuda')\n",
        "flash_attn/ops/__init__.py": "raise ImportError('flash_attn_2_cuda')\n",
        "flash_attn/ops/triton/cross_entropy.py": CROSS_ENTROPY + "def cross_entropy_loss(logits, labels, "
        "precomputed_lse=None, label_smoothing=0.0):\n"
        "    losses = f(logits, labels, reduction='none')\n    return losses, losses * 0\n",
    },
    "QuACK": {
        "quack/__init__.py": "",
        "quack/cross_entropy.py": CROSS_ENTROPY + "def cross_entropy(x, target, lse_partial=None, weight=None, "
        "ignore_index=-100, reduction='mean', inplace_backward=False):\n"
        "    assert lse_partial is None\n    return f(x, target, reduction=reduction)\n",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", INSTALLED)
def test_a_peer_is_found_where_it_is_installed(install, name):
    device = devices.StandIn()
    losses, skipped = steps.load_peers(device, [name])
    if name not in losses:
        assert skipped[name].startswith("ModuleNotFoundError: No module named")
    install(INSTALLED[name])
    losses, skipped = steps.load_peers(device, [name])
    assert set(losses) == {name} and not skipped
    z, y = peers.logits(3, 10, torch.float32, "cpu")
    assert losses[name](z, y) == F.cross_entropy(z, y)


def test_cut_cross_entropy_is_found(install):
    text = "def linear_cross_entropy(e, c, targets, bias=None, ignore_index=-100): return 'the loss'\n"
    install({"cut_cross_entropy/__init__.py": text})
    assert peers.cut_cross_entropy()(1, 2, 3) == "the loss"


def test_a_peer_that_breaks_is_skipped(monkeypatch):
    def breaks():
        raise RuntimeError("ptxas exited with 255\nand more")

    monkeypatch.setitem(peers.PEERS, "QuACK", peers.Peer(breaks, slow_start=True))
    monkeypatch.setitem(peers.PEERS, "Liger-Kernel", peers.Peer(lambda: lambda z, y: z.sum()))
    losses, skipped = steps.load_peers(devices.StandIn(), ["QuACK", "Liger-Kernel"])
    assert not losses and skipped["QuACK"] == "RuntimeError: ptxas exited with 255"
    assert skipped["Liger-Kernel"].startswith("wrong result")


def test_the_compiled_peer_is_compiled_for_each_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    assert peers.PEERS[peers.COMPILED].load() and asked == [{"dynamic": False}]


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_went_wrong(tmp_path, monkeypatch, capsys):
    steps_of = {
        "ceilings": {"status": "failed", "error": "a | b"}, "linear": {"status": "done", "skipped": "not installed"},
        "speed": {"status": "timed out", "skipped": {"QuACK": "no module"}, "rows": []},
        "targets": {"status": "done", "rows": [{"n_rows": 1, "n_classes": 2, "target": "t", "skipped": "memory"}]},
        "small": {"status": "done", "rows": [{"n_rows": 1, "n_classes": 2, "provider": "p", "host_us": 3.0}]},
    }  # fmt: skip
    results = {"dry": False, "date": "2030-01-01", "command": "c", "commit": "d",
               "steps": {name: step | {"seconds": 1.0} for name, step in steps_of.items()}}  # fmt: skip
    written = gpu_report.markdown(results)
    for line in ("| ceilings | failed | 1 | a / b |", "| linear | done | 1 | not installed |",
                 "| speed | timed out | 1 | QuACK: no module |", "| 1 x 2 | t | - | - | - |",
                 "| 1 x 2 | p | 3.0 | - |"):  # fmt: skip
        assert line in written
    assert not gpu_report._is_timed(results["steps"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert gpu_report.draw(results, tmp_path / "x.png") is False
    monkeypatch.setattr(gpu_report, "markdown", lambda *_: 1 / 0)
    gpu.write(results, tmp_path, "gpu-x")  # the JSON is there all the same
    assert json.loads((tmp_path / "gpu-x.json").read_text()) == results
    assert "report: ZeroDivisionError" in capsys.readouterr().out


def test_without_a_device_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main([], tmp_path, lambda: "a commit")
