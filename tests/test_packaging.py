"""What is installed: the package without triton, the kernels inside the wheel, the README's code as it stands."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bonus_ops

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SOURCES = [path for folder in ("bonus_ops", "kernels", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]


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


def test_without_triton_all_but_the_kernels_works(tmp_path):
    out = run(
        """
import sys
sys.modules["triton"] = None  # as where it is not installed: not found, not importable
import torch
import bonus_ops

logits, target = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
for implementation in (None, "torch", "reference"):
    loss, scores = bonus_ops.bonus_cross_entropy_with_scores(logits, target, implementation=implementation)
    loss.backward()
bonus_ops.BonusCrossEntropyLoss()(logits, target)
torch.compile(bonus_ops.bonus_cross_entropy, fullgraph=True, backend="aot_eager")(logits, target).backward()
try:
    bonus_ops.bonus_cross_entropy(logits, target, implementation="triton")
except RuntimeError as error:
    print(error)
assert not any(name.startswith("triton.") for name in sys.modules)
""",
        tmp_path,
    )
    assert "implementation='triton' cannot run" in out and "triton is not installed" in out


def test_kernels_are_imported_when_one_runs_and_say_why_none_can(tmp_path):
    pytest.importorskip("triton")
    out = run(
        """
import sys, torch, bonus_ops
assert "torch._dynamo" not in sys.modules  # 1.7 s
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_kernels_are_only_imported_from_inside_the_package(path):
    assert not re.search(r"^\s*(import kernels\b|from kernels\b)", path.read_text(), re.MULTILINE)


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
    for path in sorted((ROOT / "kernels").rglob("*.py")):
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
for implementation in ("torch", "triton"):
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


def test_importing_the_package_is_enough_for_its_parts(tmp_path):
    code = "import sys, bonus_ops as b; b.causal_lm.trainer_loss, b.policies.infobatch, b.dynamics.Mean"
    assert run(code + "; print('torch.distributed.tensor' in sys.modules)", tmp_path) == "False\n"  # half a second


def blocks_of_python() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL) if README.exists() else []


@pytest.mark.skipif(not README.exists(), reason="no README.md yet")
def test_the_readme_has_code_to_run():
    assert blocks_of_python()


ONE_BY_ONE = """
import os, runpy, sys, traceback
import torch._dynamo  # the slow imports, once: each block is a fork

for block in range(int(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os.chdir(str(block))
        said = os.open("said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        code = 1
        try:
            runpy.run_path("block.py", run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def blocks(tmp_path_factory) -> list[tuple[str, str]]:
    """Run every block of the README; return the exit status of each, and what it said."""
    folder, codes = tmp_path_factory.mktemp("readme"), blocks_of_python()
    for number, code in enumerate(codes):
        (folder / str(number)).mkdir()
        (folder / str(number) / "block.py").write_text(code)
    statuses = run(ONE_BY_ONE, folder, str(len(codes))).split()
    return [(status, (folder / str(number) / "said").read_text()) for number, status in enumerate(statuses)]


@pytest.mark.parametrize("number", range(len(blocks_of_python())))
def test_the_code_in_the_readme_runs_as_it_stands(number, blocks):
    for extra in ("sklearn", "matplotlib"):
        if extra in blocks_of_python()[number] or (extra == "matplotlib" and ".plot(" in blocks_of_python()[number]):
            pytest.importorskip(extra)
    status, said = blocks[number]
    assert status == "0", said
