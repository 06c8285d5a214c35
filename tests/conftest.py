"""Where the tests run: compiled kernels on a GPU, interpreted ones without; a fixed seed and one thread.

With EMULATE=sm_90 (or another NVIDIA target) in the environment kernels are compiled for that GPU and executed by
tests/ptx: slower to start, but what runs is the machine's code.
"""

import gc
import importlib.util
import os
import subprocess
import sys

import pytest
import torch


def _accelerator() -> str | None:
    for name in ("cuda", "xpu"):
        if hasattr(torch, name) and getattr(torch, name).is_available():
            return name
    return None


KEPT_CASES = 3  # of a test in `-m "not slow"`
ACCELERATOR = _accelerator()
EMULATED = os.environ.get("EMULATE")
INTERPRETED = False
if ACCELERATOR is None:
    # read when triton is imported, so set before any test module is; with 0 tests of kernels are skipped
    INTERPRETED = os.environ.setdefault("TRITON_INTERPRET", "0" if EMULATED else "1") == "1"
COMPILED = ACCELERATOR is not None or bool(EMULATED)  # kernels are; their exp2 and division approximate
WITHOUT_TRITON = importlib.util.find_spec("triton") is None
if WITHOUT_TRITON:  # these import it
    collect_ignore = [
        "interpreter_guard.py",
        "kernels/test_soft_kernels.py",
        "kernels/test_rest.py",
        "kernels/test_kernels.py",
        "kernels/test_traffic.py",
        "kernels/test_codegen.py",
    ]
elif INTERPRETED:
    from tests.interpreter_speed import patch_once_a_launch

    patch_once_a_launch()
if not WITHOUT_TRITON:
    import triton

    of_tested_compiler = pytest.mark.skipif(
        not triton.__version__.startswith("3.7."),
        reason="bounds on machine code are about triton 3.7's; `python -m bench codegen` shows that of another",
    )
if importlib.util.find_spec("hypothesis") is not None:  # `python -m bench gpu` asks for pytest alone
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "default", max_examples=500, deadline=None, derandomize=True, print_blob=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    settings.register_profile("long", settings.get_profile("default"), max_examples=20000, derandomize=False)
    settings.load_profile("default")
torch.set_num_threads(1)  # small cases on shared cores: a second thread only waits


def pytest_report_header() -> str:
    if WITHOUT_TRITON:
        return "kernels: not tested, triton is not installed"
    if EMULATED:
        return f"kernels: compiled for {EMULATED}, emulated"
    return f"kernels: compiled for {ACCELERATOR}" if ACCELERATOR else "kernels: interpreted, no GPU was found"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow what `-m "not slow"` leaves out.

    Of a test with many cases that is all but a few spread over them, unless it is marked ``every_case``.
    """
    cases: dict[tuple[object, str], list[pytest.Item]] = {}
    for item in items:
        if "compiled" in getattr(item, "fixturenames", ()):  # waits for machine code
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("every_case"):
            cases.setdefault((item.parent, getattr(item, "originalname", item.name)), []).append(item)
    for of_one in cases.values():
        last = len(of_one) - 1
        kept = {round(i * last / (KEPT_CASES - 1)) for i in range(KEPT_CASES)}
        for i in set(range(last + 1)) - kept:
            of_one[i].add_marker(pytest.mark.slow)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # thousands of tests that every full collection would walk, and the benchmark makes many


@pytest.fixture(scope="session", autouse=bool(EMULATED))
def emulator():
    """Let kernels run on tensors of the CPU: compiled, and executed by tests/ptx."""
    from tests.ptx.launching import emulated

    with emulated(EMULATED):
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return ACCELERATOR or "cpu"


@pytest.fixture
def kernel_device(device: str) -> str:
    """Return the device on which ``implementation="triton"`` runs, interpreted or compiled; skips if it cannot."""
    from bonus_ops.call import why_not_triton

    why = why_not_triton(device)
    if why is not None:
        pytest.skip(f"kernels cannot run: {why}")
    return device


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> str:
    """Return what the ``COMMAND`` of a test file prints: under TRITON_INTERPRET nothing can be compiled."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EMULATE")}
    environment |= {"PYTHONPATH": str(request.config.rootpath)} | getattr(request.module, "ENVIRONMENT", {})
    command = [sys.executable, *request.module.COMMAND]
    done = subprocess.run(command, cwd=request.config.rootpath, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-5000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def poison():
    """Fill every `torch.empty` with NaN or the largest integer, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
