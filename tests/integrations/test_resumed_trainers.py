"""Trainers that resume from any checkpoint, skip steps or are set up wrongly: tracked right, or told what is wrong."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonus_ops import LogBonus, bonus_cross_entropy, bonus_cross_entropy_with_scores
from bonus_ops.dynamics import ExampleTracker
from bonus_ops.policies import DifficultySampler, infobatch
from tests import torchvision_operators as torchvision_operators

pytestmark = pytest.mark.slow

NUM, CLASSES, BATCH = 14, 4, 4  # three batches and a half: 4 steps an epoch
FIELDS = ("mean_loss", "mean_el2n", "mean_entropy", "confidence", "correctness", "forgetting", "recent_losses")


def inputs_and_labels() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    return torch.randn(NUM, 6, generator=random), torch.randint(0, CLASSES, (NUM,), generator=random)


def assert_same_state(tracker: ExampleTracker, expected: ExampleTracker) -> None:
    ours, theirs = tracker.state_dict(), expected.state_dict()
    columns, others = ours.pop("columns"), theirs.pop("columns")
    assert ours == theirs
    for name, column in columns.items():
        torch.testing.assert_close(column, others[name], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


# --- transformers -----------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Items of tensors by name."""

    def __init__(self, index: bool = True, **columns: Tensor) -> None:
        self.columns = columns
        if index:
            self.columns["index"] = torch.arange(NUM)

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


class Linear(nn.Module):
    """A classifier as transformers has them."""

    config = None  # a Trainer that smooths labels asks for it

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layer = nn.Linear(6, CLASSES)

    def forward(self, input: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(input)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains a classifier with a Trainer and returns tracker, Trainer."""
    transformers = pytest.importorskip("transformers")
    from bonus_ops.integrations.transformers import TrackExamples

    def train(
        epochs=3, lr=0.0, dataset=None, model=None, tracker=None, resume=None, loss=True, callback=True, shift=False,
        options=None, fit=True, **arguments,
    ):  # fmt: skip
        input, labels = inputs_and_labels()
        dataset = Rows(input=input, labels=labels) if dataset is None else dataset
        tracker = ExampleTracker(NUM, FIELDS) if tracker is None else tracker
        tracking = TrackExamples(tracker, shift=shift, **({"bonus": None} if options is None else options))
        arguments = {
            "remove_unused_columns": False, "save_strategy": "no", "logging_steps": 100, "report_to": [],
            "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": BATCH, "seed": 3,
        } | arguments  # fmt: skip
        trainer = transformers.Trainer(
            Linear() if model is None else model,
            transformers.TrainingArguments(str(tmp_path), num_train_epochs=epochs, learning_rate=lr, **arguments),
            train_dataset=dataset,
            eval_dataset=dataset,
            compute_loss_func=tracking.loss if loss else None,
            callbacks=[tracking] if callback else [],
        )
        if fit:
            trainer.train(resume_from_checkpoint=resume)
        return tracker, trainer

    return train


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_trainer_feeds_the_tracker(trained, accumulation):
    tracker, trainer = trained(gradient_accumulation_steps=accumulation, eval_strategy="epoch")
    assert tracker.count.tolist() == [3] * NUM and tracker.epoch == 4 and tracker.step == 3 * 4
    input, labels = inputs_and_labels()
    logits = trainer.model.eval()(input)["logits"].detach()
    torch.testing.assert_close(tracker.statistic("mean_loss"), F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(tracker.statistic("correctness"), (logits.argmax(1) == labels).float())
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert tracker.step == 3 * 4, "an evaluation is not tracked"


def test_a_trainer_trains_by_the_loss_with_its_bonus(trained):
    options = {"bonus": LogBonus(0.5), "label_smoothing": 0.1}
    _, trainer = trained(epochs=1, lr=0.0, options=options, per_device_train_batch_size=NUM, max_grad_norm=0)
    input, labels = inputs_and_labels()
    model = Linear()
    expected = bonus_cross_entropy(model(input)["logits"], labels, **options)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    tracker, _ = trained(epochs=8, lr=0.1, options=options)
    assert tracker.statistic("recent_loss").mean() < tracker.statistic("mean_loss").mean() - 0.1


def test_a_trainers_tokens_become_sequences(trained):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    tokens = torch.randint(0, 11, (NUM, 7))
    labels = tokens.masked_fill(torch.arange(7) > torch.arange(NUM)[:, None] % 6 + 1, -100)
    labels[0] = -100
    model = transformers.LlamaForCausalLM(config)
    for reduction in ("mean", "max"):
        options = {"bonus": None, "reduction": reduction}
        tracker, _ = trained(
            epochs=2, dataset=Rows(input_ids=tokens, labels=labels), model=model, shift=True, options=options
        )
        logits = model(input_ids=tokens).logits.detach()
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        known = labels[:, 1:] != -100
        expected = losses.sum(1) / known.sum(1) if reduction == "mean" else losses.amax(1)
        expected[0] = math.nan
        torch.testing.assert_close(tracker.statistic("mean_loss"), expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "checkpoint"),
    [
        ({"save_strategy": "epoch"}, 8),
        ({"save_strategy": "steps", "save_steps": 4}, 8),  # saved before the epoch is known to have ended
        ({"save_strategy": "steps", "save_steps": 5}, 5),
        ({"save_strategy": "steps", "save_steps": 4}, 12),  # all that was to be done: nothing is left
    ],
    ids=["epoch", "boundary", "middle", "end"],
)
def test_a_resumed_trainer_tracks_as_if_it_had_gone_on(trained, tmp_path, arguments, checkpoint):
    expected, _ = trained(lr=0.05, **arguments)
    path = tmp_path / f"checkpoint-{checkpoint}"
    tracker, _ = trained(lr=0.05, resume=str(path), **arguments)
    assert_same_state(tracker, expected)
    assert tracker.epoch == 4 and tracker.count.tolist() == [3] * NUM
    (path / "example_tracker.pt").unlink()
    with pytest.raises(
        FileNotFoundError, match="training resumes at step .*checkpoint-.* is missing. Expected it there"
    ):
        trained(lr=0.05, resume=str(path), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": False}, RuntimeError, "needs its loss, compute_loss_func=tracking.loss, too"),
        ({"callback": False}, RuntimeError, r"its loss needs it in the Trainer.s callbacks=\[...\] too"),
        (
            {"options": {"margin": None}},
            TypeError,
            "unexpected option 'margin', expected one of vocab_size, ignore_index",
        ),
        ({"options": {"reduction": "median"}}, ValueError, "reduction must be one of mean, sum, .*got 'median'"),
        ({"tracker": "tracker"}, TypeError, "tracker must be an ExampleTracker, got str"),
    ],
    ids=["loss", "callback", "option", "reduction", "tracker"],
)
def test_a_trainer_that_would_not_track_says_so(trained, arguments, error, message):
    if arguments.get("callback") is False:
        input, labels = inputs_and_labels()
        arguments = arguments | {"dataset": Rows(index=False, input=input, labels=labels)}
    with pytest.raises(error, match=message):
        trained(**arguments)


def test_a_model_goes_from_one_trainer_to_the_next(trained):
    model, trackers = Linear(), [ExampleTracker(NUM, FIELDS) for _ in range(3)]
    for tracker in trackers:
        trained(epochs=1, model=model, tracker=tracker)
    assert [tracker.step for tracker in trackers] == [4, 4, 4]
    model(inputs_and_labels()[0])  # outside a Trainer, with its gradient
    model(inputs_and_labels()[0])


# --- lightning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lightning_module():
    lightning = pytest.importorskip("lightning.pytorch")

    class Classifier(lightning.LightningModule):
        def __init__(self, lr: float = 0.0, sampler: DifficultySampler | None = None) -> None:
            super().__init__()
            self.model, self.lr, self.sampler, self.visited, self.chosen = Linear(), lr, sampler, [], {}

        def training_step(self, batch, batch_idx):
            index, input, target = batch
            self.visited.append((self.current_epoch, index.tolist()))
            if self.sampler is not None:
                self.chosen[self.current_epoch] = self.sampler.weight.nonzero()[:, 0].tolist()
            loss, scores = bonus_cross_entropy_with_scores(self.model(input)["logits"], target, bonus=None)
            return {"loss": loss, "scores": scores, "index": index}

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.model(batch[1])["logits"], batch[2]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Classifier


def loader(sampler=None, **options) -> torch.utils.data.DataLoader:
    data = torch.utils.data.TensorDataset(torch.arange(NUM), *inputs_and_labels())
    return torch.utils.data.DataLoader(data, batch_size=BATCH, sampler=sampler, **options)


def fit(tmp_path, module, tracker, loader_, epochs=3, resume=None, callbacks=(), **options):
    lightning = pytest.importorskip("lightning.pytorch")
    from bonus_ops.integrations.lightning import TrackExamples

    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[TrackExamples(tracker), *callbacks], default_root_dir=tmp_path, logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        **({"enable_checkpointing": bool(callbacks)} | options),
    )  # fmt: skip
    trainer.fit(module, loader_, loader(), ckpt_path=resume)
    return trainer


def test_lightning_feeds_the_tracker(tmp_path, lightning_module):
    tracker, module = ExampleTracker(NUM, FIELDS), lightning_module()
    fit(tmp_path, module, tracker, loader())
    assert tracker.count.tolist() == [3] * NUM and tracker.epoch == 4 and tracker.step == 3 * 4
    input, labels = inputs_and_labels()
    logits = module.model(input)["logits"].detach()
    torch.testing.assert_close(tracker.statistic("mean_loss"), F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(tracker.statistic("correctness"), (logits.argmax(1) == labels).float())
    fit(tmp_path, module, tracker, loader(), epochs=2)  # another Trainer goes on
    assert tracker.count.tolist() == [5] * NUM and tracker.epoch == 6


@pytest.mark.parametrize(
    ("when", "name"),
    [
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, "epoch=1-step=8.ckpt"),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, "epoch=1-step=8.ckpt"),
        ({"every_n_train_steps": 4}, "epoch=1-step=8.ckpt"),
        ({"every_n_train_steps": 4}, "epoch=2-step=12.ckpt"),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, "epoch=2-step=12.ckpt"),
    ],
    ids=["epoch end", "validation end", "last step", "last step of all", "last validation"],
)
def test_lightning_goes_on_from_a_checkpoint(tmp_path, lightning_module, when, name):
    lightning = pytest.importorskip("lightning.pytorch")
    saving = functools.partial(
        lightning.callbacks.ModelCheckpoint, dirpath=tmp_path, save_top_k=-1, filename="{epoch}-{step}", **when
    )
    expected, tracker = ExampleTracker(NUM, FIELDS), ExampleTracker(NUM, FIELDS)
    fit(tmp_path, lightning_module(0.05), expected, loader(), callbacks=[saving()])
    fit(tmp_path, lightning_module(0.05), tracker, loader(), resume=tmp_path / name)
    assert tracker.epoch == 4 and tracker.count.tolist() == [3] * NUM
    assert_same_state(tracker, expected)


def test_lightning_may_skip_a_step(tmp_path, lightning_module):
    module, tracker = lightning_module(), ExampleTracker(NUM, FIELDS)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: None if batch_idx == 1 else step(batch, batch_idx)
    fit(tmp_path, module, tracker, loader(), epochs=2)
    assert tracker.count.tolist() == [2] * 4 + [0] * 4 + [2] * 6 and tracker.epoch == 3


def test_lightning_needs_a_tracker():
    pytest.importorskip("lightning.pytorch")
    from bonus_ops.integrations.lightning import TrackExamples

    with pytest.raises(TypeError, match="tracker must be an ExampleTracker, got int"):
        TrackExamples(3)


def some(difficulty: Tensor, generator: torch.Generator) -> Tensor:
    """Visit 6, 14 or 10 examples, as the epoch has it."""
    weight = torch.zeros(NUM)
    weight[torch.randperm(NUM, generator=generator)[: (6, 14, 10)[int(torch.randint(3, (), generator=generator))]]] = 1
    return weight


def of_lengths(*lengths: int) -> DifficultySampler:
    """Return a sampler whose first epochs have these lengths."""
    for seed in range(1000):
        sampler = DifficultySampler(torch.rand(NUM), some, seed=seed)
        if all(len(sampler.set_epoch(epoch) or sampler) == n for epoch, n in enumerate(lengths)):
            sampler.set_epoch(0)
            return sampler
    raise AssertionError("no seed has them")


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}], ids=str)
def test_lightning_counts_the_batches_of_the_epoch_that_begins(tmp_path, lightning_module, workers):
    sampler, module, tracker = of_lengths(6, 14, 10), lightning_module(), ExampleTracker(NUM, FIELDS)
    fit(tmp_path, module, tracker, loader(sampler, **workers), reload_dataloaders_every_n_epochs=1)
    visited = [sum(len(batch) for of, batch in module.visited if of == epoch) for epoch in range(3)]
    assert visited == [6, 14, 10] and int(tracker.count.sum()) == 30


def test_lightning_refuses_to_cut_the_epochs_of_a_sampler_short(tmp_path, lightning_module):
    sampler, tracker = of_lengths(6, 14, 10), ExampleTracker(NUM, FIELDS)
    with pytest.raises(ValueError, match="with a DifficultySampler the Trainer needs reload_dataloaders_every_n_ep"):
        fit(tmp_path, lightning_module(), tracker, loader(sampler))
    sampler.set_epoch(2)
    with pytest.raises(ValueError, match=r"epoch that begins, 0, got 2: .*Call sampler.set_epoch\(0\) before fit"):
        fit(tmp_path, lightning_module(), tracker, loader(sampler), reload_dataloaders_every_n_epochs=1)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}], ids=str)
def test_lightning_visits_what_the_sampler_chose(tmp_path, lightning_module, workers):
    tracker = ExampleTracker(NUM, FIELDS)
    sampler = DifficultySampler(lambda: tracker.difficulty("mean_loss"), lambda d, g: infobatch(d, generator=g))
    module = lightning_module(0.3, sampler)
    fit(tmp_path, module, tracker, loader(sampler, **workers), epochs=4, reload_dataloaders_every_n_epochs=1)
    for epoch in range(4):
        assert sorted(i for of, batch in module.visited if of == epoch for i in batch) == module.chosen[epoch]
    assert module.chosen[0] == list(range(NUM)) and min(map(len, module.chosen.values())) < NUM
