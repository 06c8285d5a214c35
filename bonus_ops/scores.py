"""Scores: six stored columns per example, every other difficulty score derived from them without the logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_bonus
from .losses import ClassLoss, CrossEntropy, GapLoss

__all__ = ["SCORES", "Score", "Scores"]


class Score(NamedTuple):
    """What a difficulty score is.

    ``direction`` is +1 where a higher score means a harder example, -1 where it means an easier one, 0 where the score
    does not order examples.
    """

    name: str
    formula: str
    unit: str
    range: str
    direction: int
    needs_label: bool
    paper: str


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("loss", "-log p", "nats", "[0, inf)", +1, True, "small-loss selection; arXiv 1910.00762"),
        Score("el2n", "||softmax(z) - onehot(y)||_2", "1", "[0, sqrt 2]", +1, True, "arXiv 2107.07075"),
        Score("margin", "z_y - max over k != y of z_k", "logits", "real", -1, True, "AUM, arXiv 2001.10528"),
        Score("entropy", "-sum p_k log p_k", "nats", "[0, log C]", +1, False, "uncertainty sampling"),
        Score("energy", "-logsumexp(z)", "nats", "real", +1, False, "arXiv 2010.02759, T = 1"),
        Score("target_prob", "p = softmax(z)_y", "1", "[0, 1]", -1, True, "arXiv 1911.00068; arXiv 2009.10795"),
        Score("other_prob", "max over k != y of p_k", "1", "[0, 1]", +1, True, "derived"),
        Score("prob_margin", "target_prob - other_prob", "1", "[-1, 1]", -1, True, "arXiv 1911.00068"),
        Score("loss_minus_entropy", "loss - entropy", "nats", "(-log C, inf)", +1, True, "arXiv 2206.07137"),
        Score("max_logit", "max z_k", "logits", "real", -1, False, "arXiv 1911.11132"),
        Score("max_prob", "max p_k", "1", "[1/C, 1]", -1, False, "arXiv 1610.02136"),
        Score("grad_norm", "||dL/dz||_2 of the given loss", "1/logits", "[0, inf)", +1, True, "arXiv 1803.00942"),
        Score("runner_up", "argmax over k != y of z_k", "class", "-1 .. C-1", 0, True, "derived"),
        Score("prediction", "argmax z_k, lowest index on ties", "class", "-1 .. C-1", 0, True, "derived"),
        Score("correct", "prediction == y", "bool", "False, True", 0, True, "derived"),
    )
}


class Scores(NamedTuple):
    """Difficulty scores of a batch, detached, each column shaped like the target.

    Six columns are stored, float32 but for ``runner_up`` (int32); the properties and methods derive the rest. All are
    of the plain softmax: never smoothed, weighted or with the bonus. Ignored positions hold NaN (``runner_up`` and
    ``prediction`` -1, ``correct`` False); derived scores that need the top logit are NaN where the label's is -inf.
    `SCORES` tells unit, range, direction and source of each. A named tuple: ``torch.save(scores._asdict(), path)`` and
    ``Scores(**torch.load(path))`` keep it, ``Scores(*map(torch.cat, zip(*batches)))`` joins batches.

    Attributes:
        loss: cross-entropy -log p in nats, [0, inf); higher is harder.
        el2n: L2 norm of softmax minus one-hot label, [0, sqrt 2]; higher is harder (Paul et al. 2021).
        margin: label's logit minus the largest other logit, real; lower is harder (the term AUM averages).
        entropy: of the softmax in nats, [0, log C]; higher is harder; needs no label.
        energy: -logsumexp of the logits, real; higher is stranger; needs no label.
        runner_up: class of the largest logit other than the label's, lowest index on ties; -1 where there is none.
    """

    loss: Tensor
    el2n: Tensor
    margin: Tensor
    entropy: Tensor
    energy: Tensor
    runner_up: Tensor

    @property
    def target_prob(self) -> Tensor:
        """Probability of the label, [0, 1]; lower is harder."""
        return torch.exp(-self.loss)

    @property
    def other_prob(self) -> Tensor:
        """Largest probability of another class, [0, 1]; higher is harder."""
        return torch.exp(-self.loss - self.margin)

    @property
    def prob_margin(self) -> Tensor:
        """``target_prob - other_prob``, [-1, 1]; lower is harder."""
        return self.target_prob - self.other_prob

    @property
    def loss_minus_entropy(self) -> Tensor:
        """``loss - entropy`` in nats, (-log C, inf); higher is noisier. Absolute accuracy only."""
        return self.loss - self.entropy

    @property
    def max_logit(self) -> Tensor:
        """Largest logit; lower is stranger."""
        return -self.energy - self.loss - self.margin.clamp(max=0)

    @property
    def max_prob(self) -> Tensor:
        """Largest probability, [1/C, 1]; lower is harder."""
        return torch.exp(-self.loss - self.margin.clamp(max=0))

    def prediction(self, target: Tensor) -> Tensor:
        """Return the predicted class (int64), lowest index on ties, -1 where ignored.

        Args:
            target: class indices shaped like the scores; of probabilities, ``target.argmax(1)``.

        Raises:
            TypeError: ``target`` is no Tensor.
            RuntimeError: it holds no class indices, or is not shaped like the scores.
        """
        if isinstance(target, Tensor) and (
            target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
        ):
            argmax = "target.argmax(1)" if self.loss.dim() else "target.argmax()"
            raise RuntimeError(
                f"target must hold class indices, got {target.dtype} of shape {list(target.shape)}\nExpected {argmax} "
                "where target holds probabilities."
            )
        self._check_rows("target", target)
        runner_up = self.runner_up.to(torch.int64)
        label_wins = (self.margin > 0) | ((self.margin == 0) & (target < runner_up))
        return torch.where(self.margin.isnan(), -1, torch.where(label_wins, target, runner_up))

    def correct(self, target: Tensor) -> Tensor:
        """Return whether the label is the prediction (bool), False where ignored; arguments as in `prediction`."""
        return (self.prediction(target) == target) & ~self.margin.isnan()

    def _check_rows(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}")
        one_row = self.loss.dim() == 0 and x.numel() == 1  # as torch, which takes a target (1) for logits (C)
        if x.shape != self.loss.shape and not one_row:
            raise RuntimeError(f"{name} must be shaped like the scores, {list(self.loss.shape)}, got {list(x.shape)}")

    def _gap(self) -> Tensor:
        """Return the log-odds of the label, ``log p - log(1 - p)``."""
        return -self.loss - torch.log(-torch.expm1(-self.loss))

    def grad_norm(self, bonus: GapLoss | None = None, weight: Tensor | None = None) -> Tensor:
        """Return the norm of the row's gradient, ``||dL/dz||_2 = A sqrt(1 + Q2)``, exact for the loss given.

        Args:
            bonus: the loss that was used; None is plain cross-entropy, whose gradient norm is ``el2n``.
            weight: factor of each row shaped like ``loss`` (say ``class_weight[target]``), or None.

        Returns:
            float32, [0, inf); higher is harder.

        Raises:
            TypeError: ``bonus`` is no `GapLoss` instance, or ``weight`` no Tensor.
            RuntimeError: ``weight`` is not shaped like the scores.
        """
        check_bonus(bonus)
        if isinstance(bonus, ClassLoss):
            raise TypeError(
                f"bonus must be a GapLoss or None, not the ClassLoss {type(bonus).__name__}\nThe gradient of a loss of "
                "all classes does not follow from the scores."
            )
        if weight is not None:
            self._check_rows("weight", weight)
        loss = CrossEntropy() if bonus is None else bonus
        rest = -torch.expm1(-self.loss)  # 1 - p
        # el2n = (1 - p) sqrt(1 + Q2); where p is 1 to the last bit Q2 is lost and its lower bound 0 stands in
        length = torch.where(rest > 0, self.el2n / rest, 1.0)
        norm = loss.slope(self._gap()).abs() * length
        norm = torch.where(self.margin == math.inf, 0.0, norm)  # a row with no rest teaches nothing
        norm = torch.where(self.loss.isnan(), math.nan, norm)
        return norm if weight is None else norm * weight.abs().to(norm.dtype)

    def difficulty(self, name: str, target: Tensor | None = None, bonus: GapLoss | None = None) -> Tensor:
        """Return the score ``name`` times its direction: higher is harder, whichever score is asked for.

        Args:
            name: a key of `SCORES` whose direction is not 0.
            target: unused by ordered scores; accepted so that callers need not know.
            bonus: the loss for ``grad_norm``; unused by the others.

        Returns:
            float32, shaped like the scores; higher is harder, NaN where ignored.

        Raises:
            ValueError: the name is unknown or the score orders nothing.
            TypeError: ``bonus`` is no `GapLoss` instance, where it is used.
        """
        ordered = [s.name for s in SCORES.values() if s.direction]
        if name not in ordered:
            raise ValueError(f"difficulty: name must be one of {', '.join(ordered)}, got {name!r}")
        score = self.grad_norm(bonus) if name == "grad_norm" else getattr(self, name)
        return SCORES[name].direction * score
