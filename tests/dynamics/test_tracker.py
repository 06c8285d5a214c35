"""ExampleTracker: every field against a plain-Python account of each example's observations, one by one."""

from __future__ import annotations

import copy
import io
import math
import re
import statistics as stats

import numpy as np
import pytest
import torch
from torch import Tensor

from bonus_ops import SCORES, Scores, difficulty_scores
from bonus_ops.dynamics import (
    DEFAULT_FIELDS,
    FIELDS,
    STATISTICS,
    ExampleTracker,
    ExponentiatedGradient,
    LearnedFor,
    Mean,
    RecentLosses,
    label_free_scores,
    random_label_loss,
)

NUM, CLASSES, EPOCHS, STEPS, BATCH = 23, 4, 7, 4, 13
EVERY_FIELD = (*FIELDS, Mean("prob_margin"), Mean("energy"), Mean("max_prob", (2, 3)), LearnedFor(1))


def batches(seed: int = 0):
    """Yield epochs of (scores, index, target, random_label_loss) with duplicates, ignored, padded and unlabelled rows.

    Examples 20 and up never occur, 19 only without a label.
    """
    random = torch.Generator().manual_seed(seed)
    mean = torch.randn(NUM, CLASSES, generator=random) * 2
    for _ in range(EPOCHS):
        epoch = []
        for _ in range(STEPS):
            index = torch.randint(-1, 20, (BATCH,), generator=random)
            logits = (mean[index] + 2 * torch.randn(BATCH, CLASSES, generator=random)).round(decimals=1)
            target = index.clamp(min=0) % CLASSES
            target[torch.rand(BATCH, generator=random) < 0.1] = -100
            scores = difficulty_scores(logits, target)
            randomly = random_label_loss(logits, target, scores, generator=random)
            hidden = (torch.rand(BATCH, generator=random) < 0.15) | (index == 19)
            free = label_free_scores(logits)
            scores = Scores._make(torch.where(hidden, f, s) for f, s in zip(free, scores, strict=True))
            randomly = torch.where(hidden, torch.nan, randomly)
            epoch.append((scores, index, target, randomly))
        yield epoch


def run(tracker: ExampleTracker, epochs) -> ExampleTracker:
    for epoch in epochs:
        for scores, index, target, randomly in epoch:
            tracker.update(scores, index, target, random_label_loss=randomly)
        tracker.end_epoch()
    return tracker


class Account:
    """The observations of one example, in order; statistics by their definitions, in float64."""

    def __init__(self) -> None:
        self.all: list[dict[str, float]] = []

    @property
    def labelled(self) -> list[dict[str, float]]:
        return [each for each in self.all if not math.isnan(each["loss"])]

    def mean(self, score: str, first: int = 1, last: int = 10**6) -> float:
        seen = self.labelled if SCORES[score].needs_label else self.all
        values = [each[score] for each in seen if first <= each["epoch"] <= last]
        return stats.fmean(values) if values else math.nan

    def statistic(self, name: str, most: int) -> float:
        if name == "log_weight":
            return -0.05 * sum(min(each["loss"], 100.0) for each in self.labelled)
        if name == "early_max_prob":
            return self.mean("max_prob", 2, 3)
        if name.startswith(("mean_", "early_")):
            kind, score = name.split("_", 1)
            return self.mean(score, *((6, 6) if kind == "early" else ()))
        return self.of_labels(name, most) if self.labelled else math.nan

    def of_labels(self, name: str, most: int) -> float:
        right = [bool(each["correct"]) for each in self.labelled]
        epochs = [each["epoch"] for each in self.labelled]
        losses = [each["loss"] for each in self.labelled]
        probs = [math.exp(-loss) for loss in losses]
        events = sum(a and not b for a, b in zip(right, right[1:], strict=False))
        if name.startswith("learned_for_"):
            k = int(name.rpartition("_")[2])
            runs = [epochs[i] for i in range(k - 1, len(right)) if all(right[i - k + 1 : i + 1])]
            return min(runs, default=math.inf)
        if name == "loss_change":
            if len(losses) < 5:
                return math.nan
            return stats.fmean(abs(losses[j] - 2 * losses[j - 1] + losses[j - 2]) for j in (-3, -2, -1))
        return {
            "confidence": lambda: stats.fmean(probs),
            "variability": lambda: stats.pstdev(probs),
            "correctness": lambda: stats.fmean(right),
            "forgetting": lambda: events if any(right) else most,
            "forgetting_events": lambda: events,
            "first_learned": lambda: min((e for e, r in zip(epochs, right, strict=True) if r), default=math.inf),
            "learned_forever": lambda: 1 + max((e for e, r in zip(epochs, right, strict=True) if not r), default=0),
            "second_split_forgetting": lambda: 1 + max((e for e, r in zip(epochs, right, strict=True) if r), default=0),
            "recent_loss": lambda: stats.fmean(losses[-2:]) if len(losses) > 1 else math.nan,
        }[name]()


def accounts(epochs) -> list[Account]:
    kept = [Account() for _ in range(NUM)]
    for number, epoch in enumerate(epochs, 1):
        for scores, index, target, _ in epoch:
            correct = scores.correct(target)
            names = [name for name, score in SCORES.items() if score.direction and name != "grad_norm"]
            columns = {name: getattr(scores, name).tolist() for name in names}
            last = {}
            for row, example in enumerate(index.tolist()):
                if example >= 0 and not math.isnan(columns["entropy"][row]):
                    last[example] = row
            for example, row in last.items():
                seen = {name: column[row] for name, column in columns.items()}
                kept[example].all.append(seen | {"correct": bool(correct[row]), "epoch": number})
    return kept


def truth(name: str, kept: list[Account]) -> Tensor:
    most = max(len(each.labelled) for each in kept)
    return torch.tensor([each.statistic(name, most) for each in kept], dtype=torch.float64)


@pytest.fixture(scope="module")
def story() -> list:
    return list(batches())


@pytest.fixture(scope="module")
def kept(story) -> list[Account]:
    return accounts(story)


@pytest.fixture(scope="module")
def tracked(story) -> ExampleTracker:
    return run(ExampleTracker(NUM, EVERY_FIELD), story)


def assert_states_equal(one: ExampleTracker, other: ExampleTracker) -> None:
    a, b = one.state_dict(), other.state_dict()
    columns, others = a.pop("columns"), b.pop("columns")
    assert a == b and columns.keys() == others.keys()
    for name, column in columns.items():
        assert torch.equal(column.nan_to_num(-7), others[name].nan_to_num(-7)), name


def test_the_story_holds_every_kind_of_row(story, kept):
    indices = [index for epoch in story for _, index, _, _ in epoch]
    assert any((index == -1).any() for index in indices)
    assert any(len(index.unique()) < len(index) for index in indices)
    assert any(scores.entropy.isnan().any() for epoch in story for scores, *_ in epoch)
    assert any((scores.margin == 0).any() for epoch in story for scores, *_ in epoch)  # a tie
    assert kept[19].all and not kept[19].labelled and not kept[20].all
    names = ("first_learned", "learned_for_3")
    assert all(math.isinf(truth(name, kept)[:19].max()) for name in names) and truth("forgetting_events", kept)[0] >= 0


NAMES = [s.name for f in EVERY_FIELD for s in (FIELDS[f] if isinstance(f, str) else f).statistics]


@pytest.mark.parametrize("name", NAMES)
def test_statistic_is_its_definition(tracked, kept, name):
    expected, actual = truth(name, kept), tracked.statistic(name)
    assert actual.dtype == torch.float32 and actual.shape == (NUM,)
    # a float32 sum of n terms: n roundings of the largest partial sum; second differences cancel, so absolute too
    n = max(len(each.all) for each in kept)
    torch.testing.assert_close(actual.double(), expected, rtol=n * 2.0**-23, atol=2e-6, equal_nan=True)


def test_every_statistic_tells_examples_apart(kept):
    for name in NAMES:
        values = truth(name, kept)
        assert len(values[~values.isnan()].unique()) > 1, name


def test_counts_are_of_observations(tracked, kept):
    assert tracked.count.tolist() == [len(each.all) for each in kept]
    assert tracked.seen.tolist() == [bool(each.all) for each in kept]
    assert tracked.last_step.max() <= EPOCHS * STEPS == tracked.step and tracked.epoch == EPOCHS + 1


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_random_label_quantile_is_of_the_last_finished_epoch(story, tracked, p):
    def losses(epoch):
        found = []
        for scores, index, _, randomly in epoch:
            last = {e: row for row, e in enumerate(index.tolist()) if e >= 0 and not scores.entropy[row].isnan()}
            found += [randomly[row] for row in last.values() if not randomly[row].isnan()]
        return torch.stack(found).double()

    for epochs, tracker in ((story, tracked), (story[:1], run(ExampleTracker(NUM, "random_label_loss"), story[:1]))):
        expected = losses(epochs[-1])
        actual = tracker.random_label_quantile(p)
        low = expected.quantile(p, interpolation="lower") - 0.003 * (1 + expected.quantile(p))
        high = expected.quantile(p, interpolation="higher") + 0.003 * (1 + expected.quantile(p))
        assert low <= actual <= high
    first = ExampleTracker(NUM, "random_label_loss")
    assert first.random_label_quantile(p).isnan()
    for scores, index, target, randomly in story[0]:
        first.update(scores, index, target, random_label_loss=randomly)
    now = first.random_label_quantile(p)
    first.end_epoch()
    assert now == first.random_label_quantile(p)


def test_random_labels_are_drawn_from_the_other_classes():
    logits = torch.randn(3000, 5, dtype=torch.float64)
    target = torch.randint(5, (3000,))
    target[::7] = -100
    scores = difficulty_scores(logits, target)
    every = logits.logsumexp(1, keepdim=True) - logits
    for exclude in (True, False):
        loss = random_label_loss(logits, target, scores, exclude_target=exclude)
        assert torch.equal(loss.isnan(), target == -100)
        drawn = (every - loss.double()[:, None]).abs().argmin(1)[target >= 0]
        assert (every[target >= 0].gather(1, drawn[:, None])[:, 0] - loss[target >= 0]).abs().max() < 1e-5
        share = (drawn == target[target >= 0]).double().mean()
        assert share == 0 if exclude else abs(share - 0.2) < 0.04
        offset = (drawn - target[target >= 0]) % 5
        counts = offset.bincount(minlength=5)[int(exclude) :]
        assert counts.min() > 0.8 * counts.sum() / len(counts)  # uniform: 4.5 standard deviations


def test_the_order_of_rows_and_batches_within_an_epoch_only_rounds():
    random = torch.Generator().manual_seed(1)
    one, other = (ExampleTracker(NUM, EVERY_FIELD) for _ in range(2))
    for _ in range(6):
        logits = torch.randn(NUM, CLASSES, generator=random) * 3
        target = torch.arange(NUM) % CLASSES
        scores = difficulty_scores(logits, target)
        for tracker in (one, other):
            order = torch.arange(NUM) if tracker is one else torch.randperm(NUM, generator=random)
            for rows in order.split(5):
                tracker.update(Scores._make(column[rows] for column in scores), rows, target[rows])
            tracker.end_epoch()
    for name in NAMES:
        torch.testing.assert_close(one.statistic(name), other.statistic(name), rtol=0, atol=0, equal_nan=True)


def test_any_shape_and_integer_dtype_of_the_batch(story):
    flat, shaped = (ExampleTracker(NUM, EVERY_FIELD) for _ in range(2))
    for scores, index, target, _ in story[0]:
        flat.update(scores, index, target)
        shaped.update(Scores._make(c[None, :, None] for c in scores), index.int()[None, :, None], target[None, :, None])
    assert_states_equal(flat, shaped)


def test_ties_are_wrong_without_the_target():
    scores = difficulty_scores(torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 0]))
    with_target, without = (ExampleTracker(2, "correctness") for _ in range(2))
    with_target.update(scores, torch.tensor([0, 1]), torch.tensor([0, 0]))
    without.update(Scores(*scores), torch.tensor([0, 1]))
    assert with_target.statistic("correctness").tolist() == [1, 1]
    assert without.statistic("correctness").tolist() == [0, 1]


def test_a_last_row_that_is_ignored_leaves_the_duplicate_before_it():
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0], [9.0, 0.0]])
    target = torch.tensor([0, 0, -100])
    tracker = ExampleTracker(1, ("mean_margin",))
    tracker.update(difficulty_scores(logits, target), torch.tensor([0, 0, 0]), target)
    assert tracker.statistic("mean_margin").tolist() == [-3] and tracker.count.tolist() == [1]


def test_infinite_losses_leave_a_defined_state():
    logits = torch.tensor([[-math.inf, 0.0, 1.0]])
    tracker = ExampleTracker(1, EVERY_FIELD)
    for _ in range(6):
        tracker.update(difficulty_scores(logits, torch.tensor([0])), torch.tensor([0]), torch.tensor([0]))
        tracker.end_epoch()
    assert tracker.statistic("mean_loss") == math.inf and tracker.statistic("mean_margin") == -math.inf
    assert tracker.statistic("loss_change") == math.inf and tracker.statistic("recent_loss") == math.inf
    assert tracker.statistic("log_weight") == -0.05 * 100 * 6
    assert tracker.statistic("confidence") == 0 == tracker.statistic("variability")


def test_variability_of_a_well_learned_example_is_relative():
    # a sum of squares in float32 would give 0 or 3e-4: the probabilities differ in their sixth digit
    tracker = ExampleTracker(1, "confidence")
    gaps = torch.linspace(11.0, 13.0, 50)
    for gap in gaps:
        scores = difficulty_scores(torch.stack([gap, torch.tensor(0.0)])[None], torch.tensor([0]))
        tracker.update(scores, torch.tensor([0]))
    probs = torch.exp(-torch.nn.functional.softplus(-gaps.double())).float().double()
    torch.testing.assert_close(tracker.statistic("variability")[0].double(), probs.std(correction=0), rtol=0.05, atol=0)


def test_the_early_window_is_frozen_after_it(story):
    tracker = ExampleTracker(NUM, (Mean("el2n", (2, 3)), "mean_el2n"))
    run(tracker, story[:1])
    assert tracker.statistic("early_el2n").isnan().all()
    run(tracker, story[1:3])
    frozen = tracker.statistic("early_el2n")
    assert not frozen[:19].isnan().all()
    run(tracker, story[3:])
    assert torch.equal(tracker.statistic("early_el2n").nan_to_num(-1), frozen.nan_to_num(-1))


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_resuming_equals_going_on(story, tracked, cut):
    first = run(ExampleTracker(NUM, EVERY_FIELD), story[:cut])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ExampleTracker(NUM, EVERY_FIELD)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, story[cut:])
    assert_states_equal(second, tracked)


def test_a_state_goes_to_another_device_whole(story, tracked):
    first = run(ExampleTracker(NUM, EVERY_FIELD), story[:3])
    second = ExampleTracker(NUM, EVERY_FIELD)
    second.load_state_dict(first.state_dict())
    for tracker in (first, second):  # as it began, and with a copy at the last merge
        moved = tracker.to("meta")
        assert moved is tracker and moved.device.type == "meta"
        assert all(t.device.type == "meta" for t in (*moved._state.values(), *(moved._base or {}).values()))
    assert_states_equal(run(ExampleTracker(NUM, EVERY_FIELD), story).to("cpu"), tracked)


def test_the_order_of_the_fields_is_free(story, tracked):
    other = ExampleTracker(NUM, EVERY_FIELD[::-1])
    other.load_state_dict(tracked.state_dict())
    for name in tracked.statistics:
        assert torch.equal(other.statistic(name).nan_to_num(-7), tracked.statistic(name).nan_to_num(-7))


def test_a_saved_state_is_a_copy(story):
    tracker = run(ExampleTracker(NUM, EVERY_FIELD), story[:2])
    state = tracker.state_dict()
    saved = copy.deepcopy(state)
    run(tracker, story[2:])
    assert all(
        torch.equal(column.nan_to_num(-7), saved["columns"][name].nan_to_num(-7))
        for name, column in state["columns"].items()
    )


def test_arguments_are_not_written(story):
    scores, index, target, randomly = story[0][0]
    before = [t.clone() for t in (*scores, index, target, randomly)]
    ExampleTracker(NUM, EVERY_FIELD).update(scores, index, target, random_label_loss=randomly)
    for old, new in zip(before, (*scores, index, target, randomly), strict=True):
        assert torch.equal(old.nan_to_num(-7), new.nan_to_num(-7))


def bytes_an_example(columns):
    return sum(column.dtype.itemsize for column in columns if column.length is None)


@pytest.mark.parametrize("name", FIELDS)
def test_memory_is_what_the_field_states(name):
    stated = re.search(r"Memory: ([^.]*)\.", type(FIELDS[name]).__doc__)[1]
    assert str(bytes_an_example(FIELDS[name].columns) or "none") in re.findall(r"\d+|none", stated)


def test_memory_is_what_is_documented():
    assert bytes_an_example(ExampleTracker(1, ())._columns) == 12
    assert set(ExampleTracker(1).fields) == {FIELDS[name] for name in DEFAULT_FIELDS}


def test_every_statistic_says_what_it_is():
    for name, statistic in STATISTICS.items():
        assert statistic.name == name and statistic.direction in (-1, 1)
        assert all((statistic.formula, statistic.unit, statistic.range, statistic.paper))


def test_difficulty_is_higher_for_the_harder_example():
    tracker = ExampleTracker(2, "all")
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.2, 0.0, 0.3]])
    for epoch in range(8):
        # example 0 is right at once and for good; 1 is wrong, wavers, and is right only in epochs 4 and 5
        now = logits + torch.tensor([[0.0, 0, 0], [1.0 if epoch in (3, 4) else 0.05 * (epoch % 2), 0, 0]])
        tracker.update(difficulty_scores(now, torch.tensor([0, 0])), torch.tensor([0, 1]))
        tracker.end_epoch()
    for name in tracker.statistics:
        easy, hard = tracker.difficulty(name).tolist()
        assert hard > easy, name


def test_nothing_waits_for_the_device(story):
    """On the device path nothing reads a value: on meta tensors, which have none, any such read would raise."""
    tracker = ExampleTracker(NUM, EVERY_FIELD, device="meta")
    scores, index, target, randomly = story[0][0]
    scores = Scores._make(column.to("meta") for column in scores)
    tracker.update(scores, index.to("meta"), target.to("meta"), random_label_loss=randomly.to("meta"))
    tracker.end_epoch()
    for name in tracker.statistics:
        assert tracker.statistic(name).shape == (NUM,)
    assert tracker.random_label_quantile(0.1).shape == ()


def test_on_a_gpu_the_update_is_the_same_and_never_waits(story, device, tracked):
    if device != "cuda":
        pytest.skip("no GPU was found")
    tracker = ExampleTracker(NUM, EVERY_FIELD, device=device)
    for epoch in story:
        moved = [
            (
                Scores._make(column.to(device) for column in scores),
                index.to(device),
                target.to(device),
                randomly.to(device),
            )
            for scores, index, target, randomly in epoch
        ]
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(tracker, [moved])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name in tracked.statistics:
        torch.testing.assert_close(tracker.statistic(name).cpu(), tracked.statistic(name), equal_nan=True)


def test_off_a_cpu_rows_out_of_range_are_skipped(story):
    """The range is only checked where that costs no wait; the same rows without the check are skipped."""
    tracker, clean = (ExampleTracker(NUM, EVERY_FIELD) for _ in range(2))
    scores, index, target, randomly = story[0][0]
    broken = torch.where(index == 5, NUM + 10**6, torch.where(index == 6, -12, index))
    tracker._check_range = lambda index: None  # as on a GPU
    tracker.update(scores, broken, target, random_label_loss=randomly)
    clean.update(scores, torch.where((index == 5) | (index == 6), -1, index), target, random_label_loss=randomly)
    assert_states_equal(tracker, clean)


GOOD = difficulty_scores(torch.randn(3, 4), torch.tensor([0, 1, 2]))
INDEX = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((GOOD, torch.tensor([0, 1, NUM])), IndexError, rf"expected -1 \(skipped\) or 0 .. {NUM - 1}, got {NUM}"),
        ((GOOD, torch.tensor([0, -2, 1])), IndexError, "got -2"),
        ((GOOD, INDEX[:2]), RuntimeError, r"scores.loss: expected the shape of index \[2\], got \[3\]"),
        ((GOOD, INDEX, INDEX[:2]), RuntimeError, "target: expected the shape of index"),
        ((GOOD, INDEX.float()), RuntimeError, "index: expected an integer dtype, got torch.float32"),
        ((GOOD, INDEX > 0), RuntimeError, "index: expected an integer dtype, got torch.bool"),
        ((GOOD, INDEX, INDEX.float()), RuntimeError, "target: expected an integer dtype"),
        ((GOOD, [0, 1, 2]), TypeError, "index: expected a tensor, got list"),
        ((GOOD, INDEX, [0, 1, 2]), TypeError, "target: expected a tensor, got list"),
        ((tuple(GOOD), INDEX), TypeError, "scores: expected Scores, got tuple"),
        ((GOOD._replace(loss=[1.0]), INDEX), TypeError, "scores.loss: expected a tensor"),
        ((GOOD._replace(loss=INDEX), INDEX), RuntimeError, "scores.loss: expected a floating-point dtype"),
        ((GOOD._replace(el2n=GOOD.el2n[:1]), INDEX), RuntimeError, "scores.el2n: expected the shape"),
        ((GOOD._replace(energy=GOOD.energy.to("meta")), INDEX), RuntimeError, "scores.energy: expected to be on"),
    ],
)
def test_bad_batches_raise_and_leave_the_state(story, arguments, error, message):
    tracker = run(ExampleTracker(NUM, EVERY_FIELD), story[:1])
    same = run(ExampleTracker(NUM, EVERY_FIELD), story[:1])
    with pytest.raises(error, match=message):
        tracker.update(*arguments)
    assert_states_equal(tracker, same)
    run(tracker, story[1:2])
    assert_states_equal(tracker, run(same, story[1:2]))  # the workspace is untouched too


def test_the_quantile_is_a_number():
    with pytest.raises(TypeError, match="p must be a number, got str"):
        ExampleTracker(NUM).random_label_quantile("0.1")


def test_empty_batches_count_as_steps_only():
    tracker = ExampleTracker(3, EVERY_FIELD)
    empty = difficulty_scores(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    tracker.update(empty, torch.empty(0, dtype=torch.int64))
    assert tracker.count.tolist() == [0, 0, 0] and tracker.step == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_examples": NUM + 1}, ValueError, f"expected num_examples {NUM}, got {NUM + 1}"),
        ({"version": 99}, ValueError, "expected version 1, got 99"),
        ({"fields": ["Mean(score='loss', epochs=None)"]}, ValueError, "expected fields"),
        ({"epoch": "3"}, ValueError, "expected a whole epoch"),
        ({"epoch": True}, ValueError, "expected a whole epoch"),
        ({"epoch": 40000}, ValueError, r"expected a whole epoch in \[1, 32766\] and step >= 0, got 40000"),
        ({"columns": {}}, ValueError, "expected columns count, "),
        ({"columns": None}, ValueError, "expected columns count, "),
    ],
)
def test_states_that_do_not_fit_are_refused_and_leave_the_state(story, change, error, message):
    tracker, same = (run(ExampleTracker(NUM, EVERY_FIELD), story[:1]) for _ in range(2))
    state = run(ExampleTracker(NUM, EVERY_FIELD), story[:3]).state_dict()
    with pytest.raises(error, match=message):
        tracker.load_state_dict(state | change)
    for name, wrong in (("last_step", torch.zeros(NUM - 1)), ("log_weight", torch.zeros(NUM).double()), ("count", [])):
        with pytest.raises(ValueError, match=f"expected {name}"):
            tracker.load_state_dict(state | {"columns": state["columns"] | {name: wrong}})
    with pytest.raises(TypeError, match="expected a dict"):
        tracker.load_state_dict([state])
    assert_states_equal(tracker, same)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ExampleTracker(0), ValueError, "num_examples must be at least 1, got 0"),
        (lambda: ExampleTracker(2.0), TypeError, "num_examples must be an int, got float"),
        (lambda: ExampleTracker(2, ("mean_los",)), ValueError, "got 'mean_los'"),
        (lambda: ExampleTracker(2, "everything"), ValueError, "expected 'all' or names out of mean_loss"),
        (lambda: ExampleTracker(2, (3,)), TypeError, "expected names or Field objects, got int"),
        (lambda: ExampleTracker(2, ("mean_el2n", Mean("el2n"))), ValueError, "each may be given once"),
        (lambda: ExampleTracker(2).statistic("confidence"), ValueError, "expected one of mean_loss.*got 'confidence'"),
        (lambda: ExampleTracker(2).difficulty("x"), ValueError, "got 'x'"),
        (lambda: ExampleTracker(2).random_label_quantile(), ValueError, "'random_label_loss' is not kept"),
        (lambda: ExampleTracker(2, "all").random_label_quantile(1.0), ValueError, r"p must be in \(0, 1\), got 1.0"),
        (lambda: Mean("grad_norm"), ValueError, "got 'grad_norm'"),
        (lambda: Mean("runner_up"), ValueError, "got 'runner_up'"),
        (lambda: Mean("loss", (0, 3)), ValueError, "each of epochs must be at least 1, got 0"),
        (lambda: Mean("loss", (4, 3)), ValueError, r"got \(4, 3\)"),
        (lambda: LearnedFor(0), ValueError, "k must be at least 1, got 0"),
        (lambda: RecentLosses(6), ValueError, "window must be in 1 .. 5, got 6"),
        (lambda: ExampleTracker(2, None), TypeError, "expected 'all' or names and Field objects, got NoneType"),
        (lambda: Mean("loss", 3), TypeError, r"epochs must be \(first, last\) or None, got int"),
        (lambda: Mean("loss", (1.5, 2)), TypeError, "each of epochs must be an int, got float"),
        (lambda: LearnedFor(2.5), TypeError, "k must be an int, got float"),
        (lambda: RecentLosses(2.5), TypeError, "window must be an int, got float"),
        (lambda: RecentLosses(True), TypeError, "window must be an int, got bool"),
        (lambda: ExponentiatedGradient("0.1"), TypeError, "eta must be a number, got str"),
        (lambda: ExponentiatedGradient(max_loss=None), TypeError, "max_loss must be a number, got NoneType"),
        (lambda: label_free_scores([1.0]), TypeError, "logits must be a Tensor, got list"),
        (lambda: label_free_scores(torch.tensor(1.0)), RuntimeError, r"logits must have shape .* got \[\]"),
        (lambda: random_label_loss([1.0], INDEX, GOOD), TypeError, "logits must be Tensor, got list"),
        (lambda: random_label_loss(torch.zeros(3, 4), [0], GOOD), TypeError, "target must be Tensor, got list"),
        (lambda: random_label_loss(torch.zeros(3, 4), INDEX, tuple(GOOD)), TypeError, "scores must be Scores, got"),
        (lambda: random_label_loss(torch.zeros(3, 4), INDEX / 1, GOOD), RuntimeError, "class indices, got torch.float"),
        (lambda: ExponentiatedGradient(eta=0), ValueError, "eta must be in .0, inf., got 0"),
        (lambda: ExponentiatedGradient(max_loss=math.inf), ValueError, "max_loss must be in .0, inf., got inf"),
        (lambda: random_label_loss(torch.zeros(2, 1), INDEX[:2] * 0, GOOD), RuntimeError, "expected logits"),
        (
            lambda: random_label_loss(torch.zeros(3, 1), INDEX * 0, GOOD),
            ValueError,
            "a single class leaves no other label",
        ),
    ],
)
def test_bad_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_size_may_be_an_int_of_numpy():
    tracker = ExampleTracker(np.int64(3))
    assert type(tracker.state_dict()["num_examples"]) is int and len(tracker.count) == 3


def test_label_free_scores_of_one_row():
    row = torch.tensor([1.0, 3.0, 0.0])
    scores, rows = label_free_scores(row), label_free_scores(row[None])
    assert scores.entropy.shape == () and scores.entropy == rows.entropy[0] and scores.loss.isnan()


def test_epochs_are_counted_as_far_as_they_are_stored():
    tracker = ExampleTracker(1, "first_learned")
    tracker.epoch = 32766
    with pytest.raises(OverflowError, match="32766"):
        tracker.end_epoch()
