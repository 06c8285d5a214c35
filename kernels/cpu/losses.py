"""A loss as loops call it: value and slope of a column of gaps, a C function a loss."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

from ..formulas import class_terms
from ..formulas.scalar import sigmoid
from . import stored
from .names import numbers, real, vector, with_twos

__all__ = ["Columns", "columns_of", "described", "probability", "terms_of", "why_not_compiled"]

VALUE = SLOPE = TERMS = N_PARAMS = TWOS = None  # bound by what compiles them


def column(n, gap, params, value, slope):
    """Write value and slope of ``n`` gaps; all but ``n`` are addresses."""
    gap, value, slope = vector(gap, n, real), vector(value, n, real), vector(slope, n, real)
    of_loss = with_twos(numbers(params, N_PARAMS, real), TWOS)
    for i in range(n):  # in one loop, so that what both need is computed once
        x = gap[i]
        value[i] = VALUE(x, of_loss)
        slope[i] = SLOPE(x, of_loss)


class Columns(NamedTuple):
    """The address of a C function, that of its numbers, and what keeps both there."""

    function: int
    params: int
    owners: tuple[Any, ...]


def columns_of(loss: Any, real: str) -> Columns:
    """Return `column` of a loss in an accumulation dtype; raises Numba's error where it cannot be compiled."""
    try:
        return _known(loss, real)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
    return _columns_of(loss, real)


@functools.lru_cache(256)
def _known(loss: Any, real: str) -> Columns:
    return _columns_of(loss, real)


def _columns_of(loss: Any, real: str) -> Columns:
    params = loss.parameters()
    value, slope = pair_of(loss)
    function = _compiled(value, slope, len(params), twos_of(value, params), real)
    held = array("d" if real == "float64" else "f", params)
    return Columns(ctypes.cast(function, ctypes.c_void_p).value or 0, held.buffer_info()[0], (function, held))


def pair_of(loss: Any) -> tuple[Any, Any]:
    """Return the bodies of value and slope."""
    if isinstance(loss.kernel, str):
        from ..formulas import gap_losses

        return getattr(gap_losses, f"{loss.kernel}_value"), getattr(gap_losses, f"{loss.kernel}_slope")
    value, slope = loss.kernel
    return value, slope


def twos_of(formula: Any, params: tuple[float, ...]) -> int:
    """Return where a formula that takes powers has a 2, as a set of bits: squares cost no exponential."""
    takes_powers = "power" in getattr(formula, "fn", formula).__code__.co_names
    return sum(1 << i for i, x in enumerate(params) if x == 2.0 and takes_powers)


@functools.cache
def _compiled(value: Any, slope: Any, n_params: int, twos: int, real: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        bound = {"VALUE": getattr(value, "fn", value), "SLOPE": getattr(slope, "fn", slope)}
        return module_of(column, real, bound | {"N_PARAMS": n_params, "TWOS": twos})

    name = getattr(value, "__name__", "loss").removesuffix("_value")
    return stored.entry(5, f"{name}_{real}", f"{described(value)} {described(slope)} {n_params} {twos} {real}", make)


def terms(n, p, rest, log_p, log_rest, share, params, value, pull):
    """Write what ``n`` classes add for their shares; all but ``n`` are addresses."""
    p, rest, share = vector(p, n, real), vector(rest, n, real), vector(share, n, real)
    log_p, log_rest = vector(log_p, n, real), vector(log_rest, n, real)
    value, pull = vector(value, n, real), vector(pull, n, real)
    of_loss = with_twos(numbers(params, N_PARAMS, real), TWOS)
    for i in range(n):
        a, b = TERMS(p[i], rest[i], log_p[i], log_rest[i], share[i], of_loss)
        value[i] = a
        pull[i] = b


def summed_terms(n, exps, scale, log_p, share, params, pull, sums):
    """Write the pull of ``n`` classes whose p, exponentials times the scale, are at most 1/2; add up value and pull."""
    e, log_p, share, pull = vector(exps, n, real), vector(log_p, n, real), vector(share, n, real), vector(pull, n, real)
    of_row, of_loss, sums = (
        vector(scale, 1, real)[0],
        with_twos(numbers(params, N_PARAMS, real), TWOS),
        vector(sums, 2, real),
    )
    value = pulled = 0.0
    for i in range(n):
        p = e[i] * of_row
        a, b = TERMS(p, 1.0 - p, log_p[i], 0.0, share[i], of_loss)
        pull[i] = b
        value += a
        pulled += b
    sums[0] += value
    sums[1] += pulled


class Terms(NamedTuple):
    """Addresses of C functions, that of their numbers, and what keeps them."""

    of_others: int  # `summed_terms`
    of_any: int  # `terms`
    needs_log_p: int  # whether the former looks at it
    params: int
    owners: tuple[Any, ...]


@functools.lru_cache(256)
def terms_of(loss: Any, real: str) -> Terms:
    """Return the terms of a loss in an accumulation dtype."""
    kernel, few, params = class_terms.terms_of(loss)
    functions = [_compiled_terms(*of, params, real) for of in ((summed_terms, few), (terms, kernel))]
    held = array("d" if real == "float64" else "f", params)
    at = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    return Terms(at[0], at[1], few == kernel, held.buffer_info()[0], (functions, held))


def _compiled_terms(body: Any, kernel: str, params: tuple[float, ...], real: str) -> Any:
    of_class = getattr(class_terms, f"{kernel}_terms")
    return _compiled_body(body, getattr(of_class, "fn", of_class), len(params), twos_of(of_class, params), real)


@functools.cache
def _compiled_body(body: Any, of_class: Any, n_params: int, twos: int, real: str) -> Any:
    def make() -> Any:
        from .compile import module_of

        return module_of(body, real, {"TERMS": of_class, "N_PARAMS": n_params, "TWOS": twos})

    name = f"{of_class.__name__}_{body.__name__}_{real}"
    return stored.entry(body.__code__.co_argcount, name, f"{name} {n_params} {twos}", make)


@functools.cache
def why_not_compiled(name: str, kernel: Any, n_params: int) -> str | None:
    """Return why Numba cannot compile the (value, slope) of a user's loss, or None if it can."""
    value, slope = kernel
    try:
        _compiled(value, slope, n_params, 0, "float32")
    except Exception as error:  # whatever stands in a user's body
        # every level of calls repeats where it failed, before the reason
        lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Failed in")]
        reason = lines[0] if lines else type(error).__name__
        functions = " or ".join(getattr(x, "__name__", repr(x)) for x in kernel)
        return f"numba cannot compile {functions}, the kernel of {name}: {reason.strip()}"
    return None


def described(body: Callable[..., Any]) -> str:
    """Return what a body is made of, with all that it names: two that differ are described differently."""
    body = getattr(body, "fn", body)
    if not isinstance(body, FunctionType):
        raise TypeError(f"expected a function, got {type(body).__name__}")
    if body.__module__.startswith(f"{__package__.rpartition('.')[0]}.formulas."):
        return f"{body.__module__}.{body.__qualname__}"  # whose source `stored` looks at
    code = body.__code__
    named = [body.__globals__[name] for name in code.co_names if name in body.__globals__]
    named += [cell.cell_contents for cell in body.__closure__ or ()] + list(body.__defaults__ or ())
    inner = [
        described(x) if isinstance(getattr(x, "fn", x), FunctionType) else repr(x)
        for x in named
        if getattr(x, "__name__", "") not in ("triton.language", "tl")
    ]
    return f"{body.__qualname__} {code.co_code.hex()} {code.co_consts} {code.co_names} {inner}"


def probability_column(n, gap, params, value, slope):
    """As `column` of a loss whose value is p and whose slope is 1 - p: what turns a gradient into probabilities."""
    gap, value, slope = vector(gap, n, real), vector(value, n, real), vector(slope, n, real)
    for i in range(n):
        value[i] = sigmoid(gap[i])
    for i in range(n):
        slope[i] = sigmoid(-gap[i])


@functools.cache
def probability(real: str) -> Columns:
    """Return `probability_column` in an accumulation dtype."""

    def make() -> Any:
        from .compile import module_of

        return module_of(probability_column, real, {})

    function = stored.entry(5, f"probability_{real}", f"probability {real}", make)
    return Columns(ctypes.cast(function, ctypes.c_void_p).value or 0, 0, (function,))
