"""The cases and providers of `python -m bench` under pytest-benchmark.

    pytest tests/test_benchmark.py --benchmark-enable

times them at full size. Otherwise each runs once on a few rows, and must meet the float64 truth either way.
"""

import gc
import json
import re
import types
from pathlib import Path

import pytest
import torch

from bench import __main__, linear, measure, plots, report, soft, speed
from bench.providers import CASES, DTYPES, PROVIDERS, Outcome, Provider, WrongResult, call, check, inputs
from bench.speed import bytes_moved
from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores

ROOT = Path(__file__).resolve().parent.parent
FEW = 16
SERIES = {quantity: {"ours": [1e-7, float("inf")]} for quantity in plots.PANELS}
EXAMPLE = {
    "n_classes": 10,
    "n_rows": 1,
    "gaps": [0.0, 12.0],
    "by_gap": SERIES,
    "offsets": [0.0, 100.0],
    "by_offset": SERIES,
}


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_provider(benchmark, device, case, dtype, name):
    provider, n_classes = PROVIDERS[name], CASES[case].n_classes
    few = (2, n_classes, 3, 4) if CASES[case].inner else (FEW, n_classes)
    check(provider, *inputs(few, DTYPES[dtype], device))
    shape = few if benchmark.disabled else CASES[case].shape(device != "cpu", False)
    logits, target = inputs(shape, DTYPES[dtype], device)
    pristine = logits.detach().clone()

    def prepare():
        logits.grad = None
        if provider.overwrites:
            logits.detach().copy_(pristine)

    def step():
        call(provider, logits, target)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case} {'x'.join(map(str, shape))} {dtype}"
    least = bytes_moved(target.numel(), n_classes, logits.element_size(), 1, int(provider.trains))
    benchmark.extra_info.update(bytes_moved=least, device=device)
    benchmark.pedantic(step, setup=prepare, rounds=5, warmup_rounds=1)
    assert provider.overwrites or torch.equal(logits.detach(), pristine)


def wrong_loss(z, y):
    return Outcome(bonus_cross_entropy(z, y, bonus=LogBonus(0.7)))


def wrong_as_nan_loss(z, y):
    return Outcome(bonus_cross_entropy(z, y, bonus=LogBonus(0.75)) * float("nan"))


def wrong_gradient(z, y):
    return Outcome(bonus_cross_entropy(z, y, bonus=LogBonus(0.75)) + (z - z.detach())[:, 0].sum() / len(y) / 100)


def wrong_el2n(z, y):
    loss, scores = bonus_cross_entropy_with_scores(z, y, bonus=LogBonus(0.75))
    return Outcome(loss, scores._replace(el2n=scores.el2n * 1.001))


def wrong_runner_up(z, y):
    loss, scores = bonus_cross_entropy_with_scores(z, y, bonus=LogBonus(0.75))
    return Outcome(loss, scores._replace(runner_up=scores.runner_up.roll(1)))


@pytest.mark.parametrize("run", [wrong_loss, wrong_as_nan_loss, wrong_gradient, wrong_el2n, wrong_runner_up])
def test_check_refuses_a_wrong_provider(run):
    what = run.__name__.removeprefix("wrong_").removeprefix("as_nan_")
    with pytest.raises(WrongResult, match=what):
        check(Provider(run, bonus=True), *inputs((FEW, 100), torch.float32, "cpu"))


def test_peak_bytes_counts_what_is_held_at_once():
    def hold():
        for _ in range(3):
            a = torch.empty(1000)
            b = torch.empty(500)
            del a, b

    assert measure.peak_bytes(measure.Step(lambda: None, hold), on_gpu=False) == 6000


@pytest.mark.slow
def test_interleave_runs_every_step_in_every_round():
    order = []
    steps = {name: measure.Step(lambda: None, lambda name=name: order.append(name)) for name in "abc"}
    times = measure.interleave(steps, on_gpu=False, budget_s=0.0, reps=(3, 9))
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert "".join(order) == "abcbcacab"  # nobody always follows the same one


def test_ratio_is_taken_round_by_round():
    # the machine slows down: the medians' quotient would be 4
    assert measure.ratio([2.0, 8.0, 20.0], [1.0, 2.0, 10.0])["median"] == 2.0


@pytest.mark.slow
def test_a_section_is_written_and_rendered_again_from_its_json(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(__main__, "ROOT", tmp_path)
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    monkeypatch.setitem(__main__.SECTIONS, "accuracy", lambda quick, device, progress: EXAMPLE)
    __main__.main(["accuracy", "--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["accuracy"]["command"].startswith("python -m bench accuracy")
    written = (tmp_path / "cpu.md").read_text()
    assert "| cross-entropy, relative | ours | 1e-07 | not finite |" in written
    quoted = readme.read_text()
    assert quoted.startswith("before\n") and quoted.endswith("after\n") and "old" not in quoted
    assert report.readme_block(results) in quoted
    (tmp_path / "cpu.md").unlink()
    __main__.main(["report", "--device", "cpu", "--out", str(tmp_path)])
    assert (tmp_path / "cpu.md").read_text() == written and readme.read_text() == quoted


def test_a_failed_bound_is_shown_with_its_case():
    bounds = [
        {"bound": "a <= 1", "case": "x", "dtype": "float32", "value": 0.5, "passed": True},
        {"bound": "a <= 1", "case": "y", "dtype": "float32", "value": 2.0, "passed": False},
    ]
    assert "| a <= 1 | **missed** | 2 y float32 |" in report._verdicts(bounds)
    assert "| a <= 1 | met | 0.5 x float32 |" in report._verdicts(bounds[:1])
    results = {"environment": {}, "speed": {"bounds": bounds[:1]}, "soft": {"bounds": bounds[1:]}}
    assert report.missed(results) == ["- missed: a <= 1: 2 y float32\n"]


def test_what_time_left_out_is_not_timed_and_what_failed_is_missed():
    skipped = {"skipped": "not timed, ...", "timed": False}
    case = {"case": "imagenet-1k", "dtype": "float32", "ratios": {}, "providers": {
        "ours": {"skipped": "WrongResult: loss is off"}, "F.cross_entropy": {}, "ours, loss only": {},
        "paper's formula": skipped, "eager loss and scores": skipped,
    }}  # fmt: skip
    found = {bound["bound"]: bound["passed"] for bound in speed._verdicts([case])}
    assert found == {
        "ours / F.cross_entropy <= 0.75": False, "peak memory of ours in gradients <= 1.2": False,
        "paper's formula / ours >= 5": None, "eager loss and scores / ours >= 7": None,
    }  # fmt: skip
    bounds = list(speed._verdicts([case]))
    assert "| paper's formula / ours >= 5 | not timed | not timed imagenet-1k float32 |" in report._verdicts(bounds)
    missed = report.missed({"speed": {"bounds": bounds}})
    assert len(missed) == 2 and not any("formula" in line for line in missed)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a quick run of the sections not timed here otherwise writes."""
    folder = tmp_path_factory.mktemp("quick")
    gc.collect()
    gc.freeze()  # it collects garbage before every case, which takes long among all that a test session holds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "keep_memory", lambda: False)  # it is for the whole process
        patch.setattr(plots, "why_not", lambda: "no pictures are tested here")
        __main__.main(["soft", "sigmoid", "tracker", "linear", "--quick", "--device", "cpu", "--out", str(folder)])
    return json.loads((folder / "cpu.json").read_text()), (folder / "cpu.md").read_text()


@pytest.mark.slow
def test_a_quick_run_measures_every_case_and_judges_none(quick):
    results, text = quick
    ratios = {(c["case"], c["dtype"], c["target"]): set(c["ratios"]) for c in results["soft"]["cases"]}
    assert len(ratios) == len(soft.SHAPES) * len(DTYPES) * len(soft.KINDS)
    for (_, _, target), found in ratios.items():
        assert found == ({"paper's formula / ours"} if soft.KINDS[target].torch is None else set(soft.RATIOS))
    for case in results["soft"]["cases"]:
        assert all(each["median"] > 0 for each in case["ratios"].values())
        assert all(each["peak_gradients"] > 1 for each in case["providers"].values())
    assert all(
        results[name]["quick"] and results[name]["bounds"] == [] for name in ("soft", "sigmoid", "tracker", "linear")
    )
    for title in ("Soft targets", "Sigmoid family", "Example tracker", "The last layer without its logits"):
        assert f"## {title}\n" in text
    assert "| detection 1x80x6400 bfloat16 | Focal(2), alpha |" in text
    assert "| beside index_add_ | all fields |" in text


@pytest.mark.slow
def test_the_linear_form_is_measured_beside_all_that_bounds_it(quick):
    cases = quick[0]["linear"]["cases"]
    assert [case["case"] for case in cases] == list(linear.SHAPES)
    for case in cases:
        beside = {linear.OURS, linear.BARE, linear.ONE, linear.ALONE, linear.TORCH, linear.CHUNKED, linear.EAGER}
        assert beside <= set(case["time_ms"]) and all(x["median"] > 0 for x in case["time_ms"].values())
        assert case["peaks"][linear.OURS] > case["gradients"] > 0
    assert linear.OURS_BF16 in cases[0]["time_ms"]


def test_the_linear_form_is_judged_by_what_issue_bounds():
    ratios = {"ours / three bare products": 1.16, "F.linear_cross_entropy / three bare products": 1.15,
              "the same, chunked / three bare products": 2.0, "scores alone / one bare product": 1.45,
              "ours, bfloat16 / ours": 1.4}  # fmt: skip
    peaks = {"ours": 165 * linear.MiB, "scores alone": 17 * linear.MiB}
    case = {"case": "llama2-vocab", "dtype": "float32", "gradients": 20 * linear.MiB, "peaks": peaks,
            "ratios": {label: {"median": x} for label, x in ratios.items()}}  # fmt: skip
    found = {bound["bound"]: bound["passed"] for bound in linear.verdicts([case], "avx2")}
    assert found == {
        "ours / three bare products <= 1.15": False, "ours / F.linear_cross_entropy <= 1": False,
        "ours / the same, chunked <= 1": True, "memory beyond gradients and budget, MiB <= 16": False,
        "scores alone / one bare product <= 1.45": True, "memory of scores alone, MiB <= 16": False,
        "ours, bfloat16 / ours <= 1.5": True,
    }  # fmt: skip
    (wide,) = (b for b in linear.verdicts([case | {"case": "llama3-vocab"}], "avx512") if "three" in b["bound"])
    assert wide["bound"].endswith("<= 1.35") and wide["passed"]


@pytest.mark.parametrize("name", ["loss", "el2n", "gradient of hidden", "gradient of weight"])
def test_check_refuses_a_wrong_linear_form(monkeypatch, name):
    case, right = linear.Case(FEW, 8, 100), linear.linear_bonus_cross_entropy_with_scores
    linear.check(case)

    def wrong(hidden, weight, target, bonus):
        loss, scores = right(hidden, weight, target, bonus=bonus)
        if name == "el2n":
            return loss, scores._replace(el2n=scores.el2n * 1.001)
        moved = {"gradient of hidden": hidden, "gradient of weight": weight}.get(name)
        return (loss * 1.001 if moved is None else loss + (moved - moved.detach()).sum() / 1000), scores

    monkeypatch.setattr(linear, "linear_bonus_cross_entropy_with_scores", wrong)
    with pytest.raises(WrongResult, match=name):
        linear.check(case)


def test_the_five_numbers_name_what_is_not_measured(quick):
    table = [line for line in report.readme_block(quick[0]).splitlines() if line.startswith("| ")][2:]
    assert len(table) == 5 and all("not measured" in line for line in table)


def test_each_of_the_five_numbers_has_its_bound():
    results = json.loads((ROOT / "bench/results/cpu.json").read_text())
    assert "not measured" not in report.readme_block(results)
    bounds = [
        {"bound": "ours / F.cross_entropy <= 0.6", "case": "llama2-vocab", "dtype": "float32", "value": 0.5},
        {"bound": "ours / F.cross_entropy <= 0.7", "case": "llama2-vocab", "dtype": "bfloat16", "value": 0.8},
        {"bound": "ours / F.cross_entropy <= 0.1", "case": "another", "dtype": "float32", "value": 0.9},
    ]
    for bound, passed in zip(bounds, (True, False, False), strict=True):
        bound["passed"] = passed
    block = report.readme_block({"environment": results["environment"], "speed": {"bounds": bounds}})
    (row,) = (line for line in block.splitlines() if line.startswith("| loss, gradient"))
    assert row.endswith("| 0.5 to 0.8 | <= 0.6 (float32), <= 0.7 (bfloat16) | **missed** |")


def test_a_report_opens_with_what_was_won_then_what_was_missed():
    def bound(what, passed, case, value=0.5):
        return {"bound": what, "case": case, "dtype": "float32", "value": value, "passed": passed}

    bounds = [bound("a <= 1", True, "x"), bound("a <= 1", None, "y", None), bound("b <= 1", True, "x", 0.2),
              bound("b <= 1", False, "z", 2.0), bound("c <= 1", None, "y", None)]  # fmt: skip
    won, lost = report.opening({"speed": {"bounds": bounds}}).split("## What was missed")
    assert "1 of 3 bounds" in won and "| a <= 1 | 0.5, x, float32, y not timed |" in won and "b <= 1" not in won
    assert "| b <= 1 | 0.2 to 2, x, z, float32 | 2 z float32 |" in lost and "a <= 1" not in lost
    assert "c <= 1" not in won + lost
    assert report.opening({"speed": {"bounds": []}}) == ""


@pytest.mark.parametrize("name", soft.KINDS)
def test_check_refuses_wrong_soft_targets(monkeypatch, name):
    kind = soft.KINDS[name]
    batch = soft.batch(FEW, 100, torch.float32, "cpu").of(kind)
    soft.check(kind, *batch)
    right = soft.ours

    def scaled(z, target, kind):
        loss, scores = right(z, target, kind)
        return 1.01 * loss, scores

    def scored(z, target, kind):
        loss, scores = right(z, target, kind)
        return loss, scores._replace(entropy=scores.entropy * 1.001)

    def without_bonus(z, target, kind):
        return right(z, target, kind._replace(options=kind.options | {"bonus": None}))

    def drifting(z, target, kind):
        loss, scores = right(z, target, kind)
        return loss + (z - z.detach())[:, 0].sum() / len(z) / 100, scores

    for wrong, what in ((scaled, "loss"), (scored, "entropy"), (without_bonus, "loss"), (drifting, "gradient")):
        monkeypatch.setattr(soft, "ours", wrong)
        with pytest.raises(WrongResult, match=what):
            soft.check(kind, *batch)


def test_soft_targets_are_judged_by_their_own_bounds():
    ratios = {"ours / F.cross_entropy": {"median": 0.85}, "paper's formula / ours": {"median": 4.9}}
    case = {"case": "x", "dtype": "float32", "ratios": ratios}
    cases = [case | {"target": name} for name in soft.KINDS]
    found = [(verdict["bound"], verdict["passed"]) for verdict in soft.verdicts(cases)]
    assert found == [
        ("label smoothing 0.1: ours / F.cross_entropy <= 0.8", False),
        ("label smoothing 0.1: paper's formula / ours >= 5", False),
        ("probabilities: ours / F.cross_entropy <= 0.9", True),
        ("probabilities: paper's formula / ours >= 5", False),
    ]


def test_what_is_written_from_the_record_is_up_to_date():
    """`python -m bench` and `python -m bench report` write all of it."""
    readme, results = (ROOT / "README.md").read_text(), json.loads((ROOT / "bench/results/cpu.json").read_text())
    assert report.with_results(readme, results) == readme
    text = (ROOT / "bench/results/cpu.md").read_text()
    assert report.markdown(results, re.findall(r"!\[.*\]\((.*)\)", text)) == text
    with pytest.raises(ValueError, match="expected .*end of numbers"):
        report.with_results(readme.replace(report.END, ""), results)


def test_memory_is_kept_where_malloc_agrees(monkeypatch):
    set_to = []
    libc = types.SimpleNamespace(mallopt=lambda option, value: set_to.append((option, value)) or 1)
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: libc)
    assert measure.keep_memory() and set_to == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not measure.keep_memory()
