"""`python -m bench claims`: the arithmetic behind the verdicts, the tasks, and a quick run from end to end."""

import json
import math

import pytest
import torch

pytest.importorskip("sklearn")

from bench import (
    claims,
    claims_calibration,
    claims_encouraging,
    claims_prioritisation,
    claims_separation,
    claims_suspects,
    command,
    measure,
)
from bench.claims_data import EASY, HARD, NOISY
from bench.claims_verdict import ABOVE_ZERO, NOT_REPRODUCED, ON_AVERAGE, REPRODUCED, paired, verdict
from bench.intervals import interval
from bench.measure import Effort

pytestmark = pytest.mark.slow


def test_interval_is_students():
    # 1, 2, 3: standard error 1 / sqrt(3), t = 4.303 at 2 degrees of freedom
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["seeds"] == 3
    assert found["half"] == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert math.isnan(interval([1.0])["half"])


@pytest.mark.parametrize(
    ("bars", "word"),
    [
        ({"at_least": -1}, REPRODUCED),
        ({"at_least": 0}, ON_AVERAGE),
        ({"at_least": 2.1}, NOT_REPRODUCED),
        ({"at_most": 4.5}, REPRODUCED),
        ({"at_most": 3}, ON_AVERAGE),
        ({"at_most": 1.9}, NOT_REPRODUCED),
        ({"at_least": -1, "at_most": 5}, REPRODUCED),
        ({"at_least": -1, "at_most": 3}, ON_AVERAGE),
    ],
)
def test_verdict(bars, word):
    assert verdict("a claim", [1.0, 2.0, 3.0], **bars)["verdict"] == word


def test_no_difference_is_not_above_zero():
    assert verdict("gain", [0.0, 0.0], at_least=ABOVE_ZERO)["verdict"] == NOT_REPRODUCED


def test_differences_are_taken_on_the_same_seed():
    by_name = {"a": {1: 5.0, 0: 1.0}, "b": {0: 2.0, 1: 3.0}}
    assert paired(by_name, "a", "b") == [-1.0, 2.0]


def test_auroc():
    score = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 9.0])
    kind = torch.tensor([NOISY, NOISY, HARD, EASY, EASY, HARD])
    # noisy 3 and 1 against clean 0, 2, 2, 9: 3 beats three, 1 beats one
    assert claims_separation.auroc(score, kind, NOISY, (EASY, HARD)) == pytest.approx(4 / 8)
    assert claims_separation.auroc(score, kind, HARD, (EASY,)) == pytest.approx((1.5 + 2) / 4)


@pytest.mark.parametrize(
    ("name", "counts", "n_classes"),
    [
        ("ambig", (948, 155, 194), 10),
        ("ambig_pair", (948, 155, 194), 10),
        ("synth", (1136, 80, 214), 10),
        ("rare", (None, 30, None), 5),
        ("rare_gauss", (None, 30, None), 5),
    ],
)
def test_task(name, counts, n_classes):
    task, again = claims_separation.make(name, 0), claims_separation.make(name, 0)
    assert all(torch.equal(a, b) for a, b in zip(task[:5], again[:5], strict=True))
    found = [int((task.kind == kind).sum()) for kind in (EASY, HARD, NOISY)]
    assert all(c in (None, f) for c, f in zip(counts, found, strict=True))
    assert found[NOISY] == int(0.15 * sum(found)) and task.n_classes == n_classes
    assert task.labels.min() >= 0 and task.labels.max() < n_classes


def test_noise_is_where_it_is_said_to_be():
    ambig, pair = claims_separation.make("ambig", 1), claims_separation.make("ambig_pair", 1)
    clean = ambig.kind != NOISY
    assert torch.equal(ambig.labels[clean], pair.labels[clean])
    rare, gauss = claims_separation.make("rare", 1), claims_separation.make("rare_gauss", 1)
    clean = rare.kind != NOISY
    assert torch.equal(rare.images[clean], gauss.images[clean]) and torch.equal(rare.labels[clean], gauss.labels[clean])
    assert (rare.labels[~clean] != gauss.labels[~clean]).all()  # gauss keeps the true ones
    assert not (rare.images[~clean] == gauss.images[~clean]).all(1).any()


def test_statistics_of_three_examples():
    epochs = 4
    correct = torch.tensor([[0, 1, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]]).float()
    seen = {key: torch.rand(epochs, 3) for key in ("loss", "el2n", "margin", "entropy", "energy", "norm")}
    found = claims_separation.statistics(seen | {"correct": correct}, epochs)
    assert found["forgetting"].tolist() == [1, 0, 0]
    assert found["forgetting, never learned = T"].tolist() == [1, 0, 4]
    assert found["first_learned"].tolist() == [1, 0, 4]
    assert found["learned_for_3"].tolist() == [4, 0, 4]
    assert found["learned_forever"].tolist() == [3, 0, 4]
    torch.testing.assert_close(found["el2n_mean"], seen["el2n"].mean(0))


def test_every_policy_spends_the_same_budget():
    for name, method in claims_prioritisation.METHODS.items():
        run = claims_prioritisation.Run(50, 0, 1)
        method(run)
        assert run.budget <= run.spent < run.budget + 64, name


def test_the_exact_gradient_of_cross_entropy_is_not_masked():
    # where the model is sure, softmax - onehot loses the label's part; the exact gradient points where -gap's does
    result = claims_encouraging.work("log_end 0.75", 0, 1)
    assert result["under_exact_ce"] == result["under_gap"]


def test_a_control_takes_the_larger_steps_it_is_named_for():
    # of implementation None: a kernel of plain cross-entropy in its place would compare nothing
    logits, labels = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([0])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    for name, loss in claims_encouraging.CONTROLS.items():
        torch.testing.assert_close(
            claims_encouraging.bonus_cross_entropy(logits, labels, bonus=loss), float(name.split()[-1]) * plain
        )


def test_calibration_of_four_rows_by_hand():
    # confidences .9, .9, .6, .6 in two bins; one of each pair is right: |.9 - .5| / 2 + |.6 - .5| / 2
    p = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]])
    labels = torch.tensor([[0, 1, 0, 1]])
    assert claims_calibration.ece(p.log(), labels).tolist() == pytest.approx([25.0], rel=1e-5)
    assert claims_calibration.nll(p.log(), labels).tolist() == pytest.approx(
        [-sum(map(math.log, (0.9, 0.1, 0.6, 0.4))) / 4], rel=1e-5
    )
    assert claims_calibration.ece(100 * p.log(), labels).tolist() == pytest.approx([50.0])  # a confidence of 1


def test_the_best_temperature_is_found_of_each_seed():
    torch.manual_seed(0)
    logits = 2 * torch.randn(2, 20000, 4, dtype=torch.float64)
    labels = torch.stack([torch.multinomial(each.softmax(1), 1)[:, 0] for each in logits])
    factors = torch.tensor([3.0, 0.25])
    found = claims_calibration.best_temperature(logits * factors[:, None, None], labels)
    torch.testing.assert_close(found.float(), factors, rtol=0.05, atol=0)


@pytest.mark.parametrize(("data", "n_classes"), [("digits", 10), ("lines", 8)])
def test_rows_of_calibration(data, n_classes):
    n_train, n_validation, n_test = claims_calibration._PER_CLASS[data]
    for rarest in list(claims_calibration.BALANCES.values())[1 if data == "lines" else 0 :]:  # drawn pixel by pixel
        rows = claims_calibration.split(data, rarest, 2)
        for part, n in ((rows.validation, n_validation), (rows.test, n_test)):
            assert all(labels.bincount().tolist() == [n] * n_classes for labels in part[1])
        counts = [labels.bincount().sort().values.tolist() for labels in rows.train[1]]
        assert counts[0] == counts[1] and len(counts[0]) == n_classes
        assert counts[0][0] == round(n_train * rarest) and counts[0][-1] == n_train
        assert not torch.equal(rows.train[1][0], rows.train[1][1])


def test_a_network_learns_the_same_alone_and_among_other_seeds():
    rows = claims_calibration.split("digits", 1.0, 2)
    first = claims_calibration.Split(*((x[:1], y[:1]) for x, y in rows))
    options = claims_calibration.LOSSES["LogBonus(0.75)"]
    together = claims_calibration.train(rows, options, 2, 1)
    alone = claims_calibration.train(first, options, 1, 1)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[:1], b)


def test_labels_are_flipped_to_another_class():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = claims_suspects.flip(0.3)
    flipped = data.given != data.true
    assert 0.25 < flipped.double().mean() < 0.35 and data.given.min() >= 0 and data.given.max() <= 9
    assert len(data.images) + len(data.test_images) == 1797


def test_suspects_are_counted_and_shown_worst_first():
    name = "15 % flipped, one hidden layer"
    with torch.random.fork_rng():
        found = claims_suspects.work(name, 1, 8)
        torch.manual_seed(1)
        flipped = (data := claims_suspects.flip(0.15)).given != data.true
    n_suspects = int(0.15 * len(flipped))
    assert found["precision"] * n_suspects == pytest.approx(found["recall"] * int(flipped.sum()), abs=100)
    assert found["precision"] > 80 and 0 < found["after"] < 20
    assert len(found["worst"]) == claims_suspects.SHOWN
    assert sum(one["given"] != one["true"] for one in found["worst"]) >= 14


def as_claimed(module, job):
    """Return made-up results in which every claim of the papers and of this benchmark is true."""
    name, seed = job[0], job[-2]
    if module is claims_calibration:
        better = 0.01 * (0.5 - abs(float(name[9:-1]) - 0.6)) if name.startswith("LogBonus") else 0.0
        nll = 0.1 - better
        return {
            key: [value + 0.001 * (i % 2) for i in range(seed)]
            for key, value in {"accuracy": 90 + 100 * better, "nll": nll, "ece": 2 - better, "temperature": 1.5,
                               "nll_scaled": nll, "ece_scaled": 1.0}.items()
        }  # fmt: skip
    noise = 0.001 * seed
    if module is claims_encouraging:
        end = -1.0 if name.startswith("cross-entropy") else float(name.split()[-1])
        sure = end == 1
        return {
            "accuracy": 97 + 0.1 * (end > 0.6) + noise,
            "train_margin": 8 + 3 * (1 + end) + 60 * sure + noise,
            "target_energy": -14.0 - 60 * sure + noise,
            "rest_energy": -6.0 + noise,
            "confident_share": 0.1 + 0.01 * (1 + end) + 0.3 * sure + noise,
            "under_ce": 58 + 16 * sure + noise,
            "under_exact_ce": 58 + 8 * sure + noise,
            "under_gap": 58 + 8 * sure + noise,
            "zero_gradient": 20.0 * sure,
        }
    if module is claims_prioritisation:
        harm = {"selective backprop": 9, "importance sampling, plain": 4, "InfoBatch": 3, "exponentiated gradient": -5,
                "guarded selective backprop": -2, "guarded, quantile .05": 20}.get(name, 0.0)  # fmt: skip
        harm = harm * job[1] / 50 + 0.5 * (name == "exponentiated gradient")
        return {"error": 9 + harm + noise, "bad": 50.0, "forwards": 30.0, "backwards": 30.0}
    if module is claims_suspects:
        return {"precision": 94.0, "recall": 98.0, "before": 7.0, "after": 4.0 + noise, "worst": []}
    return separable(name, seed)


def separable(name, seed):
    kind = torch.tensor([EASY] * 40 + [HARD] * 10 + [NOISY] * 10)
    shown = claims_separation.statistics(
        {key: torch.rand(3, 60) for key in ("loss", "el2n", "margin", "entropy", "energy", "correct", "norm")}, 3
    )
    x = torch.arange(60.0)
    made = {"el2n_mean": x, "loss_last": -x, "entropy_early": -x, "forgetting": -x, "loss_mean": -x, "entropy_mean": x}
    if name == "rare_gauss":
        made |= {"entropy_early": x}
    shown |= made
    auroc = {
        score: {q: claims_separation.auroc(v, kind, *of) for q, of in claims_separation.QUESTIONS.items()}
        for score, v in shown.items()
    }
    features = {key: shown[key].numpy() for pair in claims_separation.PAIRS for key in pair}
    return {"accuracy": 90.0 + seed, "auroc": auroc, "kind": kind.numpy(), "features": features}


@pytest.mark.parametrize("module", [claims._module(name) for name in claims.NAMES])
def test_verdicts_follow_the_data(module, monkeypatch):
    monkeypatch.setattr(claims_separation, "SEEDS", 3)  # it fits a model for every half of them
    results = {job: as_claimed(module, job) for job in module.jobs(Effort.FULL)}
    section = module.conclude(results, Effort.FULL)
    missed = [v for v in section["verdicts"] if v["verdict"] != REPRODUCED]
    assert section["verdicts"] and not missed
    flat = {job: without_effect(module, result) for job, result in results.items()}
    held = {v["claim"] for v in module.conclude(flat, Effort.FULL)["verdicts"] if v["verdict"] == REPRODUCED}
    # without any effect only claims that something stays as it is, or fails, hold
    stays = ("within", "no masking", "clean labels: selective", "as uniform", "rescues", "fails", "does not",
             "stay as good", "repairs", "is as accurate")  # fmt: skip
    assert all(any(word in claim for word in stays) for claim in held), held


def without_effect(module, result):
    if module is claims_calibration:
        return {key: [1.0] * len(values) for key, values in result.items()}
    if module is not claims_separation:
        return dict.fromkeys(result, 1.0)
    auroc = {score: dict.fromkeys(by_question, 0.5) for score, by_question in result["auroc"].items()}
    kind = result["kind"][torch.randperm(len(result["kind"]))]
    return result | {"auroc": auroc, "kind": kind}


def test_quick_run_is_written_and_rendered_again(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(measure, "keep_memory", lambda: False)  # it is for the whole process
    monkeypatch.setattr(command, "_drawn", lambda book, results, *_: drawn.extend(results) or [])
    command.main(claims.BOOK, ["--quick", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "claims-quick.json").read_text())
    assert set(claims.NAMES) < set(results) == set(drawn)
    assert all(results[name]["command"] == f"python -m bench claims --quick --out {tmp_path}" for name in claims.NAMES)
    written = (tmp_path / "claims-quick.md").read_text()
    assert "## Noisy against hard" in written and "| selective backprop |" in written
    assert "\n| 20 % flipped, one hidden layer |" in written and "\n15 % flipped, one hidden layer:\n" in written
    (tmp_path / "claims-quick.md").unlink()
    command.main(claims.BOOK, ["report", "--out", str(tmp_path)])
    assert (tmp_path / "claims-quick.md").read_text() == written


def test_a_verdict_is_shown_with_its_bar():
    section = {"verdicts": [verdict("a", [1.0, 2.0], at_least=0.5, at_most=3), verdict("b", [1.0, 1.0], at_most=0.5)]}
    lines = claims._verdicts(section).splitlines()
    assert lines[2] == "| a | 1.500 ± 6.353 | 0.5 to 3 | on average only: the interval crosses the bar |"
    assert lines[3] == "| b | 1.000 ± 0.000 | <= 0.5 | not reproduced |"
