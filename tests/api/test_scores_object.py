"""Scores as an object: what it says of itself, the hardest rows, its target, and its ways elsewhere."""

from __future__ import annotations

import copy
import math
import pickle
import re

import pytest
import torch
from torch import Tensor

from bonus_ops import SCORES, Scores, difficulty_scores
from bonus_ops.causal_lm import causal_lm_loss_with_scores

N, C = 40, 7


def made(shape: tuple[int, ...] = (N,), seed: int = 0, known: bool = True) -> tuple[Scores, Tensor, Tensor]:
    """Return scores with every fifth row ignored, their logits [..., C] and their target."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, C, generator=random)
    target = torch.randint(C, shape, generator=random)
    target.view(-1)[::5] = -100
    columns = difficulty_scores(logits.view(-1, C), target.view(-1))
    return Scores(*(c.view(shape) for c in columns), target=target if known else None), logits, target


# --- the tuple it was -------------------------------------------------------------------------------------------------


def test_it_is_the_tuple_of_six_that_it_was():
    scores, _, target = made()
    loss, el2n, margin, entropy, energy, runner_up = scores
    assert loss is scores.loss and runner_up is scores.runner_up and len(scores) == 6 and isinstance(scores, tuple)
    assert (
        list(scores._asdict()) == list(Scores._fields) == ["loss", "el2n", "margin", "entropy", "energy", "runner_up"]
    )
    again, bare = Scores(**scores._asdict(), target=target), Scores(*scores)
    assert tuple(again) == tuple(bare) == tuple(scores) and again.target is target and bare.target is None
    assert Scores._make(scores).target is None and scores._replace(loss=el2n).target is target
    assert scores._replace(loss=el2n).loss is el2n and scores._replace(target=None).target is None
    with pytest.raises(TypeError):
        Scores(*scores, target)  # seven by place were never allowed


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_know_the_target(way):
    scores, _, target = made()
    again = way(scores)
    assert type(again) is Scores and torch.equal(again.target, target)
    torch.testing.assert_close(tuple(again), tuple(scores), equal_nan=True)


def test_it_is_saved_and_loaded_as_plain_tensors(tmp_path):
    scores, _, target = made()
    torch.save({**scores._asdict(), "target": scores.target}, tmp_path / "scores.pt")
    again = Scores(**torch.load(tmp_path / "scores.pt", weights_only=True))
    assert torch.equal(again.target, target) and torch.equal(again.correct(), scores.correct())


@pytest.mark.parametrize("known", [True, False])
def test_the_compiler_takes_code_that_makes_it(known):
    def step(logits: Tensor, target: Tensor) -> tuple[Scores, Tensor]:
        columns = [logits.logsumexp(1)] * 5
        scores = Scores(*columns, target, target=target) if known else Scores(*columns, target)
        return scores, scores.select(slice(0, 3)).target_prob.sum() + scores.loss_minus_entropy.sum()

    logits, target = torch.randn(N, C), torch.zeros(N, dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True, backend="eager")(logits, target)
    assert type(compiled[0]) is Scores and (compiled[0].target is not None) == known
    torch.testing.assert_close(tuple(compiled[0]), tuple(step(logits, target)[0]))
    counted = torch.compile(lambda s: s.accuracy(), fullgraph=True, backend="eager")(made()[0])
    assert counted == made()[0].accuracy()


# --- what it says of itself -------------------------------------------------------------------------------------------


def test_the_summary_counts_and_gives_mean_and_quantiles_of_each_column():
    scores, _, target = made()
    title, head, *lines = repr(scores).split("\n")
    assert title == f"Scores of {N} rows, {N // 5} ignored, accuracy {float(scores.accuracy()):.4f}"
    assert head.split() == ["mean", "min", "25%", "median", "75%", "max"]
    assert [line.split()[0] for line in lines] == list(Scores._fields[:-1]) and len(repr(scores)) < 600
    for line, column in zip(lines, scores, strict=False):
        known = column[target >= 0].double()
        expected = [known.mean(), *(known.quantile(q) for q in (0.0, 0.25, 0.5, 0.75, 1.0))]
        assert line.split()[1:] == [f"{float(x):.3f}" for x in expected]
    assert "accuracy" not in repr(made(known=False)[0]) and repr(made((4, 5))[0]).startswith("Scores of 20 rows [4, 5]")


def test_the_summary_of_nothing_of_infinities_and_of_no_data_does_not_fail():
    empty = Scores(*(torch.empty(0) for _ in range(5)), torch.empty(0, dtype=torch.int32))
    assert repr(empty).startswith("Scores of 0 rows, 0 ignored\n") and "nan" in repr(empty)
    infinite = Scores(*(torch.tensor([math.inf, 1.0, math.inf]) for _ in range(5)), torch.zeros(3))
    assert "inf" in repr(infinite)
    one = difficulty_scores(torch.randn(C), torch.tensor(1))
    assert repr(one).startswith("Scores of 1 rows")
    meta = Scores(*(torch.empty(3, device="meta") for _ in range(6)))
    assert "device='meta'" in repr(meta) and repr(Scores(*range(6))) == (
        "Scores(loss=0, el2n=1, margin=2, entropy=3, energy=4, runner_up=5)"
    )
    texts = []
    torch.vmap(lambda row: texts.append(repr(Scores(*[row] * 6))) or row)(torch.rand(3))
    assert "Scores" in texts[0]


# --- the hardest rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [s.name for s in SCORES.values() if s.direction])
@pytest.mark.parametrize("k", [0, 1, 5, 1000])
@pytest.mark.parametrize("shape", [(N,), (8, 5), (2, 4, 5)])
def test_the_hardest_rows_are_those_of_largest_difficulty_without_the_ignored(by, k, shape):
    scores, _, target = made(shape)
    difficulty = scores.difficulty(by).flatten().tolist()
    expected = sorted((i for i, x in enumerate(difficulty) if x == x), key=lambda i: -difficulty[i])[:k]
    hardest = scores.hardest(k, by=by)
    assert hardest.dtype == torch.int64 and hardest.tolist() == expected
    assert (target.flatten()[hardest] >= 0).all() and len(hardest) == min(k, 4 * N // 5)


def test_the_hardest_row_may_be_infinitely_hard_and_all_may_be_ignored():
    logits = torch.tensor([[-math.inf, 0.0], [0.0, 0.0], [math.nan, 0.0]])
    assert difficulty_scores(logits, torch.tensor([0, 0, 0])).hardest(3).tolist() == [0, 1]
    assert difficulty_scores(torch.zeros(3, 2), torch.full((3,), -100)).hardest(2).tolist() == []


def test_the_hardest_refuses():
    scores, _, _ = made()
    for call, error, match in (
        (lambda: scores.hardest(-1), ValueError, "hardest: k must be at least 0, got -1"),
        (lambda: scores.hardest(2.0), TypeError, "hardest: k must be an int, got float"),
        (lambda: scores.hardest(2, by="runner_up"), ValueError, "name must be one of loss, .*, got 'runner_up'"),
    ):
        with pytest.raises(error, match=match):
            call()


# --- the target -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(N,), (8, 5), ()])
def test_it_knows_what_is_right_and_accuracy_skips_the_ignored(shape):
    scores, logits, target = made(shape) if shape else (None,) * 3
    if not shape:
        logits, target = torch.randn(C), torch.tensor(2)
        scores = Scores(*difficulty_scores(logits, target), target=target)
    counts = target >= 0
    right = (logits.argmax(-1) == target) & counts
    assert torch.equal(scores.correct(), right) and torch.equal(scores.correct(target), right)
    assert torch.equal(scores.prediction(), torch.where(counts, logits.argmax(-1), -1))
    torch.testing.assert_close(scores.accuracy(), right.sum() / counts.sum())
    bare = Scores(*scores)
    assert torch.equal(bare.correct(target), right) and bare.accuracy(target) == scores.accuracy()
    for method in (bare.correct, bare.prediction, bare.accuracy, lambda: bare.label):
        with pytest.raises(ValueError, match="expected scores that know their target, or the target"):
            method()


def test_probabilities_are_a_target_whose_label_is_the_largest():
    logits, probabilities = torch.randn(6, C, 3), torch.rand(6, C, 3)
    scores = Scores(*difficulty_scores(logits, probabilities.argmax(1)), target=probabilities)
    assert torch.equal(scores.correct(), logits.argmax(1) == probabilities.argmax(1))
    assert torch.equal(scores.select(slice(2)).target, probabilities.argmax(1)[:2])
    row = Scores(*difficulty_scores(logits[0, :, 0], probabilities[0, :, 0].argmax()), target=probabilities[0, :, 0])
    assert row.correct() == (logits[0, :, 0].argmax() == probabilities[0, :, 0].argmax())


def test_scores_of_next_tokens_know_the_shifted_labels():
    random = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(4, 9, C, generator=random), torch.randint(C, (4, 9), generator=random)
    labels[1, 4:] = -100
    scores = causal_lm_loss_with_scores(logits, labels)[1]
    next_label, prediction = labels[:, 1:], logits[:, :-1].argmax(-1)
    expected = ((prediction == next_label) & (next_label >= 0)).sum() / (next_label >= 0).sum()
    torch.testing.assert_close(scores.accuracy(), expected)
    assert torch.equal(scores.correct()[:, :-1], (prediction == next_label) & (next_label >= 0))
    assert not scores.correct()[:, -1].any() and scores.prediction()[:, -1].tolist() == [-1] * 4
    with pytest.raises(
        ValueError, match=r"target must be that of the scores, which differs in \d+ of 36 rows\n.*shifted"
    ):
        scores.correct(labels)
    assert torch.equal(scores.correct(scores.target), scores.correct())
    aligned = causal_lm_loss_with_scores(logits, None, shift_labels=labels)[1]
    assert torch.equal(aligned.target, labels) and aligned.accuracy() == aligned.accuracy(labels)
    sliced = causal_lm_loss_with_scores(torch.randn(4, 12, C)[:, :9], labels)[1]
    assert torch.equal(sliced.target, scores.target)


def test_what_is_ignored_may_differ_between_targets():
    scores, _, target = made()
    assert torch.equal(scores.correct(target.clamp(min=0)), scores.correct())


# --- rows, batches, sequences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [slice(3, 9), torch.tensor([5, 0, 5]), torch.arange(N) % 3 == 0, slice(0, 0)])
def test_rows_are_taken_from_all_columns_and_the_target(rows):
    scores, _, target = made()
    chosen = scores.select(rows)
    for column, taken in zip((*scores, target), (*chosen, chosen.target), strict=True):
        torch.testing.assert_close(taken, column[rows], equal_nan=True)
    assert Scores(*scores).select(rows).target is None


@pytest.mark.parametrize("sizes", [[3], [5, 2, 33], [0, 40]])
@pytest.mark.parametrize("known", [True, False])
def test_batches_joined_are_the_whole(sizes, known):
    scores, _, _ = made(known=known)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    joined = Scores.cat(scores.select(slice(s, s + n)) for s, n in zip(starts, sizes, strict=True))
    whole = scores.select(slice(sum(sizes)))
    torch.testing.assert_close(tuple(joined), tuple(whole), equal_nan=True)
    assert torch.equal(joined.target, whole.target) if known else joined.target is None


def test_single_rows_and_sequences_of_unlike_length_join_too():
    rows = [difficulty_scores(torch.randn(C), torch.tensor(i)) for i in range(3)]
    assert Scores.cat(rows).loss.shape == (3,)
    long, short = made((2, 10))[0], made((3, 5))[0]
    assert Scores.cat(s.flatten() for s in (long, short)).target.shape == (35,)
    for batches, error, match in (
        ([], ValueError, "at least one batch, got none"),
        ([long, tuple(long)], TypeError, "expected Scores, got tuple"),
        ([long, Scores(*long)], ValueError, "all to know their target or none, got 1 of 2"),
    ):
        with pytest.raises(error, match=match):
            Scores.cat(batches)


@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "max", "last"])
def test_tokens_become_sequences_by_the_reduction_named(reduction, shape):
    scores, _, target = made(shape)
    target[1] = -100
    scores = Scores(*(torch.where(target < 0, -1 if c.dtype == torch.int32 else math.nan, c) for c in scores),
                    target=target)  # fmt: skip
    sequences = scores.to_sequences(reduction)
    for name, column, whole in zip(Scores._fields, sequences, scores, strict=True):
        assert column.shape == shape[:1] and column.dtype == whole.dtype
        for i in range(shape[0]):
            known = [j for j in range(target[i].numel()) if target[i].view(-1)[j] >= 0]
            values, losses = whole[i].flatten(), scores.loss[i].flatten()
            if name == "runner_up" and reduction in ("mean", "sum"):
                expected = -1
            elif not known:
                expected = -1 if name == "runner_up" else math.nan
            elif reduction in ("mean", "sum"):
                expected = sum(values[known].double().tolist()) / (len(known) if reduction == "mean" else 1)
            else:
                chosen = max(known, key=lambda j: losses[j]) if reduction == "max" else known[-1]
                expected = values[chosen].item()
            assert math.isclose(column[i], expected, rel_tol=1e-5, abs_tol=1e-6) or column[i] != column[i] != expected
    assert sequences.ignored.tolist() == [i == 1 for i in range(shape[0])]
    assert (sequences.target is None) == (reduction in ("mean", "sum"))
    if sequences.target is not None:
        assert sequences.correct().shape == shape[:1]


def test_sequences_refuse_and_take_none():
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, max, last, got 'none'"):
        made((4, 5))[0].to_sequences("none")
    with pytest.raises(RuntimeError, match=r"expected scores of tokens \[N, T\], got shape \[40\]"):
        made()[0].to_sequences()
    for reduction in ("mean", "sum"):
        empty = Scores(*(torch.empty(3, 0) for _ in range(5)), torch.empty(3, 0, dtype=torch.int32))
        assert empty.to_sequences(reduction).ignored.all()


def test_it_moves_to_a_device_with_its_target():
    scores, _, _ = made()
    for moved in (scores.to("meta"), scores.to(torch.device("meta"), non_blocking=True)):
        assert all(x.device.type == "meta" for x in (*moved, moved.target))
    assert all(a is b for a, b in zip(scores.cpu(), scores, strict=True))


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_a_logger_gets_plain_numbers():
    scores, _, target = made()
    numbers = scores.scalars("train/")
    assert all(type(x) is float for x in numbers.values())
    names = ["count", "ignored", *Scores._fields[:-1], "accuracy"]
    assert list(numbers) == ["train/" + name for name in names]
    assert numbers["train/count"] == 32 and numbers["train/ignored"] == 8
    for name, column in zip(Scores._fields[:-1], scores, strict=False):
        assert math.isclose(numbers["train/" + name], column[target >= 0].double().mean(), rel_tol=1e-12)
    assert math.isclose(numbers["train/accuracy"], scores.accuracy(), rel_tol=1e-6)
    assert "accuracy" not in Scores(*scores).scalars()
    nothing = scores.select(target < 0).scalars()
    assert nothing["count"] == 0 and math.isnan(nothing["loss"]) and math.isnan(nothing["accuracy"])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(N,), (8, 5), (2, 4, 5)])
def test_a_table_has_a_line_a_row(known, shape):
    pandas = pytest.importorskip("pandas")
    scores, _, target = made(shape, known=known)
    frame = scores.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == N
    names = ["target_prob", "other_prob", "prob_margin", "loss_minus_entropy", "max_logit", "max_prob"]
    assert list(frame) == [*Scores._fields, *names, *(["target", "prediction", "correct"] if known else [])]
    last = frame.loc[tuple(n - 1 for n in shape) if len(shape) > 1 else N - 1]
    assert last["loss"] == float(scores.loss.flatten()[-1])
    assert frame["loss"].isna().sum() == N // 5
    if known:
        assert frame["correct"].tolist() == scores.correct().flatten().tolist()


def test_without_pandas_that_is_what_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pandas"):
        made()[0].to_pandas()


def test_every_method_says_what_it_returns():
    for name in dir(Scores):
        member = getattr(Scores, name)
        if not name.startswith("_") and name in vars(Scores) and not isinstance(member, (type(None), str)):
            assert re.match(r"[A-Z`]", member.__doc__), name
