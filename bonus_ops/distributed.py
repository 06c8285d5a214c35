"""DTensor logits: a rule that runs the operators on each rank's own rows, or its own classes.

`register_row_sharding` is explicit, so importing this module changes nothing.
DistributedDataParallel and FSDP need no rule: their loss sees plain tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import reference
from .kernels.results import empty_labels
from .logit_options import LogitOptions
from .losses import decode
from .ops import labels, shards, soft, vocab_parallel  # noqa: F401  the operators must exist
from .ops.shards import Saved, Terms
from .ops.shards import Shard as ClassShard

__all__ = ["register_row_sharding"]

# the axis of rows: of the arguments that have one, and of the results
_ROWS_IN = {"logits": 0, "target": 0, "label": 0, "probabilities": 0, "saved": 1, "runner_up": 0, "grad_loss": 0,
            "grad_lse": 0}  # fmt: skip
_ROWS_OUT = {
    "labels_forward": (0, 1, 0, 1, 0),  # loss, scores, runner_up, saved, softmax
    "labels_backward": (0,),
    "soft_forward": (0, 1, 0, 1),  # loss, scores, runner_up, saved
    "soft_backward": (0,),
}


@functools.cache
def register_row_sharding() -> None:
    """Let `bonus_cross_entropy` and its twins take DTensors, in this process from now on; calling twice is harmless.

    The input must be a DTensor. So may be the target, on the same mesh; a plain one is the whole target, the same on
    every rank. A ``weight`` must be a DTensor, replicated, and then so must be the target. Every rank works on the rows
    it holds, and the mean divides by the rows (or weights) of all ranks:

    - Replicated mesh dimensions stay so.
    - Rows sharded, ``Shard(0)``: no logit is moved. Ranks may hold different numbers of rows, or none.
    - Classes sharded over one mesh dimension, ``Shard(1)``, as a parallel head leaves them, with class indices as
      target and neither smoothing nor `ClassLoss`: no logit is moved. One all-gather of a few floats a row in forward,
      as in `vocab_parallel`, none in backward; loss and scores are replicated, the gradient comes back as ``Shard(1)``.
    - Anything else, such as smoothed classes: right, but the logits are moved to ``Shard(0)`` by an all-to-all, in the
      forward and in the backward, and the gradient comes back as ``Shard(0)``.
    - With extra dimensions [N, C, d1, ...], N must divide by the ranks; otherwise the logits are gathered on each.

    Scores, and a loss with ``reduction="none"``, come back sharded as the rows. A label out of range raises on the rank
    that holds it, and the others wait for it until their timeout, as with any torch operator.

    Example:
        >>> from bonus_ops import bonus_cross_entropy
        >>> from bonus_ops.distributed import register_row_sharding
        >>> register_row_sharding()
        >>> bonus_cross_entropy(logits, target).backward()  # doctest: +SKIP
    """
    for name, axes in _ROWS_OUT.items():
        torch.library.register_torch_dispatch(f"bonus_ops::{name}", DTensor, functools.partial(_run_by_rows, axes))


def _run_by_rows(axes: Sequence[int], cls: type, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Run ``op`` on this rank's rows of the arguments that have rows; the others are the same on every rank."""
    call = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    logits = call["logits"]
    if not isinstance(logits, DTensor):
        raise RuntimeError(
            f"{op}: got mixed torch.Tensor and DTensor.\nExpected input to be a DTensor where the target is one, got a "
            f"plain tensor of shape {list(logits.shape)}."
        )
    mesh = logits.device_mesh
    for name in _ROWS_IN:  # a plain tensor beside a DTensor is the same on every rank, as torch takes it
        if isinstance(call.get(name), Tensor) and not isinstance(call[name], DTensor):
            call[name] = DTensor.from_local(call[name], mesh, [Replicate()] * mesh.ndim, run_check=False)
    by_classes = [placement.is_shard(2) for placement in logits.placements]
    kind = op._schema.name.removeprefix("bonus_ops::")
    if (
        kind in _BY_CLASSES
        and sum(by_classes) == 1
        and all(cut or placement.is_replicate() for cut, placement in zip(by_classes, logits.placements, strict=True))
    ):
        return _BY_CLASSES[kind](call, by_classes.index(True))
    n_outer, n_inner, _ = logits.shape
    # outer * inner rows are cut as the outer ones were only if every rank has as many
    cut = n_inner == 1 or n_outer % mesh.size() == 0
    is_cut = [cut and not placement.is_replicate() for placement in logits.placements]

    def placements(axis: int) -> list[Placement]:
        return [Shard(axis) if c else Replicate() for c in is_cut]

    mine, whole = {}, {}  # this rank's arguments; their shapes on all ranks
    for name, x in call.items():
        if name in _ROWS_IN and x is not None:
            # detached: below autograd torch 2.11 cannot move a tensor that requires a gradient
            mine[name] = x.detach().redistribute(mesh, placements(_ROWS_IN[name])).to_local()
            whole[name] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        else:
            mine[name] = whole[name] = x.to_local() if isinstance(x, DTensor) else x

    def wrap(local: Tensor, like: Tensor, axis: int) -> DTensor:
        where = placements(axis) if like.numel() else [Replicate()] * mesh.ndim  # empty: was not asked for
        return DTensor.from_local(local, mesh, where, run_check=False, shape=like.shape, stride=like.stride())

    local, like = op(**mine), op(**whole)
    if isinstance(local, Tensor):
        return wrap(local, like, axes[0])
    return tuple(wrap(*each) for each in zip(local, like, axes, strict=True))


# --- classes --------------------------------------------------------------------------------------------------------


def _local_classes(call: Any, mesh_dim: int) -> tuple[Tensor, Tensor, ClassShard, Terms]:
    """Return logits [N, C_local] and labels [N] of all rows, which classes they are, and what they pay."""
    logits = call["logits"]
    mesh, placements = logits.device_mesh, logits.placements
    (_, _, n_local), (_, _, first) = compute_local_shape_and_global_offset(logits.shape, mesh, placements)
    shard = ClassShard(mesh.get_group(mesh_dim), first, first + n_local)
    options = LogitOptions(call["logit_scale"], call["softcap"])
    terms = Terms(decode(call["loss"], _whole(call["fields"])), None, None, options, call["ignore_index"], None)
    return logits.to_local().flatten(0, 1), _whole(call["target"]).reshape(-1), shard, terms


def _whole(x: Any) -> Any:
    """Return all of a tensor, of which a rank may hold a part."""
    if not isinstance(x, DTensor):
        return x
    return cast(DTensor, x.detach()).redistribute(x.device_mesh, [Replicate()] * x.device_mesh.ndim).to_local()


def _labels_forward(call: Any, mesh_dim: int) -> tuple[DTensor, ...]:
    logits, (rows, label, shard, terms) = call["logits"], _local_classes(call, mesh_dim)
    local = vocab_parallel.rows_of(rows.detach(), label, shard, terms, call["scores"], False)
    counts = label != terms.ignore_index
    out = empty_labels(logits.to_local()[..., :0], False, False)
    scores, runner_up, softmax = out.scores, out.runner_up, out.softmax
    if call["scores"]:
        *columns, runner_up = reference.scores_of_sums(local.sums, counts)
        scores = torch.stack(columns)
    mesh, replicated = logits.device_mesh, [Replicate()] * logits.device_mesh.ndim
    if call["softmax"]:
        z = terms.options.applied(rows.detach().to(local.lse.dtype))
        p = torch.exp(z - reference.logsumexp_of_sums(local.sums)[:, None]).masked_fill(~counts[:, None], 0.0)
        softmax = DTensor.from_local(
            p.to(logits.dtype).view(logits.to_local().shape), mesh, logits.placements, run_check=False,
            shape=logits.shape, stride=torch.empty(logits.shape, device="meta").stride(),
        )  # fmt: skip
    saved = torch.stack(shards.saved_of(local.sums))
    found = [DTensor.from_local(x, mesh, replicated, run_check=False) for x in (local.loss, scores, runner_up, saved)]
    given = softmax if isinstance(softmax, DTensor) else DTensor.from_local(softmax, mesh, replicated, run_check=False)
    return *found, given


def _labels_backward(call: Any, mesh_dim: int) -> DTensor:
    logits, (rows, label, shard, terms) = call["logits"], _local_classes(call, mesh_dim)
    grad_loss, grad_lse, saved = _whole(call["grad_loss"]), _whole(call["grad_lse"]), _whole(call["saved"])
    n_classes = label.new_tensor(logits.shape[2])
    pull = shards.pull_of(Saved(*saved), label, terms, n_classes, None, grad_loss, grad_lse)
    grad = shards.gradient(rows, label, shard, terms, n_classes, pull, torch.empty_like(rows))
    return DTensor.from_local(
        grad.view(logits.to_local().shape), logits.device_mesh, logits.placements, run_check=False,
        shape=logits.shape, stride=torch.empty(logits.shape, device="meta").stride(),
    )  # fmt: skip


_BY_CLASSES = {"labels_forward": _labels_forward, "labels_backward": _labels_backward}
