"""The stand-in for a CUDA device: it refuses what CUDA refuses, and what CUDA answers with a wrong number."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from tests import conftest

pytest.importorskip("triton")
if conftest.ACCELERATOR is not None or not conftest.INTERPRETED:
    pytest.skip("the stand-in interprets kernels", allow_module_level=True)
from tests import cuda_stand_in
from tests.cuda_stand_in import MS

ROOT = Path(__file__).resolve().parent.parent


def timed():
    return torch.cuda.Event(enable_timing=True)


def captured(work):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        work()


def on_side(work, before=False, after=False):
    x = torch.ones(3, device="cuda")
    side = torch.cuda.Stream()
    if before:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(x)
    if after:
        torch.cuda.current_stream().wait_stream(side)
    work(x)


def read_without_recording():
    timed().elapsed_time(timed())


def read_without_waiting():
    begin, end = timed(), timed()
    begin.record()
    torch.ones(3, device="cuda")
    end.record()
    begin.elapsed_time(end)


def read_without_timing():
    begin, end = timed(), torch.cuda.Event()
    begin.record()
    end.record()
    torch.cuda.synchronize()
    begin.elapsed_time(end)


def waits(work):
    torch.cuda.set_sync_debug_mode("error")
    work(torch.ones(3, device="cuda"))


REFUSED = {
    "recorded": read_without_recording,
    "not ready": read_without_waiting,
    "enable_timing": read_without_timing,
    "capturing: the host waits": lambda: captured(torch.cuda.synchronize),
    "capturing: an event is timed": lambda: captured(lambda: timed().record()),
    "capturing: _local_scalar": lambda: captured(lambda: torch.ones(1, device="cuda").item()),
    "capturing: tensor": lambda: captured(lambda: torch.tensor(1.0, device="cuda")),
    "capturing: a graph is replayed": lambda: captured(torch.cuda.CUDAGraph().replay),
    "without a preceding": lambda: torch.cuda.CUDAGraph().replay(),
    "has not waited": lambda: on_side(lambda x: x + 1, after=True),
    "not waited": lambda: on_side(lambda x: x + 1, before=True),
    "same device": lambda: torch.ones(3, device="cuda") + torch.ones(3),
    "synchronizing.*_local_scalar": lambda: waits(lambda x: x.sum().item()),
    "synchronizing.*_to_copy": lambda: waits(lambda x: x.cpu()),
    "synchronizing.*copy_": lambda: waits(lambda x: x.copy_(torch.zeros(3))),
    "synchronizing.*index": lambda: waits(lambda x: x[x > 0]),
    "synchronizing.*tensor": lambda: waits(lambda x: torch.tensor([1.0], device="cuda")),
    "synchronizing.*equal": lambda: waits(lambda x: torch.equal(x, x)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_the_stand_in_refuses_what_cuda_refuses(cuda, said):
    with pytest.raises((RuntimeError, ValueError), match=said):
        REFUSED[said]()


def test_the_stand_in_lets_pass_what_is_in_order(cuda):
    on_side(lambda x: x.add_(1), before=True, after=True)
    begin, end = timed(), timed()
    begin.record()
    x = torch.zeros(3, device="cuda")
    end.record()
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) == pytest.approx(MS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (x + 1) * 2
    x.fill_(4.0)
    assert y.tolist() == [2.0] * 3  # as captured; torch leaves it unwritten
    graph.replay()
    assert y.tolist() == [10.0] * 3


def names_of_cuda(path):
    """Return what a file uses of `torch.cuda`, with the keywords of its calls."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            found.setdefault(node.attr, set())
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "torch.cuda":
            found.setdefault(called.attr, set()).update(keyword.arg for keyword in node.keywords)
    return found


USERS = ("bench/measure.py", "bench/gpu/devices.py", "bench/gpu/launches.py", "bench/gpu/peers.py", "tests/test_gpu.py")


@pytest.mark.parametrize("path", USERS)
def test_names_and_keywords_are_those_of_torch(path):
    """In the torch that is installed: with another name a run on a GPU would end."""
    used = names_of_cuda(ROOT / path)
    assert used
    for name, keywords in used.items():
        assert hasattr(torch.cuda, name), name
        if keywords:
            known = inspect.signature(getattr(torch.cuda, name).__new__).parameters
            assert keywords <= set(known), name
    stub = (Path(torch.__file__).parent / "_C/__init__.pyi").read_text()
    properties = re.search(r"class _CudaDeviceProperties:\n((?:    .*\n)+)", stub)[1]
    fields = set(re.findall(r"^    (\w+):", properties, re.MULTILINE))
    assert set(re.findall(r"properties\.(\w+)", (ROOT / path).read_text())) <= fields
    assert set(cuda_stand_in.PROPERTIES) <= fields


def test_the_stand_in_takes_what_torch_takes():
    """Its parameters have torch's names, in torch's order."""
    for ours, theirs in (
        (cuda_stand_in.Event.__init__, torch.cuda.Event.__new__),
        (cuda_stand_in.Event.elapsed_time, torch.cuda.Event.elapsed_time),
        (cuda_stand_in.Stream.wait_stream, torch.cuda.Stream.wait_stream),
        (cuda_stand_in.Cuda.graph, torch.cuda.graph.__init__),
        (cuda_stand_in.Cuda.on, torch.cuda.stream),
        (cuda_stand_in.Cuda.set_sync_debug_mode, torch.cuda.set_sync_debug_mode),
        (cuda_stand_in.Cuda.sleep, torch.cuda._sleep),
    ):
        named = [
            [x for x in inspect.signature(f).parameters if x not in ("self", "cls", "cuda")] for f in (ours, theirs)
        ]
        assert named[0] == named[1][: len(named[0])], theirs
