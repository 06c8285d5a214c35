"""The numbers of a loss on their way into a kernel: each float64 as two float32."""

import math
import struct

import triton
import triton.language as tl


def halved(numbers):
    """Return numbers as a kernel takes them: rounded to float32, and what that left."""
    halves = [_halves(float(x)) for x in numbers]
    return tuple(high for high, _ in halves), tuple(low for _, low in halves)


def _halves(x):
    if not math.isfinite(x) or abs(x) > 3e38:
        return x, 0.0
    high = struct.unpack("f", struct.pack("f", x))[0]
    return high, x - high


@triton.jit
def widen(halves, like):
    """Return run-time numbers in the dtype of ``like``: two float32 halves restore a float64."""
    wide = ()
    for i in tl.static_range(len(halves[0])):
        wide = wide + (tl.zeros((), like.dtype) + halves[0][i] + halves[1][i],)
    return wide
