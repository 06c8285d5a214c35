"""What each arithmetic instruction computes, on arrays with a place for every thread.

Instructions that round as they like (``approx``, ``full``) err here by 2^-22, up or down as the bits of the result
fall; the PTX documents allow no more: 2 units in a quotient, 2^-22.9 in a reciprocal root.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import Instruction

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]
NUMPY: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "s16x2": np.uint32, "u16x2": np.uint32,
    "f32x2": np.uint64,
}  # fmt: skip
TWICE = {"u16": "u32", "u32": "u64", "s16": "s32", "s32": "s64"}
RELATIVE_ERROR = dict.fromkeys(("ex2", "rsqrt", "sqrt", "div"), 2.0**-22) | {"rcp": 2.0**-23}


class Operation:
    """An instruction's types and its function: ``result = function(*arguments)``."""

    def __init__(self, result: str, arguments: tuple[str, ...], function: Function) -> None:
        self.result, self.arguments, self.function = result, arguments, function


def operation(x: Instruction) -> Operation:
    """Return what an instruction computes; raises for one not known here."""
    if x.name not in _BY_NAME:
        raise unknown(x)
    return _BY_NAME[x.name](x)


def unknown(x: Instruction) -> NotImplementedError:
    return NotImplementedError(f"PTX instruction not known to the tests' machine: {x.line}")


# --- formats ----------------------------------------------------------------------------------------------------------


def widened(bits: Array) -> Array:
    """Return bfloat16 bits as float32."""
    return (np.asarray(bits, np.uint32) << np.uint32(16)).view(np.float32)


def as_bfloat16(x: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; return its bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _pair(high: Array, low: Array) -> Array:
    return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)


# --- functions by name ------------------------------------------------------------------------------------------------


def _plain(function: Function, n: int) -> Callable[[Instruction], Operation]:
    def build(x: Instruction) -> Operation:
        if x.modifiers[-2:] in (("f32", "bf16"), ("f32", "f16")):  # all but the last argument are narrow
            wide = widened if x.type == "bf16" else lambda a: a.astype(np.float32)
            return Operation("f32", (x.type,) * (n - 1) + ("f32",), lambda *a: function(*map(wide, a[:-1]), a[-1]))
        if x.type == "bf16":
            return Operation("bf16", ("bf16",) * n, lambda *a: as_bfloat16(function(*map(widened, a))))
        if x.type.endswith("x2"):
            packed = "b64" if x.type == "f32x2" else "b32"
            return Operation(packed, (packed,) * n, _by_halves(function, NUMPY[x.type[:-2]]))
        flush = "ftz" in x.modifiers
        return Operation(x.type, (x.type,) * n, _with_flush(function) if flush else function)

    return build


def _with_flush(function: Function) -> Function:
    return lambda *a: _flushed(function(*map(_flushed, a)))


def _by_halves(function: Function, kind: Any) -> Function:
    bits = 8 * np.dtype(kind).itemsize
    word, pair = np.dtype(f"u{bits // 8}").type, np.dtype(f"u{bits // 4}").type

    def run(*packed: Array) -> Array:
        halves = [np.stack([p, p >> pair(bits)]).astype(word).view(kind) for p in packed]
        low, high = function(*halves).view(word).astype(pair)
        return low | (high << pair(bits))

    return run


def _mul(x: Instruction) -> Operation:
    kind = x.type
    if "wide" in x.modifiers:
        wide = TWICE[kind]
        return Operation(wide, (kind, kind), lambda a, b: a.astype(NUMPY[wide]) * b.astype(NUMPY[wide]))
    if "hi" in x.modifiers:
        wide, bits = TWICE[kind], 8 * np.dtype(NUMPY[kind]).itemsize
        return Operation(kind, (kind, kind), lambda a, b: (
            (a.astype(NUMPY[wide]) * b.astype(NUMPY[wide])) >> NUMPY[wide](bits)).astype(NUMPY[kind]))  # fmt: skip
    return _plain(np.multiply, 2)(x)


def _mad(x: Instruction) -> Operation:
    product = _mul(x)
    return Operation(product.result, (*product.arguments, product.result), lambda a, b, c: product.function(a, b) + c)


def _fma(x: Instruction) -> Operation:
    exact = np.longdouble if x.type == "f64" else np.float64  # a product of two float32 is exact in float64
    kind = NUMPY["f32" if "f32" in x.modifiers else x.type.removesuffix("x2")]
    return _plain(lambda a, b, c: (a.astype(exact) * b.astype(exact) + c.astype(exact)).astype(kind), 3)(x)


def _div(x: Instruction) -> Operation:
    if x.type.startswith("f"):
        if "rn" in x.modifiers:
            return _plain(np.divide, 2)(x)
        return _plain(_approximate(np.divide, RELATIVE_ERROR["div"]), 2)(x)
    return _plain(lambda a, b: (np.abs(a) // np.where(b == 0, 1, np.abs(b)) * np.sign(a) * np.sign(b)).astype(a.dtype)
                  if a.dtype.kind == "i" else a // np.where(b == 0, 1, b), 2)(x)  # fmt: skip


def _rem(x: Instruction) -> Operation:
    return _plain(lambda a, b: np.fmod(a, np.where(b == 0, 1, b)), 2)(x)


def _approximate(function: Function, relative: float) -> Function:
    """Return a function that errs by all it may, up or down; zeros, infinities, NaN and e^0 are exact."""

    def run(*a: Array) -> Array:
        exact = function(*(b.astype(np.float64) for b in a))
        rounded = exact.astype(np.float32)
        up = (rounded.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31)
        wrong = (exact * (1 + np.where(up == 1, relative, -relative))).astype(np.float32)
        return np.where(exact == 1.0, rounded, wrong)

    return run


def _special(name: str, function: Function) -> Callable[[Instruction], Operation]:
    def build(x: Instruction) -> Operation:
        if "rn" in x.modifiers or x.type == "f64":
            return _plain(function, 1)(x)
        return _plain(_approximate(function, RELATIVE_ERROR[name]), 1)(x)

    return build


def _extreme(number: Function, or_nan: Function) -> Callable[[Instruction], Operation]:
    def build(x: Instruction) -> Operation:
        function = or_nan if "NaN" in x.modifiers else number
        if "relu" in x.modifiers:
            return _plain(lambda a, b: np.maximum(function(a, b), 0).astype(a.dtype), 2)(x)
        n = len(x.operands) - 1  # two, or three
        return _plain(lambda *a: functools.reduce(function, a), n)(x)

    return build


COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a != b) & ~_unordered(a, b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "equ": lambda a, b: (a == b) | _unordered(a, b), "neu": np.not_equal,
    "geu": lambda a, b: ~(a < b), "num": lambda a, b: ~_unordered(a, b), "nan": lambda a, b: _unordered(a, b),
}  # fmt: skip


def _unordered(a: Array, b: Array) -> Array:
    return (a != a) | (b != b)


def _setp(x: Instruction) -> Operation:
    compare, read = COMPARE.get(x.modifiers[0]), widened if x.type == "bf16" else np.asarray
    if compare is None or len(x.operands) != 3 or "ftz" in x.modifiers:
        raise unknown(x)
    return Operation("pred", (x.type, x.type), lambda a, b: compare(read(a), read(b)))


def _shl(x: Instruction) -> Operation:
    width = 8 * np.dtype(NUMPY[x.type]).itemsize
    return Operation(x.type, (x.type, "u32"), lambda a, n: np.where(
        n < width, a << np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0)))  # fmt: skip


def _shr(x: Instruction) -> Operation:
    width = 8 * np.dtype(NUMPY[x.type]).itemsize
    if x.type.startswith("s"):
        return Operation(x.type, (x.type, "u32"), lambda a, n: a >> np.minimum(n, width - 1).astype(a.dtype))
    return Operation(x.type, (x.type, "u32"), lambda a, n: np.where(
        n < width, a >> np.minimum(n, width - 1).astype(a.dtype), a.dtype.type(0)))  # fmt: skip


def _bfe(x: Instruction) -> Operation:
    def field(a: Array, start: Array, length: Array) -> Array:
        bits = (a.astype(np.uint64) & np.uint64(0xFFFFFFFF)) >> start.astype(np.uint64)
        bits = bits & ((np.uint64(1) << length.astype(np.uint64)) - np.uint64(1))
        if x.type == "s32":
            unused = (np.uint64(64) - length.astype(np.uint64)).astype(np.int64)
            bits = (bits.astype(np.int64) << unused) >> unused
        return bits.astype(NUMPY[x.type])

    assert x.type in ("u32", "s32"), x.line
    return Operation(x.type, (x.type, "u32", "u32"), field)


def _cvt(x: Instruction) -> Operation:
    to, source = x.modifiers[-2:]
    if to in ("bf16x2", "f16x2"):
        narrow = as_bfloat16 if to == "bf16x2" else lambda a: a.astype(np.float16).view(np.uint16)
        return Operation("b32", (source, source), lambda a, b: _pair(narrow(a), narrow(b)))
    read = widened if source == "bf16" else np.asarray
    if to == "bf16":
        return Operation("b16", (source,), lambda a: as_bfloat16(read(a).astype(np.float32)))
    kind = NUMPY[to]
    if np.dtype(kind).kind in "iu" and source in ("f16", "bf16", "f32", "f64"):
        raise unknown(x)
    return Operation(to, (source,), lambda a: read(a).astype(kind))


def _selp(x: Instruction) -> Operation:
    return Operation(x.type, (x.type, x.type, "pred"), lambda a, b, p: np.where(p, a, b))


def _prmt(x: Instruction) -> Operation:
    def permute(a: Array, b: Array, selector: Array) -> Array:
        eight = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
        found = np.zeros_like(eight)
        for i in range(4):
            which = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (eight >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            found |= np.where(which & np.uint64(8), sign, byte) << np.uint64(8 * i)
        return found.astype(np.uint32)

    return Operation("b32", ("b32",) * 3, permute)


def _logical(function: Function, of_predicates: Function, n: int = 2) -> Callable[[Instruction], Operation]:
    return lambda x: _plain(of_predicates if x.type == "pred" else function, n)(x)


_BY_NAME: dict[str, Callable[[Instruction], Operation]] = {
    "mov": _plain(lambda a: a, 1),
    "add": _plain(np.add, 2),
    "sub": _plain(np.subtract, 2),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rem": _rem,
    "neg": _plain(np.negative, 1),
    "abs": _plain(np.abs, 1),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "and": _logical(np.bitwise_and, np.logical_and),
    "or": _logical(np.bitwise_or, np.logical_or),
    "xor": _logical(np.bitwise_xor, np.logical_xor),
    "not": _logical(np.invert, np.logical_not, 1),
    "shl": _shl,
    "shr": _shr,
    "bfe": _bfe,
    "prmt": _prmt,
    "cvt": _cvt,
    "selp": _selp,
    "setp": _setp,
    "ex2": _special("ex2", np.exp2),
    "rcp": _special("rcp", lambda a: 1 / a),
    "sqrt": _special("sqrt", np.sqrt),
    "rsqrt": _special("rsqrt", lambda a: 1 / np.sqrt(a)),
}
