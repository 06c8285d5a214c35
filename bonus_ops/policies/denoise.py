"""Masks of examples to leave out: likely mislabelled, learned late, or mastered; and hard sampling guarded by them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import (
    TAKEN_OUT,
    check_integer,
    check_number,
    check_shape,
    check_threshold,
    check_vector,
    checked_difficulty,
)

__all__ = ["guarded", "late_stopping_mask", "mastered_mask", "noise_mask"]


def noise_mask(
    recent_loss: Tensor, threshold: Tensor | float, *, observations: Tensor | None = None, min_observations: int = 2
) -> Tensor:
    """Return which examples have a loss like that of a random label: likely mislabelled.

    ``recent_loss > threshold``, where the threshold is a low quantile of the losses ``logsumexp(z) - z_k`` that the
    training logits would have under random labels k. The paper drops once, late, those whose mean loss of the last 2
    epochs exceeds the 10 % quantile. It works while noise is not memorised: at a high learning rate.

    The quantile is delicate. With labels drawn among all C, 1 / C of the draws are the true label: at or below that
    quantile clean easy examples are flagged. To guard hard sampling, 0.07 with labels drawn among the others has been
    good at 5 and 10 classes, 0.10 to report or drop.

    Args:
        recent_loss: [N] in nats, mean of each example's last ``scores.loss`` (2), the plain cross-entropy; NaN,
            never seen, is not flagged.
        threshold: scalar tensor or number, e.g. ``History.quantile(0.10)``. NaN, as of a quantile that saw no losses,
            raises where there is a loss to judge; on a GPU, where that would wait, it flags nothing.
        observations: int [N], how often each was seen.
        min_observations: an example seen less often is not flagged; default 2, the losses in the mean.

    Returns:
        bool [N], True where suspect; no host sync. It finds wrong labels, not damaged inputs, and flags some hard
        clean examples too. Raises as all policies.

    References:
        arXiv 2003.10647.
    """
    check_vector("noise_mask", "recent_loss", recent_loss)
    check_integer("noise_mask", "min_observations", min_observations, 0)
    check_threshold("noise_mask", "threshold", threshold, "[-inf, inf]", recent_loss)
    suspect = recent_loss.detach() > threshold
    if observations is None:
        return suspect
    check_shape("noise_mask", "observations", observations, recent_loss, integer=True)
    return suspect & (observations >= min_observations)


def guarded(difficulty: Tensor, noisy: Tensor) -> Tensor:
    """Return the difficulty with suspects taken out: the default before any hard sampling.

    Their mark is `TAKEN_OUT`, -inf, not the NaN of what is not known. Every policy here leaves them alone: they are not
    chosen, weigh 0, and do not enter a `History`; `DifficultySampler` does not visit them. So
    ``selective_backprop(guarded(loss, noise_mask(...)), history)`` is the noise-aware prioritiser.

    Args:
        difficulty: [N], higher is harder.
        noisy: bool [N], True where suspect: `noise_mask`, `late_stopping_mask`.

    Returns:
        [N] of the dtype of ``difficulty``, -inf where noisy; detached, no host sync. Raises as all policies.
    """
    check_vector("guarded", "difficulty", difficulty)
    check_shape("guarded", "noisy", noisy, difficulty)
    if noisy.dtype != torch.bool:
        raise TypeError(f"guarded: noisy must be a bool tensor, got {noisy.dtype}")
    return difficulty.detach().masked_fill(noisy, TAKEN_OUT)


def mastered_mask(
    second_difference: Tensor,
    observations: Tensor,
    *,
    delta: float = 1e-3,
    min_observations: int = 6,
    epoch: int | None = None,
    readmit_every: int = 5,
) -> Tensor:
    """Return which examples are mastered: their loss no longer changes its course (instance-dependent early stopping).

    ``mean over the last three epochs of |L_j - 2 L_(j-1) + L_(j-2)| < delta``: skip their backpropagation. The method
    gives mastered examples a forward pass in evaluation mode every epoch, so that they may return; without one, whole
    epochs of readmission do.

    Args:
        second_difference: [N] in nats, that mean; higher is harder. NaN, not known yet, is not mastered.
        observations: int [N], how often each was seen.
        delta: > 0, default 1e-3 (2e-3 for CIFAR-100 in the authors' code; advised range 1e-5 to 1e-1).
        min_observations: default 6.
        epoch: with it, nobody is masked in epochs that ``readmit_every`` divides. (Not of the paper.)
        readmit_every: >= 1, default 5.

    Returns:
        bool [N], True where mastered; no host sync. Raises as all policies.

    References:
        Instance-dependent Early Stopping, ICLR 2025, arXiv 2502.07547, Eq. 3.
    """
    second_difference = checked_difficulty("mastered_mask", "second_difference", second_difference)
    check_shape("mastered_mask", "observations", observations, second_difference, integer=True)
    check_number("mastered_mask", "delta", delta, "(0, inf)")
    check_integer("mastered_mask", "min_observations", min_observations, 0)
    check_integer("mastered_mask", "readmit_every", readmit_every, 1)
    mastered = (second_difference < delta) & (observations >= min_observations)
    if epoch is None:
        return mastered
    check_integer("mastered_mask", "epoch", epoch, 0)
    return mastered & (epoch % readmit_every != 0)


def late_stopping_mask(learned_epoch: Tensor, learned_share: float) -> Tensor:
    """Return which examples are learned late, once enough others are learned: likely mislabelled.

    An example is learned at the first epoch that ends k correct predictions in a row. When the learned ones reach
    ``learned_share`` of all, the rest is suspect; before, nobody is. The method repeats this in rounds that train from
    scratch on what is left.

    Args:
        learned_epoch: float [N], that epoch; +inf where it has not come, NaN where the example was never seen: it is
            not suspect and does not count. The authors take k = 1, later 2 and 3.
        learned_share: rho in (0, 1]; for CIFAR-10 the authors use 0.98 a round at 20 % noise, 0.955 at 40 %. So the
            noise rate has to be known, roughly.

    Returns:
        bool [N], True where suspect; no host sync. Raises as all policies.

    References:
        Yuan et al., Late Stopping, ICCV 2023, arXiv 2308.13862.
    """
    learned_epoch = checked_difficulty("late_stopping_mask", "learned_epoch", learned_epoch)
    check_number("late_stopping_mask", "learned_share", learned_share, "(0, 1]")
    learned = learned_epoch.isfinite().sum()
    return (learned_epoch == math.inf) & (learned >= learned_share * (~learned_epoch.isnan()).sum())
