"""Where the classes of a row lie: a ragged head, 16-byte vectors, a ragged tail.

A row may start at any address. Its classes up to the first 16-byte boundary are the head, then come chunks of `CHUNK`
classes read as whole vectors, then the tail. Head and tail are fewer than 2 * CHUNK classes and form the edge. Every
class is in one part, so each is read once and nothing outside the row is touched. With VECTOR = 1 (classes not
contiguous) there is no head and classes are read one by one, `class_stride` apart.
"""

from typing import NamedTuple

import triton
import triton.language as tl

CHUNK = tl.constexpr(8)


class Rows(NamedTuple):
    """A block of rows; every field is [ROWS]."""

    ptr: tl.tensor  # class 0
    head: tl.tensor  # classes before the first vector
    n_chunks: tl.tensor
    target: tl.tensor  # the label, -1 where not active
    active: tl.tensor  # in the batch, not ignored, label in range
    ignored: tl.tensor


@triton.jit
def row_index(ROWS: tl.constexpr):
    # int64 before the first multiply: n_rows * n_classes may exceed 2^31
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def row_ptr(ptr, row, inner, strides):
    """Return the address of class 0; rows count over two axes, the inner one ``inner`` long."""
    at = ptr + (row // inner) * strides[0] + (row % inner) * strides[1]
    # through an integer: for AMD the compiler splits pointers into base and offset and loses that vectors are aligned
    return at.to(tl.int64).to(ptr.dtype)


@triton.jit
def rows_at(logits_ptr, target_ptr, row, n_rows, shape, strides, ignore_index, VECTOR: tl.constexpr):
    """Return the Rows of numbers ``row``; ``shape`` is that of the inner axis and the classes."""
    inner, n_classes = shape[0], shape[1]
    ptr = row_ptr(logits_ptr, row, inner, strides)
    target = tl.load(target_ptr + row, row < n_rows, 0).to(tl.int64)
    ignored = target == ignore_index
    active = (row < n_rows) & (target >= 0) & (target < n_classes) & (target != ignore_index)
    if VECTOR > 1:
        ELEMENT: tl.constexpr = logits_ptr.dtype.element_ty.primitive_bitwidth // 8
        past_boundary = ((ptr.to(tl.int64) % 16) // ELEMENT).to(tl.int32)
        head = tl.minimum((VECTOR - past_boundary) % VECTOR, n_classes)
    else:
        head = (row * 0).to(tl.int32)
    label = tl.where(active, target, -1).to(tl.int32)
    return Rows(ptr, head, (n_classes - head) // CHUNK, label, active, ignored)


@triton.jit
def load(ptr, mask):
    """Load in the accumulation dtype: float64 stays, the rest becomes float32; masked lanes are -inf."""
    if mask is None:
        z = tl.load(ptr)
    else:
        z = tl.load(ptr, mask, -float("inf"))
    return accumulable(z)


@triton.jit
def accumulable(z):
    if z.dtype == tl.float64:
        return z
    else:
        return z.to(tl.float32)


@triton.jit
def chunk_classes(rows, chunk):
    """Return the classes [ROWS, LANES, CHUNK] of chunk numbers [1, LANES]."""
    return rows.head[:, None, None] + (chunk * CHUNK)[:, :, None] + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def chunk_mask(rows, chunk, where):
    """Return whether chunks [1, LANES] are in the row, of rows ``where`` alone: [ROWS, LANES, 1]."""
    return ((chunk < rows.n_chunks[:, None]) & where[:, None])[:, :, None]


@triton.constexpr_function
def is_spread(VECTOR):
    """Return whether the classes of a chunk lie in several threads."""
    return VECTOR < 4


@triton.jit
def load_chunks(rows, chunk, mask, class_stride, VECTOR: tl.constexpr):
    """Load [ROWS, LANES, CHUNK] logits: chunk number ``chunk`` [1, LANES] of every row."""
    if VECTOR == 1:
        ptr = rows.ptr[:, None, None] + (chunk * CHUNK)[:, :, None].to(tl.int64) * class_stride
        return load(ptr + tl.arange(0, CHUNK)[None, None, :].to(tl.int64) * class_stride, mask)
    body = tl.multiple_of(rows.ptr + rows.head, 16)
    ptr = body[:, None, None] + (chunk * CHUNK)[:, :, None]
    if VECTOR == 4:
        # two vectors a chunk, side by side in one thread: a plain load would spread them over two
        half = tl.arange(0, 4)[None, None, :]
        low, high = load(ptr + half, mask), load(ptr + (4 + half), mask)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [low.shape[0], low.shape[1], CHUNK])
    else:
        return load(ptr + tl.arange(0, CHUNK)[None, None, :], mask)


@triton.jit
def store_chunks(out_ptr, rows, chunk, x, mask, out_class_stride, VECTOR: tl.constexpr):
    """Store [ROWS, LANES, CHUNK]; with VECTOR > 1 the rows of ``out_ptr`` are as aligned as the logits'."""
    x = x.to(out_ptr.dtype.element_ty)
    first = (chunk * CHUNK)[:, :, None]
    if VECTOR == 1:
        at = (first + tl.arange(0, CHUNK)[None, None, :]).to(tl.int64) * out_class_stride
        tl.store(out_ptr[:, None, None] + at, x, mask)
    else:
        out = tl.multiple_of(out_ptr + rows.head, 16)[:, None, None] + first
        if VECTOR == 4:  # as `load_chunks`
            halves = tl.permute(tl.reshape(x, [x.shape[0], x.shape[1], 2, 4]), (0, 1, 3, 2))
            low, high = tl.split(halves)
            half = tl.arange(0, 4)[None, None, :]
            tl.store(out + half, low, mask)
            tl.store(out + (4 + half), high, mask)
        else:
            tl.store(out + tl.arange(0, CHUNK)[None, None, :], x, mask)


@triton.jit
def edge_classes(rows):
    """Return the classes [ROWS, 2 * CHUNK] of head and tail; numbers past the last class fill up."""
    lane = tl.arange(0, 2 * CHUNK)[None, :]
    head = rows.head[:, None]
    return tl.where(lane < head, lane, lane + (rows.n_chunks * CHUNK)[:, None])


@triton.jit
def load_classes(rows, classes, mask, class_stride):
    """Load the logits of ``classes`` [ROWS, n]."""
    return load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask)
