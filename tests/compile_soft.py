"""Launches of kernels/gpu/soft.py through the JIT's own binder and compiler, for GPUs that are not here.

Run as a script, without TRITON_INTERPRET, as `compile_launches`. Prints what each launch compiled to: registers, stack
and spills, and of long rows the widths of the loads and stores in their loops.
"""

import json

import torch

from bench.codegen.machine_code import inspect, resources
from bonus_ops import CrossEntropy, Focal, LogBonus, PowerBonus, SoftmaxSquaredError, SubDataBonus
from bonus_ops.kernels.gpu import soft
from bonus_ops.losses import Loss
from bonus_ops.soft_targets import SoftTargets
from tests.compile_launches import built_for

BUILT: list[dict] = []


def launch(gpu, n_rows, n_classes, dtype, loss: Loss, given=None, weight=None, transposed=False, lse=False):
    """Make the launches of one forward with scores and one backward.

    ``given`` and ``weight`` are dtypes; with ``lse`` as a z-loss makes them.
    """
    shape = (n_classes, n_rows) if transposed else (n_rows, n_classes)
    logits = torch.zeros(shape, dtype=dtype)
    logits = (logits.t() if transposed else logits)[:, None]
    label = torch.zeros(n_rows, 1, dtype=torch.int64)
    probabilities = None if given is None else torch.zeros(n_rows, 1, n_classes, dtype=given)
    weights = (None, None) if weight is None else (torch.ones(n_classes, dtype=weight),) * 2
    targets = SoftTargets(probabilities, *weights, 0.1, 0.1)
    with built_for(gpu) as launched:
        out = soft.forward(logits, label, targets, -100, loss, True, lse=lse)
        upstream = torch.ones(n_rows, dtype=out.loss.dtype)
        of_lse = upstream if lse else None
        soft.backward(logits, label, targets, out.saved, out.runner_up, upstream, -100, loss, grad_lse=of_lse)
    what = [type(loss).__name__, n_classes, dtype, given and f"probabilities {given}", weight and "weight"]
    case = " ".join(str(x) for x in what if x is not None)
    for name, built in launched:
        found = inspect(built, gpu, 1) if n_classes > 50000 else resources(built, gpu)
        BUILT.append({"kernel": name, "target": gpu, "case": case} | found)


def main() -> None:
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for gpu in ("sm_90", "gfx942"):
        launch(gpu, 600, 50257, half, LogBonus())
        launch(gpu, 600, 10, single, LogBonus(), weight=single)
    launch("sm_90", 600, 50257, half, CrossEntropy(), half, half)
    launch("sm_90", 1, 1, half, PowerBonus(2.5, start=0.1))
    launch("sm_90", 600, 1003, single, SoftmaxSquaredError(1.0), single, lse=True)
    launch("sm_90", 64, 1000, double, Focal(), double)
    launch("sm_90", 600, 3000, torch.float16, SubDataBonus(0.5), transposed=True)
    print(json.dumps(BUILT))


if __name__ == "__main__":
    main()
