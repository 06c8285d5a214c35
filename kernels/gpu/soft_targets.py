"""Shares of the classes in a target: ``t_k = weight_k (keep h_k + off)``, with h the one-hot label or probabilities."""

from typing import NamedTuple

import triton
import triton.language as tl

from .rows import Rows, accumulable, chunk_classes, fetch, load_classes, numbers_of, row_ptr


class Target(NamedTuple):
    """The target of a block of rows; what is None was not given. Triton 3.6 returns no None: kernels make it."""

    rows: Rows  # of the probabilities where given, else of the logits
    probabilities: tl.tensor  # None, or anything: whether they are given
    weight_ptr: tl.tensor
    bonus_weight_ptr: tl.tensor
    params: tl.tuple  # keep and off of cross-entropy, keep and off of the bonus


@triton.jit
def rows_of(array, rows, row):
    """Return ``rows`` of the probabilities, or as they are where these are None."""
    if array is None:
        return rows
    else:
        return Rows(
            row_ptr(array, row), rows.head, rows.n_chunks, rows.target, rows.active, rows.ignored, rows.n_classes,
            array.class_stride,
        )  # fmt: skip


@triton.jit
def shares_of(hard, classes, mask, target):
    """Return the shares (t, v) of cross-entropy and bonus, 0 where masked."""
    keep, off, bonus_keep, bonus_off = target.params
    t, v = keep * hard + off, bonus_keep * hard + bonus_off
    if target.weight_ptr is not None:
        t *= load_weight(target.weight_ptr + classes, mask).to(t.dtype)
    if target.bonus_weight_ptr is not None:
        v *= load_weight(target.bonus_weight_ptr + classes, mask).to(v.dtype)
    return where_any(mask, t), where_any(mask, v)


@triton.jit
def where_any(mask, share):
    """Return 0 where masked; a number that all classes share stays one."""
    if mask is None or len(share.shape) == 0:
        return share
    else:
        return tl.where(mask, share, 0.0)


@triton.jit
def load_weight(ptr, mask):
    if mask is None:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask, 0.0)


@triton.jit
def fetch_both(rows, target, chunk, where, VECTOR: tl.constexpr):
    """Return what `fetch` loads of the logits, and of the probabilities or 0."""
    raw = fetch(rows, chunk, where, VECTOR)
    if target.probabilities is None:
        return raw, 0
    else:
        return raw, fetch(target.rows, chunk, where, VECTOR)


@triton.jit
def shares_in_chunks(target, raw, chunk, mask, like):
    """Return (t, v) of chunks [1, LANES], in the dtype of ``like``, right for all classes but the label.

    ``raw`` are the probabilities. Of the rest: numbers where all its classes have the same share, else [ROWS, LANES,
    CHUNK], 0 where masked.
    """
    if target.probabilities is None:
        rest = tl.zeros((), like.dtype)
    else:
        rest = numbers_of(raw, target.rows).to(like.dtype)
    return shares_of(rest, chunk_classes(target.rows, chunk), mask, target)


@triton.jit
def shares_at(target, classes, mask, like):
    """Return (t, v) of the classes [ROWS, n], in the dtype of ``like``."""
    if target.probabilities is None:
        hard = tl.where(classes == target.rows.target[:, None], 1.0, 0.0).to(like.dtype)
    else:
        hard = accumulable(load_classes(target.rows, classes, mask)).to(like.dtype)
    return shares_of(hard, classes, mask, target)
