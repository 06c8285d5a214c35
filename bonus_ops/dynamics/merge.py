"""Many processes: one state from the states of all, or the rows of all before an update. Nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..scores import Scores
from .field import Column, Field, State

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agree", "gather", "merge", "most", "several"]

REDUCE = {"min": distributed.ReduceOp.MIN, "max": distributed.ReduceOp.MAX} if distributed.is_available() else {}


def several(group: ProcessGroup | None) -> bool:
    """Return whether there is anything to merge: a process group of at least two."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def agree(what: dict[str, Any], group: ProcessGroup | None) -> None:
    """Raise RuntimeError on every process unless all of them give the same."""
    everyone: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, what, group=group)
    for key in what:
        values = [each[key] for each in everyone]
        if any(value != values[0] for value in values):
            raise RuntimeError(f"merge: the processes differ in {key}: {', '.join(map(str, values))}")


def most(steps: int, device: torch.device, group: ProcessGroup | None) -> int:
    """Return the largest number of steps any process made."""
    return int(_all_reduce(torch.tensor(steps, device=device), group, REDUCE["max"]))


def merge(
    columns: Iterable[Column], fields: Iterable[Field], state: State, base: State, group: ProcessGroup | None
) -> None:
    """Write the merged state into ``state``, whose ``"sum"`` and ``"own"`` columns were ``base`` at the last merge."""
    latest = _latest(state["last_step"], group)
    own = [(field, field.summands(state, base)) for field in fields]  # before counts are merged
    for column in columns:
        here = state[column.name]
        if column.merge == "sum":
            here.copy_(base[column.name] + _all_reduce(_added(here, base[column.name]), group))
        elif column.merge == "last":  # everyone else adds zero, so infinities and NaN pass unchanged
            here.copy_(_all_reduce(torch.where(latest, here, 0), group))
        elif column.merge in REDUCE:
            here.copy_(_all_reduce(here, group, REDUCE[column.merge]))
    for field, summands in own:
        if summands:
            field.absorb(state, base, {name: _all_reduce(summand, group) for name, summand in summands.items()})


def gather(
    scores: Scores,
    index: Tensor,
    correct: Tensor,
    target: Tensor | None,
    random_label_loss: Tensor | None,
    group: ProcessGroup,
) -> tuple[Scores, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the rows of all processes, in the order of their ranks."""
    numbers = list(scores[:-1])
    if random_label_loss is not None:
        numbers.append(random_label_loss)
    packed = _all_gather(torch.stack(numbers, 1), group)
    integers = [index, scores.runner_up.to(torch.int64), correct.to(torch.int64)]
    if target is not None:
        integers.append(target.to(torch.int64))
    whole = _all_gather(torch.stack(integers, 1), group)
    every = Scores._make([*packed[:, :5].unbind(1), whole[:, 1].to(torch.int32)])
    targets = None if target is None else whole[:, 3]
    return every, whole[:, 0], whole[:, 2] > 0, targets, None if random_label_loss is None else packed[:, 5]


def _latest(last_step: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return of which examples this process made the latest observation, the highest rank of equals; bool."""
    key = last_step.to(torch.int64) * distributed.get_world_size(group) + distributed.get_rank(group)
    return key == _all_reduce(key, group, REDUCE["max"])


def _added(now: Tensor, before: Tensor) -> Tensor:
    """Return ``now - before``, 0 where nothing was added to an infinite sum."""
    return torch.where(now == before, torch.zeros_like(now), now - before)


def _all_reduce(values: Tensor, group: ProcessGroup | None, op: Any = None) -> Tensor:
    """Return the reduction over all processes as a new tensor; int16 travels as int32, which every backend has."""
    sent = values.to(torch.int32) if values.dtype in (torch.int16, torch.uint8) else values.clone()
    distributed.all_reduce(sent, distributed.ReduceOp.SUM if op is None else op, group=group)
    return sent


def _all_gather(rows: Tensor, group: ProcessGroup) -> Tensor:
    everyone = [torch.empty_like(rows) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(everyone, rows.contiguous(), group=group)
    return torch.cat(everyone)
