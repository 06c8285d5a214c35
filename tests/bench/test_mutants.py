"""Tests that cannot fail protect nothing: `python -m tests.mutants` shows that each seeded fault turns its test red.

That takes minutes; here the list is held against the source, and a handful is run.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys

import pytest

from tests.mutants import FAULTS
from tests.seeding import ROOT, Fault, Stale, operand, seeded

HANDFUL = ("the loss is lse - z", "the upstream gradient of each row is ignored", "a half is scaled after it was")


def test_every_fault_has_its_place():
    assert len({fault.words for fault in FAULTS}) == len(FAULTS)
    stale = []
    for fault in FAULTS:
        try:
            ast.parse(seeded((ROOT / fault.file).read_text(), fault))
        except Stale as reason:
            stale.append(f"{fault.words}: {reason}")
    assert not stale


@pytest.mark.slow
def test_every_fault_has_its_test():
    tests = {fault.test for fault in FAULTS}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *sorted({test.split("[")[0] for test in tests})]
    cases = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines())
    assert not tests - cases - {case.split("[")[0] for case in cases}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def g(a, b): return a + b", "a.py has 0 of f"),
        ("def f(a, b): return a - b", "(operand, Add, 0) fits 0 places in f of a.py, not 1"),
        ("def f(a, b): return a + b + 1", "(operand, Add, 0) fits 2 places in f of a.py, not 1"),
    ],
)
def test_a_fault_without_its_place_is_stale(source, reason):
    with pytest.raises(Stale) as raised:
        seeded(source, Fault("half of a sum", "a.py", "f", (operand, ast.Add, 0), "no test"))
    assert str(raised.value) == f"stale: {reason}"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="faults are seeded in kernels, triton is missing"
)
def test_a_handful_of_faults_is_killed():
    done = subprocess.run([sys.executable, "-m", "tests.mutants", *HANDFUL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(HANDFUL)} of {len(HANDFUL)} faults killed" in done.stdout
