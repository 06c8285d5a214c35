"""Compile a body, a loop of this room with the formulas it names, to a module of LLVM for one element type.

Bodies are plain Python. Numba compiles them with other globals: `tl` and what `scalar` has a twin of are looked up
there, every function they name is compiled along, and their numbers are of the accumulation dtype, so that nothing is
widened on the way. Machine code is made of it, and kept on disk, by `stored`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.compiler_lock import global_compiler_lock
from numba.core.target_extension import target_override

from . import scalar
from .pipeline import compiled

FORMULA = {"contract"}  # as a GPU's compiler: reordered sums, or a NaN taken for impossible, would break formulas
LOOP = {"contract", "reassoc", "nsz", "arcp"}  # sums over classes in any order, so in vectors


def module_of(body: Callable[..., Any], element: str, bound: dict[str, Any], given: str = "float32") -> Any:
    """Return LLVM's module of ``entry``, a C function of addresses and sizes that returns nothing.

    Args:
        body: what it does.
        element: the element type of its tensors.
        bound: what the body names but does not import.
        given: the element type of probabilities.
    """
    function = _compiler(element).function(body, bound | scalar.given(given))
    n = body.__code__.co_argcount
    with global_compiler_lock, target_override("bonus_ops"):
        function.compile(numba.void(*[numba.intp] * n))
    (overload,) = function.overloads.values()
    args, name = ", ".join(f"i64 %a{i}" for i in range(n)), overload.fndesc.llvm_func_name
    module = overload.library.linked()
    module.link_in(llvm.parse_assembly(
        f'declare i32 @"{name}"(ptr, ptr, {", ".join(["i64"] * n)})\n'
        f"define void @entry({args}) {{\n  %out = alloca ptr\n  %error = alloca ptr\n"
        f'  call i32 @"{name}"(ptr %out, ptr %error, {args})\n  ret void\n}}\n'
    ))  # fmt: skip
    for inner in module.functions:
        if not inner.is_declaration and inner.name != "entry":
            inner.linkage = "internal"  # all are inlined, and none is left
    return module


@functools.cache
def _compiler(element: str) -> _Compiler:
    return _Compiler(element)


class _Compiler:
    """Compiles bodies for tensors of one element type ("float32", "bfloat16", ...), each once."""

    def __init__(self, element: str) -> None:
        self.twins = scalar.twins(element)
        self.number = np.float64 if element == "float64" else np.float32
        self.language = types.ModuleType("tl")
        self.language.__dict__.update(self.twins, static_range=range)
        self.made: dict[Any, Any] = {}

    def function(self, body: Callable[..., Any], bound: dict[str, Any]) -> Any:
        """Return ``body`` for Numba; names in ``bound`` are taken from there, by it and the loops it names."""
        is_loop = ".cpu." in body.__module__
        key = body, *(bound.items() if is_loop else ())
        if key not in self.made:
            known = body.__globals__ | bound if is_loop else body.__globals__
            code = body.__code__
            own = {name: self._meant(name, known[name], bound) for name in code.co_names if name in known}
            own |= {"__name__": body.__module__, "float": self.twins["float"]}  # of the words "inf" and "nan"
            code = code.replace(co_consts=tuple(map(self._constant, code.co_consts)))
            rebound = types.FunctionType(code, own, body.__name__, body.__defaults__, body.__closure__)
            fastmath = LOOP if is_loop else FORMULA
            self.made[key] = compiled(rebound, fastmath)
        return self.made[key]

    def _meant(self, name: str, x: Any, bound: dict[str, Any]) -> Any:
        if name == "tl":
            return self.language
        x = getattr(x, "fn", x)  # of a function under @triton.jit, compiled or interpreted
        if name in self.twins and (x is None or getattr(x, "__module__", "").endswith(".scalar")):
            x = self.twins[name]
            return self.function(x, bound) if isinstance(x, types.FunctionType) else x
        if isinstance(x, types.FunctionType):
            return self.function(x, bound)
        return self._constant(x.value if type(x).__name__ == "constexpr" else x)

    def _constant(self, x: Any) -> Any:
        if isinstance(x, float):
            return self.number(x)
        return tuple(map(self._constant, x)) if type(x) is tuple else x
