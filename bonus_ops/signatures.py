"""Parameters that are written once: of a function, of its twin that hands them on, of a module that keeps them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["options_of", "takes_what"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_what(function: Callable[_P, Any]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """Give a twin, which returns something else, the parameters of ``function``, which stand written there once."""

    def shown(twin: Callable[..., _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function).replace(return_annotation=inspect.signature(twin).return_annotation)
        known = tuple(signature.parameters)
        takes_any = any(x.kind is x.VAR_KEYWORD for x in signature.parameters.values())

        @functools.wraps(twin)
        def named(*args: _P.args, **options: _P.kwargs) -> _R:
            for name in options:
                if not takes_any and name not in known:  # by the name that was called, not by what it hands them to
                    raise TypeError(f"{twin.__name__}() got an unexpected keyword argument {name!r}")
            return twin(*args, **options)

        named.__dict__["__signature__"] = signature
        return named

    return shown


def options_of(function: Callable[..., Any], without: tuple[str, ...] = ()) -> list[str]:
    """Return what a module keeps for its calls of ``function``: all that it takes beside the tensors of a batch."""
    batch = ("input", "target", "linear_weight", "row_weight")
    return [name for name in inspect.signature(function).parameters if name not in (*batch, *without)]
