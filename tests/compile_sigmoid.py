"""Every launch of kernels/gpu/sigmoid.py through the JIT's own binder and compiler, for a GPU that is not here.

Run as a script, without TRITON_INTERPRET, as `compile_launches`. Prints what each launch compiled to: registers,
stack and spills, and of tensors in order their loads and stores.
"""

import json

import torch

from bench.codegen.machine_code import inspect, resources
from bonus_ops import CrossEntropy, Focal, GapLoss, LogBonus
from bonus_ops.kernels.elements import Elements
from bonus_ops.kernels.gpu import sigmoid
from tests.compile_launches import built_for

BUILT: list[dict] = []


def launch(case: str, input, target, loss: GapLoss, only: str = "", weight=None, pos_weight=None, upstream=None):
    """Make the launches of a sum, of single losses and of a gradient, or only one of them."""
    of = Elements(input, target, weight, pos_weight, loss, (0.25, 0.75))
    with built_for("sm_90") as launched:
        if only in ("", "sum"):
            sigmoid.forward(of, True, input.new_empty((), dtype=of.dtype))
        if only in ("", "losses"):
            sigmoid.forward(of, False, torch.empty_like(target))
        if only in ("", "gradient"):
            sigmoid.backward(of, torch.ones((), dtype=of.dtype) if upstream is None else upstream)
    for name, built in launched:
        found = inspect(built, "sm_90", 1) if case == "in order" else resources(built, "sm_90")
        BUILT.append({"kernel": name, "case": case} | found)


def main() -> None:
    def rows(dtype, *shape):
        return torch.zeros(shape, dtype=dtype)

    launch("in order", rows(torch.bfloat16, 5, 1003), rows(torch.bfloat16, 5, 1003), LogBonus())
    launch("in order", rows(torch.float32, 5, 1003), rows(torch.float32, 5, 1003), Focal(), "gradient")
    launch("in order", rows(torch.bfloat16, 4, 1000), rows(torch.float32, 4, 1000), CrossEntropy(), "gradient")
    launch("float64", rows(torch.float64, 70), rows(torch.float64, 70), CrossEntropy(), "gradient")
    launch("one", rows(torch.float32), rows(torch.float32), CrossEntropy(), "losses", weight=rows(torch.float32))
    weights = {"weight": rows(torch.float32, 600, 1), "pos_weight": rows(torch.float32, 80)}
    launch("weights", rows(torch.float32, 600, 80), rows(torch.float32, 600, 80), CrossEntropy(), "sum", **weights)
    launch("three axes", rows(torch.float16, 80, 5, 600).transpose(0, 2), rows(torch.float16, 600, 5, 80),
           CrossEntropy(), "gradient", upstream=rows(torch.float16, 1, 1, 80).expand(600, 5, 80))  # fmt: skip
    launch("wide", *(rows(torch.bfloat16, 1 << 15, 1).expand(1 << 15, 1 << 17),) * 2, CrossEntropy(), "sum")
    print(json.dumps(BUILT))


if __name__ == "__main__":
    main()
