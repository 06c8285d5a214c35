"""Data and network shared by the claims on noise: digits and a synthetic set, with what was done to them known."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn

N_TEST, BATCH, HIDDEN, RATE, MOMENTUM, DECAY = 500, 64, 256, 0.1, 0.9, 5e-4
EASY, HARD, NOISY = 0, 1, 2


class Task(NamedTuple):
    images: Tensor  # [N, D]
    labels: Tensor  # [N], as trained on
    kind: Tensor  # [N], EASY, HARD or NOISY
    test_images: Tensor
    test_labels: Tensor
    n_classes: int


def digits_split(rng: numpy.random.RandomState) -> tuple[numpy.ndarray, ...]:
    """Return train images, train labels, test images, test labels; pixels in [0, 1]."""
    images, labels = _digits()
    order = rng.permutation(len(labels))
    test, train = order[:N_TEST], order[N_TEST:]
    return images[train], labels[train], images[test], labels[test]


@functools.cache
def _digits() -> tuple[numpy.ndarray, numpy.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data / 16, data.target


def task(
    images: numpy.ndarray, labels: numpy.ndarray, kind: numpy.ndarray, test_images: numpy.ndarray,
    test_labels: numpy.ndarray,
) -> Task:  # fmt: skip
    def floats(x: numpy.ndarray) -> Tensor:
        return torch.tensor(x, dtype=torch.float32)

    return Task(
        floats(images), torch.tensor(labels), torch.tensor(kind), floats(test_images), torch.tensor(test_labels),
        int(test_labels.max()) + 1,
    )  # fmt: skip


class Network(nn.Module):
    """D-256-256-C, ReLU, torch's default initialisation; keeps the norm of the last hidden layer."""

    def __init__(self, n_inputs: int, n_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.head = nn.Linear(HIDDEN, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(images)
        self.hidden_norm = hidden.detach().norm(dim=1)
        return self.head(hidden)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)


def error(model: nn.Module, data: Task) -> float:
    """Return the test error in %."""
    with torch.no_grad():
        return 100 * float((model(data.test_images).argmax(1) != data.test_labels).double().mean())
