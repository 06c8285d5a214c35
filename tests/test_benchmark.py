"""The cases and providers of `python -m bench` under pytest-benchmark.

    pytest tests/test_benchmark.py --benchmark-enable

times them at full size. Otherwise each runs once on a few rows, and must meet the float64 truth either way.
"""

import json

import pytest
import torch

from bench import __main__, measure, plots, report
from bench.providers import CASES, DTYPES, PROVIDERS, Outcome, Provider, WrongResult, call, check, inputs
from bench.speed import bytes_moved
from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores

FEW = 16
SERIES = {quantity: {"ours": [1e-7, float("inf")]} for quantity in plots.PANELS}
EXAMPLE = {
    "n_classes": 10,
    "n_rows": 1,
    "gaps": [0.0, 20.0],
    "by_gap": SERIES,
    "offsets": [0.0, 100.0],
    "by_offset": SERIES,
}


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_provider(benchmark, device, case, dtype, name):
    provider, n_classes = PROVIDERS[name], CASES[case].n_classes
    check(provider, *inputs(FEW, n_classes, DTYPES[dtype], device))
    full = CASES[case].cpu_rows if device == "cpu" else CASES[case].gpu_rows
    n_rows = FEW if benchmark.disabled else full
    logits, target = inputs(n_rows, n_classes, DTYPES[dtype], device)
    pristine = logits.detach().clone()

    def prepare():
        logits.grad = None
        if provider.overwrites:
            logits.detach().copy_(pristine)

    def step():
        call(provider, logits, target)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} {n_rows}x{n_classes} {dtype}"
    least = bytes_moved(n_rows, n_classes, logits.element_size(), 1, int(provider.trains))
    benchmark.extra_info.update(bytes_moved=least, device=device)
    benchmark.pedantic(step, setup=prepare, rounds=5, warmup_rounds=1)
    assert provider.overwrites or torch.equal(logits.detach(), pristine)


def wrong_loss(z, y):
    return Outcome(bonus_cross_entropy(z, y, bonus=LogBonus(0.7)))


def wrong_as_nan_loss(z, y):
    return Outcome(bonus_cross_entropy(z, y) * float("nan"))


def wrong_gradient(z, y):
    return Outcome(bonus_cross_entropy(z, y) + (z - z.detach())[:, 0].sum() / len(y) / 100)


def wrong_el2n(z, y):
    loss, scores = bonus_cross_entropy_with_scores(z, y)
    return Outcome(loss, scores._replace(el2n=scores.el2n * 1.001))


def wrong_runner_up(z, y):
    loss, scores = bonus_cross_entropy_with_scores(z, y)
    return Outcome(loss, scores._replace(runner_up=scores.runner_up.roll(1)))


@pytest.mark.parametrize("run", [wrong_loss, wrong_as_nan_loss, wrong_gradient, wrong_el2n, wrong_runner_up])
def test_check_refuses_a_wrong_provider(run):
    what = run.__name__.removeprefix("wrong_").removeprefix("as_nan_")
    with pytest.raises(WrongResult, match=what):
        check(Provider(run, bonus=True), *inputs(FEW, 100, torch.float32, "cpu"))


def test_peak_bytes_counts_what_is_held_at_once():
    def hold():
        for _ in range(3):
            a = torch.empty(1000)
            b = torch.empty(500)
            del a, b

    assert measure.peak_bytes(measure.Step(lambda: None, hold), on_gpu=False) == 6000


def test_interleave_runs_every_step_in_every_round():
    order = []
    steps = {name: measure.Step(lambda: None, lambda name=name: order.append(name)) for name in "abc"}
    times = measure.interleave(steps, on_gpu=False, budget_s=0.0, reps=(3, 9))
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert "".join(order) == "abcbcacab"  # nobody always follows the same one


def test_ratio_is_taken_round_by_round():
    # the machine slows down: the medians' quotient would be 4
    assert measure.ratio([2.0, 8.0, 20.0], [1.0, 2.0, 10.0])["median"] == 2.0


def test_a_section_is_written_and_rendered_again_from_its_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__main__.SECTIONS, "accuracy", lambda quick, device, progress: EXAMPLE)
    __main__.main(["accuracy", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["accuracy"]["command"].startswith("python -m bench accuracy")
    written = (tmp_path / "cpu.md").read_text()
    assert "| cross-entropy, relative | ours | 1e-07 | not finite |" in written
    (tmp_path / "cpu.md").unlink()
    __main__.main(["report", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "cpu.md").read_text() == written


def test_a_failed_bound_is_shown_with_its_case():
    bounds = [
        {"bound": "a <= 1", "case": "x", "dtype": "float32", "value": 0.5, "passed": True},
        {"bound": "a <= 1", "case": "y", "dtype": "float32", "value": 2.0, "passed": False},
    ]
    assert "| a <= 1 | FAIL | 2 y float32 |" in report._verdicts(bounds)
