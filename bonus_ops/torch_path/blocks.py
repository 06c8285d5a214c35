"""Blocks of rows that stay in cache, and the buffers they are worked on in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import accumulation_dtype
from .vectors import VECTOR, first

__all__ = ["Blocks", "as_rows", "by_class", "fill"]

# Tuned by `python -m bench speed` on a 2-core AVX-512 server with 1 MiB of L2 a core, one thread.
BLOCK_ELEMENTS = 1 << 20  # at most: larger leaves the last level of cache, smaller pays its 50 operators too often
SMALLEST_BLOCK = 1 << 16  # at least, whatever share that is
WORKSPACE_SHARE = 0.15  # of one gradient's bytes, for all buffers of a call
WORKSPACE_SHARE_ALONE = 0.5  # where no gradient is made
COLUMN_CLASSES = 64  # up to here a class-major block is faster: torch reduces a short last axis element by element
COLUMN_CLASSES_APART = 1024  # and up to here where classes lie apart; beyond, `VECTOR` rows of them would cost too much


class Blocks:
    """How the rows of one call are cut into blocks, and the buffers that blocks work in.

    Buffers hold [rows, C] in the accumulation dtype, class-major where that is faster, and take a share of the bytes of
    the logits: ``share`` beside an output ``unwritten`` of that size, else `WORKSPACE_SHARE_ALONE`. The output is
    filled in order: while what is unwritten of it offers more room, the buffers lie there. The last buffer, from which
    a block of the output is copied, lies behind that block, as all do where blocks are made ``in_place``.
    """

    def __init__(
        self, logits: Tensor, n_buffers: int, unwritten: Tensor | None = None, share: float = WORKSPACE_SHARE,
        in_place: bool = False,
    ) -> None:  # fmt: skip
        n_outer, n_inner, n_classes = logits.shape
        dtype = accumulation_dtype(logits.dtype)
        per_buffer = dtype.itemsize / logits.element_size()  # bytes of a buffer to bytes of logits
        ratio = n_buffers * per_buffer
        self.n_buffers, self.n_classes, self.by_class = n_buffers, n_classes, by_class(logits)
        largest = min(max(BLOCK_ELEMENTS // n_classes, 1), n_outer * n_inner)
        share = WORKSPACE_SHARE_ALONE if unwritten is None else share
        n_elements = max(int(logits.numel() * share / ratio), SMALLEST_BLOCK)
        n_own = _whole_rows(min(max(n_elements // n_classes, 1), largest))
        self.own = logits.new_empty(n_buffers * self.padded(n_own) * n_classes, dtype=dtype)
        self.tail = None
        if unwritten is not None and not self.by_class and n_inner == 1 and unwritten.is_contiguous():
            whole = unwritten.numel() * unwritten.element_size() // dtype.itemsize * dtype.itemsize
            self.tail = unwritten.view(-1)[: whole // unwritten.element_size()].view(dtype)
        self.indices: list[tuple[slice, slice]] = []
        self.sizes: list[int] = []
        o = 0
        while o < n_outer:
            n_rows = n_own
            if self.tail is not None:
                n_rows = max(int((n_outer - o - 1) / (1 + ratio if in_place else max(ratio, 1 + per_buffer))), n_own)
            n_rows = _whole_rows(min(n_rows, largest))
            o_end = min(o + max(n_rows // n_inner, 1), n_outer)
            for i in range(0, n_inner, n_rows):
                i_end = min(i + n_rows, n_inner)
                self.indices.append((slice(o, o_end), slice(i, i_end)))
                self.sizes.append((o_end - o) * (i_end - i))
            o = o_end
        self.n_own = n_own

    def pieces(self, x: Tensor) -> Sequence[Tensor]:
        """Return the blocks of ``x`` [outer, inner, C], [rows, C] where there is one inner row."""
        if x.shape[1] == 1:
            return x.squeeze(1).split_with_sizes(self.sizes)
        return [x[index] for index in self.indices]

    def padded(self, n_rows: int) -> int:
        """Return how many rows a buffer for so many has."""
        return -(-n_rows // VECTOR) * VECTOR if self.by_class else n_rows

    def buffer(self, which: int, block: int) -> Tensor:
        """Return buffer number ``which`` for a block, [rows, C], class-major with rows up to a whole `VECTOR`."""
        n_rows = self.padded(self.sizes[block])
        size = n_rows * self.n_classes
        if self.by_class:
            return self.own.as_strided((n_rows, self.n_classes), (1, n_rows), which * size)
        if n_rows <= self.n_own or self.tail is None:
            return self.own.as_strided((n_rows, self.n_classes), (self.n_classes, 1), which * size)
        start = self.tail.numel() - (self.n_buffers - which) * size
        return self.tail.as_strided((n_rows, self.n_classes), (self.n_classes, 1), start)


def by_class(logits: Tensor) -> bool:
    """Return whether the blocks of these logits [outer, inner, C] are class-major."""
    return logits.shape[2] <= (COLUMN_CLASSES if logits.stride(2) == 1 else COLUMN_CLASSES_APART)


def as_rows(piece: Tensor, rows: Tensor) -> Tensor:
    """Return the first rows of the buffer ``rows`` [N, C] shaped like a piece, which may be [outer, inner, C]."""
    if piece.dim() == 2:
        return first(rows, piece.shape[0])
    return rows.as_strided(piece.shape, (rows.stride(0) * piece.shape[1], *rows.stride()), rows.storage_offset())


def fill(rows: Tensor, piece: Tensor) -> None:
    """Copy a piece into the buffer ``rows``, whose other rows become 0."""
    n_rows = piece.shape[:-1].numel()
    if n_rows < rows.shape[0]:
        rows[n_rows:].zero_()
    as_rows(piece, rows).copy_(piece)


def _whole_rows(n: int) -> int:
    """Return up to ``n`` rows, if possible so many that they are whole vectors for every thread."""
    step = VECTOR * torch.get_num_threads()
    return n - n % step if n >= step else n
