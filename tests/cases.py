"""The cases all tests share: logit regimes, class counts, layouts, losses.

A regime is a function ``(generator, n_rows, n_classes, dtype, device) -> (logits, target)``: float64 draws rounded to
``dtype``, so that a float64 truth computed from them sees the very numbers under test.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import bonus_ops

Regime = Callable[..., tuple[Tensor, Tensor]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(rng: torch.Generator, n_rows: int, n_classes: int) -> Tensor:
    return torch.randn(n_rows, n_classes, generator=rng, dtype=torch.float64)


def _target(rng: torch.Generator, n_rows: int, n_classes: int) -> Tensor:
    """Draw labels, the first and last class among them: a kernel's head and tail."""
    target = torch.randint(0, n_classes, (n_rows,), generator=rng)
    target[:1] = n_classes - 1
    target[1:2] = 0
    return target


def _other(rng: torch.Generator, target: Tensor, n_classes: int) -> Tensor:
    """Draw for every row a class that is not its label (the label itself where there is no other)."""
    step = torch.randint(1, max(n_classes, 2), target.shape, generator=rng)
    return (target + step) % n_classes


def _rounded(logits: Tensor, target: Tensor, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return logits.to(dtype).to(device), target.to(device)


def uniform(rng, n_rows, n_classes, dtype, device="cpu"):
    """All classes nearly alike."""
    return _rounded(0.1 * _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes), dtype, device)


def typical(rng, n_rows, n_classes, dtype, device="cpu"):
    return _rounded(3 * _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes), dtype, device)


def confident(rng, n_rows, n_classes, dtype, device="cpu"):
    """The label leads by 5..40: p -> 1, where 1 - p must not be a difference."""
    logits, target = _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes)
    logits[torch.arange(n_rows), target] += torch.linspace(5, 40, n_rows, dtype=torch.float64)
    return _rounded(logits, target, dtype, device)


def wrong(rng, n_rows, n_classes, dtype, device="cpu"):
    """Another class leads by 5..40: p -> 0."""
    logits, target = _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes)
    other = _other(rng, target, n_classes)
    logits[torch.arange(n_rows), other] += torch.linspace(5, 40, n_rows, dtype=torch.float64)
    return _rounded(logits, target, dtype, device)


def ties(rng, n_rows, n_classes, dtype, device="cpu"):
    """Few distinct values: the runner-up is the smallest class of many."""
    logits = torch.randint(-2, 3, (n_rows, n_classes), generator=rng).double()
    return _rounded(logits, _target(rng, n_rows, n_classes), dtype, device)


def masked(rng, n_rows, n_classes, dtype, device="cpu"):
    """-inf in many places but the label: a prefix longer than a tile, a suffix, at random, all but one or two."""
    logits, target = 3 * _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes)
    label = logits[torch.arange(n_rows), target].clone()
    for row in range(n_rows):
        if row % 4 == 0:
            logits[row, : n_classes * 3 // 4] = -math.inf
        elif row % 4 == 1:
            logits[row, n_classes // 4 :] = -math.inf
        elif row % 4 == 2:
            logits[row, torch.rand(n_classes, generator=rng) < 0.9] = -math.inf
        else:
            logits[row] = -math.inf
            logits[row, int(_other(rng, target[row : row + 1], n_classes))] = 1.0
    logits[torch.arange(n_rows), target] = label
    return _rounded(logits, target, dtype, device)


def shifted(rng, n_rows, n_classes, dtype, device="cpu"):
    """A common offset of 1e4, within the range of every dtype."""
    return _rounded(1e4 + 3 * _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes), dtype, device)


def far_shifted(rng, n_rows, n_classes, dtype, device="cpu"):
    """A common offset of 1e8, float32 and float64 only: neighbours in float32 are 8 apart there."""
    return _rounded(1e8 + 30 * _normal(rng, n_rows, n_classes), _target(rng, n_rows, n_classes), dtype, device)


REGIMES: dict[str, Regime] = {
    f.__name__: f for f in (uniform, typical, confident, wrong, ties, masked, shifted, far_shifted)
}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE_FLOATS = (torch.float32, torch.float64)  # what can hold `far_shifted`


def regimes_of(dtype: torch.dtype) -> list[str]:
    return [name for name in REGIMES if name != "far_shifted" or dtype in WIDE_FLOATS]


# A lane reads chunks of 8 classes; below 256 chunks rows of 8 lanes share a warp, then a row has 32, 64 or 256 lanes.
CLASS_COUNTS = (
    1,  # no rest at all
    2,  # no chunk: only the edge
    3,
    8,  # one chunk, no edge where rows are aligned; 32 rows a program
    10,  # one chunk and an edge
    63,  # 7 of 8 lanes, 4 rows a program
    64,  # 8 of 8 lanes, one tile
    65,
    1000,  # 4 rows a program, 15 tiles and a partial one; rows stay aligned
    1003,  # as 1000, but every row starts at another alignment
    2056,  # one row a program: 8 full tiles of 32 lanes and a partial one
)
MULTI_TILE = 5003  # 19 full tiles, a partial one, misaligned rows; one program a row
SPLIT_FORWARD = 16391  # 2 programs a row forward
SPLIT_BOTH = 65551  # a tail; 8 programs a row forward, 2 backward
EMPTY_PART = 67595  # 34 tiles over 8 programs a row: the last one has none


# Layouts: each returns [N, C] (or [N, C, d]) logits in another place; what lies between them is NaN.


def contiguous(logits):
    return logits.clone()


def transposed(logits):
    return logits.t().contiguous().t()


def column_slice(logits):
    wide = _nan(logits, logits.shape[0], 2 * logits.shape[1])
    return _filled(wide[:, ::2], logits)


def padded_rows(logits):
    wide = _nan(logits, logits.shape[0], logits.shape[1] + 3)
    return _filled(wide[:, : logits.shape[1]], logits)


def expanded_rows(logits):
    """One row seen N times, stride 0: the only layout that changes values."""
    return logits[:1].clone().expand_as(logits)


def offset_1(logits):
    return _offset(logits, 1)


def offset_3(logits):
    return _offset(logits, 3)


def _offset(logits, n):
    flat = _nan(logits, logits.numel() + n)
    return _filled(flat[n:].view(logits.shape), logits)


def _nan(like, *shape):
    return like.new_full(shape, math.nan)


def _filled(view, logits):
    view.copy_(logits)
    return view


LAYOUTS = {
    f.__name__: f for f in (contiguous, transposed, column_slice, padded_rows, expanded_rows, offset_1, offset_3)
}


# Losses of the gap with their windows and clamps; one that is not here is taken as it is made without arguments.
LOSSES: dict[str, bonus_ops.GapLoss | None] = {
    "cross_entropy": None,
    "log_bonus": bonus_ops.LogBonus(),
    "log_bonus_half": bonus_ops.LogBonus(0.5, strength=0.7),
    "log_bonus_zero": bonus_ops.LogBonus(0.0),
    "log_bonus_clamped": bonus_ops.LogBonus(1.0),
    "log_bonus_exact": bonus_ops.LogBonus(1.0, clamp=None),
    "log_bonus_start": bonus_ops.LogBonus(start=0.3),
    "log_bonus_abrupt": bonus_ops.LogBonus(abrupt=0.9),
    "power_bonus": bonus_ops.PowerBonus(2.5),
    "power_bonus_window": bonus_ops.PowerBonus(0.5, start=0.2, abrupt=0.8),
    "cosine_bonus": bonus_ops.CosineBonus(),
    "cosine_bonus_start": bonus_ops.CosineBonus(start=0.5, strength=-0.5),
    "sub_data_bonus": bonus_ops.SubDataBonus(0.6),
    "sub_data_bonus_clamped": bonus_ops.SubDataBonus(1.0),
    "sub_data_bonus_exact": bonus_ops.SubDataBonus(1.0, clamp=None),
    "focal": bonus_ops.Focal(2.0),
    "focal_zero": bonus_ops.Focal(0.0),
    "halted_focal": bonus_ops.HaltedFocal(1.5),
    "focal_star": bonus_ops.FocalStar(2.0, 1.0),
    "squared_error": bonus_ops.SquaredError(),
    "squared_error_mirror": bonus_ops.SquaredError(strength=0.7, gamma=1.5),
    "absolute_error_mirror": bonus_ops.AbsoluteError(strength=1.0, gamma=0.5),
    "poly1": bonus_ops.Poly1(1.5),
    "generalized_cross_entropy": bonus_ops.GeneralizedCrossEntropy(0.7),
}
LOSSES |= {
    name: loss()
    for name in bonus_ops.losses.__all__
    if issubclass(loss := getattr(bonus_ops, name), bonus_ops.GapLoss)
    and loss not in (bonus_ops.GapLoss, bonus_ops.CrossEntropy, *map(type, LOSSES.values()))
}
