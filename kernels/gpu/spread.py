"""Write a row that is a multiple of exp(z - max), all but the label's entry: a gradient or the probabilities."""

import triton
import triton.language as tl

from ..formulas.rest import origin
from ..formulas.scalar import exp
from .rows import CHUNK, edge_classes, load


@triton.jit
def write_rows(
    out_ptr, rows, inside, n_classes, class_stride, out_class_stride, rest_max, scale, at_target,
    first, last, write_edge, ROWS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Write ``out_k = scale exp(z_k - rest_max)`` and ``out_y = at_target`` for tiles first..last and the edge.

    One read and one write a class. With VECTOR > 1 the rows of ``out_ptr`` [ROWS] are as aligned as the logits'.
    """
    BLOCK: tl.constexpr = LANES * CHUNK
    inside = inside[:, None]
    for tile in range(first, last):
        offset = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (offset < (rows.n_chunks * CHUNK)[:, None]) & inside
        if VECTOR == 1:
            at, out_at = offset.to(tl.int64) * class_stride, offset.to(tl.int64) * out_class_stride
            ptr, out = rows.ptr[:, None] + at, out_ptr[:, None] + out_at
        else:
            ptr = tl.multiple_of(rows.ptr + rows.head, 16)[:, None] + offset
            out = tl.multiple_of(out_ptr + rows.head, 16)[:, None] + offset
        z = load(ptr, mask & rows.active[:, None])
        x = spread(z, rows.head[:, None] + offset, rows, rest_max, scale, at_target)
        tl.store(out, x.to(out_ptr.dtype.element_ty), mask)

    if write_edge:
        classes = edge_classes(rows)
        mask = (classes < n_classes) & inside
        z = load(rows.ptr[:, None] + classes.to(tl.int64) * class_stride, mask & rows.active[:, None])
        x = spread(z, classes, rows, rest_max, scale, at_target)
        out = out_ptr[:, None] + classes.to(tl.int64) * out_class_stride
        tl.store(out, x.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def spread(z, classes, rows, rest_max, scale, at_target):
    x = scale[:, None] * exp(z - origin(rest_max)[:, None])
    return tl.where(classes == rows.target[:, None], at_target[:, None], x)
