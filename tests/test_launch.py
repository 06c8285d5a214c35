"""Launches pass the JIT's binder and compile: what the interpreter cannot show and only a GPU would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def test_every_launch_binds_and_compiles():
    """A kernel argument called `params` once shadowed a name of the binder's; the interpreter ran it all the same."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_launches"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        "backward_kernel", "forward_kernel", "forward_softmax_kernel", "merge_kernel", "partial_kernel",
    ]  # fmt: skip
