"""An ExampleTracker as a Lightning Callback: fed by what training_step returns, in the checkpoint with the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..dynamics import ExampleTracker

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

    Raises:
        ValueError: while it trains: ``training_step`` returns no ``"scores"`` or no ``"index"``. ``"target"`` may be
            left out where the scores know it.
    """

    def __init__(self, tracker: ExampleTracker) -> None:
        self.tracker = tracker

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the tracker to where the module is."""
        self.tracker.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Track what the step returned."""
        held = outputs if isinstance(outputs, Mapping) else {}
        if missing := [name for name in ("scores", "index") if name not in held]:
            raise ValueError(
                f'TrackExamples: training_step must return {{"loss": ..., "scores": ..., "index": ...}}, lacks '
                f"{' and '.join(missing)}"
            )
        self.tracker.update(held["scores"], held["index"], held.get("target"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the processes and begin the next epoch."""
        self.tracker.merge()
        self.tracker.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return the merged state; every process calls it when a checkpoint is made."""
        self.tracker.merge()
        return self.tracker.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.tracker.load_state_dict(state_dict)
