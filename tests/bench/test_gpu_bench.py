"""`python -m bench gpu`, run dry, and what it says of times that a GPU might have given."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bench import gpu
from bench.gpu import cases, goals, losses, steps

pytest.importorskip("triton")
RESULTS = Path(__file__).resolve().parents[2] / "bench/results"


@pytest.mark.slow
def test_a_dry_run_passes_every_step_and_is_never_a_measurement():
    path = gpu.main(["--dry-run"], RESULTS, lambda: "a commit")
    results = json.loads(path.read_text())
    assert path.parent != RESULTS and results["dry"] and "nothing was measured" in path.with_suffix(".md").read_text()
    assert {goal.outcome for goal in goals.goals(goals.measured(results))} == {goals.NOT_MEASURED}
    steps = results["steps"]
    assert list(steps) == list(gpu.LIMITS) and sum(gpu.LIMITS.values()) < 480
    assert {step["status"] for step in steps.values()} == {"done"}, steps
    rows = [row for step in steps.values() for row in step["rows"]]
    timed = {(row["case"], row["loss"], row["mode"]) for row in rows if "ms" in row}
    for case in cases.LABELS:
        assert {(str(case), losses.OURS, mode) for mode in ("forward", "train")} <= timed
    for layer in cases.LAYERS:
        assert {(str(layer), name, "train") for name in (losses.OURS, losses.BARE, losses.EAGER)} <= timed
    assert {losses.HELD, "depth 1", losses.COMPILED} <= {name for _, name, _ in timed}
    why = {row["loss"]: row["skipped"] for row in rows if "skipped" in row}
    assert set(why) <= {"Liger-Kernel", "QuACK", "Cut Cross-Entropy"}, why
    assert all("No module named" in x for x in why.values())


@pytest.mark.slow
def test_a_step_that_hangs_or_fails_keeps_its_rows(monkeypatch):
    def child(step, device, rows):
        body = (
            f"print('why', flush=True); open({rows!r}, 'w').write('{{\"a\": 1}}\\n{{\"cut'); import sys, time; {step}"
        )
        return [sys.executable, "-c", body]

    monkeypatch.setattr(gpu, "command", child)
    hung, failed = gpu.run("time.sleep(60)", "cpu", 2), gpu.run("sys.exit(3)", "cpu", 60)
    assert (hung["status"], failed["status"]) == ("timed out", "failed")
    assert hung["rows"] == failed["rows"] == [{"a": 1}] and hung["said"] == failed["said"] == ["why"]


def test_a_wrong_loss_is_not_timed(monkeypatch, tmp_path):
    """Nor is one that is absent; if it is ours, its step fails."""
    off = losses.Named(lambda z, y: 1.01 * F.cross_entropy(z, y))
    nan = losses.Named(lambda z, y: float("nan") * F.cross_entropy(z, y))
    absent = losses.Named("no_such_package:loss")
    named = {"right": losses.Named(F.cross_entropy), "off": off, "nan": nan, "absent": absent}
    rows = []
    assert set(steps.Timer("cpu", rows.append).load(named, steps.CHECKED.inputs("cpu"))) == {"right"}
    why = {row["loss"]: row["skipped"] for row in rows}
    assert "wrong result" in why["off"] and "wrong result" in why["nan"] and "ModuleNotFoundError" in why["absent"]
    for name in (losses.LOSS_ONLY, "a peer"):
        step = lambda timer, name=name: timer.load({name: off}, steps.CHECKED.inputs("cpu"))  # noqa: E731
        monkeypatch.setitem(steps.STEPS, "speed", step)
        with pytest.raises(SystemExit, match="not timed") if name != "a peer" else contextlib.nullcontext():
            steps.main("speed", str(tmp_path / "rows"), "cpu")
    assert (tmp_path / "rows").read_text().count("wrong result") == 2


def test_goals_are_the_ratios_they_say():
    """Of a GPU that copies 4 TB/s and takes 1.2 times the least time."""
    rows = [{"case": str(case), "loss": loss, "mode": mode, "ms": 3 * [case.n_bytes / 4e9 * 1.2 * n]}
            for case in cases.ROWS for loss in (losses.OURS, losses.LOSS_ONLY)
            for mode, n in (("forward", 1), ("train", 3))]  # fmt: skip
    others = (("depth 1", 1.0), ("depth 2", 0.9), ("depth 3", 0.97), (losses.HELD, 0.3))
    rows += [{"case": str(cases.LLAMA2), "loss": name, "mode": "train" if ms < 0.5 else "forward", "ms": 3 * [ms]}
             for name, ms in others]  # fmt: skip
    step = {"rows": [{"copy_gb_per_s": 4000.0}, *rows], "status": "done", "seconds": 1.0, "said": ["ok"],
            "date": "2030-01-01", "commit": "c"}  # fmt: skip
    results = {"dry": False, "environment": {"gpu": "A GPU"}, "steps": {"speed": step}}
    found = {(goal.what, goal.at): goal.outcome for goal in goals.goals(goals.measured(results))}
    at = str(cases.LLAMA2)
    assert found["forward with all scores / R", at] == found["forward and backward / (2R + W)", at] == "1.20"
    assert found["share of copy bandwidth, forward", str(cases.FEW_ROWS)] == "0.83"
    assert found["all scores / loss alone, train", at] == "1.00"
    assert found["last layer with all scores / three bare products", str(cases.LAYERS[0])] == goals.NOT_MEASURED
    assert found["deeper prefetch / one tile", at] == "0.90"
    least = 3 * 1.2 * 8192 * 32000 * 2 / 4e9
    assert found[f"{losses.HELD} / forward and backward", at] == f"{0.3 / least:.2f}"
    assert "| 8192 x 32000 bf16 | depth 3 | forward | 0.97 (0.97 to 0.97) |" in gpu.markdown(results)


def test_without_a_device_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main([], tmp_path, lambda: "a commit")
