"""Each policy against a plain-Python statement of its formula; its draws against what they should average to."""

import math
import statistics

import pytest
import torch
from torch import nan

from bonus_ops import ExampleTracker, Focal, Scores, bonus_cross_entropy, difficulty_scores, policies
from bonus_ops.policies import (
    TAKEN_OUT,
    DifficultySampler,
    History,
    co_teaching_keep,
    exponentiated_gradient,
    exponentiated_weight,
    flow_weight,
    focal_weight,
    group_mean_loss,
    group_weight,
    guarded,
    importance_draw,
    importance_gain,
    importance_pays,
    infobatch,
    kl_to_reference,
    late_stopping_mask,
    mastered_mask,
    noise_mask,
    poisson_selection,
    rank_selection,
    rank_selection_is_due,
    selective_backprop,
    selective_beta,
    self_paced_threshold,
    self_paced_weight,
    small_loss,
    superloss_weight,
)

LOSS = torch.tensor([0.1, 2.0, nan, 0.5, 0.5, 3.0])
VALID = [0, 1, 3, 4, 5]
DRAWS = 20_000
SIGMAS = 4.5  # a seeded mean of draws lies this many standard errors from its expectation once in 150 000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_mean(draws, expected):
    """Check that seeded draws [n, ...] average to ``expected`` within SIGMAS standard errors."""
    draws = draws.double()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - expected).abs() <= SIGMAS * error + 1e-7).all(), (draws.mean(0), expected, error)


# --- History ----------------------------------------------------------------------------------------------------------


def test_history_is_the_last_values_without_nan():
    kept, history = [], History.empty(5)
    for values in ([], [3.0], [1.0, nan, 1.0], [2.0, 5.0, 4.0], [float(i) for i in range(13)], [nan], [1.5, 7.0]):
        history = history.push(torch.tensor(values))
        kept = (kept + [v for v in values if v == v])[-5:]
        assert sorted(history.values.tolist()) == sorted(kept + [math.inf] * (5 - len(kept)))
        assert int(history.filled) == len(kept)
        for x in (-1.0, 1.0, 2.0, 2.5, math.inf):
            below, equal = sum(v < x for v in kept), sum(v == x for v in kept)
            expected = (below + equal / 2) / len(kept) if kept else nan
            torch.testing.assert_close(history.cdf(torch.tensor([x]))[0], torch.tensor(expected), equal_nan=True)
        for q in (0.0, 0.1, 0.5, 0.99, 1.0):
            expected = sorted(kept)[math.floor(q * (len(kept) - 1))] if kept else math.inf
            assert float(history.quantile(q)) == expected


def test_history_is_not_written():
    before = History.empty(4).push(torch.tensor([1.0]))
    copy = before.values.clone()
    before.push(torch.tensor([2.0, 3.0]))
    assert torch.equal(before.values, copy) and int(before.written) == 1


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_selective_backprop_probability(beta):
    history = History.empty(8).push(LOSS)
    selection = selective_backprop(LOSS, history, beta=beta, floor=0.05, generator=generator())
    for i, x in enumerate(LOSS.tolist()):
        below, equal = (x > LOSS).sum().item(), (x == LOSS).sum().item()
        expected = 0.0 if i not in VALID else max(0.05, ((below + equal / 2) / 5) ** beta)
        assert float(selection.probability[i]) == pytest.approx(expected, rel=1e-6)
    assert not selection.keep[2]


def test_selective_backprop_keeps_everything_without_a_history():
    assert selective_backprop(LOSS, History.empty()).keep.tolist() == [True, True, False, True, True, True]


def test_selective_beta_keeps_that_share():
    loss = torch.rand(DRAWS, generator=generator())
    history = History.empty(1024).push(loss)
    for keep in (0.2, 0.5, 1.0):
        selection = selective_backprop(loss, history, beta=selective_beta(keep), generator=generator(1))
        share = selection.probability.mean()  # the CDF of 1024 draws is within about 3 / sqrt(1024) of uniform
        assert abs(float(share) - keep) < 0.05
        assert_mean(selection.keep.double() - selection.probability, 0)


@pytest.mark.slow
def test_selection_weights_are_unbiased():
    history, g = History.empty().push(LOSS), generator()
    loss = LOSS.nan_to_num(0)
    estimates = []
    for _ in range(2000):
        selection = selective_backprop(LOSS, history, floor=0.1, generator=g)
        estimates.append((selection.unbiased_weight * loss).sum() / 5)
    assert_mean(torch.stack(estimates), statistics.fmean(loss[VALID].tolist()))


@pytest.mark.slow
def test_rank_selection_is_drawn_as_composer_does():
    # without replacement: P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)
    difficulty, keep, g = torch.tensor([2.0, 3.0, 1.0, 0.0]), 0.5, generator()
    rank = [2, 3, 1, 0]  # and the order is [3, 2, 0, 1]
    p = [(r + 0.5) / 4 for r in rank]  # exponent 1 / keep - 1 = 1
    p = [x / sum(p) for x in p]
    counts = torch.zeros(4, 4)
    for _ in range(8000):
        i, j = sorted(rank_selection(difficulty, keep=keep, generator=g).tolist())
        counts[i, j] += 1
    for i in range(4):
        for j in range(i + 1, 4):
            expected = p[i] * p[j] / (1 - p[i]) + p[i] * p[j] / (1 - p[j])
            error = math.sqrt(expected * (1 - expected) / 8000)
            assert abs(float(counts[i, j]) / 8000 - expected) < SIGMAS * error


def test_rank_selection_edges():
    assert rank_selection(torch.tensor([]), keep=0.5).tolist() == []
    assert sorted(rank_selection(LOSS, keep=5 / 6).tolist()) == VALID
    assert rank_selection(torch.arange(3.0), keep=0.01).tolist() == [2]  # exponent 99: underflows outside logs
    assert rank_selection(torch.rand(7), keep=0.1).shape == (1,)


def test_rank_selection_is_due_in_its_window_but_for_every_second_step():
    assert [rank_selection_is_due(0.5, step) for step in range(4)] == [True, False, True, False]
    assert not rank_selection_is_due(0.49, 0) and not rank_selection_is_due(0.9, 0)
    assert all(rank_selection_is_due(0.6, step, every=0) for step in range(4))


# --- importance sampling ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_importance_draw_probability_and_weights(smoothing):
    draw = importance_draw(LOSS, DRAWS, smoothing=smoothing, generator=generator())
    total = sum(float(LOSS[i]) + smoothing for i in VALID)
    for i in range(6):
        p = (float(LOSS[i]) + smoothing) / total if i in VALID else 0.0
        drawn = draw.indices == i
        assert_mean(drawn, p)
        if p:
            torch.testing.assert_close(
                draw.unbiased_weight[drawn], torch.full_like(draw.unbiased_weight[drawn], 1 / (5 * p))
            )
    other = torch.tensor([5.0, -1.0, 0.0, 2.0, 0.3, 1.0])  # unbiased for any loss, not only the score's
    assert_mean(draw.unbiased_weight * other[draw.indices], other[VALID].double().mean())


def test_importance_draw_never_takes_probability_zero():
    score = torch.tensor([0.0, 0.0, 1e-30, 0.0, 1.0, 0.0, 0.0])
    assert set(importance_draw(score, 5000, generator=generator()).indices.tolist()) == {4}
    assert set(importance_draw(torch.zeros(3), 100, generator=generator()).indices.tolist()) == {0, 1, 2}


def test_poisson_selection():
    g = generator()
    draws = [poisson_selection(LOSS, 3, generator=g) for _ in range(3000)]
    total = sum(float(LOSS[i]) for i in VALID)
    expected = [min(1.0, 3 * float(LOSS[i]) / total) if i in VALID else 0.0 for i in range(6)]
    torch.testing.assert_close(draws[0].probability, torch.tensor(expected), rtol=1e-6, atol=0)
    assert_mean(torch.stack([d.keep for d in draws]), torch.tensor(expected).double())
    other = torch.tensor([5.0, -1.0, 0.0, 2.0, 0.3, 1.0]).double()
    assert_mean(torch.stack([(d.unbiased_weight * other).sum() / 5 for d in draws]), other[VALID].mean())


def test_importance_gain_is_the_papers():
    score = torch.rand(50, dtype=torch.float64, generator=generator())
    g = score / score.sum()
    # Eq. 26: 1 / tau = sqrt(1 - ||g - u||^2 / sum g^2)
    paper = 1 / torch.sqrt(1 - ((g - 1 / 50) ** 2).sum() / (g * g).sum())
    torch.testing.assert_close(importance_gain(score), paper, rtol=1e-12, atol=0)
    assert float(importance_gain(torch.full((9,), 0.1))) == pytest.approx(1)
    assert importance_pays(torch.tensor([1.99, 2.01]), presample=192, size=64).tolist() == [False, True]


# --- pruning, curriculum ----------------------------------------------------------------------------------------------


def test_infobatch():
    difficulty = torch.cat([torch.rand(5000, generator=generator()), torch.tensor([nan, math.inf])])
    mean = difficulty[:5000].mean()
    weight = infobatch(difficulty, ratio=0.3, generator=generator(1))
    easy = difficulty < mean
    assert set(weight[easy].tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert (weight[difficulty >= mean] == 1).all()
    assert weight[-2:].tolist() == [0, 1]
    assert_mean(weight[easy], 1.0)
    assert_mean((weight[easy] == 0), 0.3)
    assert infobatch(LOSS, progress=0.875).tolist() == [1, 1, 0, 1, 1, 1]


def test_co_teaching_keep():
    assert [co_teaching_keep(t) for t in (0, 5, 10, 50)] == pytest.approx([1, 0.9, 0.8, 0.8])
    assert co_teaching_keep(4, noise_rate=0.5, exponent=0.5) == pytest.approx(1 - 0.5 * 2 / 10)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.8, 1.0])
def test_small_loss_keeps_the_easiest(keep):
    easiest_first = sorted(VALID, key=lambda i: (float(LOSS[i]), i))
    kept = easiest_first[: math.floor(keep * 5)]
    assert small_loss(LOSS, keep).tolist() == [i in kept for i in range(6)]


def test_self_paced():
    assert self_paced_weight(LOSS, 0.5).tolist() == [1, 0, 0, 0, 0, 0]
    expected = [0.0 if x != x else min(1, max(0, 1 - (x - 0.4) / 2)) for x in LOSS.tolist()]
    assert self_paced_weight(LOSS, torch.tensor(0.4), gamma=2.0).tolist() == pytest.approx(expected)
    first = self_paced_threshold(None, LOSS)
    assert float(first) == pytest.approx(0.5 + 0.8 * (2.0 - 0.5))  # position 0.7 * 4 in .1 .5 .5 2 3
    assert float(self_paced_threshold(torch.tensor(1.0), LOSS)) == pytest.approx(0.9 + 0.1 * float(first))
    assert float(self_paced_threshold(torch.tensor(1.0), torch.tensor([nan]))) == 1.0


# --- weights ----------------------------------------------------------------------------------------------------------


def test_focal_weight_gives_the_focal_gradient():
    logits = torch.randn(20, 5, dtype=torch.float64, generator=generator()).mul(3).requires_grad_()
    target = torch.arange(20) % 5
    rows = bonus_cross_entropy(logits, target, bonus=None, reduction="none")
    (weighted,) = torch.autograd.grad((focal_weight(rows, gamma=2.5) * rows).sum(), logits)
    (focal,) = torch.autograd.grad(bonus_cross_entropy(logits, target, bonus=Focal(2.5), reduction="sum"), logits)
    torch.testing.assert_close(weighted, focal, rtol=1e-9, atol=1e-12)
    assert focal_weight(torch.tensor([0.0, math.inf, nan])).tolist() == [0, 1, 0]
    assert focal_weight(LOSS, gamma=0).tolist() == [1, 1, 0, 1, 1, 1]


def test_weights_of_a_negative_loss_stay_in_range():
    # scores.loss is not negative; a training loss with a bonus can be
    loss = torch.tensor([-3.0, -0.5, 0.0, 1.0])
    for gamma in (1.0, 2.0, 3.5):
        assert focal_weight(loss, gamma=gamma)[:3].tolist() == [float(focal_weight(torch.zeros(1), gamma=gamma))] * 3
    assert flow_weight(loss, temperature=0.5).tolist() == pytest.approx([1, 1, 1, math.exp(-2)])
    assert flow_weight(loss).tolist() == [1, 1, 1, 0]
    sigma = superloss_weight(loss, threshold=0.0)
    assert (sigma >= 0).all() and (sigma <= math.e * (1 + 1e-6)).all()


@pytest.mark.parametrize("lam", [0.25, 1.0])
def test_superloss_weight_minimises_the_superloss(lam):
    # sigma = argmin (l - tau) sigma + lam log(sigma)^2 in (0, e]: where the slope (l - tau) sigma + 2 lam log(sigma)
    # vanishes, if it does
    tau = math.log(10)
    loss = torch.linspace(0, 12, 200, dtype=torch.float64)
    sigma = superloss_weight(loss, threshold=tau, regularization=lam)
    inside = (loss - tau) / lam > -2 / math.e
    slope = (loss - tau) * sigma + 2 * lam * sigma.log()
    torch.testing.assert_close(slope[inside], torch.zeros_like(slope[inside]), rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma[~inside], torch.full_like(sigma[~inside], math.e), rtol=1e-7, atol=0)
    extremes = superloss_weight(torch.tensor([tau, math.inf, 3e38, nan]), threshold=tau)
    assert extremes.tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_flow_weight():
    expected = [0.0 if x != x else math.exp(-x / 0.5) for x in LOSS.tolist()]  # 0.5: the median
    assert flow_weight(LOSS).tolist() == pytest.approx(expected)
    normal = flow_weight(LOSS, temperature=2.0, normalize=True)
    assert float(normal[VALID].mean()) == pytest.approx(1)
    assert float(normal[1] / normal[0]) == pytest.approx(math.exp(-1.9 / 2))
    assert flow_weight(torch.tensor([0.0, 0.0, 1.0])).tolist() == [1, 1, 0]


def test_exponentiated_gradient_over_examples():
    state = torch.zeros(4)
    index, loss = torch.tensor([2, 0, 2, 1]), torch.tensor([1.0, 0.5, 3.0, nan])
    after = exponentiated_gradient(state, loss, eta=0.1, index=index, max_loss=2.0)
    assert after.tolist() == pytest.approx([-0.05, 0, -0.1 - 0.2, 0])
    assert state.tolist() == [0, 0, 0, 0]
    weight = exponentiated_weight(after)
    total = sum(math.exp(x) for x in after.tolist())
    assert weight.tolist() == pytest.approx([4 * math.exp(x) / total for x in after.tolist()])
    # FLOW is one step of it
    flow, step = flow_weight(LOSS[VALID]), exponentiated_gradient(torch.zeros(5), LOSS[VALID], eta=1 / 0.5)
    torch.testing.assert_close(flow, step.exp())


def test_exponentiated_gradient_over_groups():
    loss, group = torch.tensor([1.0, 3.0, nan, 4.0]), torch.tensor([0, 0, 0, 2])
    means = group_mean_loss(loss, group, 3)
    torch.testing.assert_close(means, torch.tensor([2.0, nan, 4.0]), equal_nan=True)
    state = exponentiated_gradient(torch.zeros(3), means, eta=0.5, ascent=True)
    assert state.tolist() == pytest.approx([1, 0, 2])
    q = [math.exp(x) / (math.e + 1 + math.e**2) for x in (1, 0, 2)]
    assert group_weight(state, loss, group).tolist() == pytest.approx([q[0] / 2, q[0] / 2, 0, q[2]])


def test_ascent_goes_to_the_worst_group():
    state = torch.zeros(2)
    for _ in range(200):
        state = exponentiated_gradient(state, torch.tensor([0.1, 1.0]), eta=0.1, ascent=True)
    assert float(torch.softmax(state, 0)[1]) > 0.999


# --- masks ------------------------------------------------------------------------------------------------------------


def test_mastered_mask():
    losses = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0], [0.1, 0.1, 0.1, 0.1, 0.1002], [nan, 1.0, 1.0, 1.0, 1.0]]).T
    change = (losses[2:] - 2 * losses[1:-1] + losses[:-2]).abs().mean(0)
    seen = torch.tensor([6, 6, 4])
    assert mastered_mask(change, seen).tolist() == [False, True, False]
    assert mastered_mask(change, seen - 1).tolist() == [False, False, False]
    assert [mastered_mask(change, seen, epoch=e).any().item() for e in (9, 10, 11)] == [True, False, True]


def test_noise_mask():
    recent = torch.tensor([0.1, 3.0, nan, 4.0])
    assert noise_mask(recent, 2.0).tolist() == [False, True, False, True]
    observed = noise_mask(recent, torch.tensor(2.0), observations=torch.tensor([5, 5, 0, 1]))
    assert observed.tolist() == [False, True, False, False]
    assert not noise_mask(recent, History.empty().quantile(0.1)).any()


def test_late_stopping_mask():
    learned = torch.tensor([1.0, 4.0, math.inf, 2.0, nan, math.inf])
    assert late_stopping_mask(learned, 0.6).tolist() == [False, False, True, False, False, True]
    assert not late_stopping_mask(learned, 0.61).any()


def test_guarded_examples_are_left_alone_by_every_policy():
    noisy = torch.tensor([False, True, False, False, False, False])
    difficulty = guarded(LOSS, noisy)
    history = History.empty().push(difficulty)
    assert int(history.filled) == 4
    assert not selective_backprop(difficulty, history, floor=1.0).keep[1]
    assert 1 not in rank_selection(difficulty, keep=4 / 6).tolist()
    assert 1 not in importance_draw(difficulty, 1000, smoothing=1.0).indices.tolist()
    assert not poisson_selection(difficulty, 100).keep[1]
    assert not small_loss(difficulty, 1.0)[1]
    for weigh in (infobatch, focal_weight, flow_weight):
        assert weigh(difficulty)[1] == 0
    assert superloss_weight(difficulty, threshold=1.0)[1] == self_paced_weight(difficulty, 9.0)[1] == 0
    assert LOSS[1] == 2.0


@pytest.mark.parametrize("n", [0, 3])
def test_where_all_are_ignored_nothing_is_chosen(n):
    difficulty = torch.full((n,), nan)
    history = History.empty(4).push(torch.ones(2)).push(difficulty)
    assert int(history.filled) == 2
    selections = selective_backprop(difficulty, history, floor=1.0), poisson_selection(difficulty, 2)
    weights = [
        *(selection.keep for selection in selections),
        *(selection.probability for selection in selections),
        infobatch(difficulty),
        small_loss(difficulty, 1.0),
        focal_weight(difficulty),
        superloss_weight(difficulty, threshold=1.0),
        flow_weight(difficulty, normalize=True),
        self_paced_weight(difficulty, 1.0, gamma=1.0),
        noise_mask(difficulty, 1.0),
        late_stopping_mask(difficulty, 0.5) if n else difficulty,
    ]
    assert all((weight == 0).all() and weight.shape == (n,) for weight in weights)
    if n:
        assert importance_draw(difficulty, 5).unbiased_weight.tolist() == [0] * 5


# --- the reference penalty --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_to_reference_against_the_definition(temperature):
    z, ref = torch.randn(2, 7, 6, dtype=torch.float64, generator=generator()) * 4
    z.requires_grad_()
    value = kl_to_reference(z, ref, temperature=temperature)
    p_ref, log_p = torch.softmax(ref / temperature, 1), torch.log_softmax(z / temperature, 1)
    definition = (p_ref * (torch.log_softmax(ref / temperature, 1) - log_p)).sum(1)
    torch.testing.assert_close(value, definition, rtol=1e-12, atol=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(gradient, (log_p.exp() - p_ref) / temperature, rtol=1e-10, atol=1e-15)


def test_kl_to_reference_gradcheck():
    ref = torch.randn(3, 4, dtype=torch.float64, generator=generator())
    for distance in (0.1, 3.0):  # near and far from the reference
        z = (ref + distance * torch.randn(3, 4, dtype=torch.float64, generator=generator(1))).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: kl_to_reference(z, ref, temperature=1.5), z)
        assert torch.autograd.gradgradcheck(lambda z: kl_to_reference(z, ref, temperature=1.5), z)


def test_kl_to_reference_under_transforms():
    z, ref = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator())

    def plain(z, ref):
        return (ref.softmax(-1) * (ref.log_softmax(-1) - z.log_softmax(-1))).sum(-1)

    results = [
        (
            torch.func.vmap(f)(z, ref),
            torch.func.grad(lambda z, f=f: f(z, ref).sum())(z),
            torch.func.jacrev(torch.func.jacrev(lambda z, f=f: f(z, ref).sum()))(z),
        )
        for f in (kl_to_reference, plain)
    ]
    torch.testing.assert_close(*results)
    with pytest.raises(NotImplementedError, match="jvp"):  # never a wrong tangent
        torch.func.jvp(lambda z: kl_to_reference(z, ref), (z,), (z,))


def test_kl_to_reference_is_accurate_where_models_agree():
    # error budget: the difference of the logits is known to the rounding of the inputs only, so take both as given
    ref = torch.randn(64, 10, generator=generator()) * 5
    for distance in (1e-1, 1e-2, 1e-3):
        z = (ref + distance * torch.randn(64, 10, generator=generator(1))).requires_grad_()
        value = kl_to_reference(z, ref)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        z64 = z.detach().double().requires_grad_()
        truth = kl_to_reference(z64, ref.double())
        (truth_gradient,) = torch.autograd.grad(truth.sum(), z64)
        p_ref, log_p = torch.softmax(ref.double(), 1), torch.log_softmax(z64.detach(), 1)
        plain = (p_ref * (torch.log_softmax(ref.double(), 1) - log_p)).sum(1)
        torch.testing.assert_close(
            truth.detach(), plain, rtol=1e-7, atol=1e-14
        )  # plain: 10 roundings of terms of about 10
        # a handful of roundings of the softmax and of |d - mean d| <= 10 distances
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=0)
        torch.testing.assert_close(gradient.norm(dim=1).double(), truth_gradient.norm(dim=1), rtol=2e-5, atol=0)


def test_kl_to_reference_edges():
    ref = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0], [0.0, 1.0, -math.inf], [1e4, 0.0, 0.0]])
    z = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, -math.inf], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    z.requires_grad_()
    value = kl_to_reference(z, ref)
    rest = math.log((1 + math.e + math.e**2) / (1 + math.e))
    torch.testing.assert_close(value.detach(), torch.tensor([0.0, math.inf, rest, math.log(3)]), rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(gradient, torch.softmax(z, 1).detach() - torch.softmax(ref, 1), rtol=1e-5, atol=1e-7)
    images = torch.randn(2, 5, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    penalty = kl_to_reference(images, torch.zeros(2, 5, 3, 4))
    assert penalty.shape == (2, 3, 4) and penalty.dtype == torch.bfloat16
    penalty.sum().backward()
    assert images.grad.dtype == torch.bfloat16
    assert kl_to_reference(torch.zeros(5), torch.zeros(5)).shape == ()


def test_kl_to_reference_sends_no_gradient_to_the_reference():
    ref = torch.randn(2, 3, requires_grad=True)
    kl_to_reference(torch.randn(2, 3, requires_grad=True), ref).sum().backward()
    assert ref.grad is None


# --- sampler ----------------------------------------------------------------------------------------------------------


def half(difficulty, generator):
    return infobatch(difficulty, generator=generator)


def test_sampler_shards_are_disjoint_equal_and_the_chosen_ones():
    difficulty = torch.rand(103, generator=generator())
    shards = [DifficultySampler(difficulty, half, seed=3, rank=r, world_size=4) for r in range(4)]
    for epoch in range(3):
        for shard in shards:
            shard.set_epoch(epoch)
        lengths = [len(shard) for shard in shards]
        lists = [list(shard) for shard in shards]
        assert [len(one) for one in lists] == lengths == [len(shard) for shard in shards] and len(set(lengths)) == 1
        seen = [i for one in lists for i in one]
        assert len(seen) == len(set(seen))
        chosen = set(shards[0].weight.nonzero()[:, 0].tolist())
        assert set(seen) <= chosen and len(chosen) - len(seen) < 4
        assert all(torch.equal(shard.weight, shards[0].weight) for shard in shards)


def test_sampler_epochs():
    sampler = DifficultySampler(torch.rand(50, generator=generator()), half)
    first, second = list(sampler), list(sampler)
    assert first != second and sampler.epoch == 1
    sampler.set_epoch(0)
    assert list(sampler) == first
    other = DifficultySampler(sampler.difficulty, half, seed=1)
    assert list(other) not in (first, second)


def test_sampler_reads_the_difficulty_once_an_epoch_and_visits_the_unseen():
    reads, difficulty = [], torch.tensor([math.inf, 0.0, 0.0, 1.0])
    sampler = DifficultySampler(lambda: reads.append(0) or difficulty.clone(), lambda d, g: (d > 0.5).float())
    assert sorted(sampler) == [0, 3] and sampler.weight.tolist() == [1, 0, 0, 1]
    difficulty[:] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert list(sampler) == [1] and len(reads) == 2


def test_sampler_resumes_in_the_middle_of_an_epoch():
    difficulty = torch.rand(40, generator=generator())
    sampler = DifficultySampler(difficulty.clone(), half, seed=5)
    sampler.set_epoch(2)
    it = iter(sampler)
    head = [next(it) for _ in range(7)]
    state, tail = sampler.state_dict(), list(it)
    following = list(sampler)
    # what is known of the examples has changed since: the epoch's plan has not
    again = DifficultySampler(difficulty.flip(0), half, seed=0)
    again.load_state_dict(state)
    assert list(again) == tail and again.epoch == 2 and set(head).isdisjoint(tail)
    again.difficulty = difficulty
    assert list(again) == following


def test_sampler_visits_what_is_not_known_leaves_out_what_was_taken_out_and_hides_both_from_the_policy():
    difficulty, given = torch.tensor([nan, math.inf, 1.0, 2.0, TAKEN_OUT]), []
    sampler = DifficultySampler(difficulty, lambda d, g: given.append(d) or torch.full((5,), 3.0))
    assert sorted(sampler) == [0, 1, 2, 3] and sampler.weight.tolist() == [1, 1, 3, 3, 0]
    torch.testing.assert_close(given[0], torch.tensor([nan, nan, 1.0, 2.0, nan]), equal_nan=True)
    # a policy's own arithmetic may leave NaN where it got NaN
    assert DifficultySampler(difficulty, lambda d, g: d / d.nanmean()).weight.tolist()[:2] == [1, 1]


@pytest.mark.parametrize("unseen", [nan, math.inf])
def test_sampler_starves_nobody_that_the_tracker_has_not_seen(unseen):
    tracker = ExampleTracker(100, fields="all")
    tracker.update(Scores(*torch.rand(5, 50), torch.zeros(50, dtype=torch.int32)), torch.arange(50))
    sampler = DifficultySampler(lambda: tracker.difficulty("mean_loss", unseen=unseen), half)
    visited = set(sampler)
    assert visited.issuperset(range(50, 100)) and 50 < len(visited) < 100
    assert sampler.weight[50:].tolist() == [1.0] * 50
    assert tracker.difficulty("mean_loss", unseen=unseen)[:50].equal(tracker.statistic("mean_loss")[:50])
    for name, statistic in tracker.statistics.items():
        filled = tracker.difficulty(name, unseen=7.0)
        raw = tracker.statistic(name)
        assert filled.dtype == torch.float32 and not filled.isnan().any()
        torch.testing.assert_close(filled, torch.where(raw.isnan(), 7.0, raw * statistic.direction))
    with pytest.raises(TypeError, match="difficulty: unseen must be a number, got str"):
        tracker.difficulty("mean_loss", unseen="inf")


def test_guarded_and_unseen_are_told_apart():
    recent = torch.tensor([0.1, 9.0, nan, 0.2])
    difficulty = guarded(recent, noise_mask(recent, 4.0))
    assert difficulty.isnan().tolist() == [False, False, True, False] and difficulty[1] == TAKEN_OUT
    everyone = DifficultySampler(difficulty, lambda d, g: torch.ones(4))
    assert sorted(everyone) == [0, 2, 3]


# (a policy, called with a difficulty; what it gives where an example takes no part)
TAKES_NO_PART = {
    "small_loss": (lambda d: small_loss(d, keep=0.75), 0),
    "self_paced_weight": (lambda d: self_paced_weight(d, 9.0), 0),
    "self_paced_weight, linear": (lambda d: self_paced_weight(d, 9.0, gamma=1.0), 0),
    "self_paced_threshold": (lambda d: self_paced_threshold(None, d), None),
    "selective_backprop": (lambda d: selective_backprop(d, History.empty().push(d), generator=generator()).keep, 0),
    "selective_backprop, empty": (lambda d: selective_backprop(d, History.empty()).keep, 0),
    "poisson_selection": (lambda d: poisson_selection(d, 2, smoothing=1.0, generator=generator()).keep, 0),
    "importance_draw": (lambda d: importance_draw(d, 64, smoothing=1.0, generator=generator()).indices.bincount(
        minlength=len(d)), 0),
    "importance_gain": (importance_gain, None),
    "infobatch": (lambda d: infobatch(d, generator=generator()), 0),
    "infobatch, late": (lambda d: infobatch(d, progress=0.9), 0),
    "focal_weight": (focal_weight, 0),
    "focal_weight, 0": (lambda d: focal_weight(d, gamma=0.0), 0),
    "superloss_weight": (lambda d: superloss_weight(d, threshold=1.0), 0),
    "flow_weight": (flow_weight, 0),
    "flow_weight, tau": (lambda d: flow_weight(d, temperature=1.0, normalize=True), 0),
    "exponentiated_gradient": (lambda d: exponentiated_gradient(torch.zeros(len(d)), d, eta=0.1), 0),
    "group_mean_loss": (lambda d: group_mean_loss(d, torch.zeros(len(d), dtype=torch.int64), 1), None),
    "group_weight": (lambda d: group_weight(torch.zeros(1), d, torch.zeros(len(d), dtype=torch.int64)), 0),
    "History": (lambda d: History.empty(8).push(d).values, None),
    "cdf": (lambda d: History.empty(8).push(torch.rand(5, generator=generator())).cdf(d), nan),
    "mastered_mask": (lambda d: mastered_mask(d, torch.full((len(d),), 9)), 0),
    "rank_selection": (lambda d: rank_selection(d, keep=0.5, generator=generator()).bincount(minlength=len(d)), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKES_NO_PART)
def test_what_was_taken_out_takes_no_part_as_what_is_not_known(name):
    policy, absent = TAKES_NO_PART[name]
    difficulty = torch.tensor([0.5, nan, 0.1, 2.0, nan, 1.0])
    guarded_out = guarded(difficulty.nan_to_num(3.0), difficulty.isnan())
    expected, actual = policy(difficulty), policy(guarded_out)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    if absent is not None:
        assert all(x == absent or x != x and absent != absent for x in actual[guarded_out == TAKEN_OUT].tolist())


@pytest.mark.parametrize("policy", [
    noise_mask, self_paced_weight, lambda d, t: self_paced_weight(d, t, gamma=1.0),
    lambda d, t: superloss_weight(d, threshold=t),
])  # fmt: skip
def test_a_threshold_that_is_not_known_raises_where_there_is_something_to_judge(policy):
    quantile = ExampleTracker(3, fields="all").random_label_quantile()
    for threshold in (quantile, torch.tensor(nan, dtype=torch.float64)):
        with pytest.raises(ValueError, match="threshold must be known, got nan"):
            policy(torch.tensor([1.0, 2.0]), threshold)
        assert not policy(torch.tensor([nan, nan]), threshold).any()
        assert not policy(torch.tensor([]), threshold).any()


def test_self_paced_threshold_recovers_from_a_start_without_losses():
    start = self_paced_threshold(None, torch.tensor([nan, nan]))
    assert start.isnan() and self_paced_threshold(start, torch.tensor([3.0])) == 3.0


def test_a_sampler_leaves_out_the_suspects():
    scores = difficulty_scores(torch.randn(64, 10, generator=generator()), torch.arange(64) % 10)
    suspect = noise_mask(scores.loss, threshold=4.0)
    difficulty = guarded(scores.difficulty("loss"), suspect)
    sampler = DifficultySampler(difficulty, lambda d, g: infobatch(d, generator=g))
    suspects = set(suspect.nonzero()[:, 0].tolist())
    assert suspects and len(sampler) and suspects.isdisjoint(sampler)
    keep = selective_backprop(difficulty, History.empty().push(difficulty), generator=generator()).keep
    assert not keep[suspect].any()


@pytest.mark.parametrize("handed_out", [0, 7])
def test_sampler_keeps_its_place_when_the_loaded_epoch_is_set(handed_out):
    difficulty = torch.rand(40, generator=generator())
    sampler = DifficultySampler(difficulty, half, seed=5)
    sampler.set_epoch(2)
    it = iter(sampler)
    head = [next(it) for _ in range(handed_out)]
    again = DifficultySampler(difficulty.flip(0), half)
    again.load_state_dict(sampler.state_dict())
    again.set_epoch(2)
    tail = list(again)
    assert tail == list(it) and sorted(head + tail) == sampler.weight.nonzero()[:, 0].tolist()
    again.difficulty = difficulty
    again.set_epoch(2)  # iterated since: from the beginning
    assert list(again) == head + tail
    again.load_state_dict(sampler.state_dict() | {"position": 7})
    again.set_epoch(3)
    sampler.set_epoch(3)
    assert list(again) == list(sampler)


def test_sampler_saved_at_the_end_of_an_epoch_goes_on_with_the_next():
    difficulty = torch.rand(40, generator=generator())
    sampler = DifficultySampler(difficulty, half, seed=5)
    first = list(sampler)
    state = sampler.state_dict()
    second = list(sampler)
    assert second and second != first
    for epoch, expected in ((None, second), (1, second), (0, first)):
        again = DifficultySampler(difficulty, half)
        again.load_state_dict(state)
        if epoch is not None:
            again.set_epoch(epoch)
        assert list(again) == expected


def test_sampler_says_what_it_is_without_calling_for_the_difficulty():
    sampler = DifficultySampler(torch.rand(6), half, seed=4, rank=1, world_size=2)
    sampler.set_epoch(3)
    assert repr(sampler) == "DifficultySampler(num_examples=6, epoch=3, seed=4, rank=1, world_size=2)"
    reads = []
    sampler = DifficultySampler(lambda: reads.append(0) or torch.rand(6), half)
    assert "num_examples=?" in repr(sampler) and not reads
    assert len(sampler) and "num_examples=6" in repr(sampler)


def test_sampler_in_a_dataloader():
    data = torch.utils.data.TensorDataset(torch.arange(30))
    sampler = DifficultySampler(torch.rand(30, generator=generator()), half)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected = len(loader)
        batches = [batch for (batch,) in loader]
        assert len(batches) == expected
        assert sorted(torch.cat(batches).tolist()) == sampler.weight.nonzero()[:, 0].tolist()


def test_sampler_refuses():
    difficulty = torch.rand(6)
    sampler = DifficultySampler(difficulty, half)
    state = sampler.state_dict()
    before = sampler.state_dict()
    for fault, match in (
        ({k: v for k, v in state.items() if k != "order"}, "lacks"),
        (state | {"world_size": 2}, "expected .*'world_size': 1.*got .*'world_size': 2"),
        (state | {"weight": torch.ones(7)}, "'num_examples': 6.*'num_examples': 7"),
    ):
        with pytest.raises(ValueError, match=match):
            sampler.load_state_dict(fault)
    other = state | {"seed": 9, "epoch": 9}
    for fault, match in (
        (None, "expected a dict, got NoneType"),
        (other | {"order": state["order"].tolist()}, "order must be an int64 tensor .* got list"),
        (other | {"order": state["order"].float()}, "order must be an int64 tensor .* got torch.float32"),
        (other | {"weight": state["weight"].tolist()}, "weight must be a Tensor, got list"),
        (other | {"seed": "1"}, "seed must be an int, got str"),
        (other | {"position": None}, "position must be an int, got NoneType"),
    ):
        with pytest.raises(TypeError, match=match):
            sampler.load_state_dict(fault)
    for fault, match in (
        (other | {"position": 99}, f"position must be at most {len(state['order'])}, got 99"),
        (other | {"order": state["order"] + 6}, "order must be of examples below 6, got"),
    ):
        with pytest.raises(ValueError, match=match):
            sampler.load_state_dict(fault)
    assert (sampler.seed, sampler.epoch, list(sampler)) == (before["seed"], before["epoch"], before["order"].tolist())
    assert sampler.state_dict().keys() == before.keys() and torch.equal(sampler.state_dict()["order"], before["order"])
    with pytest.raises(RuntimeError, match=r"shape \[6\], got \[2\]"):
        list(DifficultySampler(difficulty, lambda d, g: d[:2]))
    for wrong in (-1.0, math.inf, nan):
        with pytest.raises(ValueError, match=f"finite weights >= 0, got {wrong}"):
            list(DifficultySampler(difficulty, lambda d, g, wrong=wrong: torch.full_like(d, wrong)))
    with pytest.raises(TypeError, match="return a Tensor, got Selection: take its keep or unbiased_weight"):
        list(DifficultySampler(difficulty, lambda d, g: poisson_selection(d, 3, generator=g)))
    with pytest.raises(ValueError, match="at least 1 of 6 examples .* got 0; 6 have the difficulty -inf"):
        list(DifficultySampler(torch.full_like(difficulty, TAKEN_OUT), half))
    with pytest.raises(ValueError, match="at least 2 of 6 examples .* got 1; 0 have"):
        list(DifficultySampler(difficulty, lambda d, g: (d == d.max()).float(), world_size=2))
    with pytest.raises(ValueError, match="below world_size 2, got 2"):
        DifficultySampler(difficulty, half, rank=2, world_size=2)
    with pytest.raises(TypeError, match="policy must be a function, got str"):
        DifficultySampler(difficulty, "half")


# --- errors, devices, scores ------------------------------------------------------------------------------------------

INT, FLAGS = torch.ones(6, dtype=torch.int64), torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: History.empty(0), ValueError, "size must be at least 1, got 0"),
        (lambda: History.empty().quantile(1.5), ValueError, r"q must be in \[0, 1\], got 1.5"),
        (lambda: selective_backprop(LOSS, History.empty(), beta=-1.0), ValueError, r"beta must be in \[0, inf\), got"),
        (lambda: selective_backprop(LOSS[None], History.empty()), RuntimeError, r"shape \[N\], got \[1, 6\]"),
        (lambda: selective_backprop(INT, History.empty()), TypeError, "floating point tensor, got torch.int64"),
        (lambda: selective_backprop([1.0], History.empty()), TypeError, "must be a Tensor, got list"),
        (lambda: selective_beta(0), ValueError, r"keep must be in \(0, 1\], got 0"),
        (lambda: rank_selection(LOSS, keep=nan), ValueError, "keep must be in .* got nan"),
        (lambda: rank_selection(LOSS, keep="all"), TypeError, "keep must be a number, got str"),
        (lambda: importance_draw(LOSS, 0), ValueError, "size must be at least 1, got 0"),
        (lambda: importance_draw(LOSS, 1.5), TypeError, "size must be an int, got float"),
        (lambda: importance_draw(LOSS[:0], 1), ValueError, "at least one example, got 0"),
        (lambda: importance_draw(LOSS, 1, smoothing=-1), ValueError, "smoothing must be in"),
        (lambda: importance_pays(importance_gain(LOSS), 10, 64), ValueError, "presample must be at least 64, got 10"),
        (lambda: infobatch(LOSS, ratio=1.0), ValueError, r"ratio must be in \[0, 1\), got 1.0"),
        (lambda: infobatch(LOSS, progress=2), ValueError, "progress must be in"),
        (lambda: co_teaching_keep(-1), ValueError, "epoch must be at least 0"),
        (lambda: co_teaching_keep(1, noise_rate=True), TypeError, "noise_rate must be a number, got bool"),
        (lambda: small_loss(LOSS, 1.1), ValueError, "keep must be in"),
        (lambda: self_paced_weight(LOSS, 1.0, gamma=0), ValueError, r"gamma must be in \(0, inf\), got 0"),
        (lambda: self_paced_threshold(None, LOSS, momentum=1), ValueError, "momentum must be in"),
        (lambda: focal_weight(LOSS, gamma=0.5), ValueError, "gamma must be 0 or at least 1"),
        (lambda: superloss_weight(LOSS, threshold=0.0, regularization=0.0), ValueError, "regularization must be in"),
        (lambda: flow_weight(LOSS, temperature=0.0), ValueError, "temperature must be in"),
        (lambda: exponentiated_gradient(LOSS, LOSS[:2], eta=0.1), RuntimeError, r"shape \[6\], got \[2\]"),
        (lambda: exponentiated_gradient(LOSS, LOSS, eta=-0.1), ValueError, "eta must be in"),
        (lambda: exponentiated_gradient(LOSS, LOSS, eta=0.1, index=LOSS), TypeError, "integer tensor, got"),
        (lambda: group_mean_loss(LOSS, INT[:3], 2), RuntimeError, r"group must have shape \[6\], got \[3\]"),
        (lambda: mastered_mask(LOSS, INT, delta=0.0), ValueError, "delta must be in"),
        (lambda: noise_mask(LOSS, nan), ValueError, "threshold must be in"),
        (lambda: noise_mask(LOSS, 1.0, observations=LOSS), TypeError, "observations must be an integer tensor"),
        (lambda: late_stopping_mask(LOSS, 0.0), ValueError, "learned_share must be in"),
        (lambda: guarded(LOSS, INT), TypeError, "noisy must be a bool tensor, got torch.int64"),
        (lambda: guarded(LOSS, FLAGS[:1]), RuntimeError, r"noisy must have shape \[6\], got \[1\]"),
        (lambda: kl_to_reference(LOSS[None], LOSS), RuntimeError, r"must have shape \[1, 6\], got \[6\]"),
        (lambda: kl_to_reference(LOSS, LOSS, temperature=0), ValueError, "temperature must be in"),
        (lambda: kl_to_reference(INT, INT), TypeError, "floating point tensor, got torch.int64"),
        (lambda: selective_backprop(LOSS, LOSS), TypeError, "history must be a History, got Tensor"),
        (lambda: selective_backprop(LOSS, History.empty(), generator=0), TypeError, "be a torch.Generator or None"),
        (lambda: rank_selection(LOSS, generator=0), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda: importance_draw(LOSS, 1, generator=0), TypeError, "must be a torch.Generator or None, got int"),
        (lambda: poisson_selection(LOSS, 1, generator=0), TypeError, "must be a torch.Generator or None, got int"),
        (lambda: infobatch(LOSS, generator=0), TypeError, "generator must be a torch.Generator or None, got int"),
        (lambda: group_mean_loss(LOSS, INT, 1), IndexError, r"group_mean_loss: group must be in \[0, 1\), got 1"),
        (lambda: group_weight(LOSS, LOSS, -INT), IndexError, r"group_weight: group must be in \[0, 6\), got -1"),
        (lambda: exponentiated_gradient(LOSS, LOSS, eta=1, index=INT * 6), IndexError, r"in \[0, 6\), got 6"),
        (lambda: rank_selection_is_due(0.5, 0, end=0.2), ValueError, r"end must be in \[0.5, 1\], got 0.2"),
        (lambda: noise_mask(LOSS, LOSS[:, None]), RuntimeError, r"a number or a scalar tensor, got shape \[6, 1\]"),
        (lambda: self_paced_weight(LOSS, LOSS[:, None]), RuntimeError, r"scalar tensor, got shape \[6, 1\]"),
        (lambda: superloss_weight(LOSS, threshold=LOSS[:1]), RuntimeError, r"scalar tensor, got shape \[1\]"),
        (lambda: self_paced_threshold(LOSS[:2], LOSS), RuntimeError, r"previous must be .* got shape \[2\]"),
        (lambda: self_paced_threshold("1", LOSS), TypeError, "previous must be a number, got str"),
    ],
)  # fmt: skip
def test_a_bad_argument_says_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_an_index_may_be_any_integer(dtype):
    group = torch.tensor([0, 1, 1, 0, 2, 2])
    given, state = group.to(dtype), torch.tensor([0.1, -0.2, 0.3])
    torch.testing.assert_close(group_mean_loss(LOSS, given, 3), group_mean_loss(LOSS, group, 3))
    torch.testing.assert_close(group_weight(state, LOSS, given), group_weight(state, LOSS, group))
    step = exponentiated_gradient(state, LOSS, eta=0.1, index=given)
    torch.testing.assert_close(step, exponentiated_gradient(state, LOSS, eta=0.1, index=group))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_large_batches(dtype):
    loss, group = torch.ones(70_000, dtype=dtype), torch.zeros(70_000, dtype=torch.int64)
    state = torch.zeros(2, requires_grad=True)
    weight = group_weight(state, loss, group)
    torch.testing.assert_close(weight.double().sum(), torch.tensor(0.5, dtype=torch.float64), rtol=1e-6, atol=0)
    assert group_mean_loss(loss, group, 1).item() == 1 and not weight.requires_grad
    assert flow_weight(0 * loss, normalize=True).eq(1).all()  # a sum of float16 would be infinite


def test_a_threshold_outlives_an_empty_batch():
    assert self_paced_threshold(torch.tensor(2.0), LOSS[:0]).item() == 2
    assert self_paced_threshold(None, LOSS[:0]).isnan()


def test_policies_never_read_a_device_tensor_on_the_host():
    # meta tensors have no data: any .item(), nonzero or branch on a value raises
    loss = torch.rand(8, device="meta")
    history = History(torch.empty(16, device="meta"), torch.empty((), dtype=torch.int64, device="meta"))
    index = torch.zeros(8, dtype=torch.int64, device="meta")
    history = history.push(loss)
    noisy = noise_mask(loss, history.quantile(0.1), observations=index)
    results = [
        selective_backprop(guarded(loss, noisy), history).unbiased_weight,
        rank_selection(loss),
        *importance_draw(loss, 4),
        poisson_selection(loss, 4).unbiased_weight,
        importance_pays(importance_gain(loss), 8, 4),
        infobatch(loss),
        small_loss(loss, 0.5),
        self_paced_weight(loss, self_paced_threshold(torch.empty((), device="meta"), loss), gamma=1.0),
        focal_weight(loss),
        superloss_weight(loss, threshold=1.0),
        flow_weight(loss, normalize=True),
        exponentiated_weight(exponentiated_gradient(loss, loss, eta=0.1, index=index)),
        group_weight(loss, loss, index),
        mastered_mask(loss, index),
        late_stopping_mask(loss, 0.5),
        kl_to_reference(loss[None], loss[None]),
    ]
    assert all(result.device.type == "meta" for result in results)


def test_torch_default_dtype_changes_nothing():
    def results():
        history = History.empty(8).push(LOSS.half())
        group = torch.tensor([0, 1, 0, 1, 0, 1])
        return [
            history.values,
            history.cdf(LOSS),
            history.quantile(0.5),
            *selective_backprop(LOSS, history, floor=0.1, generator=generator()),
            selective_backprop(LOSS, history, generator=generator()).unbiased_weight,
            rank_selection(LOSS, generator=generator()),
            *importance_draw(LOSS, 4, generator=generator()),
            *poisson_selection(LOSS, 3, generator=generator()),
            importance_gain(LOSS),
            infobatch(LOSS, generator=generator()),
            infobatch(LOSS.half(), ratio=0.3, generator=generator()),
            small_loss(LOSS, 0.5),
            self_paced_threshold(None, LOSS),
            self_paced_weight(LOSS, 1.0, gamma=1.0),
            focal_weight(LOSS),
            superloss_weight(LOSS, threshold=1.0),
            flow_weight(LOSS, normalize=True),
            exponentiated_gradient(torch.zeros(6, dtype=torch.float32), LOSS, eta=0.1),
            group_mean_loss(LOSS, group, 2),
            group_weight(LOSS[:2], LOSS, group),
            DifficultySampler(LOSS, half).weight,
        ]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        came = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for number, (a, b) in enumerate(zip(came, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=number: f"result {n}: {m}")


def test_the_same_generator_gives_the_same_draw():
    history = History.empty().push(LOSS)
    for draw in (
        lambda g: selective_backprop(LOSS, history, generator=g).keep,
        lambda g: rank_selection(LOSS, generator=g),
        lambda g: importance_draw(LOSS, 5, generator=g).indices,
        lambda g: poisson_selection(LOSS, 3, generator=g).keep,
        lambda g: infobatch(LOSS, generator=g),
    ):
        torch.manual_seed(1)
        first = draw(generator(7))
        torch.manual_seed(2)
        assert torch.equal(first, draw(generator(7)))


def test_scores_are_what_policies_take(device):
    logits = torch.randn(32, 10, device=device)
    scores = difficulty_scores(logits, torch.arange(32, device=device) % 10)
    history = History.empty(device=device)
    for name in ("loss", "el2n", "margin", "entropy"):
        difficulty = scores.difficulty(name)
        selection = selective_backprop(difficulty, history.push(difficulty))
        hardest = selection.probability.argmax()
        assert difficulty[hardest] == difficulty.max()


def test_all_is_what_the_package_holds():
    assert policies.__all__ == sorted(policies.__all__, key=lambda name: (name[0].islower(), name))
    assert all(hasattr(policies, name) for name in policies.__all__)
