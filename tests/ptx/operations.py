"""What each arithmetic instruction computes, on arrays with a place for every thread.

Instructions that round as they like (``approx``, ``full``) err here by 2^-22, up or down as the bits of the result
fall; the PTX documents allow no more: 2 units in a quotient, 2^-22.9 in a reciprocal root.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .program import Instruction

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]
NUMPY: dict[str, Any] = {
    "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "pred": np.bool_, "bf16": np.uint16,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "f16": np.float16, "f32": np.float32,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
APPROXIMATE, RELATIVE_ERROR = ("ex2", "rsqrt", "sqrt", "div"), 2.0**-22
ROUNDED_OR_NOT = {"rn", "ftz", "approx", "full", "lo", "wide", "relu"}


def unknown(x: Instruction) -> NotImplementedError:
    return NotImplementedError(f"PTX instruction not known to the tests' machine: {x.line}")


# --- types: a name of PTX, and "x2" or more of them in a register -----------------------------------------------------


def size_of(kind: str) -> int:
    base, _, n = kind.partition("x")
    return np.dtype(NUMPY[base]).itemsize * int(n or 1)


def decode(registers: Array, kind: str) -> Array:
    """Return the numbers in the low bits of 64-bit registers, with an axis more if there are several in each."""
    base, _, n = kind.partition("x")
    if base == "pred":
        return registers != 0
    found = registers.view(NUMPY[base]).reshape(len(registers), -1)
    found = found[:, : int(n)] if n else found[:, 0]
    return (found.astype(np.uint32) << np.uint32(16)).view(np.float32) if base == "bf16" else found


def encode(numbers: Array, kind: str) -> Array:
    """Round numbers to the type, ties to even, and return them as integers."""
    base, _, n = kind.partition("x")
    if base == "bf16":
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        numbers = np.where(np.isnan(numbers), np.uint32(0x7FFF), rounded)
    numbers = np.ascontiguousarray(numbers, NUMPY[base])
    if numbers.dtype.kind == "i" and not n:
        return numbers
    return numbers.view(f"u{size_of(kind)}").reshape(-1)


# --- functions by name ------------------------------------------------------------------------------------------------


def _fma(a: Array, b: Array, c: Array) -> Array:
    exact = np.longdouble if a.dtype == np.float64 else np.float64  # a product of two float32 is exact in float64
    return a.astype(exact) * b.astype(exact) + c.astype(exact)


def _div(a: Array, b: Array) -> Array:
    """Integers towards zero."""
    return a / b if a.dtype.kind == "f" else np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


def _field(a: Array, start: Array, length: Array) -> Array:
    wide = f"{a.dtype.kind}8"
    return a.astype(wide) << (64 - start - length).astype(wide) >> (64 - length).astype(wide)


def _permute(a: Array, b: Array, which: Array) -> Array:
    """Bytes of two words by the digits of a third; an eighth would repeat a sign, and no kernel asks for one."""
    a, b, which = np.broadcast_arrays(a, b, which)
    digits = which[:, None] >> (4 * np.arange(4, dtype=np.uint32)) & np.uint32(15)
    return np.take_along_axis(np.stack([a, b], axis=1).view(np.uint8), digits, axis=1).view(np.uint32)[:, 0]


def _differ(a: Array, b: Array) -> Array:
    return (a < b) | (a > b)


COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": _differ, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "equ": lambda a, b: ~_differ(a, b), "neu": np.not_equal, "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
}  # fmt: skip
FUNCTIONS: dict[str, Function] = {
    "mov": lambda a: a, "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda a, b, c: a * b + c,
    "fma": _fma, "div": _div, "neg": np.negative, "abs": np.abs,
    "min": lambda *a: functools.reduce(np.fmin, a), "max": lambda *a: functools.reduce(np.fmax, a),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": lambda a, n: np.left_shift(a, n.astype(a.dtype)), "shr": lambda a, n: np.right_shift(a, n.astype(a.dtype)),
    "bfe": _field, "prmt": _permute, "selp": lambda a, b, where: np.where(where, a, b),
    "ex2": np.exp2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "cvt": lambda a, *low: np.stack(np.broadcast_arrays(*low, a), axis=1) if low else a,
}  # fmt: skip


class Operation(NamedTuple):
    """An instruction's types and its function: ``result = function(*arguments)``."""

    result: str
    arguments: list[str]
    function: Function


def operation(x: Instruction) -> Operation:
    """Return what an instruction computes; raises for one not known here."""
    names = COMPARE if x.name == "setp" else FUNCTIONS
    name, *modifiers = x.modifiers if x.name == "setp" else (x.name, *x.modifiers)
    result = kind = x.type
    arguments = [kind] * (len(x.operands) - 1)
    if x.name == "cvt":
        result = modifiers.pop(-2)
        modifiers += ["integer of a number"] * (result[0] in "su" and "f" in kind)
    elif modifiers[-2:-1] == ["f32"]:  # all arguments but the last are narrow
        result = arguments[-1] = modifiers.pop(-2)
    if name not in names or not {*modifiers[:-1]} <= ROUNDED_OR_NOT or x.name == "setp" and len(arguments) != 2:
        raise unknown(x)
    function = names[name]
    if "wide" in modifiers:
        result = f"{kind[0]}{2 * int(kind[1:])}"
        arguments[2:] = [result] * len(arguments[2:])
        function = _widened(function, NUMPY[result])
    elif name in ("shl", "shr", "bfe"):
        arguments[1:] = ["u32"] * len(arguments[1:])
    elif name == "selp":
        arguments[2] = "pred"
    elif x.name == "setp":
        result = "pred"
    if name in APPROXIMATE and {"approx", "full"} & {*modifiers}:
        function = _approximate(function)
    if "relu" in modifiers:
        function = _positive(function)
    return Operation(result, arguments, _flushing(function) if "ftz" in modifiers else function)


def _widened(function: Function, kind: Any) -> Function:
    return lambda a, b, *c: function(a.astype(kind), b.astype(kind), *c)


def _positive(function: Function) -> Function:
    return lambda *a: np.maximum(function(*a), 0)


def _flushing(function: Function) -> Function:
    def flushed(x: Array) -> Array:
        return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)

    return lambda *a: flushed(function(*map(flushed, a)))


def _approximate(function: Function) -> Function:
    """Return a function that errs by all it may, up or down; zeros, infinities, NaN and e^0 are exact."""

    def run(*a: Array) -> Array:
        exact = function(*(b.astype(np.float64) for b in a))
        rounded = exact.astype(np.float32)
        up = (rounded.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31)
        wrong = (exact * (1 + np.where(up == 1, RELATIVE_ERROR, -RELATIVE_ERROR))).astype(np.float32)
        return np.where(exact == 1.0, rounded, wrong)

    return run
