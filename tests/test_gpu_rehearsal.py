"""The tests that only a GPU runs, rehearsed on a stand-in that checks the order of calls as CUDA does."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from bench.gpu import launches, peers
from tests import conftest

pytest.importorskip("triton")
if conftest.ACCELERATOR is not None or not conftest.INTERPRETED:
    pytest.skip("the stand-in interprets kernels", allow_module_level=True)
from tests import test_gpu

pytestmark = pytest.mark.slow


@pytest.fixture
def few(monkeypatch):
    """One or two rounds of what a GPU does a hundred times."""
    monkeypatch.setattr(test_gpu, "range", lambda *ends: range(*(min(end, len(ends)) for end in ends)), raising=False)


@pytest.mark.parametrize("call", test_gpu.OTHERS.values(), ids=test_gpu.OTHERS)
def test_other_losses(cuda, few, monkeypatch, call):
    monkeypatch.setattr(test_gpu, "draw", lambda *_: peers.logits(3, 21, torch.float32, "cuda"))
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *_, **options: rand(3, 21, **options))
    test_gpu.test_other_losses_wait_for_nothing_and_replay(call)
    assert cuda.stream.submitted > 10  # the work was the device's


def test_steps_of_the_gpu_tests(cuda, few):
    test_gpu.test_nothing_waits_for_the_device(10, "mean")
    test_gpu.test_a_captured_step_replays(4, 10)
    test_gpu.test_work_follows_the_current_stream(10)
    test_gpu.test_twenty_runs_agree_bit_by_bit(8, 10, torch.float32)
    test_gpu.test_the_kernels_are_what_runs()
    test_gpu.assert_far_rows_are_right(80, 10)
    assert cuda.stream.submitted > 10


VALUES = (
    lambda: test_gpu.test_half_precision_is_rounded_once(4, 10, torch.float16),
    lambda: test_gpu.test_scores_are_those_of_float64(4, 10, torch.bfloat16),
    lambda: test_gpu.test_rows_and_targets_at_any_address(21, torch.float16),
)


@pytest.mark.parametrize("values", VALUES)
def test_values_of_the_gpu_tests(cuda, few, monkeypatch, values):
    values()
    assert cuda.stream.submitted > 0
    calls, step, gradient = itertools.count(1), test_gpu.step, test_gpu.reference.gradient

    def wrong(*args):
        number = next(calls)
        return [x + number for x in step(*args)]

    monkeypatch.setattr(test_gpu, "step", wrong)
    monkeypatch.setattr(test_gpu.reference, "gradient", lambda *args: 1.01 * gradient(*args))
    with pytest.raises(AssertionError):  # they can fail
        values()


def test_the_gpu_tests_refuse_a_wait_and_a_stale_replay(cuda, few, monkeypatch):
    """The rules of the stand-in reach what they call."""
    right = test_gpu.bonus_cross_entropy_with_scores

    def waiting(*args, **options):
        loss, scores = right(*args, **options)
        loss.sum().item()
        return loss, scores

    monkeypatch.setattr(test_gpu, "bonus_cross_entropy_with_scores", waiting)
    with pytest.raises(RuntimeError, match="synchronizing"):
        test_gpu.test_nothing_waits_for_the_device(10, "mean")
    with pytest.raises(RuntimeError, match="capturing"):
        test_gpu.test_a_captured_step_replays(4, 10)


def test_far_rows_are_skipped_where_memory_is_short(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 10**9))
    with pytest.raises(pytest.skip.Exception, match="not enough memory"):
        test_gpu.test_more_logits_than_a_32_bit_offset_reaches()


def test_the_launches_of_the_sanitizer(cuda, monkeypatch, capsys):
    monkeypatch.setattr(launches, "CLASSES", ((19, 1),))
    monkeypatch.setattr(launches, "N_CLASSES", 19)
    kernels = []
    submit = cuda.submit
    monkeypatch.setattr(
        cuda, "submit", lambda work, again=None: (kernels.append(again is None), submit(work, again))[1]
    )
    launches.main("cuda")
    said = re.fullmatch(r"(\d+) launches of our kernels\n", capsys.readouterr().out)
    assert int(said[1]) == sum(kernels) > 20
