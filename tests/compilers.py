"""Compilers beside the tests: in processes of their own, since under TRITON_INTERPRET nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS, GPU = "tests/kernels/test_kernels.py::", "tests/kernels/test_gpu.py::"
EMULATED = (  # every kernel, a dtype of each size, rows of each kind of length; any other case may be asked for
    "tests/kernels/test_emulated.py",
    *(f"{GPU}test_half_precision_is_rounded_once[{x}]" for x in ("600-10-bf16", "70-1003-fp16", "5-50257-bf16")),
    *(f"{GPU}test_rows_and_targets_at_any_address[{x}]" for x in ("1000-fp16", "1003-fp32", "5003-bf16")),
    *(f"{KERNELS}test_every_regime_and_path[fp32-typical-{n}]" for n in (1, 3, 8, 10, 64, 65, 1003, 2056, 16391)),
    *(f"{KERNELS}test_every_regime_and_path[{x}]" for x in ("bf16-masked-65", "bf16-confident-10", "fp64-masked-65")),
    *(f"{KERNELS}test_every_layout[{x}-torch.float32-1003]" for x in ("transposed", "padded_rows")),
    f"{KERNELS}test_a_bad_logit_spoils_its_row_alone[rest-nan-10]",
    "tests/api/test_soft.py::test_kernels[log_bonus-smoothing-torch.float32-9]",
    "tests/api/test_soft.py::test_kernels[log_bonus-probabilities-torch.float32-9]",
    "tests/api/test_sigmoid.py::test_any_layout[triton-none-in order-sliced]",
)
COMMANDS = {
    "tests.kernels.test_codegen": ("-m", "bench", "codegen", "--quick", "--json"),
    "tests.kernels.test_launch": ("-m", "tests.compile_launches"),
    "tests.kernels.test_ptx": ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *EMULATED),
}


def output(root: Path, module: str) -> str:
    """Return what the compiler of a test file prints, run on the tree at ``root``."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EMULATE")}
    environment["PYTHONPATH"] = str(root)
    if module == "tests.kernels.test_ptx":
        environment |= {"EMULATE": "sm_90", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, *COMMANDS[module]]
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-5000:]}{done.stderr[-3000:]}")
    return done.stdout
