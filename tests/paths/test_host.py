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

MOCKED = """
import json, torch
from bench import host
from bonus_ops import bonus_cross_entropy
from tests import on_meta

host.mock_launches()
compiled = []
for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.1}):
    for ignore_index in (-100, 0, 1):
        for n_rows in (128, 37, 1):
            x, y = torch.randn(n_rows, 1000, requires_grad=True), torch.full((n_rows,), 2)
            bonus_cross_entropy(x, y, ignore_index=ignore_index, implementation="triton", **options).backward()
    compiled += [list(host.Mocked.compiled)]
print(json.dumps({"compiled": compiled, "launches": host.counted(), "on meta": on_meta.both_ways()}))
"""


@pytest.fixture(scope="module")
def mocked() -> dict[str, list]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", MOCKED], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_last_batches_and_ignored_labels_compile_nothing_new(mocked):
    """A forward and a backward for each: of a mean, of a sum and of smoothed labels."""
    assert [len(x) for x in mocked["compiled"]] == [2, 4, 6], mocked["compiled"]


def test_launches_of_a_mean(mocked):
    rows = [row for row in mocked["launches"] if row["call"] in ("loss", "loss and scores")]
    assert len(rows) == 4
    for row in rows:
        operators = ["sum", "div"] + ["to"] * (row["dtype"] == "bfloat16")
        assert row["forward"] == {"kernels": 1, "operators": operators}
        assert row["backward"] == {"kernels": 1, "operators": ["ones_like"]}  # the seed that autograd makes


def test_no_backward_makes_zeros(mocked):
    """For scores and the like, which nobody differentiates."""
    assert not [row["call"] for row in mocked["launches"] if "zeros" in row["backward"]["operators"]]


def test_nothing_waits_for_the_device(mocked):
    """What asks a tensor without values for one raises; each loss on its short way and through its operator."""
    found = mocked["on meta"]
    assert all(inside in (2, 4) and short in (0, inside) for short, inside in found.values()), found
    assert found["labels"] == found["labels, scores"] == [2, 2]
