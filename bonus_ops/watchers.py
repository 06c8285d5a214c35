"""Who watches a call beside the tape: the compiler, `torch.func`, forward mode, dispatch modes.

Operators serve the tape and the compiler. Where anybody else watches, a formula in plain torch does, which is right at
any depth: an operator under a transform that it has no rule for has tangents of zero, in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["constant_when_compiled", "is_deeply_transformed", "is_plain_eager", "is_transformed"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """Let the compiler run ``function`` and keep its result.

    As torch.compiler.assume_constant_result, which would import the compiler, 1.7 s, together with this package.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def is_plain_eager(*tensors: Tensor | None) -> bool:
    """Return whether only the tape watches: no compiler, transform, batch, dispatch mode or such subclass."""
    if torch.compiler.is_compiling() or _is_transformed_eager() or torch._C._len_torch_dispatch_stack():
        return False
    for x in tensors:
        if x is None:
            continue
        # others may have no memory here, or want results of their class
        if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
            return False
        # batched, or left over from a transform that has ended
        if torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
    return True


def is_transformed() -> bool:
    """Return whether `torch.func` or forward mode is at work, whether or not the compiler looks on."""
    if torch.compiler.is_compiling():  # reading the level makes the compiler guard it
        return forward_ad._current_level >= 0 or _levels() > 0
    return _is_transformed_eager()


def _is_transformed_eager() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_deeply_transformed() -> bool:
    """Return whether forward mode or more than one transform of `torch.func` is at work."""
    return forward_ad._current_level >= 0 or _levels() > 1 or _is_forward_mode()


@constant_when_compiled
def _levels() -> int:
    return len(torch._C._functorch.get_interpreter_stack() or ())


@constant_when_compiled
def _is_forward_mode() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
