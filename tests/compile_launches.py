"""Launches of all kernels through the JIT's own binder and compiler, for GPUs that are not here; nothing is executed.

`python -m bench codegen` has the shapes that matter for speed; here are the dtypes, losses and layouts that the binder
may stumble over, and the benchmark's experiments. Run as a script, without TRITON_INTERPRET; prints what each launch
compiled to: registers, stack and spills, and in cases "by vectors" the widths of loads and stores.
"""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench.codegen.launches import caught
from bench.codegen.machine_code import inspect, resources
from bench.gpu.experiments import InForward, with_depth
from bonus_ops import CosineBonus, Focal, LogBonus, PowerBonus, SoftmaxSquaredError, SubDataBonus
from bonus_ops import bonus_binary_cross_entropy_with_logits as of_elements
from bonus_ops import bonus_cross_entropy as loss_alone
from bonus_ops import bonus_cross_entropy_with_scores as with_scores
from bonus_ops import bonus_cross_entropy_with_softmax as with_softmax

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EACH = {"implementation": "triton", "reduction": "none", "bonus": None}
BUILT: list[dict[str, Any]] = []


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch(case: str, step: Callable[..., Any], logits: Tensor, *rest: Any, gpu: str = "sm_90", upstream=(), **options):
    """Compile a forward and, if the logits take a gradient, the backward; ``upstream`` is expanded to the loss."""
    run = JITFunction.run

    def build(kernel: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        built = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        found = inspect(built, gpu, 1) if "by vectors" in case else resources(built, gpu)
        BUILT.append({"kernel": kernel.__name__, "target": gpu, "case": case} | found)

    with caught(gpu, build):
        made = step(logits, *rest, **options)
        loss = made if isinstance(made, Tensor) else made[0]
        if loss.requires_grad:
            torch.autograd.grad(loss, logits, loss.new_ones(upstream or [1] * loss.dim()).expand_as(loss))


def labels() -> None:
    """As autocast trains: the loss of halves, and its upstream gradient, are float32."""
    for case, logits, bonus in (
        ("one", zeros(FP32, 1, 1), None),
        ("long fp16", zeros(FP16, 600, 50257), LogBonus()),
        ("long float64", zeros(FP64, 600, 50257), LogBonus()),
        ("ten classes", zeros(BF16, 64, 10), Focal()),
        ("a thousand classes", zeros(FP32, 64, 1000), CosineBonus()),
        ("transposed", zeros(FP32, 3000, 600).t(), SubDataBonus(0.5)),
        ("split, four tiles ahead", zeros(BF16, 4, 200000), LogBonus(1.0)),
    ):
        for step, reduction in ((loss_alone, "mean"), *((f, "none") for f in (loss_alone, with_scores, with_softmax))):
            options = EACH | {"reduction": reduction, "bonus": bonus}
            with torch.autocast("cpu"), with_depth(4) if "ahead" in case else contextlib.nullcontext():
                launch(case, step, logits.requires_grad_(), zeros(torch.int64, len(logits)), **options)
    launch("held", InForward.apply, zeros(BF16, 8, 50257)[:, :32000], zeros(torch.int64, 8))


def shares() -> None:
    weights = {"weight": zeros(FP32, 10), "bonus_weight": zeros(FP32, 10), "bonus_smoothing": 0.1}
    for case, logits, given, options in (
        ("by vectors", zeros(BF16, 600, 50257), None, {"bonus": LogBonus()}),
        ("class weights", zeros(FP32, 600, 10), None, weights | {"bonus": LogBonus()}),
        ("probabilities by vectors, class weights", zeros(BF16, 600, 50257), BF16, {"weight": zeros(BF16, 50257)}),
        ("one", zeros(BF16, 1, 1), None, {"bonus": PowerBonus(2.5, start=0.1)}),
        ("z-loss", zeros(FP32, 600, 1003), FP32, {"bonus": SoftmaxSquaredError(1.0), "z_loss": 0.1}),
        ("float64", zeros(FP64, 64, 1000), FP64, {"bonus": Focal()}),
        ("transposed", zeros(FP16, 3000, 600).t(), None, {"bonus": SubDataBonus(0.5)}),
    ):
        target = zeros(torch.int64, len(logits)) if given is None else zeros(given, *logits.shape)
        for gpu in ("sm_90", "gfx942") if given is None else ("sm_90",):
            launch(case, with_scores, logits.requires_grad_(), target, gpu=gpu, label_smoothing=0.1, **EACH | options)


def elements() -> None:
    each, total = EACH | {"alpha": 0.25}, {"reduction": "sum"}
    for case, x, t, options in (
        ("by vectors", zeros(BF16, 5, 1003), zeros(BF16, 5, 1003), {"bonus": LogBonus()}),
        ("by vectors", zeros(FP32, 5, 1003), zeros(FP32, 5, 1003), {"bonus": Focal()}),
        ("by vectors", zeros(BF16, 4, 1000), zeros(FP32, 4, 1000), {}),
        ("float64", zeros(FP64, 70), zeros(FP64, 70), {}),
        ("one", zeros(FP32), zeros(FP32), {"weight": zeros(FP32)}),
        ("weights", *[zeros(FP32, 600, 80)] * 2, {"weight": zeros(FP32, 600, 1), "pos_weight": zeros(FP32, 80)}),
    ):
        launch(case, of_elements, x, t, **each | options)
        launch(case, of_elements, x.detach().requires_grad_(), t, **each | total | options)
    x = zeros(FP16, 80, 5, 600).transpose(0, 2).requires_grad_()
    launch("three axes", of_elements, x, zeros(FP16, 600, 5, 80), upstream=(1, 1, 80), **each)
    launch("more than 32 bits count", of_elements, *[zeros(BF16, 1 << 15, 1).expand(-1, 1 << 17)] * 2, **each | total)


if __name__ == "__main__":
    for kind in (labels, shares, elements):
        kind()
    print(json.dumps(BUILT))
