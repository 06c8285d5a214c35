"""`python -m bench gpu`, run dry, and what its report says of times that a GPU might have given."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import gpu
from bench.gpu import cases, goals, losses, report, steps

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Return the folder and the results of every step, without a GPU."""
    folder = tmp_path_factory.mktemp("gpu")
    gpu.main(["--dry-run", "--out", str(folder)], ROOT / "bench/results", lambda: "a commit")
    return folder, json.loads((folder / "gpu-dry-run.json").read_text())


@pytest.mark.slow
def test_a_dry_run_passes_every_step(dry):
    _, results = dry
    steps = results["steps"]
    assert list(steps) == list(gpu.LIMITS) and sum(gpu.LIMITS.values()) >= gpu.BUDGET_S
    assert {step["status"] for step in steps.values()} <= {"done", "skipped"}, steps
    timed = {(row["case"], row["loss"], row["mode"]) for step in steps.values() for row in step["rows"] if "ms" in row}
    for case in (*cases.LABELS, *cases.SMALL):
        assert {(str(case), losses.OURS, mode) for mode in ("forward", "train")} <= timed
    for layer in cases.LAYERS:
        assert {(str(layer), name, "train") for name in (losses.OURS, losses.BARE, losses.EAGER)} <= timed
    names = {name for _, name, _ in timed}
    assert {losses.HELD, losses.FROM_L2, "depth 1", losses.COMPILED} <= names
    why = {row["loss"]: row["skipped"] for step in steps.values() for row in step["rows"] if "skipped" in row}
    assert set(why) <= {"Liger-Kernel", "QuACK", "Cut Cross-Entropy"}, why
    assert all("No module named" in x for x in why.values())


@pytest.mark.slow
def test_a_dry_run_is_never_a_measurement(dry, tmp_path):
    folder, results = dry
    assert results["dry"] and {goal.verdict for goal in report.Times(results).goals()} == {goals.NOT_MEASURED}
    assert "nothing was measured" in (folder / "gpu-dry-run.md").read_text()
    with pytest.raises(SystemExit, match="no measurement"):
        gpu.main(["--dry-run", "--out", str(tmp_path / "results")], tmp_path, lambda: "a commit")
    assert "**GPU: not measured.**" in report.with_runs(f"{report.BEGIN}{report.END}", folder)


@pytest.mark.slow
def test_a_step_that_hangs_or_fails_keeps_its_rows(monkeypatch):
    def child(step, device):
        body = (
            "import sys, time; open(sys.argv[1], 'w').write('{\"a\": 1}\\n{\"cut'); print('why', flush=True); " + step
        )
        return [sys.executable, "-c", body, "ROWS"]

    monkeypatch.setattr(gpu, "command", child)
    monkeypatch.setattr(gpu, "LEAST_S", 2.0)
    hung, failed = gpu.run("time.sleep(60)", "cpu", 2), gpu.run("sys.exit(3)", "cpu", 60)
    assert (hung["status"], failed["status"]) == ("timed out", "failed")
    assert hung["rows"] == failed["rows"] == [{"a": 1}] and hung["said"] == failed["said"] == ["why"]
    assert gpu.run("", "cpu", 1)["status"] == "skipped"


def test_a_wrong_loss_is_not_timed():
    first = cases.Case((4, 40), "fp32").inputs("cpu")
    named = {
        "right": losses.Named(lambda: F.cross_entropy),
        "off": losses.Named(lambda: lambda z, y: 1.01 * F.cross_entropy(z, y)),
        "nan": losses.Named(lambda: lambda z, y: float("nan") * F.cross_entropy(z, y)),
        "absent": losses.Named(lambda: __import__("no_such_package")),
    }
    found, skipped = losses.load(named, first)
    assert set(found) == {"right"} and "wrong result" in skipped["off"] and "wrong result" in skipped["nan"]
    assert skipped["absent"].startswith("ModuleNotFoundError")


def test_a_wrong_result_of_ours_fails_its_step(monkeypatch, tmp_path):
    off = losses.Named(lambda: lambda z, y: 1.01 * F.cross_entropy(z, y))
    for name in (losses.LOSS_ONLY, "a peer"):
        step = lambda timer, name=name: timer.losses({name: off}, cases.SMALL[0].inputs("cpu"))  # noqa: E731
        monkeypatch.setitem(steps.STEPS, "speed", step)
        with pytest.raises(SystemExit, match="not timed") if name != "a peer" else contextlib.nullcontext():
            steps.main("speed", str(tmp_path / "rows"), "cpu")
    assert (tmp_path / "rows").read_text().count("wrong result") == 2


def test_a_call_leaves_nothing_to_the_garbage_collector():
    """A cycle would hold the gradients of every call until it runs."""
    calls = [steps.call(losses.OF_LOGITS[name].load(), "train", 0.5, *cases.Case((3, 10), "fp32").inputs("cpu"))
             for name in (losses.OURS, losses.LOSS_ONLY)]  # fmt: skip
    for call in calls:
        call()
    gc.disable()
    gc.collect()
    gc.freeze()  # what other tests have left
    try:
        for call in calls:
            call()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        held = (torch.Tensor, torch.autograd.function.BackwardCFunction)
        assert [x for x in gc.garbage if isinstance(x, held)] == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def measured(slack, but=()):
    """Return results of a GPU that copies 4 TB/s, ``slack`` times the least time, with other rows ``but``."""
    rows = [{"case": str(case), "loss": loss, "mode": mode, "ms": 3 * [case.n_bytes / 4e9 * slack * n]}
            for case in (*cases.ROWS, *cases.PIXELS, cases.CUT) for loss in (losses.OURS, losses.LOSS_ONLY)
            for mode, n in (("forward", 1), ("train", 3))]  # fmt: skip
    step = {"rows": [{"copy_gb_per_s": 4000.0}, *rows, *but], "status": "done", "seconds": 1.0, "said": ["ok"],
            "date": "2030-01-01", "commit": "c"}  # fmt: skip
    return {"dry": False, "environment": {"gpu": "A GPU"}, "steps": {"speed": step}}


def test_goals_are_the_ratios_they_say():
    for slack, expected in ((1.09, "met"), (1.26, "missed")):
        of = {}
        for goal in report.Times(measured(slack)).goals():
            of.setdefault(goal.what, set()).add(goal.verdict)
        assert of["forward with all scores / R"] == of["forward and backward / (2R + W)"] == {expected}
        assert of["share of copy bandwidth, forward"] == of["all scores / loss alone, train"] == {"met"}
        assert of["last layer with all scores / three bare products"] == {goals.NOT_MEASURED}
    others = (("depth 1", 1.0), ("depth 2", 0.9), ("depth 3", 0.97), (losses.HELD, 0.3))
    rows = [{"case": str(cases.LLAMA2), "loss": name, "mode": "train" if ms < 0.5 else "forward", "ms": 3 * [ms]}
            for name, ms in others]  # fmt: skip
    times = report.Times(measured(1.0, rows))
    found = {(goal.what, goal.at): goal for goal in times.goals()}
    assert found["deeper prefetch / one tile", str(cases.LLAMA2)].outcome == "0.90"
    held = found[f"{losses.HELD} / forward and backward", str(cases.LLAMA2)]
    assert held.value == pytest.approx(0.3 / (3 * 8192 * 32000 * 2 / 4e9)) and held.verdict == "met"


def test_the_page_on_measuring_shows_what_was_measured(tmp_path):
    text = (ROOT / "bench/README.md").read_text()
    assert report.with_runs(text, ROOT / "bench/results") == text
    folder, readme = tmp_path / "bench/results", tmp_path / "bench/README.md"
    folder.mkdir(parents=True)
    readme.write_text(text)
    (folder / "gpu-a-gpu.json").write_text(json.dumps(measured(1.0)))
    gpu.main(["--report"], folder, lambda: "a commit")
    assert "A GPU, copy bandwidth 4000 GB/s" in readme.read_text() and "not measured.**" not in readme.read_text()
    assert "| 8192 x 128256 bf16 | ms |" in (folder / "gpu-a-gpu.md").read_text()


def test_without_a_device_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main([], tmp_path, lambda: "a commit")
