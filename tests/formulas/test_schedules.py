"""Schedules: the paper's factors, the loss of every epoch, the epoch in a checkpoint, nothing compiled again."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bonus_ops import (
    BonusBCEWithLogitsLoss,
    BonusCrossEntropyLoss,
    Cosine,
    Deferred,
    Exponential,
    Focal,
    Linear,
    LogBonus,
    PowerBonus,
    Scheduled,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
)
from bonus_ops.ops import room

LOGITS = torch.linspace(-8, 12, 12).view(4, 3)[:, [2, 0, 1]].contiguous()
TARGET = torch.tensor([0, -100, 0, 1])

over_criterions = pytest.mark.parametrize("criterion", [BonusCrossEntropyLoss, BonusBCEWithLogitsLoss])


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(4), [0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        (Cosine(4), [0, (1 - math.sqrt(0.5)) / 2, 1 / 2, (1 + math.sqrt(0.5)) / 2, 1, 1, 1]),
        (Exponential(4), [math.exp(-5), math.exp(-15 / 4), math.exp(-5 / 2), math.exp(-5 / 4), 1, 1, 1]),
        (Exponential(2, k=-3.0), [0, 1 - math.exp(-1.5), 1 - math.exp(-3), 1 - math.exp(-3)]),
        (Deferred(2), [0, 0, 0, 1, 1]),
        (Deferred(0), [0, 1, 1]),
        (Deferred(1, then=Linear(4)), [0, 0, 1 / 2, 3 / 4, 1, 1]),
    ],
    ids=repr,
)
def test_factors_are_those_of_the_paper(schedule, expected):
    assert [schedule(epoch) for epoch in range(len(expected))] == pytest.approx(expected, rel=1e-14, abs=0)
    assert eval(repr(schedule)) == schedule == pickle.loads(pickle.dumps(schedule))


def test_a_factor_stays_within_its_ends():
    for schedule in (Linear(7), Cosine(7), Exponential(7), Exponential(7, -5.0), Deferred(3, Cosine(7))):
        factors = [schedule(epoch) for epoch in range(20)]
        assert factors == sorted(factors) and factors[0] >= 0 and factors[-1] <= 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(0), ValueError, "Linear: epochs must be at least 1, got 0"),
        (lambda: Cosine(-3), ValueError, "Cosine: epochs must be at least 1, got -3"),
        (lambda: Linear(1.5), TypeError, "Linear: epochs must be an int, got float"),
        (lambda: Linear(True), TypeError, "Linear: epochs must be an int, got bool"),
        (lambda: Exponential(5, k=0), ValueError, "Exponential: k must not be 0, got 0"),
        (lambda: Exponential(5, k=math.nan), ValueError, "Exponential: k must be in .-inf, inf., got nan"),
        (lambda: Exponential(5, k="5"), TypeError, "Exponential: k must be a number, got str"),
        (lambda: Deferred(-1), ValueError, "Deferred: until must be at least 0, got -1"),
        (lambda: Deferred(1, then=0.5), TypeError, "Deferred: then must be a schedule or None, got float"),
        (lambda: Scheduled(LogBonus()), ValueError, "expected a schedule of a field"),
        (lambda: Scheduled(None, strength=Linear(2)), TypeError, "loss must be a GapLoss .* got NoneType"),
        (lambda: Scheduled(LogBonus, strength=Linear(2)), TypeError, "loss must be a GapLoss .* got type"),
        (
            lambda: Scheduled(Scheduled(LogBonus(), strength=Linear(2)), log_end=Linear(2)),
            TypeError,
            "loss must be a GapLoss .* got Scheduled",
        ),
        (lambda: Scheduled(Focal(), strength=Linear(2)), ValueError, "Focal has no number 'strength' .* of gamma"),
        (lambda: Scheduled(LogBonus(1.0, clamp=None), clamp=Linear(2)), ValueError, "has no number 'clamp'"),
        (lambda: Scheduled(LogBonus(), strength=0.5), TypeError, "strength must be a schedule, got float"),
        (
            lambda: Scheduled(PowerBonus(), gamma=Linear(2)),
            ValueError,
            "PowerBonus: gamma must be in .0, inf., got 0.0",
        ),
        (
            lambda: Scheduled(LogBonus(), strength=lambda t: "1"),
            TypeError,
            "what the schedule of strength returns at epoch 0 must be a number, got str",
        ),
        (
            lambda: Scheduled(LogBonus(), strength=lambda t: None),
            TypeError,
            "at epoch 0 must be a number, got NoneType",
        ),
        (
            lambda: Scheduled(LogBonus(), strength=lambda t: math.nan),
            ValueError,
            "the schedule of strength returns at epoch 0 must be in .-inf, inf., got nan",
        ),
    ],
)
def test_bad_arguments_raise(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("epoch", "error", "message"),
    [
        (-1, ValueError, "epoch must be at least 0, got -1"),
        (1.5, TypeError, "epoch must be an int, got float"),
        (None, TypeError, "epoch must be an int, got NoneType"),
        (True, TypeError, "epoch must be an int, got bool"),
        (7, ValueError, r"LogBonus: log_end must be in \[0, 1\], got 5.25"),
    ],
)
def test_a_bad_epoch_raises_and_changes_nothing(epoch, error, message):
    bonus = Scheduled(LogBonus(0.75), log_end=lambda t: 7.0 if t == 7 else 0.5)
    bonus.set_epoch(3)
    with pytest.raises(error, match=message):
        bonus.set_epoch(epoch)
    assert bonus.epoch == 3 and bonus.current == LogBonus(0.375)


# --- the loss of an epoch ---------------------------------------------------------------------------------------------


CASES = {
    "strength": lambda: (Scheduled(LogBonus(0.75, strength=2.0), strength=Cosine(4)), "strength"),
    "log_end": lambda: (Scheduled(LogBonus(1.0), log_end=Linear(4)), "log_end"),
    "gamma": lambda: (Scheduled(Focal(2.0), gamma=Exponential(4)), "gamma"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("implementation", "reduction"), [("numba", "mean"), ("numba", "none"), ("triton", "none"), ("reference", "mean")]
)
def test_every_epoch_has_its_loss(case, implementation, reduction, request):
    place = request.getfixturevalue("kernel_device") if implementation == "triton" else "cpu"
    bonus, field = CASES[case]()
    criterion = BonusCrossEntropyLoss(bonus=bonus, reduction=reduction, implementation=implementation)
    logits, target = LOGITS.to(place).requires_grad_(), TARGET.to(place)
    for epoch in range(6 if implementation != "triton" else 2):
        assert bonus.epoch == epoch
        factor = bonus.schedules[field](epoch)
        same = type(bonus.loss)(**{**vars(bonus.loss), field: getattr(bonus.loss, field) * factor})
        assert bonus.current == same and bonus.parameters() == same.parameters()
        expected = bonus_cross_entropy(logits, target, bonus=same, reduction=reduction, implementation=implementation)
        actual = criterion(logits, target)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (actual, expected)]
        assert torch.equal(*grads)
        bonus.step()


def test_other_targets_follow_the_schedule_too():
    bonus = Scheduled(LogBonus(0.75), strength=Linear(2))
    bonus.step()
    for options in ({"label_smoothing": 0.1}, {"weight": torch.ones(3)}):
        actual = bonus_cross_entropy(LOGITS, TARGET, bonus=bonus, **options)
        assert torch.equal(actual, bonus_cross_entropy(LOGITS, TARGET, bonus=LogBonus(0.75, strength=0.5), **options))
    _, scores = bonus_cross_entropy_with_scores(LOGITS, TARGET, bonus=bonus)
    assert torch.equal(scores.grad_norm(bonus).nan_to_num(), scores.grad_norm(bonus.current).nan_to_num())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_step_before_backward_does_not_reach_it(reduction, create_graph):
    bonus = Scheduled(LogBonus(0.75), strength=Linear(2))
    logits = LOGITS.double().requires_grad_()
    loss = bonus_cross_entropy(logits, TARGET, bonus=bonus, reduction=reduction).sum()
    bonus.set_epoch(2)
    truth = bonus_cross_entropy(logits, TARGET, bonus=LogBonus(0.75, strength=0.0), reduction=reduction).sum()
    for retain in (True, False):  # the second time the gradient is made anew
        grads = [
            torch.autograd.grad(x, logits, create_graph=create_graph, retain_graph=retain)[0] for x in (loss, truth)
        ]
        torch.testing.assert_close(*grads)


# --- state ------------------------------------------------------------------------------------------------------------


@over_criterions
def test_the_epoch_is_in_the_state_dict(criterion):
    def make():
        return torch.nn.Sequential(criterion(bonus=Scheduled(LogBonus(), strength=Linear(9))))

    model = make()
    model[0].bonus.set_epoch(4)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert state == {"0.bonus.epoch": 4}

    resumed = make()
    assert str(resumed.load_state_dict(state)) == "<All keys matched successfully>"
    assert resumed[0].bonus.epoch == 4
    target = torch.tensor([0, 2, 0, 1]) if criterion is BonusCrossEntropyLoss else LOGITS.sign().clamp(min=0)
    assert torch.equal(resumed[0](LOGITS, target), model[0](LOGITS, target))
    assert not torch.equal(resumed[0](LOGITS, target), make()[0](LOGITS, target))


@over_criterions
def test_checkpoints_from_before_and_after_a_schedule_load(criterion):
    scheduled = torch.nn.Sequential(criterion(torch.ones(3), bonus=Scheduled(LogBonus(), strength=Linear(9))))
    bare = torch.nn.Sequential(criterion(torch.ones(3)))
    scheduled[0].bonus.set_epoch(4)
    assert str(scheduled.load_state_dict(bare.state_dict())) == "<All keys matched successfully>"
    assert scheduled[0].bonus.epoch == 4
    assert str(bare.load_state_dict(scheduled.state_dict())) == "<All keys matched successfully>"
    for model in (bare, scheduled):  # any other key is as strict as ever
        with pytest.raises(RuntimeError, match='Missing key.*"0.weight"'):
            model.load_state_dict({"0.bonus.epoch": 1})
        with pytest.raises(RuntimeError, match='Unexpected key.*"0.bonus.era"'):
            model.load_state_dict({**bare.state_dict(), "0.bonus.era": 1})


def test_a_criterion_without_a_schedule_has_the_state_of_torch():
    for weight in (None, torch.ones(3)):
        ours, torchs = BonusCrossEntropyLoss(weight), torch.nn.CrossEntropyLoss(weight)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        ours.load_state_dict(torchs.state_dict())


def test_a_schedule_has_a_state_of_its_own():
    bonus, resumed = (Scheduled(LogBonus(), strength=Linear(9)) for _ in range(2))
    bonus.set_epoch(5)
    resumed.load_state_dict(bonus.state_dict())
    with pytest.raises(ValueError, match="expected the state .*, got {}"):
        resumed.load_state_dict({})
    assert resumed.epoch == 5 and resumed.current == bonus.current


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(copied):
    criterion = BonusCrossEntropyLoss(bonus=Scheduled(LogBonus(), strength=Linear(4)))
    criterion.bonus.set_epoch(2)
    twin = copied(criterion)
    assert torch.equal(twin(LOGITS, TARGET), criterion(LOGITS, TARGET))
    twin.bonus.step()
    assert (twin.bonus.epoch, criterion.bonus.epoch) == (3, 2)
    assert twin(LOGITS, TARGET) < criterion(LOGITS, TARGET)


def test_it_says_what_it_is():
    bonus = Scheduled(Focal(), gamma=Deferred(1, then=Cosine(epochs=9)))
    said = "Scheduled(Focal(gamma=2.0), gamma=Deferred(until=1, then=Cosine(epochs=9)), epoch=0)"
    assert repr(bonus) == said and f"bonus={said}" in repr(BonusCrossEntropyLoss(bonus=bonus))


# --- nothing is compiled again ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_new_epoch_compiles_no_graph(case):
    torch._dynamo.reset()
    bonus, _ = CASES[case]()
    criterion = BonusCrossEntropyLoss(bonus=bonus)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    logits = LOGITS.clone().requires_grad_()
    seen = set()
    for epoch in range(6):
        bonus.set_epoch(epoch)
        expected, actual = criterion(logits, TARGET), compiled(logits, TARGET)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (actual, expected)))
        seen.add(actual.item())
    assert counter.frame_count == 1 and len(seen) >= 5


def test_a_function_with_a_schedule_compiles_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    bonus = Scheduled(LogBonus(), strength=Linear(9))
    compiled = torch.compile(
        lambda z: bonus_cross_entropy(z, TARGET, bonus=bonus, reduction="none"), fullgraph=True, backend=counter
    )
    for _ in range(4):
        torch.testing.assert_close(
            compiled(LOGITS), bonus_cross_entropy(LOGITS, TARGET, bonus=bonus.current, reduction="none")
        )
        bonus.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("case", CASES)
def test_a_new_epoch_compiles_no_kernel(case, monkeypatch, kernel_device):
    """Launches of two epochs differ in run-time floats alone, by which no kernel is specialised."""
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda **kwargs: launches.append({"grid": grid, **kwargs})

    labels = room("triton", "labels")
    monkeypatch.setattr(labels, "forward_kernel", Recorder())
    monkeypatch.setattr(labels, "backward_kernel", Recorder())
    bonus, _ = CASES[case]()
    logits, target = LOGITS.to(kernel_device).requires_grad_(), TARGET.to(kernel_device)
    params = []
    for epoch in (1, 3):
        bonus.set_epoch(epoch)
        bonus_cross_entropy(logits, target, bonus=bonus, implementation="triton").backward()
        for launch in launches[-2:]:
            numbers = launch.pop("numbers")
            params.append(numbers.loss)
            assert all(type(x) is float for halves in numbers.loss for x in halves)
    assert len(launches) == 4 and params[0] != params[2]
    for name, first in launches[0].items():
        if not isinstance(first, (torch.Tensor, tuple)) and not name.endswith("_ptr"):
            assert launches[2][name] == first, name
