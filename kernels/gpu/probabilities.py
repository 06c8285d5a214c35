"""Probabilities of the classes that are not the label, from three numbers a row.

    p = scale exp(z - max)        log p = (z - max) + log_scale

where log_scale is max - lse.
"""

import triton
import triton.language as tl

from ..formulas.rest import origin
from ..formulas.scalar import exp


@triton.jit
def probabilities(softmax, z, mask):
    """Return (exp(z - max), p, log p) of logits [ROWS, ...], the first two 0 where masked."""
    d = z - along(origin(softmax.max), z)
    e = exp(d)
    if mask is not None:
        e = tl.where(mask, e, 0.0)
    return e, e * along(softmax.scale, z), d + along(softmax.log_scale, z)


@triton.jit
def along(x, z):
    """Return ``x`` [ROWS] with as many axes as ``z`` has, 2 or 3."""
    if len(z.shape) == 2:
        return x[:, None]
    else:
        return x[:, None, None]
