"""`python -m bench lm`: the text, the model, the record."""

import itertools
import json
import math

import pytest
import torch

from bench import command, lm, lm_model, lm_text, measure
from bonus_ops import difficulty_scores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What a run of seconds writes."""
    folder = tmp_path_factory.mktemp("lm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "keep_memory", lambda: False)  # it is for the whole process
        patch.setattr(command, "_drawn", lambda *_: [])
        command.main(lm.BOOK, ["--quick", "--out", str(folder)])
    (path,) = folder.glob("lm-*-quick.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_quick_run_trains_measures_and_reports(quick):
    results, said = quick
    assert set(results["train"]["runs"]) == {"plain", "bonus"}
    for run in results["train"]["runs"].values():
        assert [step for step, *_ in run["curve"]] == list(range(1, lm.QUICK.steps + 1))
        assert run["perplexity"] < 2 * lm.QUICK.n_pieces and 0 <= run["ece"] <= 100
        assert len(run["hardest"]) == lm.HARDEST
        margins = [row["margin"] for row in run["hardest"]]
        assert margins == sorted(margins)
    assert set(results["cost"]["tokens_per_s"]) == set(lm_model.LOSSES)
    for title in ("Time and memory", "Training", "hardest pieces"):
        assert title in said
    assert "its figures mean nothing" in said


def test_plain_and_bonus_start_alike_and_plain_is_cross_entropy(quick):
    first = quick[0]["cost"]["first_losses"]
    assert first["plain"] == pytest.approx(first[lm_model.LOGITS], abs=1e-4)
    assert first["bonus"][0] < first["plain"][0]


def test_pieces_spell_the_text_and_files_kept_apart_are_not_counted():
    of = lm_text.text(400, 40)
    files = list(itertools.islice(lm_text._files(), 40))
    ascii_only = [i for i, file in enumerate(files) if file.isascii()]
    assert ascii_only
    trained = "".join(of.pieces[i] for i in of.train.tolist())
    assert all(files[i] in trained for i in ascii_only if i % lm_text.HELD_OUT != lm_text.HELD_OUT - 1)
    held = "".join(of.pieces[i] for i in of.validation.tolist())
    assert len(held) == sum(len(files[i]) for i in (19, 39)) and len(of.pieces) == 400 == len(set(of.pieces))


def test_quality_is_that_of_the_logits():
    logits = 3 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    target = logits.add(2 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(1))).argmax(1)
    found = lm_model.quality(difficulty_scores(logits, target))
    p = logits.double().softmax(1)
    confidence, guess = p.max(1)
    ece = 0.0
    for i in range(lm_model.N_BINS):
        here = (confidence * lm_model.N_BINS).long().clamp(max=lm_model.N_BINS - 1) == i
        ece += abs((confidence[here] - (guess == target)[here].double()).sum().item()) / len(p)
    assert found["perplexity"] == pytest.approx(
        math.exp(torch.nn.functional.cross_entropy(logits.double(), target).item()), rel=1e-5)  # fmt: skip
    assert found["accuracy"] == pytest.approx(100 * (guess == target).double().mean().item())
    assert found["confidence"] == pytest.approx(100 * confidence.mean().item(), rel=1e-5)
    assert found["ece"] == pytest.approx(100 * ece, rel=1e-3)
