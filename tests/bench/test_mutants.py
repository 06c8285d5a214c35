"""Tests that cannot fail protect nothing: `python -m tests.mutants` shows that each seeded fault turns its test red.

That takes minutes; here the list is held against the source, and a handful is run.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys

import pytest

from tests.mutants import MUTANTS, ROOT

pytestmark = pytest.mark.slow

HANDFUL = ("the loss is lse - z", "the upstream gradient of each row is ignored", "a gradient is given away twice")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.fault)
def test_a_fault_still_fits_the_source(mutant):
    text = (ROOT / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    ast.parse(text.replace(mutant.old, mutant.new))
    file, name = mutant.test.split("[")[0].split("::")
    assert f"def {name}(" in (ROOT / file).read_text()


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="faults are seeded in kernels, triton is missing"
)
def test_a_handful_of_faults_is_killed():
    done = subprocess.run([sys.executable, "-m", "tests.mutants", *HANDFUL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(HANDFUL)} of {len(HANDFUL)} faults killed" in done.stdout
