"""Every pair of options in some call, three times over: loss, gradient, scores and probabilities against float64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

import bonus_ops
from tests.cases import LAYOUTS
from tests.conftest import ACCELERATOR, WITHOUT_TRITON
from tests.fuzzer import OUTPUTS, Case, check

OPTIONS: dict[str, Sequence[Any]] = {
    "dtype": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "shape": (
        (1,), (7,), (64,), (65,),
        (0, 5), (1, 1), (3, 1), (5, 2), (9, 3), (7, 8), (4, 10), (6, 63), (5, 64), (5, 65), (3, 127), (3, 128),
        (2, 129), (2, 255), (2, 257), (2, 1000), (2, 1003), (1, 2056),
        (2, 5, 3), (0, 4, 2), (3, 1, 2), (1, 65, 4),
        (2, 11, 2, 3), (1, 64, 2, 2),
    ),
    "layout": (*LAYOUTS, "permuted"),
    "reduction": ("mean", "sum", "none"),
    "ignore": ("nothing", "some", "a class", "all"),
    "smoothing": (0.0, 0.1, 1.0),
    "weight": ("none", "uniform", "zeros"),
    "bonus": (
        None, bonus_ops.LogBonus(0.75), bonus_ops.LogBonus(1.0), bonus_ops.LogBonus(1.0, clamp=None),
        bonus_ops.PowerBonus(2.0), bonus_ops.CosineBonus(), bonus_ops.SubDataBonus(0.6), bonus_ops.Focal(2.0),
        bonus_ops.Poly1(1.5), bonus_ops.GeneralizedCrossEntropy(0.7),
    ),
    "outputs": OUTPUTS,
    "path": ("one thread", "several threads", "kernels"),
}  # fmt: skip
INTERPRETED = ACCELERATOR is None and not WITHOUT_TRITON  # on a GPU tensors of the CPU have no kernels
ROUNDS = 3  # kernels in the first: they are slow to interpret

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(options: Mapping[str, Any]) -> set[Pair]:
    return set(itertools.combinations(options.items(), 2))


def pairwise(options: Mapping[str, Sequence[Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Return rows that cover every pair of values, built greedily around a pair not covered yet."""
    every = [
        (a, b)
        for (first, xs), (second, ys) in itertools.combinations(options.items(), 2)
        for a in ((first, x) for x in xs)
        for b in ((second, y) for y in ys)
    ]
    missing = dict.fromkeys(rng.sample(every, len(every)))
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in rng.sample(list(options), len(options)):
            if name in row:
                continue
            values = rng.sample(options[name], len(options[name]))

            def news(x: Any, name: str = name, row: dict[str, Any] = row) -> int:
                pairs = (((n, y), (name, x)) for n, y in row.items())
                return sum(pair in missing or pair[::-1] in missing for pair in pairs)

            row[name] = max(values, key=news)
        rows.append({name: row[name] for name in options})
        for pair in pairs_of(rows[-1]):
            missing.pop(pair, None)
    return rows


def all_rows() -> list[dict[str, Any]]:
    rows = []
    for number in range(ROUNDS):
        paths = OPTIONS["path"][: 3 if number == 0 and INTERPRETED else 2]
        rows += pairwise({**OPTIONS, "path": paths}, random.Random(number))
    return rows


def case_of(number: int, row: dict[str, Any]) -> Case:
    regime = ("typical", "confident", "wrong", "ties", "offset")[number % 5]
    options = {name: x for name, x in row.items() if name != "path"}
    return Case(
        seed=number, regime=regime, target=("int64", "strided")[number % 2],
        threads=3 if row["path"] == "several threads" else 1,
        implementation="triton" if row["path"] == "kernels" else "numba", **options,
    )  # fmt: skip


ROWS = all_rows()


def test_every_pair_is_covered_by_600_calls_that_are_differentiated():
    covered = set().union(*map(pairs_of, ROWS))
    paths = OPTIONS["path"] if INTERPRETED else OPTIONS["path"][:2]
    options = {**OPTIONS, "path": paths}
    for (first, xs), (second, ys) in itertools.combinations(options.items(), 2):
        for x, y in itertools.product(xs, ys):
            assert ((first, x), (second, y)) in covered
    assert sum(row["outputs"] != "difficulty" for row in ROWS) >= 600
    assert len({tuple(row.values()) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("number", range(len(ROWS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_forward_and_backward(number):
    check(case_of(number, ROWS[number]))
