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
from .logit_options import LogitOptions
from .losses import GapLoss, decode
from .ops import labels, shards, soft, vocab_parallel  # noqa: F401  the operators must exist
from .ops.shards import Saved, Smoothed, Terms
from .ops.shards import Shard as ClassShard
from .soft_targets import SoftTargets

__all__ = ["by_shards", "register_row_sharding"]

# the axis of rows: of the arguments that have one, and of the results
_ROWS_IN = {"logits": 0, "target": 0, "label": 0, "probabilities": 0, "saved": 1, "runner_up": 0, "grad_loss": 0,
            "grad_lse": 0}  # fmt: skip
_ROWS_OUT = {
    "labels_forward": (0, 1, 0, 1, 0),  # loss, scores, runner_up, saved, softmax
    "labels_backward": (0,),
    "soft_forward": (0, 1, 0, 1, 0),  # loss, scores, runner_up, saved, lse
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
      target and no `ClassLoss`: no logit is moved. One all-gather of a few floats a row in forward, two where a bonus
      is smoothed, none in backward; loss and scores are replicated, the gradient comes back as ``Shard(1)``.
    - Anything else, such as probabilities: right, but the logits are moved to ``Shard(0)`` by an all-to-all, in the
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
    loss = decode(call["loss"], _whole(call["fields"])) if any(by_classes) else None
    if (
        call.get("probabilities") is None
        and isinstance(loss, GapLoss)
        and sum(by_classes) == 1
        and all(cut or placement.is_replicate() for cut, placement in zip(by_classes, logits.placements, strict=True))
    ):
        run = _forward if op._schema.name.endswith("_forward") else _backward
        return run(call, by_classes.index(True))
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


# --- a last layer whose classes are spread ---------------------------------------------------------------------------


def by_shards(
    input: Tensor, linear_weight: DTensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Any:
    """Return what `bonus_ops.vocab_parallel` makes of this rank's classes of a layer; see there.

    A plain tensor is the same on every rank, as is what is returned.
    """
    from .vocab_parallel import of_layer

    name = "linear_bonus_cross_entropy"
    mesh, placements = linear_weight.device_mesh, linear_weight.placements
    cut = [placement.is_shard(0) for placement in placements]
    if sum(cut) != 1 or not all(c or x.is_replicate() for c, x in zip(cut, placements, strict=True)):
        raise NotImplementedError(
            f"{name}: a last layer whose linear_weight has placements {placements}.\nExpected Shard(0), its classes, "
            "over one dimension of the mesh, and Replicate() over the others."
        )
    if linear_bias is not None:
        if not isinstance(linear_bias, DTensor):
            raise RuntimeError(f"{name}: expected linear_bias to be a DTensor as linear_weight is, got a plain tensor")
        linear_bias = linear_bias.redistribute(mesh, placements).to_local()
    (n_local, _), (first, _) = compute_local_shape_and_global_offset(linear_weight.shape, mesh, placements)

    def whole(x: Any) -> Any:  # a differentiable part of the graph
        return x.redistribute(mesh, [Replicate()] * mesh.ndim).to_local() if isinstance(x, DTensor) else x

    return of_layer(
        whole(input), linear_weight.to_local(), whole(target), group=mesh.get_group(cut.index(True)),
        class_range=(first, first + n_local), linear_bias=linear_bias, **{k: whole(x) for k, x in options.items()},
    )  # fmt: skip


# --- classes --------------------------------------------------------------------------------------------------------


def _local_classes(call: Any, mesh_dim: int) -> tuple[Tensor, Tensor, ClassShard, Terms]:
    """Return logits [N, C_local] and labels [N] of all rows, which classes they are, and what they pay."""
    logits = call["logits"]
    mesh, placements = logits.device_mesh, logits.placements
    (_, _, n_local), (_, _, first) = compute_local_shape_and_global_offset(logits.shape, mesh, placements)
    shard = ClassShard(mesh.get_group(mesh_dim), first, first + n_local)
    targets, dtype = None, reference.accumulation_dtype(logits.dtype)
    if "label" in call:
        weight, bonus_weight = (x if x is None else _whole(x).to(dtype) for x in (call["weight"], call["bonus_weight"]))
        targets = SoftTargets(None, weight, bonus_weight, call["smoothing"], call["bonus_smoothing"])
    loss = decode(call["loss"], _whole(call["fields"]))
    options = LogitOptions(call["logit_scale"], call["softcap"])
    terms = Terms(loss, targets, None, options, call["ignore_index"], None)
    label = _whole(call["target"] if targets is None else call["label"])
    return logits.to_local().flatten(0, 1).detach(), label.reshape(-1), shard, terms


def _whole(x: Any) -> Any:
    """Return all of a tensor, of which a rank may hold a part."""
    if not isinstance(x, DTensor):
        return x
    return cast(DTensor, x.detach()).redistribute(x.device_mesh, [Replicate()] * x.device_mesh.ndim).to_local()


def _of_rows(call: Any, *found: Tensor) -> tuple[DTensor, ...]:
    """Return numbers of rows as every rank has them."""
    mesh = call["logits"].device_mesh
    return tuple(DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False) for x in found)


def _of_logits(call: Any, local: Tensor) -> DTensor:
    """Return this rank's [N, C_local] as a part of what is shaped and sharded like the logits."""
    logits = call["logits"]
    return DTensor.from_local(
        local.view(logits.to_local().shape), logits.device_mesh, logits.placements, run_check=False,
        shape=logits.shape, stride=torch.empty(logits.shape, device="meta").stride(),
    )  # fmt: skip


def _forward(call: Any, mesh_dim: int) -> tuple[DTensor, ...]:
    """Run ``labels_forward``, or ``soft_forward`` of smoothed or weighted labels."""
    rows, label, shard, terms = _local_classes(call, mesh_dim)
    local = vocab_parallel.rows_of(rows, label, shard, terms, call["scores"], False)
    counts, is_soft = label != terms.ignore_index, terms.targets is not None
    scores, runner_up = local.sums.max.new_empty((0,), dtype=torch.float32), local.sums.argmax
    if call["scores"]:
        *columns, runner_up = reference.scores_of_sums(local.sums, counts)
        scores = torch.stack(columns)
    elif not is_soft:
        runner_up = runner_up[:0]
    saved = [*shards.saved_of(local.sums)]
    if local.more is not None:  # a class as the bits of an integer
        top, *others = local.more
        saved += [top.to(shards.ints_like(local.lse)).view(local.lse.dtype), *others]
    found = _of_rows(call, local.loss, scores, runner_up, torch.stack(saved))
    if is_soft:
        return *found, *_of_rows(call, local.lse if call["lse"] else local.lse[:0])
    if not call["softmax"]:
        return *found, *_of_rows(call, rows.new_empty((0,)))
    z = terms.options.applied(rows.to(local.lse.dtype))
    p = torch.exp(z - reference.logsumexp_of_sums(local.sums)[:, None]).masked_fill(~counts[:, None], 0.0)
    return *found, _of_logits(call, p.to(rows.dtype))


def _backward(call: Any, mesh_dim: int) -> DTensor:
    """Run ``labels_backward`` or ``soft_backward`` from what `_forward` has saved."""
    saved, more = _whole(call["saved"]), None
    if len(saved) > 3:
        top, *others = saved[3:]
        more = Smoothed(top.view(shards.ints_like(top)).to(torch.int32), *others)
    rows, label, shard, terms = _local_classes(call, mesh_dim)
    n_classes = label.new_tensor(call["logits"].shape[2])
    upstream = _whole(call["grad_loss"]), _whole(call["grad_lse"])
    pull = shards.pull_of(Saved(*saved[:3]), label, terms, n_classes, more, *upstream)
    return _of_logits(call, shards.gradient(rows, label, shard, terms, n_classes, pull, torch.empty_like(rows)))
