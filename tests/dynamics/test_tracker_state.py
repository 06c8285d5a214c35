"""A tracker's state: forgotten by reset, saved as plain tensors, of one dtype, and outside compiled graphs."""

from __future__ import annotations

import pytest
import torch

from bonus_ops import Scores, difficulty_scores
from bonus_ops.dynamics import STATISTICS, ExampleTracker, random_label_loss

N, C = 12, 4


def train(tracker: ExampleTracker, epochs: int = 3, seed: int = 0) -> ExampleTracker:
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(N, generator=random).split(5):
            logits = torch.randn(len(index), C, generator=random, dtype=torch.float32)
            target = index % C
            columns = difficulty_scores(logits, target)
            randomly = random_label_loss(logits, target, columns, generator=random)
            tracker.update(columns, index, target, random_label_loss=randomly)
        tracker.end_epoch()
    return tracker


def same(one: ExampleTracker, other: ExampleTracker) -> bool:
    a, b = one.state_dict(), other.state_dict()
    columns, others = a.pop("columns"), b.pop("columns")
    return a == b and all(torch.equal(columns[k].nan_to_num(-7), others[k].nan_to_num(-7)) for k in columns)


def test_reset_forgets_everything():
    tracker = train(ExampleTracker(N, "all"))
    assert not same(tracker, ExampleTracker(N, "all"))
    tracker.reset()
    assert same(tracker, ExampleTracker(N, "all")) and not tracker.seen.any()
    assert same(train(tracker), train(ExampleTracker(N, "all")))
    tracker.load_state_dict(train(ExampleTracker(N, "all"), 1).state_dict())
    tracker.reset()  # what was merged or loaded too
    assert same(train(tracker, 1), train(ExampleTracker(N, "all"), 1))


def test_a_state_goes_through_a_file_as_plain_tensors(tmp_path):
    tracker = train(ExampleTracker(N, "all"), 2)
    torch.save(tracker.state_dict(), tmp_path / "tracker.pt")
    again = ExampleTracker(N, "all")
    again.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
    assert same(again, tracker)
    assert same(train(again, 2, seed=1), train(tracker, 2, seed=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_no_statistic_takes_its_dtype_from_the_default(dtype):
    expected = train(ExampleTracker(N, "all"), 7)
    torch.set_default_dtype(dtype)
    try:
        tracker = train(ExampleTracker(N, "all"), 7)
        read = {name: tracker.statistic(name) for name in STATISTICS}
        hard = {name: tracker.difficulty(name, unseen=0.0) for name in STATISTICS}
        quantile, labels = tracker.random_label_quantile(), tracker.labels()
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(tracker, expected)
    for name in STATISTICS:
        assert read[name].dtype == hard[name].dtype == torch.float32, name
        assert torch.equal(read[name].nan_to_num(-7), expected.statistic(name).nan_to_num(-7)), name
    assert quantile.dtype == torch.float32 and quantile == expected.random_label_quantile()
    for column, other in zip(labels, expected.labels(), strict=True):
        assert column.dtype == other.dtype and torch.equal(column, other)


def test_scores_that_know_their_target_settle_ties_without_it_given():
    logits, target = torch.zeros(2, 3), torch.tensor([0, 2])
    tracker = ExampleTracker(2, "correctness")
    tracker.update(Scores(*difficulty_scores(logits, target), target=target), torch.arange(2))
    assert tracker.statistic("correctness").tolist() == [1, 0]


def test_inside_a_compiled_step_an_update_runs_as_it_is_and_compiles_nothing_anew():
    eager, tracker = ExampleTracker(N, "all"), ExampleTracker(N, "all")

    def step(logits, target, index, kept):
        columns = [logits.logsumexp(1)] * 5
        scores = Scores(*columns, target.to(torch.int32), target=target)
        kept.update(scores, index, target)
        return scores.loss.sum()

    compiled = torch.compile(step, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(12):
            random = torch.Generator().manual_seed(seed)
            logits, index = torch.randn(5, C, generator=random), torch.randperm(N, generator=random)[:5]
            assert compiled(logits, index % C, index, tracker) == step(logits, index % C, index, eager)
            tracker.end_epoch(), eager.end_epoch()
    assert same(tracker, eager)
