"""DTensor logits sharded by rows: a rule that runs the operators on each rank's own rows.

`register_row_sharding` is explicit, so importing this module changes nothing.
DistributedDataParallel and FSDP need no rule: their loss sees plain tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from . import ops  # noqa: F401  the operators must exist

__all__ = ["register_row_sharding"]

# the axis of rows in each tensor an operator takes and returns
_AXES = {
    "forward": ((0, 0), (0, 1, 0, 1, 0)),  # logits, target -> loss, scores, runner_up, saved, softmax
    "backward": ((0, 0, 1, 0), (0,)),  # logits, target, saved, grad_loss -> grad
}


@functools.cache
def register_row_sharding() -> None:
    """Let `bonus_cross_entropy` and its twins take DTensors, in this process from now on; calling twice is harmless.

    Input and target must both be DTensors on one mesh, as must ``weight`` (replicated) if there is one. Every rank
    works on the rows it holds, and the mean divides by the rows (or weights) of all ranks:

    - Replicated mesh dimensions stay so.
    - Rows sharded, ``Shard(0)``: no logit is moved. Ranks may hold different numbers of rows, or none.
    - Anything else, such as classes sharded by a parallel head, ``Shard(1)``: right, but the logits are moved to
      ``Shard(0)`` by an all-to-all, in the forward and in the backward, and the gradient comes back as ``Shard(0)``.
    - With extra dimensions [N, C, d1, ...], N must divide by the ranks; otherwise the logits are gathered on each.

    Scores, and a loss with ``reduction="none"``, come back sharded as the rows. A label out of range raises on the rank
    that holds it, and the others wait for it until their timeout, as with any torch operator.

    Example:
        >>> from bonus_ops import bonus_cross_entropy
        >>> from bonus_ops.distributed import register_row_sharding
        >>> register_row_sharding()
        >>> bonus_cross_entropy(logits, target).backward()  # doctest: +SKIP
    """
    for name, axes in _AXES.items():
        torch.library.register_torch_dispatch(f"bonus_ops::{name}", DTensor, functools.partial(_run_by_rows, *axes))


def _run_by_rows(
    axes_in: Sequence[int], axes_out: Sequence[int], cls: type, op: Any, types: Any, args: Any, kwargs: Any
) -> Any:
    """Run ``op`` on this rank's rows of the leading arguments; the others are the same on every rank."""
    tensors, options = args[: len(axes_in)], args[len(axes_in) :]
    for x in tensors:
        if not isinstance(x, DTensor):
            raise RuntimeError(
                f"{op}: got mixed torch.Tensor and DTensor.\nExpected input and target to be DTensors on one mesh, got "
                f"a plain tensor of shape {list(x.shape)}."
            )
    logits = tensors[0]
    mesh = logits.device_mesh
    n_outer, n_inner, _ = logits.shape
    # outer * inner rows are cut as the outer ones were only if every rank has as many
    cut = n_inner == 1 or n_outer % mesh.size() == 0
    is_cut = [cut and not placement.is_replicate() for placement in logits.placements]

    def placements(axis: int) -> list[Placement]:
        return [Shard(axis) if c else Replicate() for c in is_cut]

    local = [x.redistribute(mesh, placements(axis)).to_local() for x, axis in zip(tensors, axes_in, strict=True)]
    out = op(*local, *options, **kwargs)
    whole = op(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors), *options,
               **kwargs)  # fmt: skip

    def wrap(mine: Tensor, all_ranks: Tensor, axis: int) -> DTensor:
        where = placements(axis) if all_ranks.numel() else [Replicate()] * mesh.ndim  # empty: was not asked for
        return DTensor.from_local(mine, mesh, where, run_check=False, shape=all_ranks.shape, stride=all_ranks.stride())

    if isinstance(out, Tensor):
        return wrap(out, whole, axes_out[0])
    return tuple(wrap(*each) for each in zip(out, whole, axes_out, strict=True))
