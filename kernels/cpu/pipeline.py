"""Numba's way from a body to LLVM, less what bodies of this room never need.

Its own pipeline serves Python at large and ends with machine code for every function. Bodies are scalar arithmetic,
loops and calls, so a third of its passes are enough; and since only the outermost function is ever called, modules are
collected as they are lowered and optimised once, by `stored`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba.core import (
    cgutils,
    optional,  # noqa: F401
    target_extension,
    typed_passes,
    typing,
    untyped_passes,
)
from numba.core.codegen import CodeLibrary
from numba.core.compiler import CompilerBase, _LowerResult
from numba.core.compiler_machinery import LoweringPass, PassManager, register_pass
from numba.core.cpu import CPUContext
from numba.core.dispatcher import Dispatcher
from numba.core.fastmathpass import rewrite_module
from numba.core.imputils import builtin_registry
from numba.core.registry import CPUTarget
from numba.core.typing import mathdecl
from numba.cpython import builtins, iterators, mathimpl, numbers, rangeobj, slicing, tupleobj  # noqa: F401
from numba.np import arrayobj  # noqa: F401

__all__ = ["compiled"]


class Modules(CodeLibrary):
    """The module of a function, and the libraries of those it calls."""

    def __init__(self, codegen: Any, name: str) -> None:
        super().__init__(codegen, name)
        self.own: list[Any] = []
        self.called: dict[Modules, None] = {}

    def add_ir_module(self, module: Any) -> None:
        self.own.append(module)

    def add_linking_library(self, library: Modules) -> None:
        self.called[library] = None

    def linked(self) -> Any:
        """Return one module of all of LLVM's."""
        whole, known, left = llvm.parse_assembly(""), {self}, [self]
        while left:
            library = left.pop()
            if isinstance(library, Modules):
                for module in library.own:
                    whole.link_in(llvm.parse_assembly(cgutils.normalize_ir_text(str(module))))
                left += [called for called in library.called if called not in known]
                known.update(left)
            else:  # Numba's own
                whole.link_in(library._get_module_for_linking(), preserve=True)
        return whole

    def finalize(self) -> None:
        self._finalized = True

    def get_function(self, name: str) -> Any:
        raise NotImplementedError

    get_llvm_str = get_asm_str = get_function


@register_pass(mutates_CFG=True, analysis_only=False)
class Lowering(LoweringPass):
    """Lower a function to LLVM, without machine code."""

    _name = "lowering_of_bodies"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.library = Modules(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        typed_passes.NativeLowering().run_pass(state)
        lowered = state.cr
        function = state.library.own.copy  # any built-in method tells one function from another; none is called
        state.targetctx.insert_user_function(function, lowered.fndesc, [state.library])
        state["cr"] = _LowerResult(lowered.fndesc, lowered.call_helper, cfunc=function, env=lowered.env)
        return True


PASSES = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.IRLegalization,
    Lowering,
    typed_passes.NoPythonBackend,
)


class Typing(typing.Context):
    """What Numba knows of numbers, tuples and arrays; less numpy's functions, whose every operator is tried."""

    def load_additional_registries(self) -> None:
        self.install_registry(mathdecl.registry)


class Lowered(CPUContext):
    """The same, of how it becomes LLVM's; to import Numba's whole library takes half a second."""

    def load_additional_registries(self) -> None:
        for registry in (mathimpl.registry, builtin_registry):
            self.install_registry(registry)

    def post_lowering(self, module: Any, library: Any) -> None:
        if self.fastmath:
            rewrite_module(module, self.fastmath)


class Bodies(target_extension.CPU):
    """A target of Numba's, in its registry under the name of this library."""


class Target(CPUTarget):
    _toplevel_target_context = functools.cached_property(lambda self: Lowered(self.typing_context, "bonus_ops"))
    _toplevel_typing_context = functools.cached_property(lambda self: Typing())


class Compiled(Dispatcher):
    """A body as Numba compiles it along with those that name it."""

    targetdescr = Target("bonus_ops")


target_extension.target_registry["bonus_ops"] = Bodies
target_extension.dispatcher_registry[Bodies] = Compiled
target_extension.jit_registry[Bodies] = lambda **_: functools.partial(compiled, fastmath=set())

# everything is one function in the end, or loops over formulas would not become vector code
OPTIONS = dict(
    error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, nopython=True,
    boundscheck=None,
)  # fmt: skip


class Pipeline(CompilerBase):
    def define_pipelines(self) -> list[Any]:
        manager = PassManager("bodies")
        for step in PASSES:
            manager.add_pass(step, step.__name__)
        manager.finalize()
        return [manager]


def compiled(body: Callable[..., Any], fastmath: set[str]) -> Compiled:
    return Compiled(body, targetoptions=OPTIONS | {"fastmath": fastmath}, pipeline_class=Pipeline)
