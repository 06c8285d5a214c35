"""Weights from the loss: focal, SuperLoss, FLOW, exponentiated gradient and its worst-group form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import (
    check_index,
    check_integer,
    check_number,
    check_shape,
    check_threshold,
    check_vector,
    checked_difficulty,
)

__all__ = [
    "exponentiated_gradient",
    "exponentiated_weight",
    "flow_weight",
    "focal_weight",
    "group_mean_loss",
    "group_weight",
    "superloss_weight",
]


def focal_weight(loss: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Return the weights that turn cross-entropy's gradient into the focal loss's.

    ``w = (1 - p)^gamma + gamma * loss * p (1 - p)^(gamma - 1)``, the derivative of ``(1 - p)^gamma * loss`` by the
    loss, ``p = exp(-loss)``. (As a loss of its own the package has `bonus_ops.Focal`.)

    Args:
        loss: [N], ``scores.loss`` in nats, higher is harder (a negative value counts as 0); NaN weighs 0.
        gamma: 0 (no change) or >= 1, default 2.

    Returns:
        Weights [N], in [0, 1.23] for gamma = 2: 0 where p = 1, the most at p = 0.10, 1 where p = 0; detached. Raises
        as all policies.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002.
    """
    loss = checked_difficulty("focal_weight", "loss", loss)
    check_number("focal_weight", "gamma", gamma, "[0, inf)")
    if 0 < gamma < 1:
        raise ValueError(f"focal_weight: gamma must be 0 or at least 1, where the weight is bounded, got {gamma!r}")
    loss = loss.clamp(min=0)
    if gamma == 0:
        return torch.where(loss.isnan(), 0.0, torch.ones_like(loss))
    rest, p = -torch.expm1(-loss), torch.exp(-loss)
    pull = torch.where(p == 0, 0.0, loss * p)  # loss may be inf
    return torch.where(loss.isnan(), 0.0, rest**gamma + gamma * pull * rest ** (gamma - 1))


def superloss_weight(loss: Tensor, *, threshold: float | Tensor, regularization: float = 1.0) -> Tensor:
    """Return SuperLoss's confidence, which is also the factor it puts on the gradient.

    ``sigma = exp(-W(max(-2 / e, (loss - tau) / lam) / 2))`` with W the principal branch of Lambert's function, found on
    the device by Halley's method.

    Args:
        loss: [N], ``scores.loss`` in nats, higher is harder; NaN weighs 0.
        threshold: tau, number or scalar tensor: log C for classification, or a running mean of the loss.
        regularization: lam > 0; 1 for CIFAR-10, 0.25 for CIFAR-100 in the paper. Larger is closer to no weighting.

    Returns:
        Weights [N] in [0, e]: 1 at the threshold, more below (easy), less above (hard); detached. Raises as all
        policies.

    References:
        Castells et al., SuperLoss, NeurIPS 2020, Eq. 5.
    """
    loss = checked_difficulty("superloss_weight", "loss", loss)
    check_number("superloss_weight", "regularization", regularization, "(0, inf)")
    check_threshold("superloss_weight", "threshold", threshold, "(-inf, inf)", loss)
    beta = (loss - threshold) / regularization
    weight = torch.exp(-_lambert_w(beta.clamp(min=-2 / math.e) / 2))
    return torch.where(beta.isnan(), 0.0, weight)


def _lambert_w(x: Tensor) -> Tensor:
    """Return the w >= -1 with ``w exp(w) = x``, x >= -1/e."""
    branch = torch.sqrt((2 * (math.e * x + 1)).clamp(min=0))  # expansion at the branch point, where w = -1
    near = -1 + branch - branch**2 / 3 + 11 / 72 * branch**3
    log_x = torch.log(x.clamp(min=1.0))
    far = log_x - torch.log(log_x.clamp(min=1.0)) * log_x / (1 + log_x)
    w = torch.where(x < 0, near, torch.where(x < 1, torch.log1p(x.clamp(min=0)), far))
    for _ in range(4):
        # Newton's step on w - x exp(-w): bounded for large w, where w exp(w) - x would overflow
        residual = w - x * torch.exp(-w)
        slope = 1 + w
        step = residual / torch.where(slope > 0, slope - residual * (slope + 1) / (2 * slope.clamp(min=1e-6)), 1.0)
        w = torch.where((slope > 1e-3) & x.isfinite(), w - step, w)
    return torch.where(x == math.inf, math.inf, w)


def flow_weight(loss: Tensor, *, temperature: float | None = None, normalize: bool = False) -> Tensor:
    """Return ``exp(-loss / tau)``: weights that keep fine-tuning on what the pre-trained model already does well.

    Score the data once with the pre-trained model (with a trained head), keep the weights for the whole fine-tuning
    and minimise ``(weight * loss).mean()``. They solve ``min_w sum w loss + tau sum w log w``.

    Args:
        loss: [N], ``scores.loss`` of the pre-trained model in nats, higher is harder (a negative value counts as 0);
            NaN weighs 0.
        temperature: tau > 0 in nats; default the median of ``loss`` (the paper; the 1.0 of its command line is a
            placeholder). A median of 0 gives weight 1 to losses of 0 and none to others.
        normalize: divide by the mean of the weights; default False, as the paper.

    Returns:
        Weights [N] in [0, 1], larger is easier; detached, no host sync. Raises as all policies.

    References:
        Sanyal et al., Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting, 2025, arXiv 2502.02797.
    """
    loss = checked_difficulty("flow_weight", "loss", loss)
    loss = loss.clamp(min=0)
    if temperature is None:
        tau = loss.nanmedian()
    else:
        check_number("flow_weight", "temperature", temperature, "(0, inf)")
        tau = torch.full((), temperature, dtype=loss.dtype, device=loss.device)
    weight = torch.where(tau > 0, torch.exp(-loss / tau), (loss == 0).to(loss.dtype))
    weight = torch.where(loss.isnan(), 0.0, weight)
    if not normalize:
        return weight
    mean = weight.sum(dtype=torch.float64) / (~loss.isnan()).sum()  # float16 sums to 65504
    return (weight / mean).nan_to_num(nan=0.0)


def exponentiated_gradient(
    log_weight: Tensor,
    loss: Tensor,
    *,
    eta: float,
    index: Tensor | None = None,
    ascent: bool = False,
    max_loss: float = math.inf,
) -> Tensor:
    """Return ``log_weight - eta * loss`` (``+`` where ``ascent``): one step of multiplicative weights.

    One primitive, several methods, by what a weight belongs to and by the sign:

    - examples, descent: robustness to mislabelled examples. ``eta`` times the number of epochs about 1.5; the authors
      of the nearest public code use 0.01 for 200 epochs. Freeze `exponentiated_weight` for an epoch and divide the
      batch's weighted sum by its sum of weights.
    - groups or tasks, ascent: group DRO, task-robust training, ``eta`` 0.01, with `group_mean_loss` and
      `group_weight`.
    - examples, once from zero with ``eta = 1 / tau``: FLOW up to a factor.

    Args:
        log_weight: [M], the state, not written; start from zeros.
        loss: [N], ``scores.loss`` in nats, higher is harder; NaN changes nothing.
        eta: >= 0, per nat.
        index: integers [N], the entry each loss belongs to, duplicates add up; None where loss i belongs to entry i.
        ascent: raise the weight of what is hard instead of lowering it.
        max_loss: losses are capped here, > 0; default no cap. (Not of the paper.)

    Returns:
        The next state, [M], on the device; no host sync. Raises as all policies, IndexError on the CPU too.

    References:
        Majidi et al., Exponentiated Gradient Reweighting for Robust Training Under Label Noise and Beyond, 2021,
        arXiv 2104.01493. Sagawa et al., Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, arXiv
        1911.08731, Algorithm 1. Task-robust pre-training: arXiv 2306.12070.
    """
    check_vector("exponentiated_gradient", "log_weight", log_weight)
    loss = checked_difficulty("exponentiated_gradient", "loss", loss)
    check_number("exponentiated_gradient", "eta", eta, "[0, inf)")
    check_number("exponentiated_gradient", "max_loss", max_loss, "(0, inf]")
    loss = loss.clamp(max=max_loss)
    step = (eta if ascent else -eta) * torch.where(loss.isnan(), 0.0, loss).to(log_weight.dtype)
    if index is None:
        check_shape("exponentiated_gradient", "loss", loss, log_weight)
        return log_weight + step
    check_index("exponentiated_gradient", "index", index, loss, len(log_weight))
    return log_weight.index_add(0, index.to(torch.int64), step)


def exponentiated_weight(log_weight: Tensor) -> Tensor:
    """Return ``M softmax(log_weight)`` [M], positive and of mean 1, of the dtype of ``log_weight`` [M].

    Raises as all policies.
    """
    check_vector("exponentiated_weight", "log_weight", log_weight)
    return len(log_weight) * torch.softmax(log_weight, 0)


def group_mean_loss(loss: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """Return the mean loss of each group in the batch, [n_groups], at least float32; NaN for a group not in it.

    Args:
        loss: [N], ``scores.loss`` in nats, higher is harder; NaN takes no part.
        group: integers [N] in [0, n_groups).
        n_groups: >= 1.

    Raises:
        As all policies; on the CPU an IndexError for a group out of range.
    """
    total, count = _group_sums("group_mean_loss", loss, group, n_groups)
    return total / count


def group_weight(log_weight: Tensor, loss: Tensor, group: Tensor) -> Tensor:
    """Return ``softmax(log_weight)[g_i] / n_(g_i)``, so that ``sum(weight * loss)`` is the weighted mean over groups.

    Args:
        log_weight: [G], the state of `exponentiated_gradient` over groups.
        loss: [N], ``scores.loss`` in nats, higher is harder; NaN weighs 0 and does not count in n_g, the number of the
            group's examples in the batch.
        group: integers [N] in [0, G).

    Returns:
        Weights [N], at least float32, detached; they sum to the share of the groups that are in the batch. Raises as
        all policies, IndexError on the CPU too.

    References:
        arXiv 1911.08731, Algorithm 1; arXiv 2306.12070.
    """
    check_vector("group_weight", "log_weight", log_weight)
    _, count = _group_sums("group_weight", loss, group, len(log_weight))
    share = torch.softmax(log_weight.detach(), 0)
    return torch.where(
        checked_difficulty("group_weight", "loss", loss).isnan(), 0.0, (share / count)[group.to(torch.int64)]
    )


def _group_sums(function: str, loss: Tensor, group: Tensor, n_groups: int) -> tuple[Tensor, Tensor]:
    loss = checked_difficulty(function, "loss", loss)
    check_integer(function, "n_groups", n_groups, 1)
    check_index(function, "group", group, loss, n_groups)
    group = group.to(torch.int64)  # a uint8 index would be a mask
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))  # bfloat16 counts to 256
    valid = ~loss.isnan()
    zeros = loss.new_zeros(n_groups)
    return zeros.index_add(0, group, torch.where(valid, loss, 0.0)), zeros.index_add(0, group, valid.to(loss.dtype))
