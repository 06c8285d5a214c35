"""ExampleTracker: what training showed of each example, kept on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..number_checks import check_integer, check_number
from ..scores import Scores
from . import merge, random_labels, suggested
from .field import Batch, Column, Field, State, Statistic
from .fields import DEFAULT_FIELDS, resolve
from .report import NothingKnown, Report
from .suggested import Labels

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ExampleTracker"]

VERSION = 1  # of the state's format
CORE = (
    Column("count", torch.int32, 0, "sum"),
    Column("label_count", torch.int32, 0, "sum"),
    Column("last_step", torch.int32, 0, "max"),
)
LAST_EPOCH = torch.iinfo(torch.int16).max - 1


class ExampleTracker:
    """Per-example training dynamics from the scores of each step: no extra forward pass, no host synchronisation.

        tracker = ExampleTracker(len(dataset))
        for epoch in range(epochs):
            for index, input, target in loader:
                loss, scores = bonus_cross_entropy_with_scores(model(input), target)
                ...
                tracker.update(scores, index, target)
            tracker.merge()      # several processes; otherwise does nothing
            tracker.end_epoch()
        tracker.statistic("mean_margin")

    Which observation counts:

    - Index -1 (a padded row) and rows whose scores are NaN (ignored) are skipped.
    - An example that occurs several times in one update is observed once: its last row that is not skipped counts.
    - A row whose ``loss`` alone is NaN has no label (`label_free_scores`): only label-free statistics take it.
    - Rows are otherwise observed in the order of the updates. The order of examples within an epoch changes nothing
      but rounding; the order of the epochs does where a statistic is about order (forgetting, streaks, last losses).
    - Scores are of the model before the step, in training mode, on augmented input. Give forward-only passes (an
      evaluation, a second split) a tracker of their own.
    - Epochs are counted by `end_epoch`, on the host: a CUDA graph that holds an update goes on in the epoch it was
      captured in.
    - Token-level scores: reduce them by `Scores.to_sequences` first; an index repeated over tokens counts the last one.
    - With `torch.compile`, let the compiled step return its scores and call `update` after it: inside, it breaks the
      graph, and ``fullgraph=True`` refuses it.

    Not an `nn.Module` on purpose: as part of a model its state would be broadcast from rank 0 at each forward of
    `DistributedDataParallel`, and turned to half precision by ``model.half()``.

    Args:
        num_examples: size of the data set; indices are 0 .. num_examples - 1.
        fields: what to keep: ``"all"``, or names of `FIELDS` and `Field` objects such as ``Mean("entropy", (2, 4))``.
            The default is what `report` needs and the three best-known means.
        device: where the state lives; the device of the logits.

    Memory: 12 bytes an example, 4 of workspace, and what each field states, some 100 with all of `FIELDS`. Loading a
    state and merging processes keep one copy of what is summed.

    Attributes:
        num_examples, fields: as given; names of fields are resolved.
        statistics: name to `Statistic`, all that can be read.
        epoch: the epoch now, from 1.
        step: updates so far, on the rank that made most.

    Raises:
        TypeError: ``num_examples`` is no int, or ``fields`` holds something else than names and fields.
        ValueError: ``num_examples`` is not positive, or a field is unknown.
    """

    def __init__(
        self,
        num_examples: int,
        fields: str | Iterable[str | Field] = DEFAULT_FIELDS,
        device: torch.device | str | None = None,
    ) -> None:
        check_integer("ExampleTracker", "num_examples", num_examples, 1)
        self.num_examples = num_examples = int(num_examples)
        self.fields = resolve(fields)
        self.statistics: dict[str, Statistic] = {s.name: s for field in self.fields for s in field.statistics}
        self.epoch, self.step = 1, 0
        self._columns = CORE + tuple(column for field in self.fields for column in field.columns)
        device = torch.get_default_device() if device is None else device
        # one spare row at the end takes what is to be skipped: no mask, no nonzero, no synchronisation
        self._state = {c.name: _initial(c, num_examples + 1, device) for c in self._columns}
        self._base: State | None = None  # summed columns at the last merge; None: as they began
        self._since_merge: str | None = None  # kind of the updates since then: "own" rows or "gathered" ones
        self._slot = torch.full((num_examples + 1,), -1, dtype=torch.int32, device=device)

    def __repr__(self) -> str:
        fields = ", ".join(field.name for field in self.fields)
        return f"ExampleTracker({self.num_examples} examples; {fields}; epoch {self.epoch}; {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self._slot.device

    @property
    def count(self) -> Tensor:
        """Observations of each example, int32 [num_examples]."""
        return self._state["count"][:-1].clone()

    @property
    def seen(self) -> Tensor:
        """Whether each example has been observed, bool [num_examples]."""
        return self._state["count"][:-1] > 0

    @property
    def last_step(self) -> Tensor:
        """Update at which each example was last observed, counted from 1; 0 if never. int32 [num_examples]."""
        return self._state["last_step"][:-1].clone()

    @_disable_dynamo  # as torch.compiler.disable, which would import the compiler together with this package
    @torch.no_grad()
    def update(
        self,
        scores: Scores,
        index: Tensor,
        target: Tensor | None = None,
        *,
        random_label_loss: Tensor | None = None,
        validate: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        """Observe a batch.

        Args:
            scores: of the batch, any shape; on the tracker's device.
            index: which example each row is, integers shaped like the scores, -1 for rows to skip.
            target: the labels, shaped like the scores; None takes what the scores know. They settle ties between the
                label's logit and the largest other one, as `torch.argmax` would (a tie counts as wrong without), and
                let the report say which label was given and which is suggested.
            random_label_loss: of the batch, for the field of that name; see `random_label_loss`. Without that field it
                changes nothing.
            validate: on a GPU, wait and raise for indices out of range; otherwise such rows are skipped there. A CPU
                index is always checked.
            group: first gather the rows of every process of this group (``torch.distributed.group.WORLD`` for all),
                so that all hold the same state after each step and nothing is left to merge. Every process gives the
                same number of rows: pad with index -1.

        Raises:
            TypeError: ``scores`` is not `Scores`, or an argument is not a tensor.
            RuntimeError: shapes, dtypes or devices do not go together; updates with and without ``group`` are mixed.
            IndexError: an index is below -1 or not below ``num_examples``. The state is as before, whatever is raised.
        """
        _check_batch(scores, index, target, random_label_loss, self.device)
        mode = "own" if group is None else "gathered"
        if self._since_merge not in (None, mode):
            raise RuntimeError("update: with and without group between two merges counts rows twice; merge() first")
        if validate or index.device.type == "cpu":
            self._check_range(index)
        index = index.to(self.device, torch.int64, non_blocking=True).reshape(-1)
        target = scores.label if target is None and scores.target is not None else target
        target = None if target is None else target.detach().reshape(-1)
        scores = Scores._make([_float32(column.detach().reshape(-1)) for column in scores])
        correct = scores.margin > 0 if target is None else scores.correct(target)
        if random_label_loss is not None:
            random_label_loss = _float32(random_label_loss.detach().reshape(-1))
        if group is not None:
            scores, index, correct, target, random_label_loss = merge.gather(
                scores, index, correct, target, random_label_loss, group
            )
        rows = self._rows(index, scores)
        labelled = torch.where(scores.loss.isnan(), self.num_examples, rows)
        batch = Batch(rows, labelled, self.num_examples, scores, correct, random_label_loss, self.epoch, target)
        self.step += 1
        self._since_merge = mode
        for field in self.fields:
            field.update(self._state, batch)
        one = torch.ones_like(rows, dtype=torch.int32)
        self._state["count"].index_add_(0, rows, one)
        self._state["label_count"].index_add_(0, labelled, one)
        self._state["last_step"].scatter_(0, rows, self.step * one)

    def _rows(self, index: Tensor, scores: Scores) -> Tensor:
        """Return where each row goes: the last row of each example to its own, all others to the spare one."""
        skipped = (index < 0) | (index >= self.num_examples) | scores.entropy.isnan()
        rows = torch.where(skipped, self.num_examples, index)
        position = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        self._slot.scatter_reduce_(0, rows, position, "amax")
        last = self._slot.index_select(0, rows) == position
        self._slot.index_fill_(0, rows, -1)
        return torch.where(last, rows, self.num_examples)

    def _check_range(self, index: Tensor) -> None:
        if not index.numel():
            return
        low, high = (int(bound) for bound in index.aminmax())
        if low < -1 or high >= self.num_examples:
            raise IndexError(
                f"index: expected -1 (skipped) or 0 .. {self.num_examples - 1}, got {low if low < -1 else high}"
            )

    def end_epoch(self) -> None:
        """Begin the next epoch.

        Raises:
            OverflowError: after 32766 epochs.
        """
        if self.epoch == LAST_EPOCH:
            raise OverflowError(f"end_epoch: epochs are counted to {LAST_EPOCH}")
        self.epoch += 1
        for field in self.fields:
            for state in (self._state, self._base):
                if state is not None:
                    field.end_epoch(state)

    def merge(self, group: ProcessGroup | None = None) -> None:
        """Make the state of every process the one that a single process would have; collective, at each epoch's end.

        What each process has added since the last merge is summed, so that nothing counts twice; see `Column` for the
        rules. An example that several processes observed between two merges keeps the streak, the last losses and the
        learning state of the one that did so at the latest step. Every process needs its own rows:
        `DistributedSampler` repeats a few examples to even out the ranks, and those are observed twice in that epoch;
        pad with index -1 where that matters. Without `torch.distributed` this does nothing.

        Args:
            group: of the processes that share the tracker; None is all.

        Raises:
            RuntimeError: the processes differ in data set, fields or epoch. On every process, before anything changes.
        """
        if not merge.several(group):
            self._since_merge = None
            return
        gathered = self._since_merge == "gathered"
        merge.agree({**self._header(), "epoch": self.epoch, "update(group=...)": gathered}, group)
        if not gathered:
            base = self._base or {c.name: _initial(c, self.num_examples, self.device) for c in self._columns}
            merge.merge(self._columns, self.fields, self._examples(), base, group)
            self.step = merge.most(self.step, self.device, group)
        self._mark_merged()

    def statistic(self, name: str) -> Tensor:
        """Return a statistic of every example: float32 [num_examples], NaN where not observed (``log_weight``: 0).

        Raises:
            ValueError: the name is unknown, or of a field that is not kept.
        """
        if name not in self.statistics:
            raise ValueError(f"statistic: expected one of {', '.join(self.statistics)}, got {name!r}")
        return self.statistics[name].read(self._examples())

    def difficulty(self, name: str, unseen: float = math.nan) -> Tensor:
        """Return the statistic times its direction: higher is harder, whichever is asked for.

        Args:
            name: of a statistic.
            unseen: what stands for examples without the statistic: never observed, or not often enough. NaN takes no
                part in a policy and is visited by `DifficultySampler`; +inf ranks first.

        Raises:
            ValueError: as `statistic`.
            TypeError: ``unseen`` is no number.
        """
        if unseen == unseen:
            check_number("difficulty", "unseen", unseen, "[-inf, inf]")
        difficulty = self.statistic(name) * self.statistics[name].direction
        return torch.where(difficulty.isnan(), unseen, difficulty)

    def random_label_quantile(self, p: float = 0.1) -> Tensor:
        """Return the p-quantile of the random-label losses of the last finished epoch, a scalar float32 tensor.

        Of the current epoch while the first one lasts. NaN if none was given to `update`.

        Args:
            p: in (0, 1). 0.1 flags mislabelled examples that are to be dropped, 0.07 guards a prioritiser; both were
                tried with 5 and 10 classes only, and the best value moves with the noise rate.

        Raises:
            TypeError: p is no number.
            ValueError: p is out of range, or the field ``random_label_loss`` is not kept.
        """
        check_number("random_label_quantile", "p", p, "(0, 1)")
        if "random_label_counts" not in self._state:
            raise ValueError("random_label_quantile: the field 'random_label_loss' is not kept")
        name = "random_label_counts" + ("_before" if self.epoch > 1 else "")
        return random_labels.quantile(self._state[name], p)

    def labels(self) -> Labels:
        """Return the label each example was given, the one its predictions suggest, and the confidence in both.

        Raises:
            ValueError: the field ``suggested_label`` is not kept.
        """
        if "suggested" not in self._state:
            raise ValueError("labels: the field 'suggested_label' is not kept")
        return suggested.labels(self._examples())

    def report(self, suspect: float = 0.15, uncertain: float = 0.15) -> Report:
        """Return the map of the data set: easy, hard, suspect label, suspect input; waits for the tracker's device.

        The tracker must keep ``mean_el2n`` and ``early_entropy``, as by default. The default window of the latter is
        epoch 6: a shorter training needs a window of its own, given to the tracker before it,
        ``fields=("mean_el2n", Mean("entropy", (first, last)))``.

        Args:
            suspect: share of the examples with the largest mean EL2N to suspect, in [0, 1]; about the share of damage
                expected, or of what there is time to look at.
            uncertain: share with the largest early entropy to call hard or bad input, in [0, 1].

        Raises:
            TypeError: a share is no number.
            ValueError: a share is out of range, a field is missing, or no example was observed in the early window.
        """
        columns = {name: self.statistic(name).cpu() for name in self.statistics}
        labels = Labels._make(x.cpu() for x in self.labels()) if "suggested" in self._state else None
        try:
            return Report.of(columns, labels, suspect, uncertain)
        except NothingKnown as error:
            raise ValueError(self._nothing_known(error.name)) from None

    def _nothing_known(self, name: str) -> str:
        """Return why no example has the statistic, and what to do about it."""
        said = f"report: no example has {self.statistics[name].formula}"
        if not self.step:
            return f"{said}: the tracker has had no update"
        if name == "mean_el2n":
            return f"{said}: it needs examples with a label, in the early window too"
        if self.epoch == 1:
            said += f": all {self.step} updates are of epoch 1. Call tracker.end_epoch() after every epoch"
        else:
            said += f": epochs 1 to {self.epoch - 1} have ended, the epoch is {self.epoch}. Train longer"
        return said + (
            ', or for a shorter training keep an earlier window: ExampleTracker(num_examples, fields=("mean_el2n", '
            'Mean("entropy", (first, last))))'
        )

    def reset(self) -> None:
        """Forget everything: the state, the epoch and the step are as in a new tracker."""
        for column in self._columns:
            self._state[column.name].fill_(column.initial)
        self.epoch, self.step = 1, 0
        self._base = self._since_merge = None

    def to(self, device: torch.device | str) -> ExampleTracker:
        """Move the state to a device; return the tracker."""
        self._state = {name: column.to(device) for name, column in self._state.items()}
        if self._base is not None:
            self._base = {name: column.to(device) for name, column in self._base.items()}
        self._slot = self._slot.to(device)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state as plain values and tensors. With several processes `merge` first."""
        return {
            **self._header(),
            "epoch": self.epoch,
            "step": self.step,
            "columns": {name: column.clone() for name, column in self._examples().items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, on any number of processes.

        Raises:
            TypeError: ``state_dict`` is not a dict.
            ValueError: it is of another data-set size, other fields or another version, or incomplete. The state is
                as before, whatever is raised.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"load_state_dict: expected a dict, got {type(state_dict).__name__}")
        for key, expected in self._header().items():
            if state_dict.get(key) != expected:
                raise ValueError(f"load_state_dict: expected {key} {expected}, got {state_dict.get(key)}")
        columns, examples = state_dict.get("columns"), self._examples()
        if not isinstance(columns, dict) or columns.keys() != examples.keys():
            raise ValueError(f"load_state_dict: expected columns {', '.join(examples)}")
        for name, column in examples.items():
            given = columns[name]
            if not isinstance(given, Tensor) or given.shape != column.shape or given.dtype != column.dtype:
                got = f"{list(given.shape)} {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"load_state_dict: expected {name} {list(column.shape)} {column.dtype}, got {got}")
        epoch: Any = state_dict.get("epoch")
        step: Any = state_dict.get("step")
        whole = type(epoch) is int and type(step) is int
        if not (whole and 1 <= epoch <= LAST_EPOCH and step >= 0):
            raise ValueError(
                f"load_state_dict: expected a whole epoch in [1, {LAST_EPOCH}] and step >= 0, got {epoch} and {step}"
            )
        for name, column in examples.items():
            column.copy_(columns[name])
        self.epoch, self.step = epoch, step
        self._mark_merged()

    def _header(self) -> dict[str, Any]:
        """Return what a state must share with the tracker that takes it."""
        fields = sorted(repr(field) for field in self.fields)
        return {"version": VERSION, "num_examples": self.num_examples, "fields": fields}

    def _mark_merged(self) -> None:
        """Remember the summed columns: what is added from here on is what `merge` adds up."""
        summed = {column.name for column in self._columns if column.merge in ("sum", "own")}
        self._base = {name: column.clone() for name, column in self._examples().items() if name in summed}
        self._since_merge = None

    def _examples(self) -> State:
        """Return the state without the spare row, as views."""
        tables = {column.name for column in self._columns if column.length is not None}
        return {name: column if name in tables else column[:-1] for name, column in self._state.items()}


def _initial(column: Column, rows: int, device: torch.device | str) -> Tensor:
    return torch.full((column.length or rows,), column.initial, dtype=column.dtype, device=device)


def _float32(column: Tensor) -> Tensor:
    return column.to(torch.float32) if column.is_floating_point() else column


def _check_batch(
    scores: Scores, index: Tensor, target: Tensor | None, random_label_loss: Tensor | None, device: torch.device
) -> None:
    """Raise unless everything is a tensor of the batch's shape, of a fitting dtype, on the tracker's device."""
    if not isinstance(scores, Scores):
        raise TypeError(f"scores: expected Scores, got {type(scores).__name__}")
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected a tensor, got {type(index).__name__}")
    _check_integers("index", index)
    tensors: dict[str, Any] = {f"scores.{name}": column for name, column in scores._asdict().items()}
    tensors |= {"target": target, "random_label_loss": random_label_loss}
    for name, tensor in tensors.items():
        if tensor is None and not name.startswith("scores."):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.shape != index.shape:
            raise RuntimeError(f"{name}: expected the shape of index {list(index.shape)}, got {list(tensor.shape)}")
        if tensor.device != device:
            raise RuntimeError(f"{name}: expected to be on the tracker's device {device}, got {tensor.device}")
        if name in ("target", "scores.runner_up"):
            _check_integers(name, tensor)
        elif not tensor.is_floating_point():
            raise RuntimeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")


def _check_integers(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise RuntimeError(f"{name}: expected an integer dtype, got {tensor.dtype}")
