"""Compilers beside the tests: in processes of their own, since under TRITON_INTERPRET nothing can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = "tests/kernels/test_kernels.py::"
EMULATED = (
    "tests/kernels/test_emulated.py",
    "tests/kernels/test_gpu.py::test_half_precision_is_rounded_once",
    "tests/kernels/test_gpu.py::test_rows_and_targets_at_any_address",
    *(f"{KERNELS}test_every_regime_and_path[fp32-typical-{n}]" for n in (1, 2, 3, 8, 10, 63, 64, 65, 1000, 1003, 2056)),
    *(f"{KERNELS}test_every_regime_and_path[bf16-{x}]" for x in ("confident-10", "masked-65", "masked-1003")),
    *(f"{KERNELS}test_every_regime_and_path[fp64-{x}]" for x in ("confident-10", "masked-65", "masked-1003")),
    *(f"{KERNELS}test_every_regime_and_path[{x}-typical-16391]" for x in ("fp32", "bf16", "fp16")),
    *(f"{KERNELS}test_every_layout[{x}-torch.float32-1003]" for x in ("transposed", "padded_rows", "offset_3")),
    *(f"{KERNELS}test_a_bad_logit_spoils_its_row_alone[rest-nan-{n}]" for n in (10, 1003)),
    "tests/api/test_soft.py::test_kernels[log_bonus-smoothing-torch.float32-9]",
    "tests/api/test_soft.py::test_kernels[log_bonus-probabilities-torch.float32-9]",
    "tests/api/test_sigmoid.py::test_any_layout[triton-none-in order-sliced]",
)
COMMANDS = {
    "tests.kernels.test_codegen": ("-m", "bench", "codegen", "--quick", "--json"),
    "tests.kernels.test_soft_kernels": ("-m", "tests.compile_soft"),
    "tests.kernels.test_launch": ("-m", "tests.compile_launches"),
    "tests.api.test_sigmoid": ("-m", "tests.compile_sigmoid"),
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
