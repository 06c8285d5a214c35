"""A context manager that puts the bonus under code which calls `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from .functional import _DEFAULT_BONUS, bonus_cross_entropy
from .losses import ClassLoss, GapLoss

__all__ = ["patch_cross_entropy"]

_FUNCTION: Callable[..., Tensor] = bonus_cross_entropy
_OPTIONS = [p.name for p in inspect.signature(bonus_cross_entropy).parameters.values() if p.kind is p.KEYWORD_ONLY]


class patch_cross_entropy(contextlib.ContextDecorator):
    """Replace `torch.nn.functional.cross_entropy` by `bonus_cross_entropy` inside a ``with`` block or a function.

    For training code that cannot be edited. What is replaced is the attribute of the module, so it reaches every
    ``F.cross_entropy(...)``, `torch.nn.CrossEntropyLoss` and torch's own callers. It does not reach code which has
    copied the function before (``from torch.nn.functional import cross_entropy``), nor models scripted or exported
    before, nor `torch.nn.functional.linear_cross_entropy` where that works in chunks. What `torch.jit.script` compiles
    inside calls back into Python: it keeps the bonus after the block, and cannot be saved.

    The attribute is put back on exit, also after an exception. Blocks nest, the innermost counts, and one object may be
    entered again, also while it is active; as a decorator it patches during each call. The attribute belongs to the
    process: other threads see the patch, and blocks of two threads must not overlap. Patch once around the training.

    Args:
        bonus: as in `bonus_cross_entropy`; None is plain cross-entropy, by this library.
        options: the other keyword-only options of `bonus_cross_entropy`, such as ``implementation``. The arguments that
            cross-entropy has itself stay with each call.

    Raises:
        TypeError, ValueError: for a bad option, here, before anything is patched.

    Example:
        >>> import torch
        >>> from bonus_ops import LogBonus, patch_cross_entropy
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> with patch_cross_entropy(bonus=LogBonus(log_end=0.75)):
        ...     loss_fn(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(-1.7826)
        >>> loss_fn(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.1269)
    """

    def __init__(
        self, *positional: NoReturn, bonus: GapLoss | ClassLoss | None = _DEFAULT_BONUS, **options: Any
    ) -> None:
        if positional:
            raise TypeError(
                f"patch_cross_entropy() takes no positional argument, got {type(positional[0]).__name__}.\nExpected "
                "the loss by keyword, bonus=LogBonus(); as a decorator, @patch_cross_entropy()."
            )
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise TypeError(
                f"patch_cross_entropy() got an unexpected option {unknown[0]!r}.\nExpected options of "
                f"bonus_cross_entropy that cross_entropy does not have: {', '.join(_OPTIONS)}."
            )
        self.options = {"bonus": bonus, **options}
        # raise what a call would raise, whatever its tensors; a kernel may run where those are
        tried = {name: x for name, x in self.options.items() if not isinstance(x, Tensor)}
        if tried.get("implementation") == "triton":
            del tried["implementation"]
        _FUNCTION(torch.zeros(1, 2, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"), **tried)
        self._replaced: list[Callable[..., Any]] = []

    def __repr__(self) -> str:
        return f"patch_cross_entropy({', '.join(f'{name}={x!r}' for name, x in self.options.items())})"

    def __enter__(self) -> patch_cross_entropy:
        self._replaced.append(functional.cross_entropy)
        functional.cross_entropy = _patched(self.options)
        _forget_scripts()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._replaced:
            raise RuntimeError("patch_cross_entropy: left without having been entered; expected `with` or a decorator")
        functional.cross_entropy = self._replaced.pop()
        _forget_scripts()


def _patched(options: dict[str, Any]) -> Callable[..., Tensor]:
    """Return what takes the place of cross-entropy: with its signature, so that scripted code can call it."""

    def with_options(
        input: Tensor, target: Tensor, weight: Tensor | None, size_average: bool | None, ignore_index: int,
        reduce: bool | None, reduction: str, label_smoothing: float,
    ) -> Tensor:  # fmt: skip
        given = (input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        return _FUNCTION(*given, **options)

    def cross_entropy(
        input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
        ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Tensor:  # fmt: skip
        return with_options(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)

    # a script compiles the one, whose call of the other it leaves to Python; it reads types, not their names
    for function in (with_options, cross_entropy):
        function.__annotations__ = typing.get_type_hints(function)
    torch.jit.ignore(with_options)  # type: ignore[no-untyped-call]
    cross_entropy.__doc__ = bonus_cross_entropy.__doc__
    return cross_entropy


def _forget_scripts() -> None:
    """Let a module be compiled anew when scripted next: torch would reuse what it made of its class before."""
    torch.jit._recursive.concrete_type_store.type_store.clear()
