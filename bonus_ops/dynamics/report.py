"""The map of a data set: which examples are easy, which are hard, which to look at for a wrong label or a bad input."""

from __future__ import annotations

import csv
import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..number_checks import check_integer, check_number
from .suggested import Labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["KINDS", "NothingKnown", "Report"]

KINDS = ("easy", "hard", "suspect_label", "suspect_input", "unknown")
COLORS = ("#b8c4d6", "#4c78a8", "#d62728", "#9467bd", "none")
MEAN, EARLY = "mean_el2n", "early_entropy"
LEADER = {"arrowstyle": "-", "linewidth": 0.4, "color": "gray"}  # from a point to its mark


class NothingKnown(ValueError):
    """No example has a statistic that a report needs; ``name`` is the statistic's."""

    def __init__(self, name: str) -> None:
        super().__init__(f"report: no example has {name} together with the other axis of the map")
        self.name = name


@dataclass(frozen=True, repr=False)
class Report:
    """What each example looks like on two axes, mean EL2N over training and entropy early in it.

    ==================  ===================  =====================
    kind                mean EL2N            early entropy
    ==================  ===================  =====================
    ``easy``            below its cut        below its cut
    ``hard``            below                above
    ``suspect_label``   above                below
    ``suspect_input``   above                above
    ``unknown``         either was never observed
    ==================  ===================  =====================

    A label that the model contradicts all through training gives a high mean EL2N; an input it cannot read gives that
    and a high entropy from the start; a hard but sound example has a high entropy early and is learned in the end. The
    cuts are ranks, since no fixed value survives another noise rate or number of classes: above is among the given
    share of the largest. So a share is always flagged, of clean data too: a list to look at, not a verdict.

    Whom to suspect is the stronger half of the answer, which kind of suspect the weaker. ``python -m bench claims
    separation`` measures both axes on damaged data, ``suspects`` what dropping the suspects does.

    Attributes:
        kind: position in `KINDS` of each example, int64 [num_examples], on the CPU.
        columns: every statistic of the tracker by name, float32 [num_examples], on the CPU.
        labels: those given and those that the predictions over training vote for, with the confidence in both, on the
            CPU; None where the tracker does not keep ``suggested_label``.
        cuts: values of ``mean_el2n`` and ``early_entropy`` that above means above of.
    """

    kind: Tensor
    columns: dict[str, Tensor]
    cuts: tuple[float, float]
    labels: Labels | None = None

    @classmethod
    def of(
        cls, columns: dict[str, Tensor], labels: Labels | None = None, suspect: float = 0.15, uncertain: float = 0.15
    ) -> Report:
        """Make the report of a tracker's statistics; `ExampleTracker.report` collects them.

        Args:
            columns: statistics by name, float32 [num_examples] on the CPU, NaN where there is none; ``mean_el2n`` and
                ``early_entropy`` are needed.
            labels: as in the attributes.
            suspect: share of the examples with the largest mean EL2N to suspect, in [0, 1]; about the share of damage
                expected, or of what there is time to look at.
            uncertain: share with the largest early entropy to call hard or bad input, in [0, 1].

        Raises:
            TypeError: a share is no number.
            ValueError: a share is out of range, a statistic is missing, or no example has both (`NothingKnown`).
        """
        check_number("report", "suspect", suspect, "[0, 1]")
        check_number("report", "uncertain", uncertain, "[0, 1]")
        if missing := [name for name in (MEAN, EARLY) if name not in columns]:
            raise ValueError(f"report: needs the field {' and '.join(missing)}, kept are {', '.join(columns)}")
        mean, early = columns[MEAN], columns[EARLY]
        known = ~(mean.isnan() | early.isnan())
        if not known.any():
            raise NothingKnown(EARLY if early.isnan().all() else MEAN)
        cuts = _cut(mean[known], suspect), _cut(early[known], uncertain)
        kind = 2 * (mean > cuts[0]).to(torch.int64) + (early > cuts[1])
        return cls(torch.where(known, kind, KINDS.index("unknown")), columns, cuts, labels)

    @property
    def suspects(self) -> Tensor:
        """Examples to look at first, of either kind, worst first: int64 indices by falling mean EL2N."""
        suspect_label, suspect_input = map(KINDS.index, ("suspect_label", "suspect_input"))
        return self._worst_first((self.kind == suspect_label) | (self.kind == suspect_input))

    def of_kind(self, kind: str) -> Tensor:
        """Return the indices of the examples of a kind, by falling mean EL2N, int64.

        Raises:
            ValueError: the kind is none of `KINDS`.
        """
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
        return self._worst_first(self.kind == KINDS.index(kind))

    def name_of(self, index: int) -> str:
        """Return the kind of an example, one of `KINDS`."""
        return KINDS[int(self.kind[index])]

    def __str__(self) -> str:
        """Return how many examples are of each kind."""
        return ", ".join(f"{int((self.kind == i).sum())} {kind}" for i, kind in enumerate(KINDS))

    def __repr__(self) -> str:
        return f"Report({self})"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line an example: index, kind, labels and every statistic, empty where there is none."""
        table = self._table()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            for row in zip(*table.values(), strict=True):
                writer.writerow(["" if value is None or value != value else value for value in row])

    def to_pandas(self) -> Any:
        """Return the table as a `pandas.DataFrame` indexed by example.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        pandas = importlib.import_module("pandas")  # optional, and without types
        return pandas.DataFrame(self._table()).set_index("index")

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        images: Any = None,
        captions: Sequence[Any] | Tensor | None = None,
        shown: int = 8,
    ) -> Figure:
        """Draw the map, with the worst suspects of either kind marked by their index.

        Args:
            path: file to write; its suffix says the format. None writes none.
            images: of the examples, indexed by example, each anything `imshow` takes or [C, H, W] with 1, 3 or 4
                channels, as a tensor [num_examples, C, H, W] has them; those marked are shown below.
            captions: a word on each example for its image, indexed by example. None tells the label given and the one
                suggested where they differ.
            shown: how many to mark of each suspect kind.

        Returns:
            The `matplotlib.figure.Figure`, which a notebook shows; nothing is registered with pyplot.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            TypeError, ValueError: ``shown`` is no int or negative; an image has another shape; there is no image or
                caption for an example that is to be shown. Nothing is written then.
        """
        check_integer("plot", "shown", shown, 0)
        from matplotlib.figure import Figure

        marked = {kind: self.of_kind(kind)[:shown].tolist() for kind in KINDS[2:4]}
        indices = [index for kind in marked.values() for index in kind]
        pictures = (
            {} if images is None else {i: _channels_last(_of("images", images, i, len(self.kind))) for i in indices}
        )
        texts = {i: self._caption(captions, i) for i in pictures}
        rows = [kind for kind, indices in marked.items() if indices and images is not None]
        figure = Figure(figsize=(9, 6 + 1.4 * len(rows)), layout="constrained")
        grid = figure.add_gridspec(1 + len(rows), max(shown, 1), height_ratios=[6] + [1.4] * len(rows))
        scatter = figure.add_subplot(grid[0, :])
        marks = self._scatter(scatter, indices)
        handles = scatter.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8, title="kind (number of examples)",
                      title_fontsize=8)  # fmt: skip
        for row, kind in enumerate(rows, 1):
            for column, index in enumerate(marked[kind]):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(pictures[index], cmap="gray")
                axes.set_title(texts[index], fontsize=8, color=COLORS[KINDS.index(kind)])
                axes.axis("off")
        _spread(figure, scatter, marks)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _caption(self, captions: Any, index: int) -> str:
        if captions is not None:
            return f"{index}: {_of('captions', captions, index, len(self.kind))}"
        if self.labels is None or self.labels.given[index] == self.labels.suggested[index]:
            return str(index)
        return f"{index}: {int(self.labels.given[index])}, not {int(self.labels.suggested[index])}?"

    def _scatter(self, axes: Any, marked: list[int]) -> list[Any]:
        early, mean = self.columns[EARLY], self.columns[MEAN]
        for i, kind in enumerate(KINDS[:4]):
            here = self.kind == i
            label = f"{kind.replace('_', ' ')} ({int(here.sum())})"
            axes.scatter(early[here].tolist(), mean[here].tolist(), s=8, color=COLORS[i], label=label)
        marks = []
        for index in marked:
            position = float(early[index]), float(mean[index])
            marks.append(axes.annotate(str(index), position, xytext=(3, 2), textcoords="offset points", fontsize=7))
        axes.axhline(self.cuts[0], color="gray", linewidth=0.8, linestyle=":")
        axes.axvline(self.cuts[1], color="gray", linewidth=0.8, linestyle=":")
        axes.set_xlabel("entropy early in training, nats (right: the model was unsure)")
        axes.set_ylabel("mean EL2N over training (up: the model contradicts the label)")
        return marks

    def _table(self) -> dict[str, list[Any]]:
        kinds = [KINDS[i] for i in self.kind.tolist()]
        columns: dict[str, list[Any]] = {"index": list(range(len(kinds))), "kind": kinds}
        if self.labels is not None:
            for name, labels in (("given_label", self.labels.given), ("suggested_label", self.labels.suggested)):
                columns[name] = [None if label < 0 else label for label in labels.tolist()]
            for name in ("given_confidence", "suggested_confidence"):
                columns[name] = getattr(self.labels, name).tolist()
        return columns | {name: column.tolist() for name, column in self.columns.items()}

    def _worst_first(self, mask: Tensor) -> Tensor:
        indices = mask.nonzero().squeeze(1)
        return indices[self.columns[MEAN][indices].argsort(descending=True, stable=True)]


def _of(what: str, things: Any, index: int, n_examples: int) -> Any:
    """Return the thing of an example, or say what is missing."""
    try:
        return things[index]
    except (IndexError, KeyError, TypeError):
        came = f", got {len(things)}" if hasattr(things, "__len__") else f", got {type(things).__name__}"
        raise ValueError(
            f"plot: {what} must be indexed by example, one for each of {n_examples}{came}: none for {index}"
        ) from None


def _spread(figure: Any, axes: Any, marks: list[Any]) -> None:
    """Move each mark to the nearest place inside the axes that is free, and tie it to its point."""
    figure.draw_without_rendering()  # sizes in pixels are known from here on
    taken: list[Any] = []
    turns = [k * math.pi / 4 + 0.4 for k in range(8)]
    places = [(r * math.cos(turn), r * math.sin(turn)) for r in (6, 12, 20, 30, 42, 56, 72, 90) for turn in turns]
    inside = axes.get_window_extent()
    for mark in marks:
        for x, y in [(3.0, 2.0), *places]:
            mark.set_position((x, y))
            box = mark.get_window_extent().padded(2)  # 75 next to 225 is not 75225
            corners_inside = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
            if corners_inside and not any(box.overlaps(t) for t in taken):
                break
        if math.hypot(x, y) > 10:
            axes.annotate("", mark.xy, xytext=(x, y), textcoords="offset points", arrowprops=LEADER)
        taken.append(box)


def _channels_last(image: Any) -> Any:
    """Return the image as `imshow` takes it; one without a shape is its own affair."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
    shape = tuple(getattr(image, "shape", (1, 1)))
    channels = (1, 3, 4)
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in channels):
        return image
    if len(shape) == 3 and shape[0] in channels:
        return image.swapaxes(0, 1).swapaxes(1, 2)
    raise ValueError(
        f"images: expected each [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, got shape {list(shape)}"
    )


def _cut(values: Tensor, share: float) -> float:
    """Return the value that at most ``share`` of the values lie above; equal ones stay together, below."""
    above = int(share * len(values))
    return float(values.kthvalue(len(values) - above).values) if above < len(values) else float("-inf")
