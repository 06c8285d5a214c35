"""Let loops cut even small batches: a share of the rows for each of several threads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bonus_ops.kernels.cpu import threads


@contextlib.contextmanager
def several_threads(n: int = 3) -> Iterator[None]:
    """Share rows between ``n`` threads, however few there are; every share begins with a tile of its own."""
    before = threads.WORTH_A_THREAD, torch.get_num_threads()
    threads.WORTH_A_THREAD = 1
    torch.set_num_threads(n)
    try:
        yield
    finally:
        threads.WORTH_A_THREAD = before[0]
        torch.set_num_threads(before[1])
