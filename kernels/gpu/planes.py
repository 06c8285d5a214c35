"""Chunks of rows that lie side by side in memory while their classes lie apart, as in [N, C, H, W]: a thread a row.

Eight planes of a class each are loaded by neighbouring threads from neighbouring rows, so that every sector is used
whole, and joined to a chunk in each thread. The last chunk may end past the row: each plane has its own mask.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(8)


@triton.jit
def fetch_planes(rows, chunk, where):
    """Load [ROWS, LANES, CHUNK] raw: chunk number ``chunk`` [1, LANES] of rows ``where`` [ROWS], else -inf."""
    ptr, first = plane_ptr(rows.ptr, rows.class_stride, chunk)
    planes = ()
    for k in tl.static_range(CHUNK):
        mask = (first + k < rows.n_classes) & where[None, :]
        planes += (tl.trans(tl.load(ptr, mask, -float("inf"))),)
        ptr += rows.class_stride
    even = tl.join(tl.join(planes[0], planes[4]), tl.join(planes[2], planes[6]))
    odd = tl.join(tl.join(planes[1], planes[5]), tl.join(planes[3], planes[7]))
    x = tl.join(even, odd)
    return tl.reshape(x, [x.shape[0], x.shape[1], CHUNK])


@triton.jit
def store_planes(out_ptr, out_class_stride, rows, chunk, x, where):
    """Store [ROWS, LANES, CHUNK] to rows ``where`` [ROWS] of ``out_ptr`` [ROWS]."""
    ptr, first = plane_ptr(out_ptr, out_class_stride, chunk)
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 2, 2, 2]))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    x0, x4 = tl.split(a)
    x2, x6 = tl.split(b)
    x1, x5 = tl.split(c)
    x3, x7 = tl.split(d)
    planes = (x0, x1, x2, x3, x4, x5, x6, x7)
    for k in tl.static_range(CHUNK):
        tl.store(ptr, tl.trans(planes[k]), (first + k < rows.n_classes) & where[None, :])
        ptr += out_class_stride


@triton.jit
def plane_ptr(ptr, class_stride, chunk):
    """Return the addresses [LANES, ROWS] of the first class of each chunk, and these classes [LANES, 1].

    Rows are the last axis, along which the compiler lays threads.
    """
    first = tl.trans(chunk * CHUNK)
    return ptr[None, :] + first.to(tl.int64) * class_stride, first
