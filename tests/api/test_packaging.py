"""What is installed: the package without triton or numba, the wheel's kernels."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bonus_ops

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def run(code: str, folder: Path, *arguments: str, **environment: str) -> str:
    """Run code from a file of its own, as Triton needs, far from the repository; return what it printed."""
    script = folder / "script.py"
    script.write_text(code)
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


STEPS = """
import sys
for missing in sys.argv[1:]:
    sys.modules[missing] = None  # as where it is not installed: not found, not importable
import torch
import bonus_ops as b
from bonus_ops import call

torch.manual_seed(0)
logits, target = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, -100, 0])
pixels, labels = torch.randn(2, 3, 4, 4), torch.arange(32).reshape(2, 4, 4) % 3
soft, binary = torch.randn(7, 5).softmax(1), torch.rand(7, 5)
LOSSES = {  # kind: loss and scores, of logits, by an implementation
    "labels": (logits, lambda z, how: b.bonus_cross_entropy_with_scores(z, target, implementation=how)),
    "pixels": (pixels, lambda z, how: b.bonus_cross_entropy_with_scores(z, labels, implementation=how)),
    "smoothing": (logits, lambda z, how: b.bonus_cross_entropy_with_scores(
        z, target, label_smoothing=0.1, implementation=how)),
    "probabilities": (logits, lambda z, how: b.bonus_cross_entropy_with_scores(z, soft, implementation=how)),
    "sigmoid": (logits, lambda z, how: (b.bonus_binary_cross_entropy_with_logits(z, binary, implementation=how), ())),
}

def results(name, how):
    z, step = LOSSES[name]
    z = z.clone().requires_grad_()
    loss, scores = step(z, how)
    loss.backward()
    return loss.detach(), *scores, z.grad
"""
AGREE = """
for name in LOSSES:
    for got, expected in zip(results(name, how), results(name, "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_without_triton_a_cpu_runs_the_loops(tmp_path):
    out = run(
        f"""
{STEPS}
for how in (None, "numba"):
    {AGREE.strip().replace(chr(10), chr(10) + "    ")}
    for kind in ("labels", "soft", "sigmoid"):
        assert call.decide(how, logits, kind, b.LogBonus(), None) == "numba"
from bonus_ops.kernels.formulas import scalar
assert "bonus_ops.kernels.cpu.labels" in sys.modules and type(scalar.exp).__name__ == "function"
b.BonusCrossEntropyLoss()(logits, target)
logits.requires_grad_()
torch.compile(b.bonus_cross_entropy, fullgraph=True, backend="aot_eager")(logits, target).backward()
try:
    b.bonus_cross_entropy(logits, target, implementation="triton")
except RuntimeError as error:
    print(error)
assert not any(name.startswith("triton.") for name in sys.modules)
""",
        tmp_path, "triton",
    )  # fmt: skip
    assert "implementation='triton' cannot run" in out and "triton is not installed" in out


@pytest.mark.parametrize("missing", [("numba", "llvmlite"), ("triton", "numba", "llvmlite")], ids=" and ".join)
def test_without_numba_a_cpu_runs_the_reference(tmp_path, missing):
    out = run(
        f"""
{STEPS}
for how in (None,):
    assert call.decide(how, logits, "labels", b.LogBonus(), None) == "reference"
    {AGREE.strip().replace(chr(10), chr(10) + "    ")}
for step in (b.bonus_cross_entropy, b.difficulty_scores):
    try:
        step(logits, target, implementation="numba")
    except RuntimeError as error:
        print(error)
assert not any("kernels.cpu" in name for name in sys.modules)
""",
        tmp_path, *missing,
    )  # fmt: skip
    assert out == 2 * (
        "implementation='numba' cannot run: numba is not installed; pip install 'bonus-ops[cpu]' brings it\n"
    )


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_a_second_process_finds_machine_code_on_disk(tmp_path):
    """Without importing Numba, which alone takes half a second."""
    code = f"""
{STEPS}
for name in LOSSES:
    results(name, "numba")
print("numba" in sys.modules)
"""
    run(code, tmp_path)  # compiles what is not on disk yet
    assert run(code, tmp_path) == "False\n"


def test_importing_the_package_is_enough_and_imports_little(tmp_path):
    pytest.importorskip("triton")
    out = run(
        """
import sys, torch, bonus_ops
bonus_ops.causal_lm.trainer_loss, bonus_ops.policies.infobatch, bonus_ops.dynamics.Mean  # parts are there
found = {name.partition(".")[0] for name in sys.modules} & {"triton", "numba", "llvmlite"}
assert not found, found
assert not {"torch._dynamo", "torch.distributed.tensor"} & sys.modules.keys()  # 1.7 and 0.5 s
logits, target = torch.randn(2, 3), torch.tensor([0, 1])
bonus_ops.bonus_cross_entropy(logits, target)
print(sorted(name for name in sys.modules if "kernels.gpu" in name), torch.cuda.is_initialized())
try:
    bonus_ops.bonus_cross_entropy(logits, target, implementation="triton")
except RuntimeError as error:
    print(error)
""",
        tmp_path,
    )
    first, second = out.splitlines()
    assert first == "[] False"
    assert second.startswith("implementation='triton' cannot run: ") and "TRITON_INTERPRET is not set" in second


def test_kernels_import_from_anywhere_and_are_no_package_of_their_own(tmp_path):
    pytest.importorskip("triton")
    code = """
import bonus_ops.kernels.formulas.rest, bonus_ops.kernels.gpu.labels
import torch, bonus_ops
logits, target = torch.zeros(2, 4), torch.tensor([0, 1])
print(bonus_ops.bonus_cross_entropy(logits, target, bonus=None, implementation="triton").item())
"""
    assert float(run(code, tmp_path, TRITON_INTERPRET="1")) == pytest.approx(1.3862944)
    assert not (ROOT / "kernels" / "__init__.py").exists()  # else it would shadow another package named kernels


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools")
    if not README.exists():
        pytest.skip("pyproject.toml names README.md, which is not there")
    folder = tmp_path_factory.mktemp("wheel")
    # built from a copy: setuptools leaves folders behind
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "tests")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=leave_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "..", "."]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_kernels_as_regular_files(wheel):
    held = {info.filename: info for info in wheel.infolist()}
    sources = sorted((ROOT / "kernels").rglob("*.py"))
    assert {"formulas", "gpu", "cpu"} <= {path.parent.name for path in sources}
    for path in sources:
        info = held[f"bonus_ops/{path.relative_to(ROOT).as_posix()}"]
        assert not stat.S_ISLNK(info.external_attr >> 16)
        assert wheel.read(info) == path.read_bytes()
    for path in sorted((ROOT / "bonus_ops").rglob("*.py")):
        assert path.relative_to(ROOT).as_posix() in held
    assert "bonus_ops/py.typed" in held
    top_level = {name.partition("/")[0] for name in held}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"bonus_ops"}


def test_the_wheel_works_from_where_it_is_unpacked(wheel, tmp_path):
    pytest.importorskip("triton")
    wheel.extractall(tmp_path / "site")
    code = """
import torch, bonus_ops
import bonus_ops.kernels.gpu.labels as labels
print(bonus_ops.__file__)
print(labels.__file__)
logits, target = torch.zeros(2, 4), torch.tensor([0, 1])
for implementation in ("reference", "triton"):
    print(bonus_ops.bonus_cross_entropy(logits, target, bonus=None, implementation=implementation).item())
"""
    out = run(code, tmp_path, PYTHONPATH=str(tmp_path / "site"), TRITON_INTERPRET="1").split()
    assert all(line.startswith(str(tmp_path / "site")) for line in out[:2])
    assert [float(x) for x in out[2:]] == pytest.approx([1.3862944] * 2)


def test_the_wheel_asks_for_no_exact_version(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    needs = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    assert any(line.startswith("Requires-Dist: torch") for line in needs)
    assert not any("==" in line.partition(";")[0] for line in needs)
    (triton,) = (line for line in needs if line.startswith("Requires-Dist: triton"))
    assert "Linux" in triton


def test_the_wheel_has_the_version_that_the_package_says(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    assert f"\nVersion: {bonus_ops.__version__}\n" in wheel.read(name).decode()
