"""An ExampleTracker inside a transformers Trainer: the loss that feeds it, and the callback that keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from ..causal_lm import _OPTIONS, causal_lm_loss_with_scores, logits_of
from ..dynamics import ExampleTracker
from ..scores import REDUCTIONS

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
    checkpoint and comes back when training resumes from one in ``output_dir``. Where epochs differ in length
    (`DifficultySampler`), a Trainer ends each at the number of batches of the first: let that be the longest.

    Args:
        tracker: of the training set; moved to the device of the Trainer.
        index: name of the column.
        shift: whether a position's label is the token after it: True for causal language models.
        reduction: from tokens to a sequence, as in `Scores.to_sequences`.
        options: of `causal_lm_loss`, such as ``bonus`` and ``label_smoothing``.

    Raises:
        TypeError, ValueError: an argument; a Trainer with ``label_smoothing_factor``, or whose batches lack the index.
        RuntimeError, FileNotFoundError: a Trainer without the loss or the callback; a checkpoint without the state.
    """

    def __init__(
        self, tracker: ExampleTracker, *, index: str = "index", shift: bool = True, reduction: str = "mean",
        **options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(tracker, ExampleTracker):
            raise TypeError(f"TrackExamples: tracker must be an ExampleTracker, got {type(tracker).__name__}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"TrackExamples: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if unknown := [name for name in options if name not in _OPTIONS]:
            raise TypeError(f"TrackExamples: unexpected option {unknown[0]!r}, expected one of {', '.join(_OPTIONS)}")
        self.tracker, self.index, self.shift, self.reduction, self.options = tracker, index, shift, reduction, options
        self._hook: RemovableHandle | None = None
        self._awaited, self._ended = False, 0  # whether a batch's loss is still to come; epochs of this training
        self._rows: Tensor | None = None  # the batch's numbers

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss and track the batch: ``Trainer(..., compute_loss_func=tracking.loss)``."""
        options = {"shift_labels": None if self.shift else labels, **self.options}
        loss, scores = causal_lm_loss_with_scores(logits_of(outputs), labels, None, num_items_in_batch, **options)
        if not torch.is_grad_enabled():  # an evaluation
            return loss
        if self._hook is None:
            raise RuntimeError("TrackExamples: its loss needs it in the Trainer's callbacks=[...] too")
        self._awaited = False
        if self._rows is None:
            raise ValueError(f"TrackExamples: expected the column {self.index!r} with each example's number, got none")
        self.tracker.update(scores.to_sequences(self.reduction) if scores.loss.dim() > 1 else scores, self._rows)
        return loss

    def _take_index(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if torch.is_grad_enabled():
            self._awaited, self._rows = True, kwargs.get(self.index)
        return args, {name: x for name, x in kwargs.items() if name != self.index}

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        if args.label_smoothing_factor:
            said = "label_smoothing_factor must be 0: a Trainer ignores it here, and elsewhere drops the bonus for it"
            raise ValueError(f"TrackExamples: {said}. Expected TrackExamples(..., label_smoothing=...)")
        if args.remove_unused_columns:
            raise ValueError(f"TrackExamples: remove_unused_columns must be False, or {self.index!r} is dropped")
        if self._hook is not None:
            self._hook.remove()
        if model is not None:  # first, before what trackers of earlier Trainers left there
            self._hook = model.register_forward_pre_hook(self._take_index, prepend=True, with_kwargs=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_init_end(args, state, control, **kwargs)  # the model may be another one
        self.tracker.to(args.device)
        self._awaited, self._ended = False, int(state.epoch or 0)
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and file.is_file():
            held = torch.load(file, map_location="cpu", weights_only=True)
            self.tracker.load_state_dict(held["tracker"])
            for _ in range(held["ended"], self._ended):  # saved at the last step of an epoch, before its end
                self.tracker.end_epoch()
        elif state.global_step and not self.tracker.step:
            said = f"TrackExamples: training resumes at step {state.global_step}, but {file} is missing. "
            raise FileNotFoundError(said + "Expected it there, or tracker.load_state_dict before")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self._awaited:
            raise RuntimeError("TrackExamples: the Trainer needs its loss, compute_loss_func=tracking.loss, too")

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.tracker.merge()
        self.tracker.end_epoch()
        self._ended += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tracker.merge()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            torch.save({"ended": self._ended, "tracker": self.tracker.state_dict()}, folder / FILE)
