"""Halve the time of interpreted kernels: patch triton.language once a launch, not again for every function it calls.

Patches private names of Triton's interpreter, so it belongs to tests alone; what kernels compute stays the same.
"""

from __future__ import annotations

import functools

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _modules(fn):
    """Return what `_patch_lang` would patch for a function: those of the two modules that its file names."""
    return [x for x in (tl, tl.core) if any(value is x for value in fn.__globals__.values())]


def _call(self, *args, **kwargs):
    """Call a device function; Triton's own call patches first, a millisecond each time, whatever is patched already."""
    if any(tl.core.is_builtin(module.load) for module in _modules(self.fn)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def patch_once_a_launch() -> None:
    interpreter.InterpretedFunction.__call__ = _call
