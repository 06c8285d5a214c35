"""A DataLoader sampler that leaves out examples by what is known of them, before they cost a forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .checks import check_integer, check_vector
from .selective import Selection

__all__ = ["DifficultySampler"]

Policy = Callable[[Tensor, torch.Generator], Tensor]
STATE = ("seed", "epoch", "rank", "world_size", "order", "weight", "position")


class DifficultySampler(Sampler[int]):
    """Visit, in random order, the examples to which a policy gives a weight.

    At the start of every epoch the policy sees the difficulty of all examples (stale: from when each was last seen)
    and returns their weights for the epoch; those of weight 0 are skipped and cost nothing. Multiply the losses by
    ``sampler.weight[index]``. NaN takes no part here either: what `guarded` took out is not visited.

    The same on every process: the draw depends on (seed, epoch) and on the difficulty, which must be merged over
    processes first. Process ``rank`` takes every ``world_size``-th of the shuffled order; up to ``world_size - 1`` are
    left over for the epoch, so that shards are disjoint and of equal length. Skip `DistributedSampler`.

    Args:
        difficulty: float [num_examples], or a function that returns it, called once an epoch. Higher is harder. NaN
            takes no part: weight 0. +inf was never seen: visited with weight 1, and the policy gets NaN for it. An
            `ExampleTracker` gives NaN for the unseen: ``nan_to_num(nan=math.inf)``, before `guarded`.
        policy: ``(difficulty, generator) -> weight [num_examples]``, on the CPU, finite and >= 0 (what it gives for NaN
            does not matter); a bool mask will do. A `Selection` is not a weight: take its ``keep`` or
            ``unbiased_weight``.
        seed: the same on every process.
        rank: of this process, in [0, world_size).
        world_size: number of processes.

    Attributes:
        weight: float [num_examples] on the CPU, of the present epoch.

    Call `set_epoch` before every epoch, so that ``len`` is that epoch's; without it each new iteration starts the next.
    `state_dict` holds the epoch's plan and the place in it, so that a resumed run visits the rest of the same epoch
    (``len`` stays that of the whole), or the next epoch where that one was finished. It counts what was handed out:
    with workers, a DataLoader fetches ahead of what was trained.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of a wrong type, range or shape; a policy whose weights have
            a wrong shape, are negative or not finite, or leave this process no example to visit.

    Example:
        >>> import math, torch
        >>> from bonus_ops.policies import *
        >>> loss = torch.tensor([0.1, 5.0, 0.2, math.nan, math.inf])  # the last two: a suspect, one never seen
        >>> sorted(DifficultySampler(loss, lambda d, g: small_loss(d, keep=0.7)))
        [0, 2, 4]

        What was seen last, the suspects left out, with each policy that draws:

        >>> from bonus_ops import difficulty_scores
        >>> from bonus_ops.dynamics import ExampleTracker
        >>> tracker = ExampleTracker(100, fields="all")
        >>> def difficulty():
        ...     recent = tracker.statistic("recent_loss")
        ...     return guarded(recent.nan_to_num(nan=math.inf), noise_mask(recent, 4.0))
        >>> def selective(d, g):
        ...     return selective_backprop(d, History.empty(len(d)).push(d), generator=g).keep
        >>> pruned = DifficultySampler(difficulty, lambda d, g: infobatch(d, generator=g))
        >>> drawn = DifficultySampler(difficulty, lambda d, g: poisson_selection(d, 50, generator=g).unbiased_weight)
        >>> chosen = DifficultySampler(difficulty, selective)
        >>> len(pruned), len(drawn), len(chosen)  # nothing was seen yet
        (100, 100, 100)
        >>> logits = torch.zeros(90, 10).index_fill(1, torch.tensor(0), 3.0)
        >>> logits[:5, 0] = -9  # suspects
        >>> logits[5:50, 0] = 0
        >>> target = torch.zeros(90, dtype=torch.long)
        >>> for _ in range(2):  # the recent loss is known after two epochs
        ...     tracker.update(difficulty_scores(logits, target), torch.arange(90), target)
        ...     tracker.end_epoch()
        >>> for sampler in (pruned, drawn, chosen):
        ...     sampler.set_epoch(1)
        ...     visited = set(sampler)
        ...     print(visited.isdisjoint(range(5)), visited.issuperset(range(90, 100)), len(visited) < 95)
        True True True
        True True True
        True True True
        >>> pruned
        DifficultySampler(num_examples=100, epoch=1, seed=0, rank=0, world_size=1)
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
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self._order: Tensor | None = None  # of this process, made when first asked for
        self._weight: Tensor | None = None
        self._position = 0
        self._iterated = False
        self._resumed = False  # in the middle of an epoch, not iterated since

    def set_epoch(self, epoch: int) -> None:
        """Start this epoch at the next iteration, from its beginning, with the difficulty of then.

        Right after `load_state_dict` of an unfinished epoch, that epoch keeps its plan and place.
        """
        check_integer("DifficultySampler.set_epoch", "epoch", epoch, 0)
        if self._resumed and epoch == self.epoch:
            return
        self.epoch, self._order, self._position = epoch, None, 0
        self._iterated = self._resumed = False

    @property
    def weight(self) -> Tensor:
        """Weight of every example in the present epoch, float [num_examples]; 0 where skipped."""
        self._plan()
        assert self._weight is not None
        return self._weight

    def __len__(self) -> int:
        """Return how many examples this process visits in the present epoch: the last begun, or the one set."""
        return len(self._plan())

    def __iter__(self) -> Iterator[int]:
        if self._iterated:
            self.set_epoch(self.epoch + 1)
        order = self._plan()  # may raise: the epoch is not begun then
        self._iterated, self._resumed = True, False
        while self._position < len(order):
            self._position += 1
            yield int(order[self._position - 1])

    def state_dict(self) -> dict[str, Any]:
        """Return seed and epoch (from which the generator starts), this epoch's order and weights, and the place."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "rank": self.rank,
            "world_size": self.world_size,
            "order": self._plan().clone(),
            "weight": self.weight.clone(),
            "position": self._position,
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
        self.seed, self.epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order, self._weight = state["order"].clone(), state["weight"].clone()
        self._iterated = self._position >= len(self._order)  # finished: the next iteration is of the next epoch
        self._resumed = not self._iterated

    def __repr__(self) -> str:
        known = self._weight if callable(self.difficulty) else self.difficulty  # a function is not called for this
        num_examples = "?" if known is None else len(known)
        return (
            f"DifficultySampler(num_examples={num_examples}, epoch={self.epoch}, seed={self.seed}, rank={self.rank}, "
            f"world_size={self.world_size})"
        )

    def _read(self) -> Tensor:
        difficulty = self.difficulty() if callable(self.difficulty) else self.difficulty
        check_vector("DifficultySampler", "difficulty", difficulty)
        return difficulty.detach().cpu()

    def _plan(self) -> Tensor:
        if self._order is None:
            difficulty = self._read()
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63)
            unseen = difficulty == math.inf
            known = difficulty.masked_fill(unseen, math.nan)
            weight = self._checked(self.policy(known, generator), known).masked_fill(unseen, 1.0)
            chosen = weight.nonzero()[:, 0]
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            chosen = chosen[: len(chosen) // self.world_size * self.world_size]
            if len(chosen) == 0:
                positive, absent = int((weight > 0).sum()), int(difficulty.isnan().sum())
                raise ValueError(
                    f"DifficultySampler: expected a weight above 0 for at least {self.world_size} of {len(weight)} "
                    f"examples (one a process), got {positive}; {absent} have the difficulty NaN, which takes no part: "
                    "never seen is +inf"
                )
            self._order, self._weight = chosen[self.rank :: self.world_size], weight
        return self._order

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
    if state["position"] > len(order):
        raise ValueError(f"{name}: position must be at most {len(order)}, got {state['position']}")
    if len(order) and not 0 <= int(order.min()) <= int(order.max()) < n_examples:
        came = f"{int(order.min())} to {int(order.max())}"
        raise ValueError(f"{name}: order must be of examples below {n_examples}, got {came}")
