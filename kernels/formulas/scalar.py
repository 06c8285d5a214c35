"""Scalar functions that stay accurate where a loss of the gap needs them, in the dtype of their argument."""

from __future__ import annotations

import math

from .language import jit, tl

LOG2_E = tl.constexpr(math.log2(math.e))
HALF_PI = tl.constexpr(math.pi / 2)
PI = tl.constexpr(math.pi)
# Divisors of series, as floats: an integer would make a float32 a float64 on CPUs.
SIN_TERMS = tl.constexpr(11)
SIN_DIVISORS = tl.constexpr(tuple(float(n * (n + 1)) for n in range(22, 0, -2)))
EXPM1_TERMS = tl.constexpr(14)  # 0.5^15 / 16! leaves nothing of a float64
EXPM1_DIVISORS = tl.constexpr(tuple(float(n) for n in range(15, 1, -1)))


@jit
def exp(x):
    """Return e^x by one exp2; subtract any offset before, since the product rounds relative to |x|."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2_E)


@jit
def tiny(x):
    """Return the smallest normal number of the dtype of ``x``."""
    if x.dtype == tl.float64:
        return 2.2250738585072014e-308
    else:
        return 1.1754943508222875e-38


@jit
def reciprocal(x):
    """Return 1 / x for x in [2^-126, 1], within 2 ulp: a division would also guard against larger ones."""
    if x.dtype == tl.float64:
        return 1.0 / x
    else:
        root = tl.rsqrt(x)
        return root * root


@jit
def log_of_rest(p):
    """Return log(1 - p) for p in [0, 1/2]: half the instructions of a logarithm, and small ones keep their digits."""
    if p.dtype == tl.float64:
        return tl.log(1.0 - p)
    else:
        return log_of_rest_series(p)


@jit
def log_of_rest_series(p):
    """Return `log_of_rest` of a float32."""
    # least squares for (log(1 - p) + p) / -p^2, reweighted to level the errors: 1.3 2^-24, rounding and all
    y = 1.479392930 * p - 1.760112100
    y = y * p + 1.298339893
    y = y * p - 0.2148487575
    y = y * p + 0.2705133429
    y = y * p + 0.2429934416
    y = y * p + 0.3336601418
    y = y * p + 0.4999950621
    return -p * (y * p + 1.0)


@jit
def log1p(x):
    """Return log(1 + x) for x in [0, 1] without libdevice (Kahan): the rounding of 1 + x divides out."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@jit
def log_sigmoid(x):
    """Return log(sigmoid(x)) = -softplus(-x)."""
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@jit
def sigmoid(x):
    """Return 1 / (1 + e^-x) with full relative accuracy on both sides."""
    e = exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@jit
def power(p, log_p, exponent):
    """Return p^exponent; a CPU squares by a product."""
    return exp(exponent * log_p)


@jit
def expm1(x):
    """Return e^x - 1 for x <= 0: by its series near 0, where the difference would cancel."""
    y = 1.0
    for i in tl.static_range(EXPM1_TERMS):
        y = 1.0 + x / EXPM1_DIVISORS[i] * y
    return tl.where(x > -0.5, x * y, exp(x) - 1.0)


@jit
def sin(x):
    """Return the sine for x in [0, pi/2] by its series, whose first term left out is x^25 / 25! = 5e-21."""
    x2 = x * x
    y = 1.0
    for i in tl.static_range(SIN_TERMS):
        y = 1.0 - x2 / SIN_DIVISORS[i] * y
    return x * y


@jit
def tanh(t):
    """Return the hyperbolic tangent, which keeps the digits of a small ``t``."""
    if t.dtype == tl.float64:
        x = -2.0 * tl.abs(t)
        y = -expm1(x) / (1.0 + exp(x))
        return tl.where(t < 0.0, -y, y)
    else:
        return tanh_float32(t)


@jit
def tanh_float32(t):
    """Return `tanh` of a float32: near 0 by a polynomial in t^2 (Cephes's)."""
    x = exp(-2.0 * tl.abs(t))
    far = (1.0 - x) / (1.0 + x)
    s = t * t
    near = -5.70498872745e-3 * s + 2.06390887954e-2
    near = near * s - 5.37397155531e-2
    near = near * s + 1.33314422036e-1
    near = near * s - 3.33332819422e-1
    return tl.where(tl.abs(t) < 0.625, near * s * t + t, tl.where(t < 0.0, -far, far))
