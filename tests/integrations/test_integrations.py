"""The glue under the real libraries, skipped where they are not installed; and the sampler in their loops."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bonus_ops import (
    ExampleTracker,
    Focal,
    LogBonus,
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
)
from bonus_ops.policies import DifficultySampler, infobatch
from tests import torchvision_operators as torchvision_operators

pytestmark = pytest.mark.slow

N, D, C = 48, 6, 4


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(library), reason=f"{library} is not installed")


class Rows(Dataset):
    """Rows (index, input, target) whose classes lie apart."""

    def __init__(self, n: int = N) -> None:
        random = torch.Generator().manual_seed(0)
        self.target = torch.arange(n) % C
        self.input = torch.randn(n, D, generator=random) + 2 * torch.eye(C, D)[self.target]

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        return i, self.input[i], self.target[i]


def half(difficulty, generator):
    return infobatch(difficulty, generator=generator)


def everyone(difficulty, generator):
    return torch.ones(len(difficulty))


# --- transformers -----------------------------------------------------------------------------------------------------


class Sentences(Dataset):
    """Tokens of several lengths, each with its number; the last two tokens are padding."""

    def __init__(self, kind: str) -> None:
        random = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(2, 20, (N, 8), generator=random)
        self.kind = kind

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, object]:
        labels = self.tokens[i].clone()
        labels[6:] = -100
        return {"input_ids": self.tokens[i], "labels": labels if self.kind == "causal" else i % C, "index": i}


def small_model(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    if kind == "causal":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1,
        ))  # fmt: skip
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=C,
        max_position_embeddings=8,
    ))  # fmt: skip


def trainer_of(folder, kind: str, tracking, **arguments):
    import transformers

    given = {
        "remove_unused_columns": False, "num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True,
        "report_to": [], "save_strategy": "epoch", "logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    args = transformers.TrainingArguments(output_dir=str(folder), **(given | arguments))
    return transformers.Trainer(
        small_model(kind), args, train_dataset=Sentences(kind), eval_dataset=Sentences(kind),
        compute_loss_func=tracking.loss, callbacks=[tracking],
    )  # fmt: skip


@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("kind", ["causal", "classes"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_tracks_every_example_once_an_epoch(tmp_path, kind, accumulation):
    from bonus_ops.integrations.transformers import TrackExamples

    tracking = TrackExamples(ExampleTracker(N, "all"), shift=kind == "causal", bonus=LogBonus(0.5))
    trainer = trainer_of(tmp_path, kind, tracking, gradient_accumulation_steps=accumulation)
    before = trainer.evaluate()["eval_loss"]
    assert tracking.tracker.step == 0  # an evaluation is not tracked
    trainer.train()
    assert tracking.tracker.count.tolist() == [2] * N and tracking.tracker.epoch == 3
    assert trainer.evaluate()["eval_loss"] < before and tracking.tracker.step == 2 * N // 8
    if kind == "classes":
        assert tracking.tracker.labels().given.tolist() == [i % C for i in range(N)]


@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_what_a_trainer_tracks_is_the_score_of_the_model(tmp_path, kind):
    from bonus_ops.integrations.transformers import TrackExamples

    tracking = TrackExamples(ExampleTracker(N, "mean_loss"), shift=kind == "causal", bonus=None)
    trainer = trainer_of(tmp_path, kind, tracking, num_train_epochs=1, learning_rate=0.0, save_strategy="no")
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer.train()
    data = Sentences(kind)
    with torch.no_grad():
        for i in range(N):
            logits = trainer.model(input_ids=data.tokens[i : i + 1]).logits[0]
            labels = data[i]["labels"]
            if kind == "causal":
                expected = nn.functional.cross_entropy(logits[:-1], labels[1:])
            else:
                expected = nn.functional.cross_entropy(logits, torch.tensor(labels))
            assert math.isclose(tracking.tracker.statistic("mean_loss")[i], expected, rel_tol=1e-4)


@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("when", [6, 8])  # an epoch's end; in the middle of one
def test_a_trainer_resumes_with_what_was_tracked(tmp_path, when):
    from bonus_ops.integrations.transformers import TrackExamples

    def run(folder, resume=None, **arguments):
        tracking = TrackExamples(ExampleTracker(N, "all"), shift=False)
        trainer = trainer_of(folder, "classes", tracking, save_strategy="steps", save_steps=2, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return tracking.tracker.state_dict()

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "a", str(tmp_path / "a" / f"checkpoint-{when}"))
    assert whole["epoch"] == resumed["epoch"] == 3 and whole["step"] == resumed["step"] == 12
    for name, column in whole["columns"].items():
        torch.testing.assert_close(resumed["columns"][name], column, equal_nan=True)
    (tmp_path / "a" / f"checkpoint-{when}" / "example_tracker.pt").unlink()
    with pytest.raises(FileNotFoundError, match=f"training resumes at step {when}, but .* is missing"):
        run(tmp_path / "a", str(tmp_path / "a" / f"checkpoint-{when}"))


@needs("transformers")
@needs("accelerate")
def test_a_trainer_that_would_lose_the_loss_or_the_index_is_refused(tmp_path):
    from bonus_ops.integrations.transformers import TrackExamples

    tracking = TrackExamples(ExampleTracker(N), shift=False, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0: .* drops the bonus"):
        trainer_of(tmp_path, "classes", tracking, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="remove_unused_columns must be False, or 'index' is dropped"):
        trainer_of(tmp_path, "classes", tracking, remove_unused_columns=True)
    tracking = TrackExamples(ExampleTracker(N), index="number", shift=False)
    trainer = trainer_of(tmp_path, "classes", tracking)
    trainer.train_dataset = [
        {k: v for k, v in row.items() if k != "index"} for row in map(Sentences("classes").__getitem__, range(N))
    ]
    with pytest.raises(ValueError, match="expected the column 'number' with each example's number, got none"):
        trainer.train()


# --- Lightning --------------------------------------------------------------------------------------------------------


def lightning_module(returns):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.visited = nn.Linear(D, C), []

        def training_step(self, batch, batch_idx):
            index, input, target = batch
            self.visited += index.tolist()
            loss, scores = bonus_cross_entropy_with_scores(self.layer(input), target)
            return returns(loss, scores, index, target)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module()


def lightning_trainer(folder, **options):
    from lightning.pytorch import Trainer

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **(quiet | options))


def returned(loss, scores, index, target):
    return {"loss": loss, "scores": scores, "index": index, "target": target}


@needs("lightning")
def test_lightning_tracks_saves_and_restores(tmp_path):
    from bonus_ops.integrations.lightning import TrackExamples

    def fit(epochs, resume=None):
        tracking = TrackExamples(ExampleTracker(N, "all"))
        trainer = lightning_trainer(tmp_path, max_epochs=epochs, callbacks=[tracking], enable_checkpointing=False)
        trainer.fit(lightning_module(returned), DataLoader(Rows(), 8), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return tracking.tracker

    whole, part = fit(3), fit(1)
    assert whole.count.tolist() == [3] * N and whole.epoch == 4 and part.epoch == 2
    resumed = fit(3, tmp_path / "1.ckpt")
    assert resumed.epoch == 4 and resumed.step == whole.step
    for name in whole.statistics:
        torch.testing.assert_close(resumed.statistic(name), whole.statistic(name), equal_nan=True)
    assert whole.labels().given.tolist() == [i % C for i in range(N)]


@needs("lightning")
def test_lightning_is_told_what_a_step_must_return(tmp_path):
    from bonus_ops.integrations.lightning import TrackExamples

    for returns, lacks in ((lambda *x: x[0], "scores and index"), (lambda *x: {"loss": x[0], "index": x[2]}, "scores")):
        trainer = lightning_trainer(tmp_path, max_epochs=1, callbacks=[TrackExamples(ExampleTracker(N))])
        with pytest.raises(ValueError, match=f"training_step must return .*, lacks {lacks}"):
            trainer.fit(lightning_module(returns), DataLoader(Rows(), 8))


@needs("lightning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("policy", [everyone, half])
def test_the_sampler_visits_its_plan_each_epoch_in_lightnings_loop(tmp_path, workers, policy):
    random = torch.rand(N, generator=torch.Generator().manual_seed(2))
    twin, sampler = DifficultySampler(random, policy), DifficultySampler(random, policy)
    module = lightning_module(returned)
    loader = DataLoader(Rows(), 8, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    lightning_trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(module, loader)
    expected = []
    for epoch in range(3):
        twin.set_epoch(epoch)
        expected += list(twin)
    assert module.visited == expected and sampler.epoch == 2


# --- accelerate -------------------------------------------------------------------------------------------------------


@needs("accelerate")
@pytest.mark.parametrize("workers", [0, 2])
def test_accelerate_keeps_tracker_and_sampler_and_visits_each_plan(tmp_path, workers):
    from accelerate import Accelerator

    def run(epochs, stop=None, resume=False):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = nn.Linear(D, C)
        tracker = ExampleTracker(N, "all")
        sampler = DifficultySampler(lambda: tracker.difficulty("mean_loss"), half)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, DataLoader(Rows(), 4, sampler=sampler, num_workers=workers)
        )
        accelerator.register_for_checkpointing(tracker, sampler)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        visited = []
        for epoch in range(sampler.epoch, epochs):
            loader.set_epoch(epoch)
            visited.append([])
            trained = sampler.state_dict()["position"] if resume else 0
            for index, input, target in loader:
                loss, scores = bonus_cross_entropy_with_scores(model(input), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                tracker.update(scores, index, target)
                visited[-1] += index.tolist()
                trained += len(index)
                if (epoch, len(visited[-1])) == stop:
                    state, exact = sampler.state_dict, sampler.state_dict(position=trained)
                    sampler.state_dict = lambda exact=exact: exact
                    accelerator.save_state(str(tmp_path / "state"))
                    sampler.state_dict = state
                    return visited, tracker
            resume = False
            tracker.merge()
            tracker.end_epoch()
        return visited, tracker

    whole, all_of_it = run(3)
    assert sorted(whole[0]) == list(range(N)) and len(whole[1]) < N and len(set(whole[1])) == len(whole[1])
    head, _ = run(3, stop=(1, 8))
    tail, tracker = run(3, resume=True)
    assert head[0] == whole[0] and head[1] + tail[0] == whole[1] and tail[1] == whole[2]
    for name in tracker.statistics:
        torch.testing.assert_close(tracker.statistic(name), all_of_it.statistic(name), equal_nan=True)


TWO_PROCESSES = """
import sys, torch
from torch.utils.data import DataLoader
from accelerate import Accelerator
from tests.integrations.test_integrations import N, C, D, Rows, everyone
from bonus_ops import ExampleTracker, bonus_cross_entropy_with_scores
from bonus_ops.policies import DifficultySampler

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2, accelerator.num_processes
torch.manual_seed(0)
model = torch.nn.Linear(D, C)
tracker = ExampleTracker(N, "all")
sampler = DifficultySampler(lambda: tracker.difficulty("mean_loss"), everyone)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), 4, sampler=sampler))
accelerator.register_for_checkpointing(tracker)
for epoch in range(2):
    loader.set_epoch(epoch)
    for index, input, target in loader:
        loss, scores = bonus_cross_entropy_with_scores(model(input), target)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        tracker.update(scores, index, target)
    tracker.merge()
    tracker.end_epoch()
assert tracker.count.tolist() == [2] * N, tracker.count
every = accelerator.gather(tracker.statistic("mean_loss")[None])
assert torch.equal(every[0], every[1]) and tracker.labels().given.tolist() == [i % C for i in range(N)]
accelerator.save_state(sys.argv[1])
accelerator.wait_for_everyone()  # one process writes
again = ExampleTracker(N, "all")
accelerator._custom_objects.clear()
accelerator.register_for_checkpointing(again)
accelerator.load_state(sys.argv[1])
assert torch.equal(again.statistic("mean_loss"), tracker.statistic("mean_loss")) and again.epoch == 3
print("right")
"""


@needs("accelerate")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="gloo is not available")
def test_accelerate_tracks_over_two_processes_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
               str(tmp_path / "run.py"), str(tmp_path / "state")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=240)
    assert run.returncode == 0 and run.stdout.count("right") == 2, run.stderr[-3000:]


# --- timm -------------------------------------------------------------------------------------------------------------


@needs("timm")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"smoothing": 0.0}, {"target_threshold": 0.2}, {"sum_classes": True}, {"reduction": "none"},
     {"pos_weight": 3.0}, {"weight": torch.linspace(0.2, 0.9, C)}, {"smooth_dense": True, "smoothing": 0.3},
     {"target_threshold": 0.1, "sum_classes": True, "smoothing": 0.2}],
    ids=str,
)  # fmt: skip
def test_without_a_bonus_it_is_timms_binary_cross_entropy(dense, options):
    import timm

    from bonus_ops.integrations.timm import BonusBinaryCrossEntropy

    random = torch.Generator().manual_seed(0)
    logits = torch.randn(8, C, generator=random, requires_grad=True)
    target = torch.rand(8, C, generator=random) if dense else torch.randint(C, (8,), generator=random)
    theirs = timm.loss.BinaryCrossEntropy(**options)(logits, target)
    ours = BonusBinaryCrossEntropy(**options, bonus=None)(logits, target)
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs))
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(BonusBinaryCrossEntropy(**options)(logits, target), theirs)


@needs("timm")
def test_with_a_loss_it_is_that_loss_on_timms_targets():
    from bonus_ops.integrations.timm import BonusBinaryCrossEntropy

    logits, target = torch.randn(8, C), torch.arange(8) % C
    hot = nn.functional.one_hot(target, C).float()
    expected = bonus_binary_cross_entropy_with_logits(logits, hot, bonus=Focal(1.0), reduction="none").sum(1).mean()
    loss = BonusBinaryCrossEntropy(smoothing=0.0, sum_classes=True, bonus=Focal(1.0))
    torch.testing.assert_close(loss(logits, target), expected)


@needs("timm")
@pytest.mark.parametrize("binary", [False, True])
def test_timms_mixup_trains_a_model_with_a_bonus(binary):
    import timm

    from bonus_ops import BonusCrossEntropyLoss
    from bonus_ops.integrations.timm import BonusBinaryCrossEntropy

    torch.manual_seed(0)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=C)
    options = {"target_threshold": 0.2, "sum_classes": True} if binary else {}
    criterion = (BonusBinaryCrossEntropy if binary else BonusCrossEntropyLoss)(**options, bonus=LogBonus(0.5))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    input, target = torch.randn(16, 3, 8, 8), torch.arange(16) % C
    losses = []
    for _ in range(40):
        x, y = mixup(input.clone(), target)
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(bonus_cross_entropy(model(input).detach(), target, bonus=None)))
    assert losses[-1] < losses[0] / 2
    assert not binary or isinstance(criterion, timm.loss.BinaryCrossEntropy)


def test_the_package_itself_imports_no_library():
    code = (
        "import sys, bonus_ops, bonus_ops.integrations; print({'transformers', 'lightning', 'timm'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
