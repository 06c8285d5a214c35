"""ExampleTracker over several processes (gloo): the merged state is that of one process which saw every row."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import distributed

from bonus_ops import Scores, difficulty_scores
from bonus_ops.dynamics import FIELDS, ExampleTracker, LearnedFor, Mean, random_label_loss

NUM, CLASSES, EPOCHS, STEPS, BATCH = 41, 4, 6, 3, 4  # rows of a rank: EPOCHS x STEPS x BATCH
WORLD = 4
EVERY_FIELD = (*FIELDS, Mean("energy", (2, 4)), LearnedFor(1))
TIMEOUT_S = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()), reason="torch is built without gloo"
    ),
]


def steps(epoch: int, world: int, rank: int):
    """Yield a rank's batches of an epoch: a shuffle that gives each example to one rank, another one each epoch."""
    random = torch.Generator().manual_seed(epoch)
    mean = 2 * torch.randn(NUM, CLASSES, generator=torch.Generator().manual_seed(99))
    order = torch.full((STEPS * BATCH * world,), -1)  # what is left over is padded
    seen = torch.randperm(NUM, generator=random)[: len(order)]
    order[: len(seen)] = seen
    logits = mean[order] + 2 * torch.randn(len(order), CLASSES, generator=random)
    target = order.clamp(min=0) % CLASSES
    target[torch.rand(len(order), generator=random) < 0.1] = -100
    scores = difficulty_scores(logits, target)
    randomly = random_label_loss(logits, target, scores, generator=random)
    for step in range(STEPS):
        rows = (step * world + torch.arange(world) if rank < 0 else torch.tensor([step * world + rank])) * BATCH
        rows = (rows[:, None] + torch.arange(BATCH)).flatten()
        yield Scores._make(column[rows] for column in scores), order[rows], target[rows], randomly[rows]


def run(tracker: ExampleTracker, epochs, world: int, rank: int = -1, **options) -> ExampleTracker:
    """Train on a rank's rows, or on those of all ranks together for rank -1."""
    for epoch in epochs:
        for scores, index, target, randomly in steps(epoch, world, rank):
            tracker.update(scores, index, target, random_label_loss=randomly, **options)
        if rank >= 0 and not options:
            tracker.merge()
        tracker.end_epoch()
    return tracker


def assert_same(tracker: ExampleTracker, expected: ExampleTracker, what: str) -> None:
    ours, theirs = tracker.state_dict(), expected.state_dict()
    columns, others = ours.pop("columns"), theirs.pop("columns")
    assert ours == theirs, what
    for name, column in columns.items():
        # a summed float32 is rounded once more a merge; all else is exact
        exact = not column.is_floating_point() or name.startswith("loss_")
        rtol, atol = (0.0, 0.0) if exact else (EPOCHS * 2.0**-23, EPOCHS * 2.0**-23)
        torch.testing.assert_close(
            column, others[name], rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{what}, {n}: {m}"
        )


def check_epoch_merge(world: int, rank: int) -> None:
    expected = run(ExampleTracker(NUM, EVERY_FIELD), range(EPOCHS), world)
    tracker = run(ExampleTracker(NUM, EVERY_FIELD), range(EPOCHS), world, rank)
    assert_same(tracker, expected, "merged each epoch")
    tracker.merge()
    tracker.merge()
    assert_same(tracker, expected, "merging again counts nothing twice")


def check_merge_each_step(world: int, rank: int) -> None:
    tracker, expected = ExampleTracker(NUM, EVERY_FIELD), run(ExampleTracker(NUM, EVERY_FIELD), range(2), world)
    for epoch in range(2):
        for scores, index, target, randomly in steps(epoch, world, rank):
            tracker.update(scores, index, target, random_label_loss=randomly)
            tracker.merge()
        tracker.end_epoch()
    assert_same(tracker, expected, "merged each step")


def check_merge_after_the_epoch_ends(world: int, rank: int) -> None:
    tracker, expected = ExampleTracker(NUM, EVERY_FIELD), run(ExampleTracker(NUM, EVERY_FIELD), range(2), world)
    for epoch in range(2):
        for scores, index, target, randomly in steps(epoch, world, rank):
            tracker.update(scores, index, target, random_label_loss=randomly)
        tracker.end_epoch()
        tracker.merge()
    assert_same(tracker, expected, "merged after end_epoch")


def check_gathered_rows(world: int, rank: int) -> None:
    group = distributed.group.WORLD
    expected = run(ExampleTracker(NUM, EVERY_FIELD), range(EPOCHS), world)
    tracker = run(ExampleTracker(NUM, EVERY_FIELD), range(3), world, rank, group=group)
    scores, index, target, _ = next(steps(0, world, rank))
    with pytest.raises(RuntimeError, match=r"merge\(\) first"):
        tracker.update(scores, index, target)
    tracker.merge()  # nothing to add, and from here on rows may be one's own again
    run(tracker, range(3, EPOCHS), world, rank)
    assert_same(tracker, expected, "gathered, then merged")


def check_resume(world: int, rank: int) -> None:
    """From all processes to all, and from one to all: a loaded state is not added up."""
    expected = run(ExampleTracker(NUM, EVERY_FIELD), range(EPOCHS), world)
    for first in (run(ExampleTracker(NUM, EVERY_FIELD), range(3), world, rank), None):
        if first is None:
            first = ExampleTracker(NUM, EVERY_FIELD)
            for epoch in range(3):
                for scores, index, target, randomly in steps(epoch, world, -1):
                    first.update(scores, index, target, random_label_loss=randomly)
                first.end_epoch()
        second = ExampleTracker(NUM, EVERY_FIELD)
        second.load_state_dict(first.state_dict())
        assert_same(run(second, range(3, EPOCHS), world, rank), expected, "resumed")


def check_conflicts(world: int, rank: int) -> None:
    """An example several processes observed: sums add up, and the latest step, then the highest rank, has the rest."""
    tracker = ExampleTracker(2, ("recent_losses", "mean_loss", "learned_for_3"))
    gap = torch.tensor([float(rank)])
    scores = difficulty_scores(torch.stack([gap, torch.zeros(1)], 1), torch.tensor([0]))
    for _ in range(2 if rank == 0 else 0):  # so its row below is observed later than the others'
        tracker.update(scores, torch.tensor([-1]))
    tracker.update(scores, torch.tensor([0]))
    if rank > 0:
        tracker.update(scores, torch.tensor([1]))
    tracker.merge()
    losses = torch.nn.functional.softplus(-torch.arange(world, dtype=torch.float32))
    last = tracker.state_dict()["columns"]["loss_1"]
    torch.testing.assert_close(last, torch.stack([losses[0], losses[-1]]))
    torch.testing.assert_close(tracker.statistic("mean_loss"), torch.stack([losses.mean(), losses[1:].mean()]))
    assert tracker.count.tolist() == [world, world - 1] and tracker.step == 3


def check_infinite_sums(world: int, rank: int) -> None:
    tracker = ExampleTracker(1, ("mean_loss", "mean_margin"))
    scores = difficulty_scores(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0]))
    for _ in range(2):
        tracker.update(scores, torch.tensor([0 if rank == 0 else -1]))
        tracker.merge()
    assert tracker.statistic("mean_loss") == torch.inf and tracker.statistic("mean_margin") == -torch.inf


def check_disagreement(world: int, rank: int) -> None:
    """Every process raises, so none waits for the others, and keeps its state."""
    for tracker, match in (
        (ExampleTracker(5 + rank), "the processes differ in num_examples: 5, 6"),
        (ExampleTracker(5, ("mean_loss",) if rank else ("mean_el2n",)), "differ in fields"),
        (ExampleTracker(5), "differ in epoch"),
    ):
        if match == "differ in epoch" and rank == 0:
            tracker.end_epoch()
        with pytest.raises(RuntimeError, match=match):
            tracker.merge()


CHECKS = (
    check_epoch_merge, check_merge_each_step, check_merge_after_the_epoch_ends, check_gathered_rows, check_resume,
    check_conflicts, check_infinite_sums, check_disagreement,
)  # fmt: skip


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder) / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for check in CHECKS:
        result = "passed"
        try:
            check(world, rank)
        except Exception:
            result = traceback.format_exc()
        (Path(folder) / f"{check.__name__}-{rank}").write_text(result)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[str]]:
    """Run every check on every rank; a server that has imported torch once forks the ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # which the first reduction imports
    folder = tmp_path_factory.mktemp("ranks")
    processes = [context.Process(target=worker, args=(rank, WORLD, str(folder)), daemon=True) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
        process.kill()
    return {
        check.__name__: [
            path.read_text() if (path := folder / f"{check.__name__}-{rank}").exists() else "no result"
            for rank in range(WORLD)
        ]
        for check in CHECKS
    }


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_merged_state_is_that_of_one_process(results, check):
    assert all(result == "passed" for result in results[check]), "\n".join(results[check])


def test_without_processes_there_is_nothing_to_merge():
    assert not distributed.is_initialized() and "RANK" not in os.environ
    tracker = run(ExampleTracker(NUM, EVERY_FIELD), range(2), 2, 0)
    expected = tracker.count
    tracker.merge()
    assert expected.sum() > 0 and torch.equal(tracker.count, expected)
