"""What a call costs the host of a GPU, the launch itself mocked: variants compiled, launches, ways taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from bench.record import ROOT

pytestmark = pytest.mark.slow

ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

TRAINING = """
import json, torch
from bench import host
from bonus_ops import bonus_cross_entropy

host.mock_launches()
for ignore_index in (-100, 0, 1):
    for n_rows in (128, 37, 1):
        x, y = torch.randn(n_rows, 1000, requires_grad=True), torch.full((n_rows,), 2)
        bonus_cross_entropy(x, y, ignore_index=ignore_index, **OPTIONS).backward()
print(json.dumps(host.Mocked.compiled))
"""


def printed(*code: str) -> object:
    done = subprocess.run([sys.executable, *code], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str)
def test_last_batches_and_ignored_labels_compile_nothing_new(options):
    compiled = printed("-c", TRAINING.replace("OPTIONS", repr({"implementation": "triton", **options})))
    assert len(compiled) == len(set(compiled)) == 2, compiled  # forward and backward


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, str], dict]:
    code = "import json\nfrom bench import host\nhost.mock_launches()\nprint(json.dumps(host.counted()))"
    return {(row["call"], row["dtype"]): row for row in printed("-c", code)}


@pytest.mark.parametrize("call", ["loss", "loss and scores"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_launches_of_a_mean(counted, call, dtype):
    row = counted[call, dtype]
    assert row["forward"] == {"kernels": 1, "operators": ["sum", "div"] + ["to"] * (dtype == "bfloat16")}
    assert row["backward"] == {"kernels": 1, "operators": ["ones_like"]}  # the seed that autograd makes


def test_no_backward_makes_zeros(counted):
    """For scores and the like, which nobody differentiates."""
    assert not [row["call"] for row in counted.values() if "zeros" in row["backward"]["operators"]]


def test_nothing_waits_for_the_device():
    """What asks a tensor without values for one raises; each loss on its short way and through its operator."""
    found = printed("-m", "tests.on_meta")
    assert all(inside in (2, 4) and short in (0, inside) for short, inside in found.values()), found
    assert found["labels"] == found["labels, scores"] == [2, 2]
