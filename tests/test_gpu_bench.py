"""`python -m bench gpu` as it will run on a GPU, on a stand-in that checks the order of calls as CUDA does."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import gpu, measure
from bench.gpu import devices, goals, peers, steps
from bench.gpu import report as gpu_report
from bonus_ops.kernels.gpu import launch
from tests import conftest

pytest.importorskip("triton")
if conftest.ACCELERATOR is not None or not conftest.INTERPRETED:
    pytest.skip("the stand-in interprets kernels", allow_module_level=True)
from tests import cuda_stand_in
from tests.toy_gpu import Toy

pytestmark = pytest.mark.slow

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
    readme, folder = root / "bench/README.md", root / "bench/results"
    folder.mkdir(parents=True)
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
    torch.testing.assert_close(losses[name](z, y), F.cross_entropy(z, y))


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
