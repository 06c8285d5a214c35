"""Every launch of kernels/gpu/labels.py through the JIT's own binder and compiler, for a GPU that is not here.

Run as a script, without TRITON_INTERPRET; nothing is executed. Prints the kernels that compiled, the experiments of the
benchmark among them.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from bench.codegen.launches import caught
from bench.gpu.experiments import InForward, with_depth
from bonus_ops import CosineBonus, CrossEntropy, Focal, GapLoss, LogBonus, SubDataBonus
from bonus_ops.kernels.gpu import labels
from bonus_ops.logit_options import PLAIN


@contextlib.contextmanager
def built_for(target: str) -> Iterator[list[tuple[str, Any]]]:
    """Compile the launches inside for a GPU; yield the name of each kernel and what it compiled to."""
    run, built = JITFunction.run, []

    def build(kernel: JITFunction, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        built.append((kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **kwargs)))

    with caught(target, build):
        yield built


def launch(n_rows: int, n_classes: int, dtype: torch.dtype, loss: GapLoss, transposed: bool = False) -> None:
    """Make the launches of one forward, forward with scores and softmax, and backward."""
    logits = (
        torch.zeros(n_classes, n_rows, dtype=dtype).t() if transposed else torch.zeros(n_rows, n_classes, dtype=dtype)
    )
    logits, target = logits[:, None], torch.zeros(n_rows, 1, dtype=torch.int64)
    for scores, softmax in ((False, False), (True, False), (True, True)):
        out = labels.forward(logits, target, -100, loss, scores, softmax, PLAIN)
    upstream = torch.ones(1, dtype=out.loss.dtype).expand(n_rows)
    labels.backward(logits, target, out.saved, upstream, None, -100, loss, PLAIN)
    mean, *_, saved = labels.forward_mean(logits, target, -100, loss, False, PLAIN)
    labels.backward_mean(logits, target, saved, mean, -100, loss, PLAIN)


def main() -> None:
    with built_for("sm_90") as built:
        launch(1, 1, torch.float32, CrossEntropy())
        for dtype in (torch.float16, torch.float64):  # the other two: test_codegen.py
            launch(600, 50257, dtype, LogBonus())
        launch(64, 10, torch.bfloat16, Focal())
        launch(64, 1000, torch.float32, CosineBonus())
        launch(600, 3000, torch.float32, SubDataBonus(0.5), transposed=True)
        logits = torch.zeros(8, 50257, dtype=torch.bfloat16, requires_grad=True)
        target = torch.zeros(8, dtype=torch.int64)
        for way in ("held", "from L2"):
            InForward.apply(logits[:, :32000], target, way)
        with with_depth(4):
            launch(4, 200000, torch.bfloat16, LogBonus(1.0))  # rows split over programs
    print(json.dumps(sorted({name for name, _ in built})))


if __name__ == "__main__":
    main()
