"""The map of a data set: which examples are easy, which are hard, which look damaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .tracker import ExampleTracker

__all__ = ["Report"]


class Report(NamedTuple):
    """A row an example: what it looks like, and why."""

    kind: Tensor

    @classmethod
    def of(cls, tracker: ExampleTracker) -> Report:
        raise NotImplementedError
