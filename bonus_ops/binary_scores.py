"""Scores of the sigmoid family: one stored number an element, the rest derived from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["BinaryScores"]


class BinaryScores(NamedTuple):
    """Difficulty scores of every element of a loss on a sigmoid, detached, float32, shaped like the target.

    The label of an element is 1 where its target is above 1/2, else 0. Like `Scores`, they are of the plain sigmoid:
    never smoothed, weighted, balanced or with the bonus. NaN where the logit or the target is NaN. An example of many
    elements takes a reduction of its own, say ``scores.loss.mean(1)``.

    Attributes:
        gap: log-odds of the label, ``x`` for label 1 and ``-x`` for label 0; real, in nats; lower is harder. What is
            stored; the others follow it, so ``gap.flatten().topk(k, largest=False).indices`` are the hardest elements.
            Above 0 the label is what a threshold of 1/2 predicts.

    Example:
        >>> import torch
        >>> from bonus_ops import binary_difficulty_scores
        >>> scores = binary_difficulty_scores(torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> scores.gap
        tensor([[ 2., -1.,  3.]])
        >>> scores.loss
        tensor([[0.1269, 1.3133, 0.0486]])
    """

    gap: Tensor

    @property
    def loss(self) -> Tensor:
        """Binary cross-entropy of the label, ``-log p`` in nats, [0, inf); higher is harder."""
        return -logsigmoid(self.gap)

    @property
    def target_prob(self) -> Tensor:
        """Probability of the label, ``p = sigmoid(gap)``, [0, 1]; lower is harder."""
        return torch.sigmoid(self.gap)
