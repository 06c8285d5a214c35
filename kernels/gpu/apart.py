"""Label and runner-up, set apart from the sums over classes: only they can be near p = 1, and a gap knows 1 - p."""

import triton
import triton.language as tl

from ..formulas.scalar import log_sigmoid, sigmoid
from ..formulas.soft_targets import Apart, rest_of
from .soft_targets import shares_at


@triton.jit
def apart(classes, mask, gap, target, params, TERMS: tl.constexpr):
    """Return the class of each row whose logit is ``gap`` above the logsumexp of all others."""
    p, rest, log_p, log_rest = sigmoid(gap), rest_of(gap), log_sigmoid(gap), log_sigmoid(-gap)
    t, v = shares_at(target, classes[:, None], mask[:, None], gap)
    t, v = tl.sum(t, 1), tl.sum(v, 1)
    value, pull = TERMS(p, rest, log_p, log_rest, v, params)
    return Apart(p, rest, log_p, t, value, pull)
