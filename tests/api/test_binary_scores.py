"""Scores of the sigmoid family: each follows from the gap of the label, and the loss beside them is the loss alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from bonus_ops import (
    Focal,
    binary_difficulty_scores,
    bonus_binary_cross_entropy_with_logits,
    bonus_binary_cross_entropy_with_logits_and_scores,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_those_of_the_label(dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(5, 7)).to(dtype).requires_grad_()
    target = torch.randint(0, 2, (5, 7)).to(dtype)
    scores = binary_difficulty_scores(logits, target)
    x = logits.detach().double()
    torch.testing.assert_close(
        scores.loss.double(), F.binary_cross_entropy_with_logits(x, target.double(), reduction="none"),
        rtol=1e-6, atol=0,
    )  # fmt: skip
    p = torch.where(target > 0, torch.sigmoid(x), torch.sigmoid(-x))
    torch.testing.assert_close(scores.target_prob.double(), p, rtol=1e-6, atol=0)
    assert torch.equal(scores.gap > 0, (x > 0) == (target > 0))
    for each in (scores.gap, scores.loss, scores.target_prob):
        assert each.dtype == torch.float32 and each.shape == target.shape and not each.requires_grad


def test_a_soft_target_has_the_label_it_is_nearer_to_and_a_half_has_label_0():
    scores = binary_difficulty_scores(torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0.9, 0.5, 0.1]))
    assert scores.gap.tolist() == [3, -3, -3]


def test_the_limits():
    inf, nan = math.inf, math.nan
    scores = binary_difficulty_scores(torch.tensor([inf, -inf, nan, 1.0, -200.0]), torch.tensor([1.0, 1, 1, nan, 1]))
    assert scores.gap[:2].tolist() == [inf, -inf] and scores.gap[2:4].isnan().all()
    assert scores.loss.nan_to_num(7.0, inf).tolist() == [0, inf, 7, 7, 200]
    assert scores.target_prob.nan_to_num(7.0).tolist() == [1, 0, 7, 7, 0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_beside_scores_is_the_loss_alone(reduction):
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, requires_grad=True), torch.randint(0, 2, (4, 3)).float()
    options = {"weight": torch.rand(3), "reduction": reduction, "bonus": Focal(), "alpha": 0.25}
    if reduction == "mean":
        options["normalizer"] = 2.0
    loss, scores = bonus_binary_cross_entropy_with_logits_and_scores(logits, target, **options)
    assert torch.equal(loss, bonus_binary_cross_entropy_with_logits(logits, target, **options))
    assert torch.equal(scores.gap, binary_difficulty_scores(logits, target).gap)
    loss.sum().backward()
    assert logits.grad.abs().sum() > 0


def test_the_target_is_not_written_and_the_scores_stay_when_the_logits_change():
    logits, target = torch.tensor([2.0, -1.0]), torch.ones(2)
    scores = binary_difficulty_scores(logits, target)
    logits.zero_()
    assert scores.gap.tolist() == [2, -1] and target.tolist() == [1, 1]


@pytest.mark.slow
def test_a_call_with_scores_compiles_whole():
    logits, target = torch.randn(4, 3, requires_grad=True), torch.randint(0, 2, (4, 3)).float()
    function = bonus_binary_cross_entropy_with_logits_and_scores
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target)[1].gap, function(logits, target)[1].gap)


@pytest.mark.parametrize("function", [binary_difficulty_scores, bonus_binary_cross_entropy_with_logits_and_scores])
def test_bad_calls_raise_what_torch_raises(function):
    with pytest.raises(ValueError, match=r"Target size .* must be the same as input size"):
        function(torch.zeros(3), torch.zeros(2))
    with pytest.raises(TypeError, match="must be Tensor, not ndarray"):
        function(torch.zeros(3), torch.zeros(3).numpy())
    with pytest.raises(RuntimeError, match="Expected target of float16, bfloat16, float32 or float64, got torch.int64"):
        function(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
