"""A context manager that puts the bonus under code which calls `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

import contextlib
import functools
import inspect
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
    copied the function before (``from torch.nn.functional import cross_entropy``), nor scripted or exported models.

    The attribute is put back on exit, also after an exception. Blocks nest, the innermost counts, and one object may be
    entered again, also while it is active. As a decorator it patches during each call.

    The attribute belongs to the process: other threads see the patch as long as it is on, and blocks of two threads
    must not overlap, since each puts back what it found. Patch once around the training instead.

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
        _try(self.options)
        self._replaced: list[Callable[..., Any]] = []

    def __repr__(self) -> str:
        return f"patch_cross_entropy({', '.join(f'{name}={x!r}' for name, x in self.options.items())})"

    def __enter__(self) -> patch_cross_entropy:
        replaced, options = functional.cross_entropy, self.options

        @functools.wraps(replaced)
        def cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
            return _FUNCTION(*args, **kwargs, **options)

        self._replaced.append(replaced)
        functional.cross_entropy = cross_entropy
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        functional.cross_entropy = self._replaced.pop()


def _try(options: dict[str, Any]) -> None:
    """Raise what a call with these options would raise, whatever its tensors."""
    options = {name: x for name, x in options.items() if not isinstance(x, Tensor)}
    if options.get("implementation") == "triton":
        del options["implementation"]  # it may run where the calls' tensors are
    _FUNCTION(torch.zeros(1, 2, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu"), **options)
