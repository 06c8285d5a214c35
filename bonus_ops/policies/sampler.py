"""A DataLoader sampler that leaves out examples by what is known of them, before they cost a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .checks import check_integer, check_vector

__all__ = ["DifficultySampler"]

Policy = Callable[[Tensor, torch.Generator], Tensor]
STATE = ("seed", "epoch", "rank", "world_size", "order", "weight", "position")


class DifficultySampler(Sampler[int]):
    """Visit, in random order, the examples to which a policy gives a weight.

    At the start of every epoch the policy sees the difficulty of all examples (stale: from when each was last seen)
    and returns their weights for the epoch; those of weight 0 are skipped and cost nothing. Multiply the losses by
    ``sampler.weight[index]``.

    The same on every process: the draw depends on (seed, epoch) and on the difficulty, which must be merged over
    processes first. Process ``rank`` takes every ``world_size``-th of the shuffled order; up to ``world_size - 1`` are
    left over for the epoch, so that shards are disjoint and of equal length. Skip `DistributedSampler`.

    Args:
        difficulty: float [num_examples], or a function that returns it, called once an epoch, say
            ``lambda: tracker.statistic("loss_last")``. Higher is harder. An example with NaN was never seen: it is
            visited, with weight 1, whatever the policy says.
        policy: ``(difficulty, generator) -> weight [num_examples] >= 0``, on the CPU; NaN weighs 0. For instance
            ``lambda d, g: infobatch(d, generator=g)`` or
            ``lambda d, g: poisson_selection(d, 1000, generator=g).unbiased_weight``. Guard it against noise:
            ``selective_backprop(guarded(d, noisy), ...)``.
        seed: the same on every process.
        rank: of this process, in [0, world_size).
        world_size: number of processes.

    Attributes:
        weight: float [num_examples] on the CPU, of the present epoch.

    Call `set_epoch` before every epoch, so that ``len`` is that epoch's; without it each new iteration starts the next.
    `state_dict` holds the epoch's plan and the place in it, so that a resumed run visits the rest of the same epoch. It
    counts what was handed out: with workers, a DataLoader fetches ahead of what was trained.

    Raises:
        TypeError, ValueError, RuntimeError: an argument of a wrong type, range or shape; a policy whose weights have
            a wrong shape or are negative.

    Example:
        >>> import torch
        >>> from bonus_ops.policies import DifficultySampler, small_loss
        >>> loss = torch.tensor([0.1, 5.0, 0.2, float("nan")])
        >>> sampler = DifficultySampler(loss, lambda d, g: small_loss(d, keep=0.7).float())
        >>> sorted(sampler)
        [0, 2, 3]
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

    def set_epoch(self, epoch: int) -> None:
        """Start this epoch at the next iteration, from its beginning, with the difficulty of then."""
        check_integer("DifficultySampler.set_epoch", "epoch", epoch, 0)
        self.epoch, self._order, self._position, self._iterated = epoch, None, 0, False

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
        self._iterated = True
        order = self._plan()
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
            ValueError: they differ, or an entry is missing; nothing is changed.
        """
        if missing := [key for key in STATE if key not in state]:
            raise ValueError(f"DifficultySampler.load_state_dict: expected {', '.join(STATE)}, lacks {missing}")
        known = {"rank": self.rank, "world_size": self.world_size, "num_examples": len(self._read())}
        came = {"rank": state["rank"], "world_size": state["world_size"], "num_examples": len(state["weight"])}
        if known != came:
            raise ValueError(f"DifficultySampler.load_state_dict: expected {known}, got {came}")
        self.seed, self.epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order, self._weight = state["order"].clone(), state["weight"].clone()
        self._iterated = False

    def _read(self) -> Tensor:
        difficulty = self.difficulty() if callable(self.difficulty) else self.difficulty
        check_vector("DifficultySampler", "difficulty", difficulty)
        return difficulty.detach().cpu()

    def _plan(self) -> Tensor:
        if self._order is None:
            difficulty = self._read()
            generator = torch.Generator().manual_seed((self.seed * 0x9E3779B97F4A7C15 + self.epoch) % 2**63)
            weight = self.policy(difficulty, generator)
            if not isinstance(weight, Tensor) or weight.shape != difficulty.shape:
                came = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                raise RuntimeError(
                    f"DifficultySampler: policy must return weights of shape {list(difficulty.shape)}, got {came}"
                )
            weight = weight.detach().cpu().float().nan_to_num(nan=0.0)
            weight = torch.where(difficulty.isnan(), 1.0, weight)
            if bool((weight < 0).any()):
                raise ValueError(f"DifficultySampler: policy must return weights >= 0, got {float(weight.min())}")
            chosen = weight.nonzero()[:, 0]
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
            chosen = chosen[: len(chosen) // self.world_size * self.world_size]
            self._order, self._weight = chosen[self.rank :: self.world_size], weight
        return self._order
