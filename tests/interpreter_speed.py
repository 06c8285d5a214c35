"""Make interpreted kernels take a third of the time: what Triton's interpreter repeats is done once.

It patches triton.language for every function a kernel calls, makes a table for every operation and constants for every
shape, and walks a reduction element by element. This patches its private names, so it belongs to tests alone; what
kernels compute stays the same.
"""

from __future__ import annotations

import functools
import math

import triton.language as tl
from triton.runtime import interpreter

_whole_type = tl.block_type.__init__
_one_by_one = interpreter.ReduceOps.generic_reduce
_numpy_type = functools.cache(interpreter._get_np_dtype)


@functools.cache
def _modules(fn):
    """Return what `_patch_lang` would patch for a function: those of the two modules that its file names."""
    return [x for x in (tl, tl.core) if any(value is x for value in fn.__globals__.values())]


@functools.cache
def _shape(*sizes):
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))


@functools.cache
def _fields_of_block(element, sizes):
    made = object.__new__(tl.block_type)
    _whole_type(made, element, list(sizes))
    return vars(made)


def _block(self, element_ty, shape):
    """Make the type of a block; Triton's own checks and names every one."""
    if element_ty.is_ptr():  # has no hash
        _whole_type(self, element_ty, shape)
    else:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        vars(self).update(_fields_of_block(element_ty, sizes))


def _tensor(self, handle, type):
    """Make a tensor; Triton's own wraps the sizes of each, which takes longer than to add two."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(*(type.shape.values if type.is_block() else ()))


def _call(self, *args, **kwargs):
    """Call a device function; Triton's own call patches first, a millisecond each time, whatever is patched already."""
    if any(tl.core.is_builtin(module.load) for module in _modules(self.fn)):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _reduce(self, input):
    """Combine neighbours until one is left, as a compiled kernel does: a tree, all of a level at once."""
    values, axis = [x.handle.data for x in input], self.axis
    if axis is None or self.keep_dims:
        return _one_by_one(self, input)
    while values[0].shape[axis] > 1:
        sides = [
            self.to_tensor(value.take(range(side, value.shape[axis], 2), axis), x.dtype)
            for side in (0, 1) for value, x in zip(values, input, strict=True)
        ]  # fmt: skip
        combined = self.combine_fn.fn(*sides)
        values = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
    return [self.to_tensor(value.squeeze(axis), x.dtype) for value, x in zip(values, input, strict=True)]


def patch_once_a_launch() -> None:
    interpreter.InterpretedFunction.__call__ = _call
    interpreter._get_np_dtype = lambda dtype: _numpy_type(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)
    tl.block_type.__init__ = _block
    tl.tensor.__init__ = _tensor
    interpreter.ReduceOps.generic_reduce = _reduce
