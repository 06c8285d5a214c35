"""DifficultySampler in a loop: an iterator keeps its plan and place, whatever is set, looked at or saved meanwhile."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from bonus_ops.policies import DifficultySampler, infobatch


def everyone(difficulty, generator):
    return torch.ones(len(difficulty))


def half(difficulty, generator):
    return infobatch(difficulty, generator=generator)


def loader_of(n, policy=everyone, batch_size=2, workers=0, **options):
    sampler = DifficultySampler(torch.rand(n, generator=torch.Generator().manual_seed(0)), policy)
    return sampler, DataLoader(list(range(n)), batch_size, sampler=sampler, num_workers=workers, **options)


def visits(batches):
    return [int(i) for batch in batches for i in batch]


@pytest.mark.parametrize(("workers", "epoch", "when"), [(0, 0, 1), (0, 0, 6), (0, 1, 3), (0, 5, 6), (1, 5, 3)])
def test_an_epoch_set_while_an_iterator_runs_changes_the_next_one_only(workers, epoch, when):
    sampler, loader = loader_of(40, half, workers=workers)
    twin, other = loader_of(40, half)
    it = iter(loader)
    head = [next(it) for _ in range(when)]
    weight = sampler.weight
    sampler.set_epoch(epoch)
    assert torch.equal(sampler.weight, weight)
    assert visits(head + list(it)) == visits(other)  # of epoch 0, each once
    if epoch:
        twin.set_epoch(epoch)
        assert visits(loader) == visits(other) and sampler.epoch == epoch


LOOKS = {
    "a batch": lambda loader: next(iter(loader)), "two": lambda loader: [next(iter(loader)) for _ in "ab"],
    "the length": lambda loader: len(loader), "the state": lambda loader: loader.sampler.state_dict(),
}  # fmt: skip


@pytest.mark.parametrize(
    ("look", "workers", "when"), [(look, 0, when) for look in LOOKS for when in (0, 1, 3)] + [("two", 1, 3)]
)
def test_a_look_at_the_loader_changes_no_epoch(look, workers, when):
    sampler, loader = loader_of(80, half, workers=workers)
    expected = visits(loader_of(80, half)[1])
    it, head = iter(loader), []
    for _ in range(when):
        head.append(next(it))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LOOKS[look](loader)
    assert visits(head + list(it)) == expected and sampler.epoch == 0
    assert sorted(expected) == sampler.weight.nonzero()[:, 0].tolist()
    assert sampler.state_dict()["position"] == len(expected)


def test_two_iterators_of_an_epoch_visit_the_same_in_step_or_not():
    sampler, _ = loader_of(10)
    one, two = iter(sampler), iter(sampler)
    together = [(next(one), next(two)) for _ in range(10)]
    assert all(a == b for a, b in together) and sorted(a for a, _ in together) == list(range(10))
    assert next(one, None) is next(two, None) is None
    assert list(sampler) != [a for a, _ in together] and sampler.epoch == 1


def test_persistent_workers_visit_each_epoch():
    sampler, loader = loader_of(12, workers=2, persistent_workers=True)
    twin, other = loader_of(12)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        twin.set_epoch(epoch)
        assert visits(loader) == visits(other)
    it = iter(loader)  # stopped in the middle: epoch 3, as 2 was finished
    next(it)
    sampler.set_epoch(7)
    twin.set_epoch(7)
    assert visits(loader) == visits(other) and sampler.epoch == 7


def test_an_epoch_that_is_stopped_and_begun_again_and_again_is_told():
    sampler, loader = loader_of(12)
    with pytest.warns(UserWarning, match=r"epoch 0 begins for the 3. time.*\(2 of 12\).*\s.*set_epoch"):
        for _ in range(3):
            for _ in loader:
                break
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch in range(5):
            sampler.set_epoch(epoch)
            for _ in loader:
                break


@pytest.mark.parametrize("world_size", [1, 3])
def test_its_contract_is_that_of_the_distributed_sampler(world_size):
    data = list(range(14))
    for epoch in (0, 3):
        for rank in range(world_size):
            ours = DifficultySampler(torch.rand(14), everyone, rank=rank, world_size=world_size)
            theirs = DistributedSampler(data, world_size, rank, drop_last=True)
            for sampler in (ours, theirs):
                sampler.set_epoch(epoch)
                assert len(sampler) == 14 // world_size
                running, again = iter(sampler), iter(sampler)
                first = next(running)
                sampler.set_epoch(epoch + 1)
                whole = list(again)
                assert whole == [first, *running] and len(set(whole)) == len(whole) == len(sampler)
                assert list(sampler) != whole
                sampler.set_epoch(epoch)
                assert list(sampler) == whole


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_ints_of_numpy_are_ints(kind):
    plain = DifficultySampler(torch.arange(9.0), half, seed=2, rank=1, world_size=2)
    sampler = DifficultySampler(torch.arange(9.0), half, seed=kind(2), rank=kind(1), world_size=kind(2))
    for one in (plain, sampler):
        one.set_epoch(kind(3))
    assert list(plain) == list(sampler) and repr(plain) == repr(sampler)
    state = sampler.state_dict(position=kind(1))
    assert {type(x) for x in state.values()} == {int, torch.Tensor}
    plain.load_state_dict(state | {"position": kind(1)})
    assert type(plain.state_dict()["position"]) is int
    with pytest.raises(TypeError, match="epoch must be an int, got float"):
        sampler.set_epoch(3.0)
    with pytest.raises(TypeError, match="epoch must be an int, got bool"):
        sampler.set_epoch(True)


@pytest.mark.parametrize(("workers", "trained"), [(0, 0), (0, 1), (2, 5), (0, 16)])
def test_a_run_that_says_what_it_trained_goes_on_there(workers, trained):
    sampler, loader = loader_of(256, batch_size=16, workers=workers)
    sampler.set_epoch(4)
    it = iter(loader)
    head = visits([next(it) for _ in range(trained)])
    state = sampler.state_dict(position=16 * trained)
    whole = head + visits(it)
    assert state["position"] == 16 * trained == len(head)
    again, rest = loader_of(256, batch_size=16, workers=workers)
    again.load_state_dict(state)
    if trained < 16:
        next(iter(rest))  # a look at the first batch
        again.set_epoch(4)
        assert visits(rest) == whole[len(head) :] and len(again) == 256
    following = visits(rest)
    assert again.epoch == 5 and sorted(following) == list(range(256)) and following != whole


def test_what_was_trained_counts_from_the_beginning_of_the_epoch():
    sampler, _ = loader_of(12)
    whole = list(sampler)
    sampler.set_epoch(0)
    it = iter(sampler)
    for _ in range(5):
        next(it)
    again, _ = loader_of(12)
    again.load_state_dict(sampler.state_dict())
    it = iter(again)
    next(it), next(it)
    assert again.state_dict()["position"] == 7
    third, _ = loader_of(12)
    third.load_state_dict(again.state_dict(position=6))
    assert list(third) == whole[6:]


def test_what_was_trained_is_checked():
    sampler, _ = loader_of(12)
    for position, error, match in (
        (13, ValueError, "position must be at most 12, got 13"),
        (-1, ValueError, "position must be at least 0, got -1"),
        (2.0, TypeError, "position must be an int, got float"),
        (True, TypeError, "position must be an int, got bool"),
    ):
        with pytest.raises(error, match=match):
            sampler.state_dict(position=position)


def test_the_plan_of_an_epoch_is_made_once_and_a_later_one_sees_what_is_known_then():
    seen = []
    sampler = DifficultySampler(lambda: seen.append(len(seen)) or torch.full((6,), float(len(seen))), everyone)
    it = iter(sampler)
    next(it)
    sampler.set_epoch(0), sampler.set_epoch(0), len(sampler), sampler.weight, sampler.state_dict()
    next(iter(sampler))
    assert len(seen) == 1
    list(it)
    sampler.set_epoch(0)  # finished: again, with what is known now
    assert len(sampler) == 6 and len(seen) == 2


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_as_a_batch_sampler_it_says_what_it_is(options):
    sampler, _ = loader_of(12)
    with pytest.raises(TypeError, match=r"gives examples, not batches: expected DataLoader\(..., sampler=\)"):
        list(DataLoader(list(range(12)), batch_sampler=sampler, **options))
    assert sorted(DataLoader(list(range(12)), sampler=sampler, batch_size=None)) == list(range(12))  # a row at a time
    batches = torch.utils.data.BatchSampler(sampler, 5, False)
    sampler.set_epoch(0)
    assert sorted(visits(DataLoader(list(range(12)), batch_sampler=batches, **options))) == list(range(12))
