"""What a CPU computes its own way: numbers of memory, and twins of what `tl` and `formulas.scalar` offer.

In float32 everything here becomes vector code: no branches and no calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..formulas.scalar import log_of_rest_series, tanh_float32
from . import memory
from .pipeline import compiled

f32, i32 = np.float32, np.int32


def _jit(function: Any) -> Any:
    return compiled(function, {"contract"})


@intrinsic
def bits(typingctx: Any, x: Any) -> Any:
    """Return the bits of a float32 as an int32, of an int32 as a float32."""
    to = types.int32 if x == types.float32 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(to))

    return to(x), codegen


# --- what tl offers ---------------------------------------------------------------------------------------------------


@intrinsic
def where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """Return ``a`` where the condition holds, else ``b``: a choice of evaluated arguments, not a branch."""
    number = typingctx.unify_types(a, b)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, y = (context.cast(builder, v, t, number) for v, t in zip(args[1:], signature.args[1:], strict=True))
        return builder.select(context.cast(builder, args[0], signature.args[0], types.boolean), x, y)

    return number(condition, a, b), codegen


def _compared(sign: str) -> Any:
    @intrinsic
    def extremum(typingctx: Any, a: Any, b: Any) -> Any:
        number = typingctx.unify_types(a, b)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, y = (context.cast(builder, v, t, number) for v, t in zip(args, signature.args, strict=True))
            compared = builder.icmp_signed if isinstance(number, types.Integer) else builder.fcmp_ordered
            return builder.select(compared(sign, x, y), x, y)

        return number(a, b), codegen

    return extremum


maximum, minimum = _compared(">"), _compared("<")  # of NaN and b: b


@intrinsic
def largest_of(typingctx: Any, a: Any, b: Any) -> Any:
    """Return the larger, NaN of NaN: what a loop may do in any order, so in vectors."""
    number = typingctx.unify_types(a, b)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        given = [context.cast(builder, v, t, number) for v, t in zip(args, signature.args, strict=True)]
        kind = context.get_value_type(number)
        function = builder.module.declare_intrinsic("llvm.maximum", [kind], ir.FunctionType(kind, [kind, kind]))
        return builder.call(function, given)

    return number(a, b), codegen


@_jit
def absolute(x):
    return abs(x)


def _of_llvm(name: str) -> Any:
    @intrinsic
    def function(typingctx: Any, x: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.call(builder.module.declare_intrinsic(name, [context.get_value_type(x)]), args)

        return x(x), codegen

    return function


sqrt, floor = _of_llvm("llvm.sqrt"), _of_llvm("llvm.floor")


@_jit
def log_near_one(f, k):
    """Return log(1 + f) + k log 2 for 1 + f in [sqrt 1/2, sqrt 2] (the polynomial is Cephes's)."""
    z = f * f
    p = f32(7.0376836292e-2)
    p = p * f + f32(-1.1514610310e-1)
    p = p * f + f32(1.1676998740e-1)
    p = p * f + f32(-1.2420140846e-1)
    p = p * f + f32(1.4249322787e-1)
    p = p * f + f32(-1.6668057665e-1)
    p = p * f + f32(2.0000714765e-1)
    p = p * f + f32(-2.4999993993e-1)
    p = p * f + f32(3.3333331174e-1)
    y = f * z * p + k * f32(-2.12194440e-4) - f32(0.5) * z
    return f + y + k * f32(0.693359375)


@_jit
def log(x):
    """Return log x of a float32 within 1 unit in the last place; -inf of 0, NaN below."""
    small = x < f32(2.0**-126)
    i = bits(x * f32(2.0**23) if small else x)
    k = i32(i32(i - i32(0x3F3504F3)) >> i32(23))
    f = bits(i32(i - i32(k << i32(23)))) - f32(1.0)
    y = log_near_one(f, f32(k) - (f32(23.0) if small else f32(0.0)))
    y = f32(-np.inf) if x == f32(0.0) else y
    y = f32(np.inf) if x == f32(np.inf) else y
    return y if x >= f32(0.0) else f32(np.nan)


@_jit
def log_float64(x):
    return math.log(x) if x >= 0.0 else np.nan


def _infinity(number: Any) -> Any:
    """Return a twin of `float` for the words "inf" and "nan"."""

    @intrinsic(prefer_literal=True)
    def infinity(typingctx: Any, word: Any) -> Any:
        value = float(word.literal_value)

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return context.get_constant(number, value)

        return number(word), codegen

    return infinity


infinity_float32, infinity_float64 = _infinity(types.float32), _infinity(types.float64)


# --- twins of formulas.scalar -----------------------------------------------------------------------------------------


@_jit
def polynomial_of_exp(r):
    """Return e^r for r in [-log(2) / 2, log(2) / 2]: least squares, reweighted to level the errors, 0.05 2^-24."""
    p = f32(1.3814539e-3)
    p = p * r + f32(8.3687454e-3)
    p = p * r + f32(4.1668389e-2)
    p = p * r + f32(1.6666521e-1)
    p = p * r + f32(4.9999994e-1)
    return p * (r * r) + r + f32(1.0)


@_jit
def exp(x):
    """Return e^x within 1 unit in the last place; by two powers of 2, so that both ends of the range are reached."""
    x = f32(-104.0) if x < f32(-104.0) else x
    x = f32(89.0) if x > f32(89.0) else x
    r, k = reduced(x, f32(254.0))
    h = i32(k >> i32(1))
    return polynomial_of_exp(r) * bits(i32(h << i32(23))) * bits(i32(i32(k - h) << i32(23)))


@_jit
def reduced(x, bias):
    """Return r and k with e^x = e^r 2^n, where the last 9 bits of k are ``n + bias``."""
    shift = f32(1.5 * 2.0**23) + bias  # added, it leaves a whole number, which stands in the last bits
    shifted = x * f32(1.4426950408889634) + shift
    n = shifted - shift
    return (x - n * f32(0.693359375)) + n * f32(2.12194440e-4), bits(shifted)  # ln 2 in two parts


@_jit
def exp_float64(x):
    return math.exp(x)


@_jit
def bounded(x):
    return f32(-88.0) if x < f32(-88.0) else x


@_jit
def bounded_float64(x):
    return -1000.0 if x < -1000.0 else x


@_jit
def exp_of_bounded(x):
    r, k = reduced(x, f32(127.0))
    return polynomial_of_exp(r) * bits(i32(k << i32(23)))


@_jit
def exp_below(x):
    return exp_of_bounded(bounded(x))


@_jit
def log1p(x):
    """Return log(1 + x) = 2 artanh(x / (2 + x)) for x in [0, 1] within 2 units in the last place."""
    y = x / (f32(2.0) + x)
    s = y * y
    p = f32(0.28031275)
    p = p * s + f32(0.27997863)
    p = p * s + f32(0.40021771)
    p = p * s + f32(0.66666412)
    return y * s * p + (y + y)


@_jit
def log1p_float64(x):
    return math.log1p(x)


@_jit
def reciprocal(x):
    return f32(1.0) / x


@_jit
def reciprocal_float64(x):
    return 1.0 / x


@_jit
def tiny(x):
    return f32(2.0**-126)


@_jit
def tiny_float64(x):
    return 2.0**-1022


@_jit
def power(p, log_p, exponent):
    return p * p if exponent == f32(2.0) else exp(exponent * log_p)


@_jit
def power_float64(p, log_p, exponent):
    return p * p if exponent == 2.0 else math.exp(exponent * log_p)


@_jit
def log_of_rest_float64(p):
    return math.log1p(-p)


@_jit
def tanh_float64(t):
    return math.tanh(t)


# --- numbers as they lie in memory: halves as the integers that hold their bits ---------------------------------------


@intrinsic
def as_it_is(typingctx: Any, x: Any) -> Any:
    return x(x), lambda context, builder, signature, args: args[0]


@_jit
def widen_bfloat16(x):
    return bits(i32(i32(x) << i32(16)))


@_jit
def narrow_bfloat16(x):
    """Round to nearest, ties to even."""
    i = bits(x)
    i = i32(i + i32(0x7FFF) + i32(i32(i >> i32(16)) & i32(1)))
    return np.int16(i32(0x7FC0) if x != x else i32(i >> i32(16)))


@_jit
def widen_float16(x):
    i = i32(i32(x) & i32(0x7FFF))
    y = bits(i32(i << i32(13))) * f32(2.0**112)  # subnormals too
    special = bits(i32(i32(i << i32(13)) | i32(0x7F800000)))
    y = special if i >= i32(0x7C00) else y
    return -y if x < 0 else y


@_jit
def narrow_float16(x):
    """Round to nearest, ties to even; infinity past 65504."""
    i = i32(bits(x) & i32(0x7FFFFFFF))
    normal = i32(i32(i - i32(0x38000000) + i32(0xFFF) + i32(i32(i >> i32(13)) & i32(1))) >> i32(13))
    subnormal = i32(bits(bits(i) + f32(0.5)) - i32(0x3F000000))
    h = subnormal if i < i32(0x38800000) else normal
    h = i32(0x7C00) if i >= i32(0x477FF000) else h
    h = i32(0x7E00) if x != x else h
    return np.int16(h | (i32(-0x8000) if bits(x) < i32(0) else i32(0)))


_MEMORY: dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]] = {
    "float32": (types.float32, as_it_is, as_it_is),
    "float64": (types.float64, as_it_is, as_it_is),
    "bfloat16": (types.int16, widen_bfloat16, narrow_bfloat16),
    "float16": (types.int16, widen_float16, narrow_float16),
}


def twins(element: str) -> dict[str, Any]:
    """Return what `names` lists and what `tl` offers, for tensors of this element type."""
    in_memory, widen, narrow = _MEMORY[element]
    double = element == "float64"
    real = types.float64 if double else types.float32
    both = dict(
        where=where, largest_of=largest_of, maximum=maximum, minimum=minimum, abs=absolute, sqrt=sqrt,
        element=in_memory, widen=widen, narrow=narrow, read=widen, size=in_memory.bitwidth // 8,
        real=real, real_size=real.bitwidth // 8, int32=types.int32, int64=types.int64, float32=types.float32,
        vector=memory.vector, numbers=memory.numbers, record=memory.record, unrelated=memory.unrelated,
        with_twos=memory.with_twos, transpose=memory.transpose,
        call5=memory.call5, call8=memory.call8, call9=memory.call9,
    )  # fmt: skip
    if double:
        own = dict(
            log=log_float64, log1p=log1p_float64, exp=exp_float64, exp_below=exp_float64, bounded=bounded_float64,
            exp_of_bounded=exp_float64, float=infinity_float64,
            reciprocal=reciprocal_float64, log_of_rest=log_of_rest_float64, tiny=tiny_float64, tanh=tanh_float64,
            power=power_float64,
        )  # fmt: skip
    else:
        own = dict(
            log=log, log1p=log1p, exp=exp, exp_below=exp_below, bounded=bounded,
            exp_of_bounded=exp_of_bounded, float=infinity_float32, tiny=tiny,
            reciprocal=reciprocal,
            log_of_rest=getattr(log_of_rest_series, "fn", log_of_rest_series),
            tanh=getattr(tanh_float32, "fn", tanh_float32), power=power,
        )  # fmt: skip
    return both | own


def given(element: str) -> dict[str, Any]:
    """Return what `names` lists of probabilities of this element type."""
    in_memory, widen, _ = _MEMORY[element]
    return {"given_element": in_memory, "given_size": in_memory.bitwidth // 8, "widen_given": widen}
