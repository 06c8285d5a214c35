"""The clocks of `python -m bench gpu`, on a stand-in that checks the order of calls as CUDA does."""

from __future__ import annotations

import gc
import statistics
import types

import pytest
import torch

from bench import measure
from bench.gpu import devices, peers
from tests import conftest

pytest.importorskip("triton")
if conftest.ACCELERATOR is not None or not conftest.INTERPRETED:
    pytest.skip("the stand-in interprets kernels", allow_module_level=True)
from tests.cuda_stand_in import MS
from tests.toy_gpu import Toy


@pytest.mark.slow
def test_a_step_is_timed_without_what_prepares_it(cuda, monkeypatch):
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 0.0)  # a slow host would have it run again
    x = torch.zeros(3, device="cuda")
    prepared, run = [], []

    def prepare():
        prepared.append(x + 1)

    def twice():
        run.append((x + 1) * 2)

    step = measure.Step(prepare, twice)
    assert measure.time_ms(step, True) == pytest.approx(2 * MS)
    times = Toy().interleave({"twice": step, "once": measure.Step(prepare, lambda: x + 1)}, -1.0)
    assert {name: len(values) for name, values in times.items()} == {"twice": 7, "once": 7}
    assert statistics.median(times["twice"]) == pytest.approx(2 * MS)
    assert statistics.median(times["once"]) == pytest.approx(MS)
    assert len(prepared) == 1 + 2 * 9 and len(run) == 1 + 9  # two rounds that nobody times


def test_a_gpu_that_woke_before_the_launches_were_queued_is_timed_again(cuda, monkeypatch):
    """Else the time of Python would be taken for that of kernels."""
    now, slept, took = [0.0], [], iter((0.005, 0.005))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles / 2e6))

    def slow():
        now[0] += next(took)

    measure.time_ms(measure.Step(lambda: None, slow), True)
    assert slept == pytest.approx([4.0, 10.0])


def test_the_device_is_asked_what_it_is(cuda):
    found = devices.Gpu().describe()
    assert found["gpu"] == "NVIDIA H200" and found["l2_mb"] == 62.9 and found["memory_gb"] == 150.0
    assert found["driver"] == "unknown"  # no nvidia-smi here
    assert devices.Gpu().kernels() == "triton" and devices.Gpu().shape(7, 9) == (7, 9)
    # four times the cache, at most 64
    assert [devices.Gpu().copies(size) for size in (1 << 30, 64 << 20, 32 << 20, 1 << 10)] == [1, 4, 8, 64]
    devices.Gpu().reset()


def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices._driver() == "580.1"
    tool.write_text("#!/bin/sh\nexit 3\n")
    assert devices._driver() == "unknown"


@pytest.mark.slow
def test_ceilings_are_bytes_and_products_over_time(cuda):
    assert measure.copy_gb_per_s(1 << 12) == pytest.approx(2 * 4096 / (MS * 1e-3) / 1e9)
    assert Toy().gemm_tflop_per_s(16) == pytest.approx(2 * 16**3 / (MS * 1e-3) / 1e12)


def test_host_time_is_that_of_a_call(cuda, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(clock))
    calls = []
    assert devices.Gpu().host_us(lambda: calls.append(1), n=4) == 1e6 / 4
    assert len(calls) == 20 + 7 * 4


def test_replayed_time_is_that_of_a_call(cuda):
    x = torch.zeros(3, device="cuda")
    host = []

    def step():
        host.append(1)
        x.add_(1)
        x.mul_(1)

    assert devices.Gpu().replay_us(step, n=20) == pytest.approx(2 * MS * 1e3)
    assert len(host) == 3 + 10  # warmed up, captured; no replay asks the host
    assert x[0].item() == 3 + 10 + 7 * 20  # the stand-in runs what it captures


@pytest.mark.slow
def test_a_step_leaves_nothing_to_the_garbage_collector():
    """Which is off while steps are timed: a cycle would hold the gradients of all of them."""
    z, y = peers.logits(3, 10, torch.float32, "cpu")
    losses = {name: peers.PEERS[name].load() for name in (peers.OURS, peers.LOSS_ONLY)}
    for loss in losses.values():
        torch.autograd.grad(loss(z, y), z)
    gc.collect()
    gc.disable()
    try:
        for loss in losses.values():
            torch.autograd.grad(loss(z, y), z)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_peak_memory_is_read_around_the_step(cuda):
    asked = []

    def run():
        asked.append("run")
        cuda.memory["peak"] = 900

    cuda.memory["now"] = 500
    assert measure.peak_bytes(measure.Step(lambda: asked.append("prepare"), run), True) == 400
    assert asked == ["prepare", "run"]
    assert measure.cache_bytes(True) == 62_914_560 and measure.cache_bytes(False) == 0


def test_memory_is_kept_where_malloc_agrees(monkeypatch):
    set_to = []
    libc = types.SimpleNamespace(mallopt=lambda option, value: set_to.append((option, value)) or 1)
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: libc)
    assert measure.keep_memory() and set_to == [(-4, 0), (-1, -1)]
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: types.SimpleNamespace())
    assert not measure.keep_memory()
