"""Easy first: small-loss selection and self-paced learning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_integer, check_number, check_threshold, checked_difficulty

__all__ = ["co_teaching_keep", "self_paced_threshold", "self_paced_weight", "small_loss"]


def co_teaching_keep(epoch: int, *, noise_rate: float = 0.2, warmup_epochs: int = 10, exponent: float = 1.0) -> float:
    """Return ``R(t) = 1 - noise_rate * min(t ** exponent / warmup_epochs, 1)``, the share `small_loss` keeps.

    The authors' code differs: its exponent acts on the noise rate during the warm-up, which jumps where it ends. Raises
    as all policies.

    Args:
        epoch: t >= 0, counted from 0.
        noise_rate: tau in [0, 1], which the user must know; default 0.2.
        warmup_epochs: T_k >= 1, default 10.
        exponent: c > 0, default 1.

    References:
        Han et al., Co-teaching, NeurIPS 2018, arXiv 1804.06872, section 3.
    """
    check_integer("co_teaching_keep", "epoch", epoch, 0)
    check_number("co_teaching_keep", "noise_rate", noise_rate, "[0, 1]")
    check_integer("co_teaching_keep", "warmup_epochs", warmup_epochs, 1)
    check_number("co_teaching_keep", "exponent", exponent, "(0, inf)")
    ramp: float = epoch**exponent / warmup_epochs
    return 1 - noise_rate * min(ramp, 1.0)


def small_loss(difficulty: Tensor, keep: float) -> Tensor:
    """Return which ``int(keep * N)`` examples are easiest; in a noisy set these are the likely clean ones.

    Train on ``(mask * loss).sum() / mask.sum()``. The Co-teaching code divides that mean by the number kept once
    more, so its learning rate shrinks with the batch size; this one does not. In Co-teaching two networks swap masks.

    Args:
        difficulty: [N], higher is harder: ``scores.loss``. NaN takes no part: N counts the others. Ties: lowest
            index first.
        keep: share in [0, 1], e.g. `co_teaching_keep`.

    Returns:
        bool [N], True where kept, on the device; no host sync. Raises as all policies.

    References:
        arXiv 1804.06872, Algorithm 1.
    """
    difficulty = checked_difficulty("small_loss", "difficulty", difficulty)
    check_number("small_loss", "keep", keep, "[0, 1]")
    order = difficulty.argsort(stable=True)  # NaN last
    n_kept = (keep * (~difficulty.isnan()).sum().double()).floor()
    easiest = torch.arange(len(order), device=order.device) < n_kept
    return torch.empty_like(easiest).scatter(0, order, easiest)


def self_paced_weight(loss: Tensor, threshold: Tensor | float, *, gamma: float | None = None) -> Tensor:
    """Return self-paced weights: what is easier than the threshold counts.

    ``gamma=None``: hard, ``v = [loss < threshold]``. Otherwise linear, ``v = clip(1 - (loss - threshold) / gamma, 0,
    1)``: 1 up to the threshold, 0 from ``threshold + gamma`` on.

    Args:
        loss: [N], ``scores.loss`` in nats, higher is harder; NaN weighs 0.
        threshold: lambda, a number or a scalar tensor, e.g. `self_paced_threshold`; grows over training.
        gamma: > 0, width of the slope; MentorNet uses 1.

    Returns:
        Weights [N] in [0, 1] of the dtype of ``loss``, on the device; no host sync. Raises as all policies.

    References:
        Kumar et al., Self-Paced Learning, NeurIPS 2010; Jiang et al., MentorNet, ICML 2018, arXiv 1712.05055.
    """
    loss = checked_difficulty("self_paced_weight", "loss", loss)
    check_threshold("self_paced_weight", "threshold", threshold, "[-inf, inf]", loss)
    if gamma is None:
        return (loss < threshold).to(loss.dtype)
    check_number("self_paced_weight", "gamma", gamma, "(0, inf)")
    return torch.where(loss.isnan(), 0.0, (1 - (loss - threshold) / gamma).clamp(0, 1))


def self_paced_threshold(
    previous: Tensor | None, loss: Tensor, *, percentile: float = 0.7, momentum: float = 0.9
) -> Tensor:
    """Return the running mean of a percentile of the batch's losses, the threshold of MentorNet.

    Args:
        previous: the last threshold, a scalar tensor, or None at the start.
        loss: [N], ``scores.loss`` in nats, higher is harder; NaN takes no part (a batch of NaN alone, or of nothing,
            leaves the threshold; at the start it gives NaN, which the next batch that has a loss replaces).
        percentile: in [0, 1], default 0.7.
        momentum: in [0, 1), default 0.9. (The flags of the authors' code say 0.5, its functions 0.9.)

    Returns:
        A scalar tensor on the device of ``loss``; no host sync. Raises as all policies.

    References:
        arXiv 1712.05055, section 3.2; google/mentornet.
    """
    loss = checked_difficulty("self_paced_threshold", "loss", loss)
    check_number("self_paced_threshold", "percentile", percentile, "[0, 1]")
    check_number("self_paced_threshold", "momentum", momentum, "[0, 1)")
    loss = loss.float()
    now = loss.nanquantile(percentile) if len(loss) else loss.new_full((), math.nan)
    if previous is None:
        return now
    check_threshold("self_paced_threshold", "previous", previous, "[-inf, inf]", None)
    mean = momentum * previous + (1 - momentum) * now
    return torch.where(now.isnan(), previous, torch.where(torch.as_tensor(previous).isnan(), now, mean))
