"""Scores: stored columns and derived ones against their direct formulas in float64, and a direction none can invert."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bonus_ops import (
    SCORES,
    CosineBonus,
    Focal,
    GeneralizedCrossEntropy,
    LogBonus,
    Poly1,
    PowerBonus,
    Score,
    Scores,
    SoftmaxSquaredError,
    SubDataBonus,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    difficulty_scores,
    reference,
)
from tests.cases import REGIMES, WIDE_FLOATS, confident, generator, regimes_of, typical

IMPLEMENTATIONS = ("numba", "reference")
EVERY_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
STORED = Scores._fields
# a derived score is as exact as the float32 columns it is made of, relative to their size
MADE_OF = {
    "other_prob": ("loss", "margin"),
    "prob_margin": ("loss", "margin"),
    "loss_minus_entropy": ("loss", "entropy"),
    "max_logit": ("energy", "loss", "margin"),
    "max_prob": ("loss", "margin"),
}
LABEL_FREE = ("entropy", "energy", "max_logit", "max_prob")
ULP = 2.0**-23


def direct(logits: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return every score in float64 by the formula of its paper, softmax written out."""
    z, row = logits.double(), torch.arange(len(target))
    p = z.softmax(1)
    log_p = z.log_softmax(1)
    is_label = torch.arange(z.shape[1]) == target[:, None]
    rest = z.masked_fill(is_label, -math.inf)
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(1)
    loss = -log_p[row, target]
    return {
        "loss": loss,
        "el2n": (p - is_label.double()).norm(dim=1),
        "margin": z[row, target] - rest.amax(1),
        "entropy": entropy,
        "energy": -z.logsumexp(1),
        "runner_up": torch.where(rest.amax(1) > -math.inf, rest.argmax(1), -1),
        "target_prob": p[row, target],
        "other_prob": p.masked_fill(is_label, 0.0).amax(1),
        "prob_margin": p[row, target] - p.masked_fill(is_label, 0.0).amax(1),
        "loss_minus_entropy": loss - entropy,
        "max_logit": z.amax(1),
        "max_prob": p.amax(1),
        "grad_norm": (p - is_label.double()).norm(dim=1),
        "prediction": z.argmax(1),
        "correct": z.argmax(1) == target,
    }


def of(scores: Scores, name: str, target: Tensor) -> Tensor:
    if name in ("prediction", "correct"):
        return getattr(scores, name)(target)
    return scores.grad_norm() if name == "grad_norm" else getattr(scores, name)


def spearman(x: Tensor, y: Tensor) -> float:
    ranks = torch.stack([v.double().argsort().argsort().double() for v in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


# --- values -----------------------------------------------------------------------------------------------------------


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("n_classes", [2, 10, 300])
@pytest.mark.parametrize(("dtype", "regime"), [(d, r) for d in WIDE_FLOATS for r in regimes_of(d)])
def test_every_score_equals_its_direct_formula(implementation, n_classes, dtype, regime):
    logits, target = REGIMES[regime](generator(7), 24, n_classes, dtype)
    scores = difficulty_scores(logits, target, implementation=implementation)
    truth = direct(logits, target)
    assert set(truth) == set(SCORES)
    for name, expected in truth.items():
        actual = of(scores, name, target)
        assert actual.shape == target.shape and not actual.requires_grad, name
        if expected.is_floating_point():
            size = torch.stack([truth[part].abs() for part in MADE_OF.get(name, (name,))]).amax(0)
            size = torch.where(size.isfinite(), size, 0.0).clamp(min=1.0)
            same = actual.double() == expected  # infinities
            assert (same | ((actual.double() - expected).abs() <= 6 * ULP * size)).all(), name
        else:
            assert torch.equal(actual.to(expected.dtype), expected), name


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", ["typical", "ties", "masked"])
def test_half_precision_logits_give_float32_scores(implementation, dtype, regime):
    logits, target = REGIMES[regime](generator(8), 24, 100, dtype)
    scores = difficulty_scores(logits, target, implementation=implementation)
    wide = difficulty_scores(logits.double(), target, implementation="reference")
    for name, actual, expected in zip(STORED, scores, wide, strict=True):
        assert actual.dtype == (torch.int32 if name == "runner_up" else torch.float32)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6, msg=name)


@EVERY_IMPLEMENTATION
def test_easy_rows_keep_relative_accuracy_where_torch_has_none(implementation):
    """A row's loss is rankable however small: the gap is rounded to its own size twice, and nothing is lost beyond."""
    lead = torch.linspace(0, 80, 161)
    others = typical(generator(2), len(lead), 9, torch.float32)[0]
    others = others - others.double().logsumexp(1, keepdim=True).float()
    logits = torch.cat([lead[:, None], others], 1)
    target = torch.zeros(len(lead), dtype=torch.int64)
    e = (logits[:, 1:].double() - logits[:, :1].double()).exp()  # nothing is subtracted from 1
    loss = e.sum(1).log1p()
    el2n = (e.sum(1) ** 2 + (e**2).sum(1)).sqrt() / (1 + e.sum(1))
    assert loss.min() < 1e-34

    scores = difficulty_scores(logits, target, implementation=implementation)

    def ulps(actual: Tensor, truth: Tensor) -> Tensor:
        return (actual.double() - truth).abs() / truth / ULP

    assert (ulps(scores.loss, loss) <= 8 + lead).all()
    assert (ulps(scores.el2n, el2n) <= 8 + lead).all()
    assert (ulps(bonus_cross_entropy(logits, target, reduction="none", bonus=None), loss) <= 8 + lead).all()
    assert (scores.loss.diff() < 0).all()
    assert ulps(F.cross_entropy(logits, target, reduction="none"), loss).max() > 1e6


@EVERY_IMPLEMENTATION
def test_equal_columns_whatever_else_is_asked(implementation):
    logits, target = typical(generator(4), 30, 70, torch.float32)
    target[3] = -100
    alone = difficulty_scores(logits, target, implementation=implementation)
    for options in ({"bonus": None}, {"reduction": "sum"}, {"weight": torch.rand(70)}, {"label_smoothing": 0.2}):
        for needs_grad in (False, True):
            z = logits.clone().requires_grad_(needs_grad)
            _, scores = bonus_cross_entropy_with_scores(z, target, **options, implementation=implementation)
            for column, expected in zip(scores, alone, strict=True):
                assert not column.requires_grad
                # loops over soft targets add up in another order
                slack = 1e-6 if implementation == "numba" and "label_smoothing" in options else 0.0
                torch.testing.assert_close(column, expected, rtol=slack, atol=slack, equal_nan=True)


@EVERY_IMPLEMENTATION
def test_scores_take_the_shape_of_the_target(implementation):
    logits = torch.randn(2, 5, 3, 4)
    target = torch.randint(0, 5, (2, 3, 4))
    scores = difficulty_scores(logits, target, implementation=implementation)
    flat = difficulty_scores(logits.movedim(1, -1).reshape(-1, 5), target.reshape(-1), implementation=implementation)
    for column, expected in zip(scores, flat, strict=True):
        assert column.shape == target.shape
        torch.testing.assert_close(column.reshape(-1), expected)
    single = difficulty_scores(torch.randn(5), torch.tensor(2), implementation=implementation)
    assert all(column.shape == () for column in single)


# --- edges ------------------------------------------------------------------------------------------------------------


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("row", [[1.0, 2.0, 3.0], [math.nan, 1.0, 2.0]])
def test_ignored_positions_hold_nan_minus_one_and_false(implementation, row):
    target = torch.tensor([-100, 1])
    scores = difficulty_scores(torch.tensor([row, [0.0, 3.0, 1.0]]), target, implementation=implementation)
    for name in SCORES:
        ignored, counted = of(scores, name, target)
        if name in ("runner_up", "prediction"):
            assert ignored == -1 and counted >= 0
        elif name == "correct":
            assert not ignored and counted
        else:
            assert ignored.isnan() and counted.isfinite(), name


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(
    ("row", "target", "runner_up", "prediction"),
    [
        ([2.0, 2.0, 2.0], 0, 1, 0),
        ([2.0, 2.0, 2.0], 1, 0, 0),
        ([2.0, 2.0, 2.0], 2, 0, 0),
        ([0.0, 2.0, 2.0], 1, 2, 1),
        ([0.0, 2.0, 2.0], 2, 1, 1),
        ([0.0, 2.0, 2.0], 0, 1, 1),
    ],
)
def test_ties_go_to_the_lowest_index(implementation, row, target, runner_up, prediction):
    logits, target = torch.tensor([row]), torch.tensor([target])
    scores = difficulty_scores(logits, target, implementation=implementation)
    assert scores.runner_up.item() == runner_up
    assert scores.prediction(target).item() == prediction == logits.argmax().item()
    assert scores.correct(target).item() == (prediction == target.item())


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("logits", [[[4.0]], [[4.0, -math.inf, -math.inf]]])
def test_a_row_with_no_rest_is_certain(implementation, logits):
    target = torch.tensor([0])
    scores = difficulty_scores(torch.tensor(logits), target, implementation=implementation)
    assert [x.item() for x in scores] == [0, 0, math.inf, 0, -4, -1]
    assert scores.prediction(target).item() == 0 and scores.correct(target).item()
    assert scores.target_prob == scores.max_prob == scores.prob_margin == 1 and scores.other_prob == 0
    assert scores.max_logit == 4 and scores.loss_minus_entropy == 0


@EVERY_IMPLEMENTATION
def test_a_label_ruled_out_has_all_but_finite_loss(implementation):
    target = torch.tensor([0])
    scores = difficulty_scores(torch.tensor([[-math.inf, 0.0, math.log(3)]]), target, implementation=implementation)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = [math.inf, math.sqrt(1 + 0.25**2 + 0.75**2), -math.inf, entropy, -math.log(4), 2]
    assert [x.item() for x in scores] == pytest.approx(expected)
    assert scores.prediction(target).item() == 2 and not scores.correct(target)
    assert scores.target_prob == 0 and scores.loss_minus_entropy == math.inf
    assert scores.other_prob.isnan() and scores.max_logit.isnan()  # as documented: the top logit is not stored


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize("row", [[math.nan, 0.0, 1.0], [0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3])
def test_a_row_without_a_softmax_has_no_scores(implementation, row):
    target = torch.tensor([0])
    scores = difficulty_scores(torch.tensor([row]), target, implementation=implementation)
    assert all(column.isnan() for column in scores[:5])
    assert scores.runner_up == scores.prediction(target) == -1 and not scores.correct(target)


# --- the norm of the gradient of the loss in use ----------------------------------------------------------------------


@EVERY_IMPLEMENTATION
@pytest.mark.parametrize(
    "bonus",
    [
        None,
        LogBonus(),
        LogBonus(0.5, strength=2.0, start=0.3),
        LogBonus(1.0),
        LogBonus(1.0, clamp=None),
        LogBonus(abrupt=0.9),
        PowerBonus(2.0),
        CosineBonus(),
        SubDataBonus(0.5),
        Focal(),
        Poly1(),
        GeneralizedCrossEntropy(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("n_classes", [1, 2, 30])
def test_grad_norm_is_the_norm_of_the_true_gradient(implementation, bonus, n_classes):
    halves = (regime(generator(5), 60, n_classes, torch.float32) for regime in (typical, confident))
    logits, target = (torch.cat(x) for x in zip(*halves, strict=True))
    target[7] = -100
    weight = torch.linspace(-1, 2, n_classes)
    z = logits.double().requires_grad_()
    loss = bonus_cross_entropy(z, target, weight.double(), reduction="sum", bonus=bonus, implementation="reference")
    truth = torch.autograd.grad(loss, z)[0].norm(dim=1).masked_fill(target == -100, math.nan)
    scores = difficulty_scores(logits, target, implementation=implementation)
    row_weight = weight[target.clamp(min=0)]
    actual = scores.grad_norm(bonus, weight=row_weight)
    # the gap is recovered from the loss, which holds it to eps * max(1, gap)
    torch.testing.assert_close(actual.double(), truth, rtol=3e-5, atol=1e-30, equal_nan=True)
    unweighted = scores.difficulty("grad_norm", bonus=bonus)
    torch.testing.assert_close(unweighted * row_weight.abs(), actual, equal_nan=True)


# --- registry and direction -------------------------------------------------------------------------------------------


def test_the_registry_lists_every_score_and_nothing_else():
    of_rows = {
        "difficulty",
        "hardest",
        "select",
        "flatten",
        "to",
        "cpu",
        "cat",
        "to_sequences",
        "scalars",
        "to_pandas",
        "z_loss",
    }
    other = of_rows | {"accuracy", "ignored", "label", "target"}
    public = {name for name in dir(Scores) if not name.startswith("_")} - set(dir(tuple))
    assert public - other == set(SCORES)
    for name, score in SCORES.items():
        assert isinstance(score, Score) and score.name == name and score.direction in (-1, 0, 1)
        assert all(isinstance(text, str) and text for text in (score.formula, score.unit, score.range, score.paper))


def hardness(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and how hard each row is: less and less sure, or from sure to wrong."""
    hard = torch.linspace(-6, -0.2, 50) if name in LABEL_FREE else torch.linspace(-2, 6, 50)
    logits = 0.05 * torch.randn(50, 6)
    logits[:, 2] -= hard
    return logits, torch.full((50,), 2), hard


@pytest.mark.parametrize("name", [score.name for score in SCORES.values() if score.direction])
@EVERY_IMPLEMENTATION
def test_difficulty_ranks_hard_rows_first(name, implementation):
    assert SCORES[name].needs_label == (name not in LABEL_FREE)
    logits, target, hard = hardness(name)
    scores = difficulty_scores(logits, target, implementation=implementation)
    assert spearman(scores.difficulty(name), hard) > 0.9
    assert spearman(of(scores, name, target) * SCORES[name].direction, hard) > 0.9


@pytest.mark.parametrize("name", ["runner_up", "prediction", "correct", "LOSS", "", "gap", "__class__", None])
def test_difficulty_refuses_what_orders_nothing(name):
    scores = difficulty_scores(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    ordered = ", ".join(score.name for score in SCORES.values() if score.direction)
    with pytest.raises(ValueError, match=f"name must be one of {ordered}, got {name!r}"):
        scores.difficulty(name)


@pytest.mark.parametrize("regime", sorted(REGIMES))
def test_scores_lie_in_the_range_the_registry_states(regime):
    n_classes = 12
    logits, target = REGIMES[regime](generator(6), 64, n_classes, torch.float32)
    scores = difficulty_scores(logits, target)
    bounds = {"inf": math.inf, "sqrt 2": math.sqrt(2), "log C": math.log(n_classes), "-log C": -math.log(n_classes)}
    bounds |= {"1/C": 1 / n_classes, "0": 0.0, "1": 1.0, "-1": -1.0}
    checked = 0
    for name, score in SCORES.items():
        if score.range[0] not in "[(" or ", " not in score.range:
            continue
        low, high = (bounds[end] for end in score.range[1:-1].split(", "))
        value = of(scores, name, target)
        slack = 4 * ULP * max(1.0, math.log(n_classes))
        assert ((value >= low - slack) & (value <= high + slack)).all(), name
        checked += 1
    assert checked >= 8


def test_the_specification_and_the_loops_agree_on_every_column():
    for regime in regimes_of(torch.float32):
        logits, target = REGIMES[regime](generator(9), 40, 130, torch.float32)
        spec = reference.scores(logits, target, -100)
        fast = difficulty_scores(logits, target, implementation="numba")
        for name, a, b in zip(STORED, fast, spec, strict=True):
            torch.testing.assert_close(a, b, rtol=4e-6, atol=2e-6, msg=f"{regime} {name}")


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("method", ["prediction", "correct"])
def test_given_probabilities_the_error_says_what_to_pass(method: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape)
    probabilities = logits.softmax(min(1, len(shape) - 1))
    scores = bonus_cross_entropy_with_scores(logits, probabilities)[1]
    argmax = "target.argmax(1)" if len(shape) > 1 else "target.argmax()"
    with pytest.raises(RuntimeError, match="must hold class indices, got torch.float32") as error:
        getattr(scores, method)(probabilities)
    assert f"Expected {argmax} where" in str(error.value)
    assert getattr(scores, method)(eval(argmax, {"target": probabilities})).shape == scores.loss.shape


def test_grad_norm_refuses_a_loss_of_all_classes() -> None:
    scores = difficulty_scores(torch.randn(4, 3), torch.arange(4) % 3)
    for call in (scores.grad_norm, lambda bonus: scores.difficulty("grad_norm", bonus=bonus)):
        with pytest.raises(TypeError, match="must be a GapLoss or None, not the ClassLoss SoftmaxSquaredError"):
            call(bonus=SoftmaxSquaredError())
