"""A DataLoader sampler that leaves out examples by what is known of them, before they cost a forward pass."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .checks import TAKEN_OUT, check_integer, check_vector
from .selective import Selection

__all__ = ["DifficultySampler"]

Policy = Callable[[Tensor, torch.Generator], Tensor]
STATE = ("seed", "epoch", "rank", "world_size", "order", "weight", "position")


@dataclass
class _Plan:
    """An epoch: whom it visits, in which order, with which weights; and how far that has come."""

    epoch: int
    order: Tensor  # of this process
    weight: Tensor  # of all examples
    start: int = 0  # where its iterators begin
    reached: int = 0  # the furthest place of any of them
    begun: int = 0  # how many there were
    loaded: bool = False

    @property
    def finished(self) -> bool:
        return self.reached >= len(self.order)

    def visit(self) -> Iterator[int]:
        for place in range(self.start, len(self.order)):
            self.reached = max(self.reached, place + 1)
            yield int(self.order[place])


class DifficultySampler(Sampler[int]):
    """Visit, in random order, the examples to which a policy gives a weight.

    At the start of every epoch the policy sees the difficulty of all examples (stale: from when each was last seen)
    and returns their weights for the epoch; those of weight 0 are skipped and cost nothing. Multiply the losses by
    ``sampler.weight[index]``. What is not known is visited, so that nobody starves; what `guarded` took out is not.

    The same on every process: the draw depends on (seed, epoch) and on the difficulty, which must be merged over
    processes first. Process ``rank`` takes every ``world_size``-th of the shuffled order; up to ``world_size - 1`` are
    left over for the epoch, so that shards are disjoint and of equal length. Skip `DistributedSampler`. Where a library
    shards what the sampler gives (accelerate, Lightning), leave ``rank`` and ``world_size`` alone.

    Some trainers count the batches of an epoch beforehand: a Trainer of transformers once, from the first epoch,
    Lightning whenever it loads the loader (`bonus_ops.integrations.lightning` sees to it).

    Args:
        difficulty: float [num_examples], or a function that returns it, called once an epoch. Higher is harder. NaN
            and +inf are not known, or never seen: visited with weight 1. -inf is taken out, as by `guarded`: weight 0.
            The policy gets NaN for all three. ``lambda: tracker.difficulty("recent_loss")`` will do.
        policy: ``(difficulty, generator) -> weight [num_examples]``, on the CPU, finite and >= 0 (what it gives for NaN
            does not matter); a bool mask will do. A `Selection` is not a weight: take its ``keep`` or
            ``unbiased_weight``.
        seed: the same on every process.
        rank: of this process, in [0, world_size).
        world_size: number of processes.

    Attributes:
        epoch: the epoch last begun, or the one set since.

    **DataLoader.** ``DataLoader(data, batch_size, sampler=sampler)``, without ``shuffle``. It gives examples and is no
    ``batch_sampler``: `torch.utils.data.BatchSampler` makes one of it.

    **Epochs.** Call `set_epoch` before every epoch, as with `DistributedSampler`. An iterator keeps the plan and the
    place it began with, whatever is set or iterated meanwhile. Until one of an epoch's iterators has given its last
    example, a further one (a look at the first batch) begins the same epoch; after that, without `set_epoch`, the next.

    **Saving.** `state_dict` holds the epoch's plan and the place in it, so that a resumed run visits the rest of the
    same epoch (``len`` stays that of the whole), or the next epoch where that one was finished. The place is what was
    handed out; a DataLoader with workers, or a library that looks ahead, has taken more than was trained: say what was
    by ``state_dict(position=...)``.

    Raises:
        As all policies; also where the weights have a wrong shape, are negative or not finite, or leave this process no
            example to visit.

    Example:
        >>> import math, torch
        >>> from bonus_ops.policies import *
        >>> loss = torch.tensor([0.1, 5.0, 0.2, 6.0, math.nan])  # a suspect, and one never seen
        >>> loss = guarded(loss, loss > 5.5)
        >>> sorted(DifficultySampler(loss, lambda d, g: small_loss(d, keep=0.7)))
        [0, 2, 4]

        With a tracker, ``difficulty`` may be a function of no arguments, and a `Selection` gives what it keeps:

        >>> def selective(d, g):
        ...     return selective_backprop(d, History.empty(len(d)).push(d), generator=g).keep
        >>> 4 in DifficultySampler(lambda: loss, selective)  # what was never seen is visited
        True
    """

    def __init__(
        self,
        difficulty: Tensor | Callable[[], Tensor],
        policy: Policy,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not callable(policy):
            raise TypeError(f"DifficultySampler: policy must be a function, got {type(policy).__name__}")
        if not callable(difficulty):
            check_vector("DifficultySampler", "difficulty", difficulty)
        check_integer("DifficultySampler", "seed", seed, 0)
        check_integer("DifficultySampler", "world_size", world_size, 1)
        check_integer("DifficultySampler", "rank", rank, 0)
        if rank >= world_size:
            raise ValueError(f"DifficultySampler: rank must be below world_size {world_size}, got {rank}")
        self.difficulty, self.policy = difficulty, policy
        self.seed, self.rank, self.world_size = int(seed), int(rank), int(world_size)
        self.epoch = 0
        self._plan: _Plan | None = None  # of the epoch, made when first asked for
        self._begun: _Plan | None = None  # of the last iterator

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator be of this epoch, from its beginning, with the difficulty of then.

        Iterators that run are not touched. An epoch that has begun, or was loaded, and is not finished keeps its plan
        and where it starts.

        Raises:
            TypeError, ValueError: ``epoch`` is no int (of Python or numpy), or negative.
        """
        check_integer("DifficultySampler.set_epoch", "epoch", epoch, 0)
        plan = self._plan
        if plan and plan.epoch == epoch and (plan.begun or plan.loaded) and not plan.finished:
            plan.begun = min(plan.begun, 1)  # again, and on purpose
            return
        self.epoch, self._plan = int(epoch), None

    @property
    def weight(self) -> Tensor:
        """Weight of each example in the epoch last begun, or to come: float [num_examples] on the CPU, 0 if skipped."""
        return (self._begun or self._planned()).weight

    def __len__(self) -> int:
        """Return how many examples this process visits in the epoch: the last begun, or the one set since."""
        return len(self._planned().order)

    def __iter__(self) -> Iterator[int]:
        _refuse_batches(self)
        plan = self._planned()
        if plan.finished:
            plan = self._made(self.epoch + 1)  # may raise: the epoch is not begun then
        if plan.begun > 1:
            warnings.warn(
                f"DifficultySampler: epoch {plan.epoch} begins for the {plan.begun + 1}. time, none of its iterators "
                f"came to the end ({plan.reached} of {len(plan.order)}): the same examples come first again. Call "
                "set_epoch before every epoch.",
                stacklevel=2,
            )
        plan.begun += 1
        self.epoch, self._plan, self._begun = plan.epoch, plan, plan
        return plan.visit()

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Return seed and epoch (from which the generator starts), this epoch's order and weights, and the place.

        Args:
            position: how many examples of this epoch this process has trained on, from the epoch's beginning, what was
                trained before a resumption included: batches times batch size, at most ``len(sampler)``; where a
                library shards what the sampler gives, of all processes together. None takes what was handed out,
                which is more where a DataLoader has workers: they fetch ahead.

        Raises:
            TypeError, ValueError: ``position`` is no int, negative, or more than the epoch has.
        """
        plan = self._begun
        if plan is None or (position is None and plan.finished and plan is not self._plan):
            plan = self._planned()
        if position is not None:
            check_integer("DifficultySampler.state_dict", "position", position, 0)
            _check_position("DifficultySampler.state_dict", position, plan.order)
        return {
            "seed": self.seed,
            "epoch": plan.epoch,
            "rank": self.rank,
            "world_size": self.world_size,
            "order": plan.order.clone(),
            "weight": plan.weight.clone(),
            "position": plan.reached if position is None else int(position),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the sampler must have the same rank, world size and number of examples.

        Raises:
            TypeError: ``state`` or an entry is of another type; nothing is changed.
            ValueError: they differ, or an entry is missing or out of range; nothing is changed.
        """
        if not isinstance(state, dict):
            raise TypeError(f"DifficultySampler.load_state_dict: expected a dict, got {type(state).__name__}")
        if missing := [key for key in STATE if key not in state]:
            raise ValueError(f"DifficultySampler.load_state_dict: expected {', '.join(STATE)}, lacks {missing}")
        _check_state(state)
        known = {"rank": self.rank, "world_size": self.world_size, "num_examples": len(self._read())}
        came = {"rank": state["rank"], "world_size": state["world_size"], "num_examples": len(state["weight"])}
        if known != came:
            raise ValueError(f"DifficultySampler.load_state_dict: expected {known}, got {came}")
        self.seed, self.epoch, place = int(state["seed"]), int(state["epoch"]), int(state["position"])
        order, weight = state["order"].clone(), state["weight"].clone()
        self._plan = _Plan(self.epoch, order, weight, start=place, reached=place, loaded=True)
        self._begun = None

    def __repr__(self) -> str:
        planned = None if self._plan is None else self._plan.weight
        known = planned if callable(self.difficulty) else self.difficulty  # a function is not called for this
        num_examples = "?" if known is None else len(known)
        return (
            f"DifficultySampler(num_examples={num_examples}, epoch={self.epoch}, seed={self.seed}, rank={self.rank}, "
            f"world_size={self.world_size})"
        )

    def _read(self) -> Tensor:
        difficulty = self.difficulty() if callable(self.difficulty) else self.difficulty
        check_vector("DifficultySampler", "difficulty", difficulty)
        return difficulty.detach().cpu()

    def _planned(self) -> _Plan:
        """Return the plan of the epoch last begun, or set since."""
        if self._plan is None:
            self._plan = self._made(self.epoch)
        return self._plan

    def _made(self, epoch: int) -> _Plan:
        difficulty = self._read()
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
        taken_out = difficulty == TAKEN_OUT
        unknown = difficulty.isnan() | (difficulty == math.inf)
        known = difficulty.masked_fill(taken_out | unknown, math.nan)
        weight = self._checked(self.policy(known, generator), known).masked_fill(unknown, 1.0)
        chosen = weight.nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        chosen = chosen[: len(chosen) // self.world_size * self.world_size]
        if len(chosen) == 0:
            raise ValueError(
                f"DifficultySampler: expected a weight above 0 for at least {self.world_size} of {len(weight)} "
                f"examples (one a process), got {int((weight > 0).sum())}; {int(taken_out.sum())} have the difficulty "
                "-inf, which `guarded` gives to what it takes out"
            )
        return _Plan(epoch, chosen[self.rank :: self.world_size], weight)

    @staticmethod
    def _checked(weight: object, difficulty: Tensor) -> Tensor:
        """Return the policy's weights as float32, 0 where the difficulty is NaN."""
        if not isinstance(weight, Tensor):
            hint = ": take its keep or unbiased_weight" if isinstance(weight, Selection) else ""
            raise TypeError(f"DifficultySampler: policy must return a Tensor, got {type(weight).__name__}{hint}")
        if weight.shape != difficulty.shape:
            raise RuntimeError(
                f"DifficultySampler: policy must return weights of shape {list(difficulty.shape)}, got "
                f"{list(weight.shape)}"
            )
        weight = weight.detach().cpu().float().masked_fill(difficulty.isnan(), 0.0)
        wrong = weight[~((weight >= 0) & (weight < math.inf))]
        if len(wrong):
            raise ValueError(f"DifficultySampler: policy must return finite weights >= 0, got {float(wrong[0])}")
        return weight


def _refuse_batches(sampler: DifficultySampler) -> None:
    """Raise where a DataLoader asks for batches, of which torch would say, from a worker, that an int is not iterable.

    A sampler is told neither which it is nor by whom it is iterated, so the DataLoader is looked for where torch has
    it. Where it is not found, torch's own error remains. Integers that raise when iterated would need no look, but
    pandas, and whoever else asks for ``__iter__`` first, takes them for lists.
    """
    loader: Any = sys._getframe(2).f_locals.get("loader")  # of the caller of __iter__
    if isinstance(loader, DataLoader) and id(loader.batch_sampler) == id(sampler):
        raise TypeError(
            "DifficultySampler gives examples, not batches: expected DataLoader(..., sampler=), got batch_sampler="
        )


def _check_state(state: dict[str, Any]) -> None:
    """Raise unless the entries are what `state_dict` gives."""
    name = "DifficultySampler.load_state_dict"
    for key in ("seed", "epoch", "rank", "world_size", "position"):
        check_integer(name, key, state[key], 0)
    check_vector(name, "weight", state["weight"])
    order, n_examples = state["order"], len(state["weight"])
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.dim() != 1:
        came = f"{order.dtype} {list(order.shape)}" if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"{name}: order must be an int64 tensor [N], got {came}")
    _check_position(name, state["position"], order)
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < n_examples:
        came = f"{int(order.min())} to {int(order.max())}"
        raise ValueError(f"{name}: order must be of examples below {n_examples}, got {came}")


def _check_position(name: str, position: int, order: Tensor) -> None:
    if position > len(order):
        raise ValueError(f"{name}: position must be at most {len(order)}, got {position}")
