"""Parameters that are written once: of a function, of its twin that hands them on, of a module that keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["options_of", "takes_what"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_what(function: Callable[_P, Any]) -> Callable[[Callable[..., _R]], Callable[_P, _R]]:
    """Give a twin, which returns something else, the parameters of ``function``, which stand written there once."""

    def shown(twin: Callable[..., _R]) -> Callable[_P, _R]:
        returned = inspect.signature(twin).return_annotation
        twin.__dict__["__signature__"] = inspect.signature(function).replace(return_annotation=returned)
        return twin

    return shown


def options_of(function: Callable[..., Any], without: tuple[str, ...] = ()) -> list[str]:
    """Return what a module keeps for its calls of ``function``: all that it takes beside the tensors of a batch."""
    batch = ("input", "target", "linear_weight", "row_weight")
    return [name for name in inspect.signature(function).parameters if name not in (*batch, *without)]
