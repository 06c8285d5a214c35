"""Loops on several threads: a share of the rows each, without Python's lock.

Threads are started for a call and end with it: there is no pool that a fork could break or that two callers share.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

__all__ = ["run"]

CPU = torch.device("cpu")
WORTH_A_THREAD = 1 << 17  # elements: a thread takes some 50 us to start


def run(loop: Any, plan: int, n_rows: int, n_elements: int, work_bytes: int, owners: Any = None) -> None:
    """Call ``loop(plan, first, last, work)`` for shares of the rows, on as many threads as torch may use.

    Args:
        loop: a C function of four integers.
        plan: address of what all threads are told.
        n_rows: how many there are.
        n_elements: how much work that is.
        work_bytes: how much memory of its own a thread needs.
        owners: what holds the memory that the plan's addresses point to, until all threads are done.
    """
    n = min(n_elements // WORTH_A_THREAD, n_rows)
    n = min(n, torch.get_num_threads()) if n > 1 else 1
    if n == 1:
        work = torch.empty(work_bytes, dtype=torch.uint8, device=CPU)
        loop(plan, 0, n_rows, work.data_ptr())
        return
    work_bytes = -(-work_bytes // 64) * 64  # no line of the cache belongs to two threads
    work = torch.empty(n * work_bytes, dtype=torch.uint8, device=CPU)
    ends = [n_rows * i // n for i in range(n + 1)]
    shares = [(plan, ends[i], ends[i + 1], work.data_ptr() + i * work_bytes) for i in range(n)]
    others = [threading.Thread(target=loop, args=share) for share in shares[1:]]
    for thread in others:
        thread.start()
    loop(*shares[0])
    for thread in others:
        thread.join()
