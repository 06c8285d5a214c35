"""Classes spread over three gloo ranks: it is the loss of all classes. Run as a script, this file is one rank."""

import datetime
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bonus_ops import (
    ClassLoss,
    Focal,
    GeneralizedCrossEntropy,
    LogBonus,
    PowerBonus,
    SoftmaxAbsoluteError,
    SoftmaxSquaredError,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
)

pytestmark = pytest.mark.slow

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

TIMEOUT = 300  # seconds for all ranks, of which importing torch takes 3 to 10
WORLD = 3
N, H, C = 9, 5, 12

# which classes the ranks hold
RANGES = {
    "equal": [(0, 4), (4, 8), (8, 12)],
    "uneven": [(0, 1), (1, 8), (8, 12)],
    "empty": [(0, 7), (7, 7), (7, 12)],
    "backwards": [(8, 12), (1, 8), (0, 1)],
}


EVERYTHING = {"logit_scale": 1.5, "softcap": 6.0, "z_loss": 0.3}
# name: how classes are spread, dtype, what the logits are like, options
CASES: dict[str, tuple[str, torch.dtype, str, dict[str, Any]]] = {
    **{where: (where, torch.float32, "typical", {}) for where in RANGES},
    "float64": ("uneven", torch.float64, "typical", {}),
    "bfloat16": ("uneven", torch.bfloat16, "typical", {}),
    "everything-float64": ("backwards", torch.float64, "wrong", {**EVERYTHING, "weight": True}),
    "smoothed-float64": ("uneven", torch.float64, "confident", {"label_smoothing": 0.2}),
    "class-loss-bfloat16": ("uneven", torch.bfloat16, "typical", {"bonus": SoftmaxSquaredError(strength=0.5)}),
} | {
    name: (where, torch.float32, regime, options)
    for name, where, regime, options in [
        ("plain", "uneven", "typical", {"bonus": None}),
        ("sum", "uneven", "typical", {"reduction": "sum"}),
        ("none", "empty", "typical", {"reduction": "none"}),
        ("power", "equal", "typical", {"bonus": PowerBonus(gamma=2.0, strength=0.5)}),
        ("focal", "uneven", "typical", {"bonus": Focal(2.0)}),
        ("gce", "uneven", "typical", {"bonus": GeneralizedCrossEntropy(0.7)}),
        ("confident", "uneven", "confident", {}),
        ("wrong", "uneven", "wrong", {}),
        ("shifted", "uneven", "shifted", {"reduction": "none"}),
        ("ties", "backwards", "ties", {}),
        ("masked", "uneven", "masked", {"reduction": "none"}),
        ("all-ignored", "uneven", "all-ignored", {"reduction": "sum"}),
        ("no-rows", "uneven", "no-rows", {"reduction": "sum"}),
        ("ignore-0", "uneven", "class-0-ignored", {"ignore_index": 0}),
        ("weight", "uneven", "typical", {"weight": True}),
        ("weight-none", "uneven", "typical", {"weight": True, "reduction": "none"}),
        ("scale", "uneven", "typical", {"logit_scale": 0.5}),
        ("softcap", "uneven", "typical", {"softcap": 3.0}),
        ("z-loss", "uneven", "typical", {"z_loss": 0.1}),
        ("everything", "backwards", "typical", {**EVERYTHING, "weight": True}),
        ("everything-none", "empty", "confident", {**EVERYTHING, "weight": True, "reduction": "none"}),
        ("smoothing", "uneven", "typical", {"bonus": None, "label_smoothing": 0.2}),
        ("smoothing-one", "uneven", "typical", {"bonus": None, "label_smoothing": 1.0}),
        ("smoothing-confident", "empty", "confident", {"bonus": None, "label_smoothing": 1e-3}),
        ("smoothing-shifted", "uneven", "shifted", {"bonus": None, "label_smoothing": 0.2, "reduction": "none"}),
        ("smoothing-weight", "backwards", "typical", {"bonus": None, "label_smoothing": 0.2, "weight": True}),
        ("smoothing-everything", "uneven", "typical",
         {**EVERYTHING, "bonus": None, "label_smoothing": 0.2, "weight": True}),
        *[(f"smoothed-bonus-{regime}", where, regime, {"label_smoothing": 0.2, "reduction": reduction})
          for where, regime, reduction in [
              ("equal", "typical", "mean"), ("empty", "confident", "none"), ("uneven", "wrong", "none"),
              ("uneven", "shifted", "none"), ("empty", "low", "none"), ("backwards", "ties", "none"),
              ("uneven", "masked", "none"),
              ("uneven", "all-ignored", "sum"), ("uneven", "no-rows", "sum"),
          ]],
        *[(f"smoothed-{type(loss).__name__}-{regime}", "uneven", regime,
           {"bonus": loss, "label_smoothing": 0.2, "reduction": "none"})
          for regime in ("typical", "wrong") for loss in (Focal(2.0), LogBonus(1.0))],
        *[(f"class-loss-{regime}", where, regime, {"bonus": SoftmaxSquaredError(strength=0.5), **options})
          for where, regime, options in [
              ("equal", "typical", {}), ("empty", "confident", {"reduction": "none"}), ("uneven", "masked", {}),
              ("backwards", "wrong", {**EVERYTHING, "label_smoothing": 0.2, "reduction": "none"}),
              ("uneven", "no-rows", {"reduction": "sum"}),
          ]],
        ("smoothed-label-alone", "uneven", "typical", {"label_smoothing": 0.2, "bonus_smoothing": 0.0}),
        ("smoothed-bonus-alone", "uneven", "wrong", {"bonus_smoothing": 0.3}),
        ("bonus-weight", "uneven", "typical", {"bonus_weight": True}),
        ("bonus-weight-weight", "backwards", "typical", {"bonus_weight": True, "weight": True}),
        ("bonus-weight-smoothed", "uneven", "wrong",
         {"bonus_weight": True, "weight": True, "label_smoothing": 0.2, "bonus_smoothing": 0.3}),
        ("smoothed-bonus-weight", "uneven", "typical", {"weight": True, "label_smoothing": 0.2}),
        ("smoothed-bonus-everything", "uneven", "wrong",
         {**EVERYTHING, "weight": True, "bonus_weight": True, "label_smoothing": 0.2, "reduction": "none"}),
    ]
}  # fmt: skip

# of the linear form; "row_weight", "bias" and "frozen" are about its tensors, "rows" is of a chunk
LINEAR: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "float64": ("uneven", torch.float64, {"rows": 2, "bias": True}),
} | {
    name: (where, torch.float32, options)
    for name, where, options in [
        ("mean", "equal", {}),
        ("chunks", "uneven", {"rows": 2}),
        ("chunks-of-one", "empty", {"rows": 1}),
        ("backwards", "backwards", {"rows": 4, "bias": True}),
        ("sum", "uneven", {"reduction": "sum", "rows": 4, "row_weight": True}),
        ("none", "uneven", {"reduction": "none", "rows": 4, "bias": True, "row_weight": True}),
        ("frozen", "uneven", {"frozen": True, "rows": 4}),
        ("frozen-none", "uneven", {"frozen": True, "reduction": "none"}),
        ("weight", "uneven", {"weight": True, "rows": 4, "row_weight": True}),
        ("focal", "uneven", {"bonus": Focal(2.0), "rows": 4}),
        ("scale", "uneven", {"logit_scale": 0.5, "bias": True}),
        ("z-loss", "uneven", {"z_loss": 0.1, "rows": 4, "row_weight": True}),
        ("everything", "uneven", {**EVERYTHING, "weight": True, "rows": 4, "row_weight": True, "bias": True}),
        ("everything-none", "empty", {**EVERYTHING, "weight": True, "reduction": "none", "rows": 4, "bias": True}),
        ("smoothing", "uneven", {"bonus": None, "label_smoothing": 0.2, "rows": 4}),
        ("smoothing-weight", "backwards", {"bonus": None, "label_smoothing": 0.2, "rows": 4, "weight": True}),
        ("smoothing-everything", "uneven",
         {**EVERYTHING, "bonus": None, "label_smoothing": 0.2, "weight": True, "rows": 4}),
        ("smoothed-bonus", "uneven", {"label_smoothing": 0.2, "rows": 4, "bias": True}),
        ("smoothed-bonus-none", "empty", {"label_smoothing": 0.2, "rows": 4, "reduction": "none"}),
        ("smoothed-focal", "uneven", {"bonus": Focal(2.0), "label_smoothing": 0.2, "rows": 4}),
        ("class-loss", "uneven", {"bonus": SoftmaxAbsoluteError(strength=0.5), "rows": 4, "bias": True}),
        ("class-loss-none", "empty", {"bonus": SoftmaxSquaredError(), "label_smoothing": 0.2, "reduction": "none"}),
        ("smoothed-label-alone", "uneven", {"label_smoothing": 0.2, "bonus_smoothing": 0.0, "rows": 4}),
        ("bonus-weight", "uneven", {"bonus_weight": True, "weight": True, "rows": 4, "row_weight": True}),
        ("smoothed-bonus-everything", "backwards",
         {**EVERYTHING, "bonus_weight": True, "weight": True, "label_smoothing": 0.2, "rows": 4, "row_weight": True}),
        ("own-input-grad", "uneven", {"reduce_input_grad": False, "rows": 4}),
    ]
}  # fmt: skip


def example(regime: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and labels, the second label ignored, which every rank draws alike."""
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(0 if regime == "no-rows" else N, C, generator=draw, dtype=torch.float64) * 3
    target = torch.randint(0, C, (len(logits),), generator=draw)
    rows = torch.arange(len(logits))
    if regime == "confident":
        logits[rows, target] += torch.linspace(5, 40, N, dtype=torch.float64)
    elif regime == "wrong":
        logits[rows, (target + 5) % C] += 30
    elif regime in ("shifted", "low"):
        logits += 1e4 if regime == "shifted" else -1e4
    elif regime == "ties":
        logits = logits.round()
        logits[0] = 1.0
    elif regime == "masked":
        logits[:, ::2] = -torch.inf
        logits[2:4] = -torch.inf
        target[2] = 3
        logits[3, target[3]] = 1.0
        target[4:] = target[4:] // 2 * 2 + 1
        target[4] = 0
    target[:1] = 7 if regime != "ties" else 4
    target[1:2] = 0 if regime == "class-0-ignored" else -100
    if regime == "all-ignored":
        target[:] = -100
    elif len(target):
        logits[1] = torch.nan  # whatever an ignored row holds
    return logits.to(dtype), target


def class_weight(dtype: torch.dtype) -> torch.Tensor:
    weight = (torch.arange(C) + 1.0).to(dtype) / 4
    weight[3] = 0
    return weight


def class_weights(options: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return those that a case asks for."""
    both = {"weight": class_weight(dtype), "bonus_weight": class_weight(dtype).flip(0)}
    return {name: x for name, x in both.items() if name in options}


def layer(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(6)
    shapes = {"input": (N, H), "linear_weight": (C, H), "linear_bias": (C,)}
    tensors = {k: torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for k, s in shapes.items()}
    tensors["row_weight"] = (torch.rand(N, generator=draw, dtype=torch.float64) * 2).to(dtype)
    for key in ("input", "row_weight"):  # of an ignored row
        tensors[key][1] = torch.nan
    return tensors


def upstream(loss: torch.Tensor) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)


# --- a rank -----------------------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=store, timeout=datetime.timedelta(seconds=30)
    )
    results = {
        "logits": {name: of_logits(case, rank) for name, case in CASES.items()},
        "linear": {name: of_layer(case, rank) for name, case in LINEAR.items()},
        "errors": errors(rank),
        "others": others(rank),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # at times a thread of gloo's outlives the interpreter, which then aborts


def counts(mode: Any) -> dict[str, int]:
    return {str(op).split(".")[-1].strip("_"): n for op, n in mode.get_comm_counts().items()}


def of_logits(case: Any, rank: int) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    from bonus_ops import vocab_parallel

    where, dtype, regime, options = case
    logits, target = example(regime, dtype)
    first, stop = RANGES[where][rank]
    mine = logits[:, first:stop].clone().requires_grad_()
    options = {**options, **class_weights(options, dtype)}
    options = dict(options, group=None, class_range=None if where == "equal" else (first, stop))
    with CommDebugMode() as forward:
        loss, scores = vocab_parallel.bonus_cross_entropy_with_scores(mine, target, **options)
    with CommDebugMode() as backward:
        loss.backward(upstream(loss))
    alone = vocab_parallel.bonus_cross_entropy(mine, target, **options)
    return {
        "loss": loss.detach(), "scores": list(scores), "grad": mine.grad, "sent": (counts(forward), counts(backward)),
        "without": alone.detach(),
    }  # fmt: skip


def of_layer(case: Any, rank: int) -> dict[str, Any]:
    from torch.distributed.tensor.debug import CommDebugMode

    from bonus_ops import vocab_parallel
    from bonus_ops.ops import vocab_parallel as ops

    where, dtype, options = case
    options = dict(options)
    first, stop = RANGES[where][rank]
    tensors, target = layer(dtype), example("typical", dtype)[1]
    rows, frozen = options.pop("rows", N), options.pop("frozen", False)
    for name, key in (("bias", "linear_bias"), ("row_weight", "row_weight")):
        if not options.pop(name, False):
            tensors[key] = None
    for key in ("linear_weight", "linear_bias"):
        tensors[key] = None if tensors[key] is None else tensors[key][first:stop].clone()
    for key, x in tensors.items():
        if x is not None and not (frozen and key != "input"):
            x.requires_grad_()
    options = {**options, **class_weights(options, dtype)}
    chunk_rows = ops.chunk_rows
    ops.chunk_rows = lambda call: rows + rank  # the rank with the least room decides
    with CommDebugMode() as forward:
        loss, scores = vocab_parallel.linear_bonus_cross_entropy_with_scores(
            target=target, group=None, class_range=None if where == "equal" else (first, stop), **tensors, **options
        )
    with CommDebugMode() as backward:
        loss.backward(upstream(loss))
    ops.chunk_rows = chunk_rows
    alone = vocab_parallel.linear_bonus_cross_entropy(
        target=target, group=None, class_range=None if where == "equal" else (first, stop), **tensors, **options
    )
    return {
        "loss": loss.detach(), "scores": [*scores, scores.last_layer_grad_norm], "without": alone.detach(),
        "sent": (counts(forward), counts(backward)),
        "grads": {key: x.grad for key, x in tensors.items() if x is not None and x.requires_grad},
    }  # fmt: skip


def errors(rank: int) -> dict[str, tuple[str, str]]:
    import torch.distributed as dist

    from bonus_ops.vocab_parallel import bonus_cross_entropy as loss_of
    from bonus_ops.vocab_parallel import linear_bonus_cross_entropy as linear

    logits, target = example("typical", torch.float32)
    first, stop = RANGES["uneven"][rank]
    mine, span = logits[:, first:stop].clone().requires_grad_(), (first, stop)
    whole = layer(torch.float32)
    hidden, weight = whole["input"], whole["linear_weight"][first:stop]
    outside, negative, other = target.clone(), target.clone(), target.clone()
    outside[3], negative[4] = C, -1
    other[5] = (other[5] + rank) % C
    alone = dist.new_group([0])
    last = rank == WORLD - 1
    extra = torch.zeros(N, 1)

    def outcome(function: Any, *args: Any, **options: Any) -> tuple[str, str]:
        try:
            function(*args, **{"group": None, "class_range": span, **options})
        except Exception as raised:
            return type(raised).__name__, str(raised)
        return "nothing", ""

    def twice() -> None:
        (grad,) = torch.autograd.grad(loss_of(mine, target, group=None, class_range=span), mine, create_graph=True)
        grad.sum().backward()

    def linear_twice() -> None:
        x = hidden.clone().requires_grad_()
        loss = linear(x, weight, target, group=None, class_range=span)
        torch.autograd.grad(loss, x, create_graph=True)

    def batched() -> None:
        torch.func.vmap(lambda x: loss_of(x, target, group=None, class_range=span))(mine[None])

    def compiled() -> None:
        whole = torch.compile(lambda x: loss_of(x, target, group=None, class_range=span), backend="eager",
                              fullgraph=True)  # fmt: skip
        whole(mine)

    def plain(function: Any) -> tuple[str, str]:
        return outcome(lambda group, class_range: function())

    found = {
        "label": outcome(loss_of, mine, outside),
        "negative label": outcome(loss_of, mine, negative),
        "linear label": outcome(linear, hidden, weight, outside),
        "overlap": outcome(loss_of, torch.cat([mine, extra], 1) if rank == 0 else mine, target,
                           class_range=(first, stop + (rank == 0))),
        "gap": outcome(loss_of, mine[:, : mine.shape[1] - 1] if rank == 0 else mine, target,
                       class_range=(first, stop - (rank == 0))),
        "linear gap": outcome(linear, hidden, weight, target, class_range=(first + last, stop + last)),
        "twice": outcome(loss_of, logits, target, class_range=(0, C)),
        "unfit": outcome(loss_of, mine, target, class_range=(first, stop + last)),
        "unequal": outcome(loss_of, mine, target, class_range=None),
        "weight": outcome(loss_of, mine, target, weight=torch.ones(C + 1)),
        "weight shape": outcome(loss_of, mine, target, weight=torch.ones(C, 2)),
        "targets": outcome(loss_of, mine, other),
        "rows": outcome(loss_of, mine[: N - last], target[: N - last], validate=True),
        "linear rows": outcome(linear, hidden[: N - last], weight, target[: N - last]),
        "own fault": outcome(loss_of, mine, target.float() if last else target, validate=True),
        "linear own fault": outcome(linear, hidden, weight[:, 1:] if last else weight, target),
        "probabilities": outcome(loss_of, mine, mine.detach().softmax(1)),
        "bonus weight": outcome(loss_of, mine, target, bonus_weight=torch.ones(C + 1)),
        "two weights": outcome(loss_of, mine, target, weight=torch.ones(C), bonus_weight=torch.ones(C + 1)),
        "range type": outcome(loss_of, mine, target, class_range=5),
        "range order": outcome(loss_of, mine, target, class_range=(5, 4)),
        "softcap": outcome(loss_of, mine, target, softcap=0.0),
        "budget": outcome(linear, hidden, weight, target, budget=0),
        "reduction": outcome(loss_of, mine, target, reduction="most"),
        "target shape": outcome(loss_of, mine, target[:3]),
        "second derivative": plain(twice),
        "linear second derivative": plain(linear_twice),
        "vmap": plain(batched),
        "compiled": plain(compiled),
    }  # fmt: skip
    if rank > 0:
        found["no member"] = outcome(loss_of, mine, target, group=alone)
    return found


def others(rank: int) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    from bonus_ops.vocab_parallel import bonus_cross_entropy as loss_of
    from bonus_ops.vocab_parallel import linear_bonus_cross_entropy as linear

    found: dict[str, Any] = {}
    logits, target = example("typical", torch.float32)
    first, stop = RANGES["uneven"][rank]
    options = {"group": None, "class_range": (first, stop)}
    mine = logits[:, first:stop].clone().requires_grad_()
    bonus_of = checkpoint(loss_of, mine, target, use_reentrant=False, **options)
    bonus_of.backward()
    found["checkpoint"] = bonus_of.detach(), mine.grad
    image = logits.t().reshape(1, C, 3, 3)[:, first:stop].clone().requires_grad_()
    loss = loss_of(image, target.view(1, 3, 3), reduction="none", **options)
    loss.backward(upstream(loss.flatten()).view(loss.shape))
    found["image"] = loss.detach(), image.grad
    row = logits[0, first:stop].clone().requires_grad_()
    loss = loss_of(row, target[0], **options)
    loss.backward()
    found["row"] = loss.detach(), row.grad
    pair = dist.new_group([1, 2])
    if rank >= 1:  # equal shards by the ranks of the group
        half = logits[:, :6] if rank == 1 else logits[:, 6:]
        found["pair"] = loss_of(half, target, group=pair)
    tensors = layer(torch.float32)
    embedding = tensors["linear_weight"][first:stop].clone().requires_grad_()
    hidden = tensors["input"].clone().requires_grad_()
    loss = linear(hidden, embedding, target, **options)
    loss.backward(retain_graph=True)
    loss.backward()
    found["again"] = hidden.grad, embedding.grad
    last = tensors["input"].clone().requires_grad_()
    linear(last, embedding.detach(), target, **options).backward(torch.tensor(torch.nan))
    found["nan upstream"] = last.grad
    with torch.no_grad():
        found["no grad"] = linear(hidden, embedding, target, **options)
    return found


# --- what they found --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name may not resolve
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=TIMEOUT)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def joined(parts: list[torch.Tensor], where: str, dim: int) -> torch.Tensor:
    """Return the shards of all ranks in the order of the classes."""
    order = sorted(range(len(parts)), key=lambda rank: RANGES[where][rank])
    return torch.cat([parts[rank] for rank in order], dim)


def same_bits(tensors: list[torch.Tensor]) -> bool:
    first, *others = (x.flatten().view(torch.uint8) for x in tensors)
    return all(torch.equal(x, first) for x in others)


def alone(case: Any, dtype: torch.dtype) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Return loss, scores and gradient of one process, of the inputs as they were rounded."""
    _, rounded, regime, options = case
    logits, target = example(regime, rounded)
    ignored = target == options.get("ignore_index", -100)
    logits = logits.to(dtype).masked_fill(ignored[:, None], 0.0).requires_grad_()
    options = {**options, **{name: x.to(dtype) for name, x in class_weights(options, rounded).items()}}
    loss, scores = bonus_cross_entropy_with_scores(logits, target, implementation="reference", **options)
    loss.backward(upstream(loss))
    return loss.detach(), scores, logits.grad


def truth_of_layer(case: Any, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return loss, scores with the norm of the last layer's gradient, and gradients, of one process by its logits."""
    _, rounded, options = case
    options = {k: x for k, x in options.items() if k not in ("rows", "reduce_input_grad")}
    reduction, z_loss = options.pop("reduction", "mean"), options.pop("z_loss", 0.0)
    tensors = {k: x.to(dtype).requires_grad_() for k, x in layer(rounded).items()}
    target = example("typical", rounded)[1]
    bias = tensors["linear_bias"] if options.pop("bias", False) else None
    frozen, weighs = options.pop("frozen", False), options.pop("row_weight", False)
    own = tensors["row_weight"].masked_fill(target == -100, 0.0) if weighs else torch.ones(N, dtype=dtype)
    options = {**options, **{name: x.to(dtype) for name, x in class_weights(options, rounded).items()}}
    counts = target != -100
    n = divisor = counts.sum()
    if "weight" in options:
        divisor = options["weight"][target[counts]].sum()
        if "bonus_weight" in options and reduction == "mean":  # whose mean is over rows
            options["bonus_weight"] = options["bonus_weight"] * (divisor / n)
    z = F.linear(tensors["input"].masked_fill(~counts[:, None], 0.0), tensors["linear_weight"], bias)
    z.retain_grad()
    common = {"reduction": "none", "implementation": "reference"}
    rows, scores = bonus_cross_entropy_with_scores(z, target, **common, **options)
    of_z = bonus_cross_entropy(z, target, z_loss=z_loss, **common, **options) - rows
    (dz,) = torch.autograd.grad(((rows + of_z) * own).sum(), z, retain_graph=True)
    size = tensors["input"].detach().square().sum(1) + (bias is not None)
    norm = (torch.linalg.vector_norm(dz, dim=1) * size.sqrt()).masked_fill(~counts, torch.nan)
    if reduction == "mean":
        rows, of_z = rows / divisor, of_z / n
    loss = (rows + of_z) * own
    loss = loss if reduction == "none" else loss.sum()
    loss.backward(upstream(loss))
    wanted = ["input", *([] if frozen else ["linear_weight"]), *(["linear_bias"] if bias is not None else [])]
    wanted += ["row_weight"] if weighs else []
    return loss.detach(), [*scores, norm], {key: tensors[key].grad for key in wanted}


FLOORS = {torch.float64: 2.0**-44, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_loss_of_all_classes(ranks: list[dict[str, Any]], name: str) -> None:
    case = CASES[name]
    where, dtype, _, _ = case
    found = [rank["logits"][name] for rank in ranks]
    loss, scores, grad = alone(case, torch.float64)
    eager = alone(case, dtype)
    for what, got, truth, same in (
        ("loss", found[0]["loss"], loss, eager[0]),
        ("grad", joined([x["grad"] for x in found], where, 1), grad, eager[2]),
    ):
        assert got.dtype == dtype
        assert_within_budget(got, truth, same, floor=FLOORS[dtype], what=f"{name}: {what}")
    for column, got, truth, same in zip(scores._fields, found[0]["scores"], scores, eager[1], strict=True):
        if column == "runner_up":
            assert torch.equal(got, same), name
        else:
            assert_within_budget(got, truth.double(), same, floor=2.0**-20, what=f"{name}: {column}")


@pytest.mark.parametrize("name", LINEAR)
def test_the_linear_form_is_the_loss_of_all_classes(ranks: list[dict[str, Any]], name: str) -> None:
    case = LINEAR[name]
    where, dtype, options = case
    found = [rank["linear"][name] for rank in ranks]
    (loss, scores, grads), eager = truth_of_layer(case, torch.float64), truth_of_layer(case, dtype)
    floor = FLOORS[dtype]
    assert_within_budget(found[0]["loss"], loss, eager[0], floor=floor, what=f"{name}: loss")
    *columns, runner_up, norm = found[0]["scores"]
    assert torch.equal(runner_up, eager[1][5]), name
    for got, truth, same in zip((*columns, norm), (*scores[:5], scores[6]), (*eager[1][:5], eager[1][6]), strict=True):
        assert_within_budget(got, truth.double(), same, floor=2.0**-20, what=f"{name}: scores")
    assert all(x["grads"].keys() == grads.keys() for x in found), name
    for key, truth in grads.items():
        parts = [x["grads"][key] for x in found]
        if key.startswith("linear"):
            got = joined(parts, where, 0)
        elif key == "input" and options.get("reduce_input_grad") is False:
            got = torch.stack(parts).sum(0)
        else:
            assert same_bits(parts), name
            got = parts[0]
        unit = max(1.0, float(truth.abs().max()))
        assert_within_budget(got, truth, eager[2][key], floor=floor, unit=unit, what=f"{name}: {key}")


@pytest.mark.parametrize(("form", "names"), [("logits", CASES), ("linear", LINEAR)])
def test_all_ranks_get_the_same_bits(ranks: list[dict[str, Any]], form: str, names: Any) -> None:
    for name in names:
        found = [rank[form][name] for rank in ranks]
        assert same_bits([x["loss"] for x in found]), name
        for columns in zip(*(x["scores"] for x in found), strict=True):
            assert same_bits(list(columns)), name


def test_scores_do_not_change_the_loss(ranks: list[dict[str, Any]]) -> None:
    for name, x in ranks[0]["logits"].items():
        assert same_bits([x["loss"], x["without"]]), name
    for name, x in ranks[0]["linear"].items():  # another budget
        torch.testing.assert_close(x["without"], x["loss"], rtol=0, atol=1e-5, msg=name)


def asks_twice(options: dict[str, Any]) -> bool:
    """Return whether all classes pay what is not cross-entropy, of the probability that the first all-gather tells."""
    smoothing = options.get("bonus_smoothing", options.get("label_smoothing", 0.0))
    bonus = options.get("bonus", LogBonus())
    return smoothing > 0 and bonus is not None or isinstance(bonus, ClassLoss)


def test_one_all_gather_in_forward_and_nothing_in_backward(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, x in rank["logits"].items():
            assert x["sent"] == ({"allgather_base": 1 + asks_twice(CASES[name][3])}, {}), name


def test_the_linear_form_sends_once_a_chunk(ranks: list[dict[str, Any]]) -> None:
    n_rows = N - 1  # one is ignored
    for rank in ranks:
        for name, x in rank["linear"].items():
            _, _, options = LINEAR[name]
            a_chunk = 1 + asks_twice(options)
            forward, backward = {"allgather_base": 1 + a_chunk * -(-n_rows // options.get("rows", N))}, {}
            if options.get("reduce_input_grad", True):
                (backward if options.get("reduction") == "none" else forward)["allreduce"] = 1
            of_classes = isinstance(options.get("bonus"), ClassLoss)
            if of_classes or any(
                x in options for x in ("softcap", "label_smoothing", "bonus_weight")
            ):  # for the norm of the last layer's gradient
                forward["allreduce"] = forward.get("allreduce", 0) + 1
            assert x["sent"] == (forward, backward), (name, x["sent"], forward, backward)


ERRORS = {
    "label": ("IndexError", "Target 12 is out of bounds"),
    "negative label": ("IndexError", "Target -1 is out of bounds"),
    "linear label": ("IndexError", "Target 12 is out of bounds"),
    "overlap": ("ValueError", "the class ranges of the ranks overlap at class"),
    "gap": ("ValueError", "the class ranges of the ranks leave out classes"),
    "linear gap": ("ValueError", "the class ranges of the ranks leave out classes"),
    "twice": ("ValueError", "the class ranges of the ranks overlap at class 0"),
    "unfit": ("ValueError", "but its shard has"),
    "unequal": ("ValueError", "class_range=None stands for equal shards"),
    "weight": ("RuntimeError", "expected weight of shape [12], one number for each class of all ranks, got [13]"),
    "weight shape": ("RuntimeError", "got [12, 2]"),
    "targets": ("RuntimeError", "expected the same target on all ranks"),
    "rows": ("RuntimeError", "expected the same rows on all ranks"),
    "linear rows": ("RuntimeError", "expected the same rows on all ranks"),
    "probabilities": ("NotImplementedError", "expected class indices as target"),
    "bonus weight": ("RuntimeError", "one number for each class of all ranks, got [13]"),
    "two weights": ("RuntimeError", "bonus_weight must have shape [12], one number a class, got [13]"),
    "range type": ("TypeError", "class_range must be (first, stop) or None, got 5"),
    "range order": ("ValueError", "class_range[1] must be at least 5, got 4"),
    "softcap": ("ValueError", "softcap must be in (0, inf)"),
    "budget": ("ValueError", "budget must be at least 1, got 0"),
    "reduction": ("ValueError", "most is not a valid value for reduction"),
    "target shape": ("ValueError", "Expected input batch_size (9) to match target batch_size (3)"),
    "second derivative": ("RuntimeError", "no second derivative"),
    "linear second derivative": ("RuntimeError", "no second derivative"),
    "vmap": ("NotImplementedError", "no rule for torch.func"),
    "compiled": ("Unsupported", "outside of torch.compile"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_faults_raise_on_every_rank(ranks: list[dict[str, Any]], name: str) -> None:
    kind, words = ERRORS[name]
    for rank in ranks:
        came = rank["errors"][name]
        assert came[0] == kind and words in came[1], came
    if name not in ("compiled", "target shape"):  # which have more to say
        assert len({rank["errors"][name] for rank in ranks}) == 1


@pytest.mark.parametrize(("name", "own"), [("own fault", "NotImplementedError"), ("linear own fault", "RuntimeError")])
def test_a_fault_of_one_rank_raises_on_all(ranks: list[dict[str, Any]], name: str, own: str) -> None:
    *others, last = (rank["errors"][name] for rank in ranks)
    assert last[0] == own and "raised an error" not in last[1]
    assert set(others) == {
        ("RuntimeError", f"rank {len(ranks) - 1} of the group raised an error about its own arguments; see there")
    }


def test_who_is_no_member_hears_so(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[1:]:
        assert rank["errors"]["no member"] == ("ValueError", "group: this process is not among its ranks")


def test_shapes_checkpoints_and_groups(ranks: list[dict[str, Any]]) -> None:
    logits, target = example("typical", torch.float64)
    found = [rank["others"] for rank in ranks]

    def compared(name: str, x: torch.Tensor, y: torch.Tensor, dim: int, **options: Any) -> None:
        x = x.clone().requires_grad_()
        loss = bonus_cross_entropy(x, y, **options)
        loss.backward(upstream(loss.flatten()).view(loss.shape) if options else None)
        torch.testing.assert_close(found[0][name][0].double(), loss.detach(), rtol=2e-6, atol=2e-6)
        got = joined([each[name][1] for each in found], "uneven", dim)
        torch.testing.assert_close(got.double(), x.grad, rtol=2e-6, atol=2e-6)

    logits = logits.float().double()
    compared("checkpoint", logits, target, 1)
    compared("image", logits.t().reshape(1, C, 3, 3), target.view(1, 3, 3), 1, reduction="none")
    compared("row", logits[0], target[0], 0)
    whole = bonus_cross_entropy(logits, target)
    for each in found[-2:]:
        torch.testing.assert_close(each["pair"].double(), whole, rtol=2e-6, atol=2e-6)


def test_an_upstream_gradient_of_nan_does_not_reach_an_ignored_row(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        grad = rank["others"]["nan upstream"]
        assert (grad[1] == 0).all() and grad[[0, *range(2, N)]].isnan().all()


def test_a_second_backward_adds_the_same(ranks: list[dict[str, Any]]) -> None:
    case = ("uneven", torch.float32, {})
    loss, _, grads = truth_of_layer(case, torch.float64)
    found = [rank["others"] for rank in ranks]
    hidden, weight = found[0]["again"][0], joined([x["again"][1] for x in found], "uneven", 0)
    for got, truth in ((hidden, grads["input"]), (weight, grads["linear_weight"])):
        torch.testing.assert_close(got.double(), 2 * truth / upstream(loss).item(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0]["no grad"].double(), loss, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_rank() -> Any:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("n_classes", "dtype"), [(1, torch.float32), (2, torch.float64), (40, torch.float32)])
def test_every_loss_for_one_rank(one_rank: None, n_classes: int, dtype: torch.dtype) -> None:
    from bonus_ops import vocab_parallel
    from tests.cases import LOSSES

    options = {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 60.0}
    draw = torch.Generator().manual_seed(n_classes)
    for scale in (1, 8, 30):
        logits = (torch.randn(6, n_classes, generator=draw, dtype=torch.float64) * scale).to(dtype)
        target = torch.randint(0, n_classes, (6,), generator=draw)
        target[1] = -100

        def outcome(function: Any, of: torch.dtype, logits: Any = logits, target: Any = target, **named: Any) -> Any:
            z = logits.to(of, copy=True).requires_grad_()
            loss = function(z, target, reduction="none", **named)
            loss.backward(upstream(loss))
            return loss, z.grad

        mirrored = {"squared": SoftmaxSquaredError(0.7, 3.0), "absolute": SoftmaxAbsoluteError(0.5, 1.0)}
        for name, bonus in (LOSSES | mirrored).items():
            for smoothed in ({}, options):
                named = {"bonus": bonus, **smoothed}
                found = outcome(vocab_parallel.bonus_cross_entropy, dtype, group=None, **named)
                named["implementation"] = "reference"
                eager, truth = (outcome(bonus_cross_entropy, of, **named) for of in (dtype, torch.float64))
                for what, x, y, same in zip(("loss", "grad"), found, truth, eager, strict=True):
                    assert_within_budget(x, y, same, floor=FLOORS[dtype], what=f"{name} {smoothed} {scale}: {what}")


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2])
else:
    from tests.budget import assert_within_budget
