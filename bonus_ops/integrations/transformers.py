"""An ExampleTracker inside a transformers Trainer: the loss that feeds it, and the callback that keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..causal_lm import causal_lm_loss_with_scores, logits_of
from ..dynamics import ExampleTracker

__all__ = ["TrackExamples"]

FILE = "example_tracker.pt"  # in a checkpoint's folder


class TrackExamples(TrainerCallback):
    """Track every training example of a Trainer, under a loss with a bonus.

        tracking = TrackExamples(ExampleTracker(len(data)), shift=False, bonus=LogBonus(0.5))
        Trainer(model, TrainingArguments(..., remove_unused_columns=False), train_dataset=data,
                compute_loss_func=tracking.loss, callbacks=[tracking]).train()
        tracking.tracker.report()

    The data set gives each example's number in a column, which is taken from the inputs before the model sees them:
    ``data.map(lambda row, i: {"index": i}, with_indices=True)``. Tokens are reduced to sequences. Evaluations are not
    tracked; their loss is the same. Epochs end and processes merge with the Trainer's; the state goes into each
    checkpoint and comes back when training resumes from one in ``output_dir``.

    Args:
        tracker: of the training set; moved to the device of the logits.
        index: name of the column.
        shift: whether a position's label is the token after it: True for causal language models.
        reduction: from tokens to a sequence, as in `Scores.to_sequences`.
        options: of `causal_lm_loss`, such as ``bonus`` and ``label_smoothing``.

    Raises:
        ValueError: by the Trainer, for ``label_smoothing_factor`` or ``remove_unused_columns``; the index is missing.
        FileNotFoundError: training resumes from a checkpoint without the tracker's state.
    """

    def __init__(
        self,
        tracker: ExampleTracker,
        *,
        index: str = "index",
        shift: bool = True,
        reduction: str = "mean",
        **options: Any,
    ) -> None:
        self.tracker, self.index, self.shift, self.reduction, self.options = tracker, index, shift, reduction, options
        self._rows: Tensor | None = None  # numbers of the batch in the model
        self._training = self._may_resume = False
        self._ended = 0  # epochs of this training

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss and track the batch: ``Trainer(..., compute_loss_func=tracking.loss)``."""
        logits = logits_of(outputs)
        loss, scores = causal_lm_loss_with_scores(
            logits,
            labels,
            num_items_in_batch=num_items_in_batch,
            shift_labels=None if self.shift else labels,
            **self.options,
        )
        if self._training:
            if self._rows is None:
                raise ValueError(
                    f"TrackExamples: expected the column {self.index!r} with each example's number, got none"
                )
            if self.tracker.device != logits.device:
                self.tracker.to(logits.device)
            self.tracker.update(scores.to_sequences(self.reduction) if scores.loss.dim() > 1 else scores, self._rows)
        return loss

    def _take_index(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self._training, self._rows = model.training, kwargs.get(self.index)
        return args, {name: x for name, x in kwargs.items() if name != self.index}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse arguments that would lose the loss or the index; take the index from the model's inputs."""
        if args.label_smoothing_factor:
            raise ValueError(
                "TrackExamples: label_smoothing_factor must be 0: the Trainer ignores it next to compute_loss_func and "
                "drops the bonus otherwise. Expected TrackExamples(..., label_smoothing=...)"
            )
        if args.remove_unused_columns:
            raise ValueError(f"TrackExamples: remove_unused_columns must be False, or {self.index!r} is dropped")
        kwargs["model"].register_forward_pre_hook(self._take_index, with_kwargs=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Await the first epoch: what training resumes from is known only then."""
        self._may_resume, self._ended = True, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint that training resumes from."""
        resumes, self._may_resume = self._may_resume and state.global_step > 0, False
        if not resumes:
            return
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if file.is_file():
            held = torch.load(file, map_location="cpu", weights_only=True)
            self.tracker.load_state_dict(held["tracker"])
            for _ in range(held["ended"], int(state.epoch)):  # saved at the last step of an epoch, before its end
                self.tracker.end_epoch()
            self._ended = int(state.epoch)
        elif not self.tracker.step:
            raise FileNotFoundError(
                f"TrackExamples: training resumes at step {state.global_step}, but {file} is missing. "
                "Expected it there, or tracker.load_state_dict before"
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Merge the processes and begin the next epoch."""
        self.tracker.merge()
        self.tracker.end_epoch()
        self._ended += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the merged state into the checkpoint."""
        self.tracker.merge()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            torch.save({"ended": self._ended, "tracker": self.tracker.state_dict()}, folder / FILE)
