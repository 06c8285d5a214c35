"""An ExampleTracker as a Lightning Callback: fed by what training_step returns, in the checkpoint with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from ..dynamics import ExampleTracker
from ..policies import DifficultySampler

__all__ = ["TrackExamples"]


class TrackExamples(Callback):
    """Track every training example of a Lightning Trainer.

        def training_step(self, batch, batch_idx):
            index, input, target = batch
            loss, scores = bonus_cross_entropy_with_scores(self(input), target)
            return {"loss": loss, "scores": scores, "index": index, "target": target}

        tracking = TrackExamples(ExampleTracker(len(data)))
        Trainer(callbacks=[tracking]).fit(model, loader)
        tracking.tracker.report()

    Epochs end and processes merge with the Trainer's. The state is part of every checkpoint, and back in place when
    ``fit(ckpt_path=...)`` resumes; ``save_checkpoint`` is to be called on every process, as Lightning asks.

    Args:
        tracker: of the training set; moved to the module's device.

    Lightning counts an epoch's batches when it loads the loader. With a `DifficultySampler`, whose epochs differ in
    length, it has to load it every epoch, ``Trainer(reload_dataloaders_every_n_epochs=1)``, always with that sampler,
    which is set here to the epoch to come. Before a training that resumes, set it yourself.

    Raises:
        TypeError: ``tracker`` is no `ExampleTracker`.
        ValueError: a `DifficultySampler` whose epochs Lightning would cut short or fill up with repeated examples.
        ValueError: while it trains: ``training_step`` returns no ``"scores"`` or no ``"index"``. ``"target"`` may be
            left out where the scores know it.
    """

    def __init__(self, tracker: ExampleTracker) -> None:
        if not isinstance(tracker, ExampleTracker):
            raise TypeError(f"TrackExamples: tracker must be an ExampleTracker, got {type(tracker).__name__}")
        self.tracker = tracker
        self._first: int | None = None  # the tracker's epoch during the Trainer's epoch 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier Trainer; the state of a checkpoint comes after this."""
        self._first = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the tracker to where the module is."""
        self.tracker.to(pl_module.device)
        if self._first is None:
            self._first = self.tracker.epoch - trainer.current_epoch
        for sampler in _samplers(trainer):
            if trainer.reload_dataloaders_every_n_epochs != 1:
                said = "Trainer needs reload_dataloaders_every_n_epochs=1, or it ends epochs where the first one ended"
                raise ValueError(f"TrackExamples: with a DifficultySampler the {said}")
            if sampler.epoch != (now := trainer.current_epoch):
                said = f"expected it at the epoch that begins, {now}, got {sampler.epoch}: batches are counted already"
                raise ValueError(f"TrackExamples: {said}. Call sampler.set_epoch({now}) before fit")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Track what the step returned."""
        if outputs is None or outputs == {}:  # the step was skipped
            return
        held = outputs if isinstance(outputs, Mapping) else {}
        if missing := [name for name in ("scores", "index") if name not in held]:
            raise ValueError(
                f'TrackExamples: training_step must return {{"loss": ..., "scores": ..., "index": ...}}, lacks '
                f"{' and '.join(missing)}"
            )
        self.tracker.update(held["scores"], held["index"], held.get("target"))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what ended unseen: a checkpoint may be of an epoch's last step, which is not run again."""
        self._end_epochs(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the processes and begin the next epoch, which Lightning is about to count."""
        self._end_epochs(trainer.current_epoch + 1)
        for sampler in _samplers(trainer):
            sampler.set_epoch(trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what ended unseen."""
        self._end_epochs(trainer.current_epoch)

    def _end_epochs(self, ended: int) -> None:
        assert self._first is not None
        while self.tracker.epoch < self._first + ended:
            self.tracker.merge()
            self.tracker.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return the merged state; every process calls it when a checkpoint is made."""
        self.tracker.merge()
        return {"tracker": self.tracker.state_dict(), "first": self._first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.tracker.load_state_dict(state_dict["tracker"])
        self._first = state_dict["first"]


def _samplers(trainer: Trainer) -> list[DifficultySampler]:
    """Return those of the training loaders, also out of what Lightning shards them with over processes."""
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    owners = [*loaders, *(getattr(loader, "batch_sampler", None) for loader in loaders)]
    found = [getattr(owner, "sampler", None) for owner in owners]
    found = [getattr(getattr(sampler, "dataset", None), "_sampler", sampler) for sampler in found]
    return list({id(sampler): sampler for sampler in found if isinstance(sampler, DifficultySampler)}.values())
