"""Where the classes of a row lie: a ragged head, 16-byte vectors, a ragged tail.

A row may start at any address. Its classes up to the first 16-byte boundary are the head, then come chunks of `CHUNK`
classes read as whole vectors, then the tail. Head and tail are fewer than 2 * CHUNK classes and form the edge. Every
class is in one part, so each is read once and nothing outside the row is touched.

``VECTOR`` says how chunks are read: 16 bytes at a time where it is above 1; class by class, `class_stride` apart, where
it is 1; by planes where it is 0, since rows and not classes lie side by side, see `planes`. The last two have no head.

Tiles are loaded raw by `fetch`, a turn before `logits_of` makes logits of them: memory works while the loop computes.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..formulas.logits import capped
from .planes import CHUNK, fetch_planes, store_planes

# two -inf in a word
LOWEST_BFLOAT16 = tl.constexpr(0xFF80FF80 - 2**32)
LOWEST_FLOAT16 = tl.constexpr(0xFC00FC00 - 2**32)


class Array(NamedTuple):
    """A tensor [outer, inner, C] as a kernel takes it."""

    ptr: tl.tensor
    inner: tl.tensor
    n_classes: tl.tensor
    outer_stride: tl.tensor
    row_stride: tl.tensor
    class_stride: tl.tensor


class Rows(NamedTuple):
    """A block of rows; the first six are [ROWS]."""

    ptr: tl.tensor  # class 0
    head: tl.tensor  # classes before the first vector
    n_chunks: tl.tensor
    target: tl.tensor  # the label, -1 where not active
    active: tl.tensor  # in the batch, not ignored, label in range
    ignored: tl.tensor
    n_classes: tl.tensor
    class_stride: tl.tensor


@triton.jit
def row_index(ROWS: tl.constexpr):
    # int64 before the first multiply: n_rows * n_classes may exceed 2^31
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def row_index_reversed(ROWS: tl.constexpr):
    # forward has read the last rows last, so the L2 cache still holds them
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program.to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def row_ptr(array, row):
    """Return the address of class 0; rows count over two axes."""
    at = array.ptr + (row // array.inner) * array.outer_stride + (row % array.inner) * array.row_stride
    # through an integer: for AMD the compiler splits pointers into base and offset and loses that vectors are aligned
    return at.to(tl.int64).to(array.ptr.dtype)


@triton.jit
def rows_at(logits, target_ptr, row, n_rows, ignore_index, VECTOR: tl.constexpr):
    """Return the Rows of numbers ``row``."""
    ptr, n_classes = row_ptr(logits, row), logits.n_classes
    target = tl.load(target_ptr + row, row < n_rows, 0).to(tl.int64)
    ignored = target == ignore_index
    active = (row < n_rows) & (target >= 0) & (target < n_classes) & (target != ignore_index)
    if VECTOR > 1:
        ELEMENT: tl.constexpr = logits.ptr.dtype.element_ty.primitive_bitwidth // 8
        past_boundary = ((ptr.to(tl.int64) % 16) // ELEMENT).to(tl.int32)
        head = tl.minimum((VECTOR - past_boundary) % VECTOR, n_classes)
    else:
        head = (row * 0).to(tl.int32)
    label = tl.where(active, target, -1).to(tl.int32)
    n_chunks = (n_classes - head + (CHUNK - 1 if VECTOR == 0 else 0)) // CHUNK
    return Rows(ptr, head, n_chunks, label, active, ignored, n_classes, logits.class_stride)


@triton.jit
def accumulable(z):
    """Convert to the accumulation dtype: float64 stays, the rest becomes float32."""
    if z.dtype == tl.float64:
        return z
    else:
        return z.to(tl.float32)


@triton.jit
def zeros(rows, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return a number for each lane of each row, in the accumulation dtype."""
    return accumulable(tl.zeros([ROWS, LANES], rows.ptr.dtype.element_ty))


@triton.constexpr_function
def may_lift(LOGIT):
    """Return whether -inf does not stay so."""
    return LOGIT is capped


@triton.jit
def numbers_of(raw, rows):
    """Return what was loaded from ``rows`` in the accumulation dtype, words of two numbers taken apart."""
    if raw.dtype == tl.int32:
        if rows.ptr.dtype.element_ty == tl.bfloat16:
            low, high = (raw << 16).to(tl.float32, bitcast=True), (raw & -65536).to(tl.float32, bitcast=True)
        else:
            low = raw.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (raw >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return tl.reshape(tl.join(low, high), [raw.shape[0], raw.shape[1], CHUNK])
    else:
        return accumulable(raw)


@triton.jit
def logits_of(raw, rows, mask, options, LOGIT: tl.constexpr):
    """Return logits of what was loaded, in the accumulation dtype; masked ones, -inf there, stay so."""
    z = LOGIT(numbers_of(raw, rows), options)
    if mask is not None and may_lift(LOGIT):
        z = tl.where(mask, z, -float("inf"))
    return z


@triton.jit
def chunk_classes(rows, chunk):
    """Return the classes [ROWS, LANES, CHUNK] of chunk numbers [1, LANES]."""
    return rows.head[:, None, None] + (chunk * CHUNK)[:, :, None] + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def chunk_mask(rows, chunk, where, VECTOR: tl.constexpr):
    """Return whether chunks [1, LANES] are in the row, of rows ``where`` alone: [ROWS, LANES, 1], of planes a class."""
    if VECTOR == 0 or VECTOR == 2:  # where threads share a chunk, a mask of chunks would be shuffled to their classes
        offset = (chunk * CHUNK)[:, :, None] + tl.arange(0, CHUNK)[None, None, :]
        end = rows.n_classes if VECTOR == 0 else (rows.n_chunks * CHUNK)[:, None, None]
        return (offset < end) & where[:, None, None]
    else:
        return ((chunk < rows.n_chunks[:, None]) & where[:, None])[:, :, None]


@triton.constexpr_function
def is_spread(VECTOR):
    """Return whether the classes of a chunk lie in several threads."""
    return 0 < VECTOR < 4


@triton.jit
def load(ptr, mask):
    """Load raw; masked lanes are -inf."""
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask, -float("inf"))


@triton.jit
def fetch(rows, chunk, where, VECTOR: tl.constexpr):
    """Load [ROWS, LANES, CHUNK] raw: chunk number ``chunk`` [1, LANES] of every row.

    Of rows ``where`` [ROWS] and of chunks in the row, else -inf; without ``where`` all must be there.
    """
    if VECTOR == 0:
        return fetch_planes(rows, chunk, where)
    else:
        mask = None if where is None else chunk_mask(rows, chunk, where, VECTOR)
        if VECTOR == 1:
            ptr = rows.ptr[:, None, None] + (chunk * CHUNK)[:, :, None].to(tl.int64) * rows.class_stride
            return load(ptr + tl.arange(0, CHUNK)[None, None, :].to(tl.int64) * rows.class_stride, mask)
        else:
            ptr = tl.multiple_of(rows.ptr + rows.head, 16)[:, None, None] + (chunk * CHUNK)[:, :, None]
            return fetch_vectors(ptr, mask, VECTOR)


@triton.jit
def fetch_whole(rows, chunk, VECTOR: tl.constexpr):
    """As `fetch` with a vector above 1, of chunks in the row; of rows not active anything."""
    ptr = tl.multiple_of(rows.ptr + rows.head, 16)[:, None, None] + (chunk * CHUNK)[:, :, None]
    mask = rows.active[:, None, None]
    if VECTOR == 8:
        return tl.load(ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, 4)[None, None, :], mask)
    else:
        return fetch_vectors(ptr, mask, VECTOR)


@triton.jit
def fetch_vectors(ptr, mask, VECTOR: tl.constexpr):
    """Load a chunk at each of ``ptr`` [ROWS, LANES, 1], multiples of 16 bytes."""
    if VECTOR == 8:  # words of two numbers: half the registers while they wait
        words = ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, 4)[None, None, :]
        if mask is None:
            return tl.load(words)
        else:
            return tl.load(words, mask, LOWEST_BFLOAT16 if ptr.dtype.element_ty == tl.bfloat16 else LOWEST_FLOAT16)
    elif VECTOR == 4:
        # two vectors a chunk, side by side in one thread: a plain load would spread them over two
        half = tl.arange(0, 4)[None, None, :]
        low, high = load(ptr + half, mask), load(ptr + (4 + half), mask)
        return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), [low.shape[0], low.shape[1], CHUNK])
    else:
        return load(ptr + tl.arange(0, CHUNK)[None, None, :], mask)


@triton.jit
def store_chunks(out_ptr, out_class_stride, rows, chunk, x, mask, VECTOR: tl.constexpr):
    """Store [ROWS, LANES, CHUNK]; with VECTOR > 1 the rows of ``out_ptr`` are as aligned as the logits'.

    ``mask`` is None, or as `chunk_mask` returns it; of planes it is the rows [ROWS] to write.
    """
    x = x.to(out_ptr.dtype.element_ty)
    first = (chunk * CHUNK)[:, :, None]
    if VECTOR == 0:
        store_planes(out_ptr, out_class_stride, rows, chunk, x, mask)
    elif VECTOR == 1:
        at = (first + tl.arange(0, CHUNK)[None, None, :]).to(tl.int64) * out_class_stride
        tl.store(out_ptr[:, None, None] + at, x, mask)
    else:
        out = tl.multiple_of(out_ptr + rows.head, 16)[:, None, None] + first
        if VECTOR == 4:  # as `fetch`
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
def load_classes(rows, classes, mask):
    """Load ``classes`` [ROWS, n], raw."""
    return load(rows.ptr[:, None] + classes.to(tl.int64) * rows.class_stride, mask)


@triton.jit
def load_label(rows, options, LOGIT: tl.constexpr):
    """Return the label's logit [ROWS], -inf where not active."""
    raw = load(rows.ptr + rows.target.to(tl.int64) * rows.class_stride, rows.active)
    return logits_of(raw, rows, rows.active, options, LOGIT)
