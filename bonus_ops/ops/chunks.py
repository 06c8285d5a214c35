"""The linear form by chunks of rows, so that no more logits exist than a budget holds; without a gradient by tiles.

    z = x W^T + b        dx = (dL/dz) W        dW = sum (dL/dz)^T x        db = sum dL/dz

Between the first product and the others loops or kernels turn a chunk's logits into results, and into their gradient,
which takes the place of the logits. dW is kept in the accumulation dtype: read and written once a chunk, which is why
fewer than 128 rows a chunk cost time. Without a gradient nothing is needed of a row but sums, so tiles of classes do:
their memory does not grow with the number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, row_sums
from ..logit_options import PLAIN, LogitOptions
from ..losses import GapLoss
from ..row_sums import RowSums
from ..soft_targets import SoftTargets
from . import labels, room

__all__ = ["Layer", "LinearResult", "Products", "Rows", "Wanted", "computed", "empty", "row_bytes", "rows_of_chunk"]

# Measured on a server with AVX2, one thread, 1024x512x32000 to 512x768x128256: 256 to 512 rows a chunk are alike
BUDGET = {"cpu": 128 << 20}  # bytes: 256 rows of 128256 classes
BUDGET_OF_ACCELERATORS = 1 << 30
ROWS = 512  # at most, on a CPU that chooses itself
PAD = 64  # elements to which rows of a chunk are padded: an odd number of classes costs the first product a quarter
WEIGHT_TILE = 4 << 20  # bytes of the weight that are widened at once
TILE = (512, 2048)  # rows and classes, where nothing but sums is wanted


class Layer(NamedTuple):
    """What the logits are made of."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [C, H]
    bias: Tensor | None  # [C]
    dtype: torch.dtype  # what products are made of


class Rows(NamedTuple):
    """What is computed of every row of logits."""

    label: Tensor  # [N]
    upstream: Tensor | None  # [N], of each row's loss
    z_upstream: Tensor | None  # [N], of the square of each row's logsumexp, undivided; None where that costs nothing
    targets: SoftTargets | None  # None for class indices
    loss: Any
    ignore_index: int
    options: LogitOptions  # whose scale is left to the products where nothing comes between

    @property
    def folded(self) -> float:
        """The scale, where the products take it."""
        return self.options.scale if self.options.softcap is None else 1.0

    @property
    def of_product(self) -> LogitOptions:
        """What is left to do to the products."""
        return PLAIN if self.options.softcap is None else self.options

    @property
    def norm_from_scores(self) -> bool:
        """Whether the scores know the norm of each row's gradient."""
        hard = self.targets is None and isinstance(self.loss, GapLoss)
        return hard and self.options.softcap is None and self.z_upstream is None


class Wanted(NamedTuple):
    """What is asked for."""

    scores: bool
    norm: bool  # of the gradient of every row's logits
    hidden: bool  # gradients
    weight: bool
    bias: bool

    @property
    def gradient(self) -> bool:
        """Whether any gradient is."""
        return self.hidden or self.weight or self.bias


class LinearResult(NamedTuple):
    """What comes of it; no elements where it was not asked for. Gradients are of ``sum upstream loss / divisor``."""

    loss: Tensor  # [N] accumulation dtype
    lse: Tensor  # [N] the same; where the z-loss wants it
    scores: Tensor  # [5, N] float32
    runner_up: Tensor  # [N] int32
    norm: Tensor  # [N] float32, of the last layer's gradient of upstream times loss
    grad_hidden: Tensor  # [N, H] accumulation dtype, as the next two
    grad_weight: Tensor  # [C, H]
    grad_bias: Tensor  # [C]


def empty(layer: Layer, wanted: Wanted, lse: bool) -> LinearResult:
    """Return the memory of the results."""
    (n_rows, size), n_classes = layer.hidden.shape, layer.weight.shape[0]
    dtype = reference.accumulation_dtype(layer.hidden.dtype)

    def made(asked: bool, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return layer.hidden.new_empty(shape if asked else (0,), dtype=dtype)

    return LinearResult(
        made(True, n_rows),
        made(lse, n_rows),
        made(wanted.scores, 5, n_rows, dtype=torch.float32),
        made(wanted.scores, n_rows, dtype=torch.int32),
        made(wanted.norm, n_rows, dtype=torch.float32),
        made(wanted.hidden, n_rows, size),
        made(wanted.weight, n_classes, size),
        made(wanted.bias, n_classes),
    )


def row_bytes(n_classes: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how much memory the logits of a row take in a chunk."""
    dtype = reference.accumulation_dtype(dtype) if device.type == "cpu" else dtype
    return -(-n_classes // PAD) * PAD * dtype.itemsize


def rows_of_chunk(n_rows: int, n_bytes: int, budget: int, device: torch.device) -> int:
    """Return the rows of all chunks but the last: as many as the budget holds, spread evenly."""
    most = n_rows
    if not budget:
        budget = BUDGET.get(device.type, BUDGET_OF_ACCELERATORS)
        most = min(most, ROWS) if device.type == "cpu" else most
    most = max(min(most, budget // max(n_bytes, 1)), 1)
    return -(-n_rows // -(-n_rows // most)) if n_rows else 1


def computed(
    layer: Layer, rows: Rows, wanted: Wanted, divisor: Tensor | None, budget: int, implementation: str
) -> LinearResult:
    """Return the results of all rows; ``budget`` in bytes, 0 for as much as was measured to be enough.

    Gradients are divided by ``divisor`` on a CPU, where the products do it; elsewhere the caller does, without a wait.
    """
    out = empty(layer, wanted, rows.z_upstream is not None)
    on_cpu = layer.hidden.device.type == "cpu"
    kept = None
    if on_cpu:  # rows that teach nothing cost nothing
        reference.check_target(rows.label, layer.weight.shape[0], rows.ignore_index)
        counts = rows.label != rows.ignore_index
        if not counts.all():
            kept = counts.nonzero()[:, 0]
            for x, nothing in zip(out, (0.0, 0.0, math.nan, -1, math.nan, 0.0, 0.0, 0.0), strict=True):  # fmt: skip
                x.fill_(nothing)
    n_rows, n_classes = len(layer.hidden) if kept is None else len(kept), layer.weight.shape[0]
    from_chunks = wanted.norm and not rows.norm_from_scores
    if not n_rows:
        return out._replace(grad_weight=out.grad_weight.zero_(), grad_bias=out.grad_bias.zero_())
    how = implementation, "labels" if rows.targets is None else "soft"
    if how in _BY_SUMS and not (wanted.gradient or from_chunks):
        return _from_sums(_summed(layer, rows, kept), rows, kept, out)
    factor = (1.0 / divisor).item() if on_cpu and divisor is not None else 1.0
    products = Products(layer, factor, rows.folded)
    n_bytes = row_bytes(n_classes, products.dtype, layer.hidden.device)
    size = rows_of_chunk(n_rows, n_bytes, budget, layer.hidden.device)
    buffer = layer.hidden.new_empty(min(size, n_rows), n_bytes // products.dtype.itemsize, dtype=products.dtype)
    one_chunk = _OF_CHUNKS[how]
    for first in range(0, n_rows, size):
        chunk = slice(first, min(first + size, n_rows)) if kept is None else kept[first : first + size]
        x, label = products.rows(chunk), rows.label[chunk]
        if not on_cpu:  # whatever an ignored row holds: 0 times NaN would reach the weight
            x = torch.where((label != rows.ignore_index)[:, None], x, 0.0)
        z = buffer[: len(x), :n_classes]
        products.logits(x, z)
        upstream, z_upstream = (None if x is None else x[chunk] for x in (rows.upstream, rows.z_upstream))
        of_chunk = rows._replace(label=label[:, None], upstream=upstream, z_upstream=z_upstream)
        loss, lse, columns, runner_up = one_chunk(z[:, None], of_chunk, wanted.scores, wanted.gradient or from_chunks)
        out.loss[chunk] = loss
        if lse is not None:
            out.lse[chunk] = lse
        if wanted.scores:
            out.scores[:, chunk] = columns
            out.runner_up[chunk] = runner_up
        if from_chunks:
            out.norm[chunk] = torch.linalg.vector_norm(z, dim=1).to(torch.float32)
        if wanted.hidden:
            products.to_hidden(z, out.grad_hidden, chunk)
        if wanted.weight:
            products.to_weight(z, x, out.grad_weight, first == 0)
        if wanted.bias:
            products.to_bias(z, out.grad_bias, first == 0)
    return out


def _summed(layer: Layer, rows: Rows, kept: Tensor | None) -> RowSums:
    """Return the sums of the rows that are kept, added up by tiles of classes."""
    products = Products(layer, 1.0, rows.folded)
    n_rows = len(layer.hidden) if kept is None else len(kept)
    sums = row_sums.of_nothing(n_rows, products.dtype, layer.hidden.device)
    buffer = layer.hidden.new_empty(min(TILE[0], n_rows) * TILE[1], dtype=products.dtype)
    for classes, w in products.tiles(TILE[1]):
        for first in range(0, n_rows, TILE[0]):
            part = slice(first, min(first + TILE[0], n_rows))
            chunk = part if kept is None else kept[part]
            x, some = products.rows(chunk), RowSums._make(x[part] for x in sums)
            z = buffer[: len(x) * len(w)].view(len(x), len(w))
            products.tile(x, w, classes, z)
            room("numba", "sums").add(some, z, rows.label[chunk], classes.start, rows.of_product)
    return sums


def _from_sums(sums: RowSums, rows: Rows, kept: Tensor | None, out: LinearResult) -> LinearResult:
    at = slice(None) if kept is None else kept
    out.loss[at] = rows.loss.value(reference.gap_of_sums(sums))
    if len(out.lse):
        out.lse[at] = reference.logsumexp_of_sums(sums)
    if len(out.runner_up):
        *columns, runner_up = reference.scores_of_sums(sums, torch.ones_like(sums.max, dtype=torch.bool))
        out.scores[:, at] = torch.stack(columns)
        out.runner_up[at] = runner_up
    return out


class Products:
    """The products of a layer. On a CPU halves are widened first, the weight by tiles: theirs are not made there."""

    def __init__(self, layer: Layer, factor: float, scale: float) -> None:
        self.layer, self.factor, self.scale = layer, factor * scale, scale
        on_cpu = layer.hidden.device.type == "cpu"
        self.dtype = reference.accumulation_dtype(layer.dtype) if on_cpu else layer.dtype
        self.n_classes, size = layer.weight.shape
        as_it_is = not on_cpu or layer.weight.dtype == layer.dtype == self.dtype
        self.most = self.n_classes if as_it_is else max(WEIGHT_TILE // (max(size, 1) * self.dtype.itemsize), 1)

    def rows(self, chunk: Any) -> Tensor:
        return self._wide(self.layer.hidden[chunk])

    def tiles(self, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield classes and their share of the weight in the dtype of the products."""
        step = max(min(self.most, most or self.most), 1)
        for first in range(0, self.n_classes, step):
            classes = slice(first, min(first + step, self.n_classes))
            yield classes, self._wide(self.layer.weight[classes])

    def logits(self, x: Tensor, out: Tensor) -> None:
        for classes, w in self.tiles():
            self.tile(x, w, classes, out[:, classes])

    def tile(self, x: Tensor, w: Tensor, classes: slice, out: Tensor) -> None:
        if self.layer.bias is None:
            _add(out, x, w.t(), fresh=True, factor=self.scale)
        else:
            torch.addmm(self._wide(self.layer.bias[classes]), x, w.t(), beta=self.scale, alpha=self.scale, out=out)

    def to_hidden(self, grad: Tensor, out: Tensor, chunk: Any) -> None:
        part = out[chunk]
        for classes, w in self.tiles():
            _add(part, grad[:, classes], w, fresh=classes.start == 0, factor=self.factor)
        if not isinstance(chunk, slice):
            out[chunk] = part

    def to_weight(self, grad: Tensor, x: Tensor, out: Tensor, fresh: bool) -> None:
        _add(out, grad.t(), x, fresh, self.factor)

    def to_bias(self, grad: Tensor, out: Tensor, fresh: bool) -> None:
        total = grad.sum(0, dtype=out.dtype)
        out.copy_(total.mul_(self.factor)) if fresh else out.add_(total, alpha=self.factor)

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(self.layer.dtype).to(self.dtype)


def _add(out: Tensor, a: Tensor, b: Tensor, fresh: bool, factor: float = 1.0) -> None:
    """Add ``factor a b`` to ``out``, or, fresh, write it there; sums are kept in the dtype of ``out``."""
    wide = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, **wide, beta=0 if fresh else 1, alpha=factor, out=out)


# --- between the products: logits [n, 1, C] to what is of rows, their gradient written over them ----------------------

_OfChunk = tuple[Tensor, Any, Any, Any]  # loss, logsumexp, scores, runner-up; None where it was not asked for


def _labels_by_loops(z: Tensor, of: Rows, scores: bool, gradient: bool) -> _OfChunk:
    loops, row, options = room("numba", "labels"), (of.ignore_index, of.loss), of.of_product
    upstream = (1.0 if of.upstream is None else of.upstream) if gradient else None
    z_factor = 0.0 if of.z_upstream is None else 1.0
    out = loops.visit(z, of.label, *row, scores, upstream, False, options, z_factor, z, of.z_upstream)
    return out.loss, out.lse, out.scores, out.runner_up


def _labels_by_kernels(z: Tensor, of: Rows, scores: bool, gradient: bool) -> _OfChunk:
    kernels, row, options = room("triton", "labels"), (of.ignore_index, of.loss), of.of_product
    out, lse = kernels.forward(z, of.label, *row, scores, False, options), None
    if of.z_upstream is not None:
        lse = labels.logsumexp(z, of.label, out.saved, of.ignore_index, options[:2])
    if gradient:
        of_lse = None if lse is None else _of_lse(of, lse)
        kernels.backward(z, of.label, out.saved, _each(of, out.saved), of_lse, *row, options, out=z)
    return out.loss, lse, out.scores, out.runner_up


def _of_lse(of: Rows, lse: Tensor) -> Tensor:
    assert of.z_upstream is not None
    return 2.0 * of.z_upstream * lse


def _soft_by_loops(z: Tensor, of: Rows, scores: bool, gradient: bool) -> _OfChunk:
    upstream = None
    if gradient:
        upstream = torch.ones(1, dtype=reference.accumulation_dtype(z.dtype)) if of.upstream is None else of.upstream
    z_factor = 0.0 if of.z_upstream is None else 1.0
    row = (of.ignore_index, of.loss, scores, upstream, of.of_product, z_factor, of.z_upstream)
    out = room("numba", "soft").visit(z, of.label, of.targets, *row, out=z).result
    return out.loss, out.lse if z_factor else None, out.scores, out.runner_up


def _soft_by_kernels(z: Tensor, of: Rows, scores: bool, gradient: bool) -> _OfChunk:
    kernels, row = room("triton", "soft"), (of.ignore_index, of.loss)
    out = kernels.forward(z, of.label, of.targets, *row, scores, of.of_product, of.z_upstream is not None)
    lse = None if of.z_upstream is None else out.lse
    if gradient:
        of_lse = None if lse is None else _of_lse(of, lse)
        kernels.backward(z, of.label, of.targets, out.saved, out.runner_up, _each(of, out.saved), *row, z,
                         of.of_product, of_lse)  # fmt: skip
    return out.loss, lse, out.scores, out.runner_up


def _each(of: Rows, like: Tensor) -> Tensor:
    return like.new_ones(1).expand(len(of.label)) if of.upstream is None else of.upstream


_BY_SUMS = {("numba", "labels")}  # what has loops for tiles of classes
_OF_CHUNKS = {
    ("numba", "labels"): _labels_by_loops,
    ("triton", "labels"): _labels_by_kernels,
    ("numba", "soft"): _soft_by_loops,
    ("triton", "soft"): _soft_by_kernels,
}
