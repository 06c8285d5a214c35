"""The specification: every quantity of the package in plain torch, any device, any dtype, differentiable twice.

Rows are the last axis of ``logits`` [..., C]; ``target`` [...] holds class indices. Nothing here is fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .kernels.results import accumulation_dtype
from .logit_options import LogitOptions
from .losses import CrossEntropy, GapLoss, Loss
from .row_sums import RowSums
from .scores import Scores
from .soft_targets import SoftTargets

__all__ = [
    "CROSS_ENTROPY",
    "accumulation_dtype",
    "check_target",
    "elements",
    "elements_gradient",
    "gap_of_sums",
    "gradient",
    "logsumexp",
    "logsumexp_gradient",
    "logsumexp_of_sums",
    "out_of_bounds",
    "rows",
    "scores",
    "scores_of_sums",
    "share_times",
    "soft_rows",
    "softmax",
    "z_of",
]

CROSS_ENTROPY = CrossEntropy()


def check_target(target: Tensor, n_classes: int, ignore_index: int) -> None:
    """Raise torch's IndexError for a class index out of range."""
    if torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(target):  # under vmap: look at every label there is
        target = torch._C._functorch.get_unwrapped(target)
    bad = ((target < 0) | (target >= n_classes)) & (target != ignore_index)
    if bad.any():
        raise out_of_bounds(int(target[bad][0]), int(bad.sum()), n_classes, ignore_index)


def out_of_bounds(label: int, count: int, n_classes: int, ignore_index: int) -> IndexError:
    """Return the error of ``count`` class indices out of range, one of which is ``label``."""
    return IndexError(
        f"Target {label} is out of bounds.\nExpected class indices in [0, {n_classes}) or "
        f"ignore_index={ignore_index}, got {count} outside."
    )


def _masked(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logits, label's logit, rest with the label at -inf, which rows count), ignored rows made harmless."""
    n_classes = logits.shape[-1]
    ignored = target == ignore_index
    bad = ((target < 0) | (target >= n_classes)) & ~ignored
    logits = logits.to(accumulation_dtype(logits.dtype)).masked_fill(ignored[..., None], 0.0)
    label = torch.where(ignored | bad, 0, target.long())
    is_label = torch.arange(n_classes, device=logits.device) == label[..., None]
    z_target = torch.where(is_label, logits, 0.0).sum(-1)
    # a label out of range (unchecked on a GPU) makes its row NaN
    return logits, z_target + torch.where(bad, math.nan, 0.0), logits.masked_fill(is_label, -math.inf), ~ignored


def _rest(rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (max, max with 0 for -inf, sum of exp(rest - max)) of the other classes."""
    if rest.shape[-1] == 0:
        maximum = rest.new_full(rest.shape[:-1], -math.inf)
    else:
        maximum = rest.detach().amax(-1)
    origin = maximum.masked_fill(maximum == -math.inf, 0.0)
    return maximum, origin, torch.exp(rest - origin[..., None]).sum(-1)


def _gap(z_target: Tensor, origin: Tensor, sum_exp: Tensor) -> Tensor:
    empty = sum_exp == 0
    gap = torch.where(empty, math.inf, (z_target - origin) - torch.log(torch.where(empty, 1.0, sum_exp)))
    nan = (z_target == math.inf) | z_target.isnan() | (empty & (z_target == -math.inf))
    return gap + torch.where(nan, math.nan, 0.0)


def rows(logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss) -> Tensor:
    """Return the loss of each row, 0 where ignored, in the accumulation dtype."""
    cleaned, z_target, rest, counts = _masked(logits, target, ignore_index)
    _, origin, sum_exp = _rest(rest)
    value = loss.value(_gap(z_target, origin, sum_exp))
    # where no logit is finite the gradient is NaN too, as torch's
    nothing = (sum_exp == 0) & ~z_target.isfinite()
    value = value + (
        cleaned.masked_fill(~nothing[..., None], 0.0) * torch.where(nothing, math.nan, 0.0)[..., None]
    ).sum(-1)
    return torch.where(counts, value, 0.0)


def gradient(logits: Tensor, target: Tensor, ignore_index: int, loss: GapLoss, grad_loss: Tensor) -> Tensor:
    """Return ``sum_i grad_loss_i dL_i / dlogits`` by the closed form, itself differentiable.

    ``dL/dz_y = -A``, ``dL/dz_k = A exp(z_k - max) / sum_exp``.
    """
    cleaned, z_target, rest, counts = _masked(logits, target, ignore_index)
    _, origin, sum_exp = _rest(rest)
    slope = loss.slope(_gap(z_target, origin, sum_exp)) * grad_loss
    slope = torch.where(sum_exp == 0, slope * 0.0, slope)  # a row with no rest teaches nothing
    slope = torch.where(counts, slope, 0.0)
    scale = slope / torch.where(sum_exp == 0, 1.0, sum_exp)
    others = scale[..., None] * torch.exp(rest - origin[..., None])
    is_label = torch.arange(logits.shape[-1], device=logits.device) == target[..., None]
    pull = slope * 0.0 - slope  # an infinite slope is NaN at the label, as torch's
    return torch.where(is_label & counts[..., None], pull[..., None], others).to(logits.dtype)


def z_of(logits: Tensor, target: Tensor, ignore_index: int, options: LogitOptions) -> Tensor:
    """Return what options make of the logits, whatever ignored rows hold."""
    if options.kernel == "as_given":
        return logits
    return options.applied(logits.masked_fill((target == ignore_index)[..., None], 0.0))


def logsumexp(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the logsumexp of each row, 0 where ignored, in the accumulation dtype."""
    cleaned = logits.to(accumulation_dtype(logits.dtype)).masked_fill((target == ignore_index)[..., None], 0.0)
    if logits.shape[-1] == 0:  # nothing to pay for
        return cleaned.sum(-1)
    return torch.logsumexp(cleaned, -1).masked_fill(target == ignore_index, 0.0)


def logsumexp_gradient(logits: Tensor, target: Tensor, ignore_index: int, grad_lse: Tensor) -> Tensor:
    """Return ``sum_i grad_lse_i dlogsumexp_i / dlogits``, itself differentiable."""
    ignored = target == ignore_index
    cleaned = logits.to(accumulation_dtype(logits.dtype)).masked_fill(ignored[..., None], 0.0)
    return torch.softmax(cleaned, -1) * grad_lse.masked_fill(ignored, 0.0)[..., None]


def softmax(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the probabilities of each row in the dtype of the logits; 0 where ignored."""
    probabilities = torch.softmax(logits.to(accumulation_dtype(logits.dtype)), -1).to(logits.dtype)
    bad = (target < 0) | (target >= logits.shape[-1])
    probabilities = probabilities.masked_fill(bad[..., None], math.nan)
    return probabilities.masked_fill((target == ignore_index)[..., None], 0.0)


@torch.no_grad()
def scores(logits: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype = torch.float32) -> Scores:
    """Return the six stored columns, shaped like the target; see `Scores`."""
    cleaned, z_target, rest, counts = _masked(logits, target, ignore_index)
    maximum, origin, sum_exp = _rest(rest)
    shifted = rest - origin[..., None]
    e = torch.exp(shifted)
    runner_up = rest.argmax(-1) if rest.shape[-1] else torch.zeros_like(target)
    sum_exp_z = torch.where(e == 0, e, e * shifted).sum(-1)
    sums = RowSums(z_target, maximum, sum_exp, (e * e).sum(-1), sum_exp_z, runner_up)
    return scores_of_sums(sums, counts, dtype)


def scores_of_sums(sums: RowSums, counts: Tensor, dtype: torch.dtype = torch.float32) -> Scores:
    """Return the six stored columns of rows from their sums; NaN where a row does not count."""
    z_target, maximum, sum_exp, sum_exp2, sum_exp_z, runner_up = sums
    gap = gap_of_sums(sums)
    total = torch.where(sum_exp == 0, 1.0, sum_exp)
    p, u = torch.sigmoid(gap), torch.sigmoid(-gap)
    plain, log_odds_loss = -logsigmoid(gap), -logsigmoid(-gap)
    purity = sum_exp2 / (total * total)
    rest_entropy = torch.log(total) - sum_exp_z / total
    entropy = torch.where(p == 0, 0.0, p * plain) + torch.where(u == 0, 0.0, u * (log_odds_loss + rest_entropy))
    margin = z_target - maximum + torch.where(gap.isnan(), math.nan, 0.0)
    energy = -logsumexp_of_sums(sums)
    known = counts & ~gap.isnan() & (maximum > -math.inf)

    def column(x: Tensor) -> Tensor:
        return torch.where(counts, x + torch.where(gap.isnan(), math.nan, 0.0), math.nan).to(dtype)

    return Scores(
        column(plain), column(u * torch.sqrt(1 + purity)), column(margin), column(entropy), column(energy),
        torch.where(known, runner_up, -1).to(torch.int32),
    )  # fmt: skip


def gap_of_sums(sums: RowSums) -> Tensor:
    """Return ``z_y - logsumexp(rest)`` of rows from their sums."""
    return _gap(sums.z_target, sums.max.masked_fill(sums.max == -math.inf, 0.0), sums.sum_exp)


def logsumexp_of_sums(sums: RowSums) -> Tensor:
    """Return the logsumexp of all classes of rows from their sums: by way of the larger of label and rest."""
    gap = gap_of_sums(sums)
    rest = sums.max + torch.log(torch.where(sums.sum_exp == 0, 1.0, sums.sum_exp))
    return torch.where(gap > 0, sums.z_target - logsigmoid(gap), rest - logsigmoid(-gap))


def soft_rows(logits: Tensor, label: Tensor, ignore_index: int, loss: Loss, targets: SoftTargets) -> Tensor:
    """Return the loss of each row for a target that is shares of the classes (see `SoftTargets`), 0 where ignored.

    ``L = sum_k t_k (-log p_k) + sum_k c(p_k, v_k)``: every class pays by its share what it would pay as the label. The
    first sum is there for losses that add to cross-entropy; for any other loss of the gap ``c = v_k value(gap_k)``.
    Of ``label`` only what is ignored or out of range matters where probabilities are given.
    """
    n_classes = logits.shape[-1]
    counts = label != ignore_index
    hard = targets.hard(label, n_classes, accumulation_dtype(logits.dtype))
    logits = logits.to(hard.dtype).masked_fill(~counts[..., None], 0.0)
    if n_classes == 0:
        return logits.sum(-1)
    # only the top class can have p > 1/2, where log(1 - p) must come from the sum over the others
    log_p = torch.log_softmax(logits, -1)
    top = logits.detach().argmax(-1, keepdim=True)
    is_top = torch.arange(n_classes, device=logits.device) == top
    _, origin, sum_exp = _rest(logits.masked_fill(is_top, -math.inf))
    gap_top = _gap(torch.where(is_top, logits, 0.0).sum(-1), origin, sum_exp)
    others = torch.where(is_top, -1.0, log_p).clamp(max=-1e-9)
    gap = torch.where(is_top, gap_top[..., None], others - torch.log(-torch.expm1(others)))
    log_p = torch.where(is_top, logsigmoid(gap), log_p)
    v = targets.of_bonus(n_classes).of(hard)
    if isinstance(loss, GapLoss):
        value = share_times(v, loss.excess(gap))
    else:
        value = loss.class_value(torch.sigmoid(gap), torch.sigmoid(-gap), log_p, v)
    if loss.adds_to_cross_entropy:
        value = value + share_times(targets.of_cross_entropy(n_classes).of(hard), -log_p)
    bad = counts & ((label < 0) | (label >= n_classes))  # unchecked on a GPU and while compiling
    total = torch.where(bad, math.nan, value.sum(-1))
    return torch.where(counts, total, 0.0)


def share_times(share: Tensor, value: Tensor) -> Tensor:
    """Return the product; a class without a share costs nothing even where its loss is infinite."""
    return share * torch.where((share == 0) & value.isinf(), 0.0, value)


def elements(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: GapLoss,
    scales: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Return ``weight (positive pos_weight t L(x) + negative (1 - t) L(-x))`` of each element, unreduced.

    For a logit x with target t in [0, 1] the gap is x for the positive share t and -x for the negative one;
    ``scales`` are (positive, negative). With plain cross-entropy and scales 1 this is binary cross-entropy.
    """
    x, t = _wide(input, target)
    one, zero = loss.value(x), loss.value(-x)
    # no share costs nothing, even where the loss is infinite
    one = one.masked_fill((t == 0) & one.isinf(), 0.0) * (1.0 if pos_weight is None else pos_weight)
    zero = zero.masked_fill((t == 1) & zero.isinf(), 0.0)
    value = scales[0] * t * one + scales[1] * (1 - t) * zero
    return value if weight is None else value * weight


def elements_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, loss: GapLoss,
    scales: tuple[float, float], grad_loss: Tensor,
) -> Tensor:  # fmt: skip
    """Return the gradient of `elements` for ``input`` by the closed form, itself differentiable."""
    x, t = _wide(input, target)
    one = loss.slope(x) * (1.0 if pos_weight is None else pos_weight)
    slope = scales[1] * (1 - t) * loss.slope(-x) - scales[0] * t * one
    return ((slope if weight is None else slope * weight) * grad_loss).to(input.dtype)


def _wide(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(torch.promote_types(input.dtype, target.dtype))
    return input.to(dtype), target.to(dtype)
