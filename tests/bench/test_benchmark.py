"""What `python -m bench` times, under pytest-benchmark; what it judges, writes, and writes again.

    pytest tests/bench/test_benchmark.py --benchmark-enable [-k "linear and ours"]

times at full size every step of every case that the command times. Otherwise a few run once, on a few rows: the quick
run of the command, below, has all of them. Either way results must meet the float64 truth first.
"""

import functools
import json
import re
import types
from pathlib import Path

import pytest
import torch

from bench import bounds, command, linear, measure, report, sigmoid, soft, speed, tracker
from bench.__main__ import BOOK
from bench.measure import Effort
from bench.providers import Outcome, Provider, WrongResult, check, inputs, truth
from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores

ROOT = Path(__file__).resolve().parents[2]
FEW = 16
TIMED = (speed, soft, sigmoid, linear, tracker)


def pytest_generate_tests(metafunc):
    if "timed" in metafunc.fixturenames:
        whole = metafunc.config.getoption("benchmark_enable", False)
        found = [(module, case, name) for module in TIMED for case in module.cases()[: None if whole else 1]
                 for name in module.names(*case)]  # fmt: skip
        ids = [" ".join([module.__name__.rpartition(".")[2], *case, name]) for module, case, name in found]
        metafunc.parametrize("timed", found, ids=ids)


@functools.lru_cache(1)
def steps(module, case, effort):
    return module.steps(*case, effort)


def test_step(benchmark, timed):
    module, case, name = timed
    step = steps(module, case, Effort.QUICK if benchmark.disabled else Effort.FULL)[name]

    benchmark.group = " ".join([module.__name__, *case])
    benchmark.pedantic(step.run, setup=step.prepare, rounds=5, warmup_rounds=1)


# --- what is timed is right -------------------------------------------------------------------------------------------


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
    batch = inputs((FEW, 100), torch.float32)
    with pytest.raises(WrongResult, match=what):
        check(Provider(run, bonus=True), *batch, truth(*batch))


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


@pytest.mark.parametrize("name", soft.KINDS)
def test_check_refuses_wrong_soft_targets(monkeypatch, name):
    kind = soft.KINDS[name]
    batch = soft.batch(FEW, 100, torch.float32).of(kind)
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


# --- how it is timed --------------------------------------------------------------------------------------------------


def test_peak_bytes_counts_what_is_held_at_once():
    def hold():
        for _ in range(3):
            a = torch.empty(1000)
            b = torch.empty(500)
            del a, b

    assert measure.peak_bytes(measure.Step(lambda: None, hold)) == 6000


def test_interleave_runs_every_step_in_every_round():
    order = []
    steps = {name: measure.Step(lambda: None, lambda name=name: order.append(name)) for name in "abc"}
    times = measure.interleave(steps, budget_s=0.0, reps=(3, 9))
    assert [len(values) for values in times.values()] == [3, 3, 3]
    assert "".join(order) == "abcbcacab"  # nobody always follows the same one


def test_ratio_is_taken_round_by_round():
    # the machine slows down: the medians' quotient would be 4
    assert measure.ratio([2.0, 8.0, 20.0], [1.0, 2.0, 10.0])["median"] == 2.0


def test_a_short_run_spends_less_and_leaves_large_eager_formulas_out():
    assert Effort.SHORT.rounds(1.5, (5, 31)) == (0.25, (3, 31)) and Effort.FULL.rounds(1.5, (5, 31)) == (1.5, (5, 31))
    assert [effort.leaves_out(1 << 24) for effort in Effort] == [False, True, False]


# --- judged -----------------------------------------------------------------------------------------------------------


def test_a_bound_is_met_missed_or_not_timed():
    held = [bounds.bound("a", 0.5, at_most=1, case="x", dtype="float32"), bounds.bound("a", None, at_most=1, case="y"),
            bounds.bound("b", 2.0, at_least=1), bounds.bound("b", 0.5, at_least=1, case="z"),
            bounds.bound("c", None, at_most=1, case="w")]  # fmt: skip
    assert [each["passed"] for each in held] == [True, None, True, False, None]
    table = bounds.verdicts(held)
    assert "| a <= 1 | met | 0.5 x float32, not timed y |" in table and "| b >= 1 | **missed** | 0.5 z |" in table
    results = {"environment": {}, "speed": {"bounds": held[:2]}, "soft": {"bounds": held[2:]}}
    assert bounds.missed(results) == ["- missed: b >= 1: 0.5 z\n"]
    won, lost = bounds.opening(results).split("## What was missed")
    lost, untimed = lost.split("## What was not timed")
    assert "1 of 3 bounds" in won and "| a <= 1 | 0.5, x, float32, y not timed |" in won
    assert "| b >= 1 | 0.5 to 2, z | 0.5 z |" in lost and "| c <= 1 | not timed |" in untimed
    assert bounds.opening({"speed": {"bounds": []}}) == ""


def test_what_time_left_out_is_not_timed_and_what_failed_is_missed():
    skipped = {"skipped": "not timed, ...", "timed": False}
    case = {"case": "imagenet-1k", "dtype": "float32", "ratios": {}, "providers": {
        "ours": {"skipped": "WrongResult: loss is off"}, "F.cross_entropy": {}, "ours, loss only": {},
        "paper's formula": skipped, "eager loss and scores": skipped,
    }}  # fmt: skip
    assert {bound["bound"]: bound["passed"] for bound in speed._verdicts([case])} == {
        "ours / F.cross_entropy <= 0.75": False, "peak memory of ours in gradients <= 1.2": False,
        "paper's formula / ours >= 5": None, "eager loss and scores / ours >= 7": None,
    }  # fmt: skip


def test_the_linear_form_is_judged_at_every_shape_or_said_not_to_be_timed():
    ratios = {"ours / three bare products": 1.16, "F.linear_cross_entropy / three bare products": 1.15,
              "the same, chunked / three bare products": 2.0, "scores alone / one bare product": 1.45,
              "ours, bfloat16 / ours": 1.4}  # fmt: skip
    peaks = {"ours": 165 * linear.MiB, "scores alone": 17 * linear.MiB}
    case = {"case": "llama2-vocab", "gradients": 20 * linear.MiB, "peaks": peaks,
            "ratios": {label: {"median": x} for label, x in ratios.items()}}  # fmt: skip
    held = list(linear.verdicts([case], "avx2"))
    assert {bound["bound"]: bound["passed"] for bound in held if bound["case"] == "llama2-vocab"} == {
        "ours / three bare products <= 1.15": False, "ours / F.linear_cross_entropy <= 1": False,
        "ours / the same, chunked <= 1": True, "memory beyond gradients and budget, MiB <= 16": False,
        "scores alone / one bare product <= 1.45": True, "memory of scores alone, MiB <= 16": False,
        "ours, bfloat16 / ours <= 1.5": True,
    }  # fmt: skip
    others = [bound for bound in held if bound["case"] != "llama2-vocab"]
    assert {bound["case"] for bound in others} == {"gpt2-vocab", "llama3-vocab"}
    assert all(bound["passed"] is bound["value"] is None for bound in others)
    (wide,) = (b for b in linear.verdicts([case | {"case": "llama3-vocab"}], "avx512")
               if "three" in b["bound"] and b["case"] == "llama3-vocab")  # fmt: skip
    assert wide["bound"].endswith("<= 1.35") and wide["passed"]


def test_soft_and_sigmoid_are_judged_by_their_own_bounds():
    ratios = {"ours / F.cross_entropy": {"median": 0.85}}
    cases = [{"case": "x", "dtype": "float32", "ratios": ratios, "target": name} for name in soft.KINDS]
    assert [(each["bound"], each["passed"]) for each in soft.verdicts(cases)] == [
        ("label smoothing 0.1: ours / F.cross_entropy <= 0.8", False),
        ("label smoothing 0.1: paper's formula / ours >= 5", None),
        ("probabilities: ours / F.cross_entropy <= 0.9", True),
        ("probabilities: paper's formula / ours >= 5", None),
    ]
    case = {"dtype": "float32", "case": "detection", "loss": "LogBonus(0.75)", "eager / ours": {"median": 6.5}}
    found = list(sigmoid.verdicts([case]))
    assert [(each["case"], each["bound"]) for each in found if each["passed"] is not None] == [
        ("detection", "eager LogBonus(0.75) / ours >= 6")
    ]
    assert all("None" not in each["bound"] for each in found)


# --- written, and written again ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_quick_run_writes_every_section_and_judges_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "keep_memory", lambda: False)  # it is for the whole process
    monkeypatch.setattr(command, "_drawn", lambda *_: [])
    command.main(BOOK, ["--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("cpu-*-quick.json")
    results, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert results["speed"]["command"] == f"python -m bench --quick --out {tmp_path}"
    for name, section in BOOK.sections.items():
        assert f"## {section.title}\n" in text and results[name].get("bounds", []) == []
        cases = results[name].get("cases", [])
        for case in cases.values() if isinstance(cases, dict) else cases:
            assert all(each["median"] > 0 for each in case.get("ratios", {}).values()), case
    for module, name in (
        (speed, "speed"),
        (soft, "soft"),
        (sigmoid, "sigmoid"),
        (linear, "linear"),
        (tracker, "tracker"),
    ):
        assert len(results[name]["cases"]) == len(module.cases()), name
    assert set(results["linear"]["cases"][0]["time_ms"]) == set(linear.names("llama2-vocab"))
    path.with_suffix(".md").unlink()
    capsys.readouterr()
    command.main(BOOK, ["report", "--out", str(tmp_path)])
    assert path.with_suffix(".md").read_text() == text and text in capsys.readouterr().out


def test_what_is_asked_for_is_measured_and_the_rest_stays(tmp_path, monkeypatch, capsys):
    def book(value):
        run = {name: command.Section(name.title(), lambda effort, tell, x=value: {"x": x, "by": effort.value},
                                     lambda section: f"found {section['x']} by {section['by']}")
               for name in ("one", "two")}  # fmt: skip
        return command.Book("python -m x", "X.", "Title", run, lambda: "x-cpu", default=Effort.SHORT)

    monkeypatch.setattr(measure, "keep_memory", lambda: False)
    out = ["--out", str(tmp_path)]
    command.main(book(1), out)
    command.main(book(2), ["--full", *out])
    command.main(book(3), ["two", *out])
    assert "found 1 by short" in (tmp_path / "x-cpu-short.md").read_text()
    full = (tmp_path / "x-cpu.md").read_text()
    assert "found 2 by full" in full and "found 3 by full" in full and "`python -m x two --out" in full
    capsys.readouterr()
    command.main(book(4), ["report", *out])
    said = capsys.readouterr().out
    assert "found 1" in said and full in said and "found 4" not in said
    with pytest.raises(SystemExit, match="unknown section three; expected one, two, report"):
        command.main(book(5), ["three", *out])


def test_the_readme_has_a_column_a_machine_and_names_what_is_not_measured(tmp_path):
    def held(value, dtype, case="llama2-vocab", at_most=0.7):
        return bounds.bound("ours / F.cross_entropy", value, at_most=at_most, case=case, dtype=dtype)

    wide = [held(0.5, "float32", at_most=0.6), held(0.8, "bfloat16"), held(0.9, "float32", "another")]
    for name, found, effort in (("avx2", [], "full"), ("avx512", wide, "full"), ("avx512-short", [], "short")):
        where = {"cpu": "A CPU", "instruction_set": name, "effort": effort}
        (tmp_path / f"cpu-{name}.json").write_text(json.dumps({"environment": where, "speed": {"bounds": found}}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.quote(tmp_path, readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| A CPU with AVX2 | A CPU with AVX512 |" in text and "| not measured | 0.5 to 0.8, **missed** |" in text
    report.quote(tmp_path, readme)
    assert readme.read_text() == text
    readme.write_text(text.replace(report.END, ""))
    with pytest.raises(ValueError, match="expected .*end of numbers"):
        report.quote(tmp_path, readme)


def test_what_is_written_from_the_records_is_up_to_date():
    """`python -m bench report` writes all of it."""
    records, readme = report.full_records(ROOT / "bench/results"), (ROOT / "README.md").read_text()
    assert records and report.readme_block(records) in readme
    for name, results in records.items():
        text = (ROOT / f"bench/results/{name}.md").read_text()
        assert command.markdown(BOOK, results, re.findall(r"!\[.*\]\((.*)\)", text)) == text


def test_memory_is_kept_where_malloc_agrees(monkeypatch):
    set_to = []
    libc = types.SimpleNamespace(mallopt=lambda option, value: set_to.append((option, value)) or 1)
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: libc)
    assert measure.keep_memory() and set_to == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not measure.keep_memory()
