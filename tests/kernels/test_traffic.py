"""What the kernels touch, to the byte: each logit read once a sweep, each output written once, nothing else.

With b bytes a logit, of a row of V classes the forward sweep reads V b, and at most

    + b        the label's logit, on its own
    + 8 b      the chunk that holds the largest other logit, for the smallest class that attains it; once a part

where a thread has a row V b alone. Backward reads V b and writes V b. Ignored rows and labels out of range read
nothing.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import bonus_ops
from bonus_ops.call import as_rows
from bonus_ops.kernels.gpu import labels, launch, launching
from bonus_ops.kernels.results import empty_at_phase
from bonus_ops.logit_options import PLAIN
from tests.cases import EMPTY_PART, LAYOUTS, MULTI_TILE, SPLIT_BOTH, SPLIT_FORWARD, generator, typical
from tests.conftest import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the guard watches the interpreter")
if INTERPRETED:
    from tests.interpreter_guard import guard

CHUNK = 8
CASES = [
    # (n_rows, n_classes, layout), n_rows odd where a program holds several rows
    (5, 1, "contiguous"),
    (5, 3, "contiguous"),
    (19, 10, "contiguous"),
    (19, 10, "transposed"),
    (19, 10, "expanded_rows"),
    (19, 65, "padded_rows"),
    (3, 1000, "contiguous"),
    (3, 1000, "offset_1"),
    (3, 1000, "column_slice"),
    (3, 1003, "contiguous"),
    (3, 1003, "offset_3"),
    (3, MULTI_TILE, "contiguous"),
    (2, 1043, "transposed"),  # 16 full tiles of 8 chunks and a partial one; two programs a row backward
    (2, SPLIT_FORWARD, "contiguous"),
    (1, SPLIT_BOTH, "offset_1"),
    (1, EMPTY_PART, "contiguous"),
]
NARROW = {(5, 3, "contiguous"), (19, 10, "contiguous"), (3, 1000, "offset_1"), (3, 1003, "contiguous")}
over_cases = pytest.mark.parametrize(
    ("n_rows", "n_classes", "layout", "dtype"),
    [
        pytest.param(*case, dtype, id=f"{'-'.join(map(str, case))}-{name}")
        for case in CASES
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
        if name == "fp32" or case in NARROW  # the code is the same but for the width of a chunk
    ],
)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def draw(n_rows, n_classes, layout, dtype):
    """Return typical logits in a layout; the second row is ignored where there are three."""
    logits, target = typical(generator(), n_rows, n_classes, dtype)
    if n_rows > 2:
        target[1] = -100
    return LAYOUTS[layout](logits), target


@functools.cache
def observe(n_rows, n_classes, layout, dtype):
    """Run forward and backward of the kernels under the guard."""
    logits, target = draw(n_rows, n_classes, layout, dtype)
    with guard() as launches:
        loss, _ = bonus_ops.bonus_cross_entropy_with_scores(
            logits.requires_grad_(), target, reduction="sum", implementation="triton"
        )
        loss.backward()
    return logits.detach(), target, launches


def reads(launched):
    return launched.times_read("logits[0]")[:, 0]


def counted(logits, target, n=1):
    """Return ``n`` for each logit that must be read, those of expanded rows added up: they are the same memory."""
    times = n * (target != -100).numpy().astype(int)[:, None] * np.ones(logits.shape, int)
    return np.broadcast_to(times.sum(0), times.shape) if logits.stride(0) == 0 and len(logits) > 1 else times


def assert_read_once(logits, target, found, parts=1, more=0, out=None):
    """Check how often a forward read each logit; ``more`` sweeps follow the first, and write ``out``."""
    extra = found - counted(logits, target, 1 + more)
    by = launching.vector(*(x[:, None] for x in (logits, out) if x is not None))
    rows = len(logits) if logits.stride(0) == 0 else 1
    each = 0 if by == 0 else rows  # a thread has a row: label and max are not read again
    assert (extra >= 0).all() and (extra[counted(logits, target) == 0] == 0).all()
    assert extra.max() <= each and (extra.sum(1) <= (1 + CHUNK * parts) * each).all()
    for i, y in enumerate(target.tolist()):  # but for the label, whole chunks
        head = -logits[i].data_ptr() % 16 // logits.element_size() if by > 1 else 0
        chunks = {(k - head) // CHUNK for k in np.flatnonzero(extra[i]).tolist() if k != y}
        assert len(chunks) <= parts * rows, (i, chunks)


@pytest.mark.slow
@over_cases
def test_forward_reads_each_logit_once(n_rows, n_classes, layout, dtype):
    logits, target, launches = observe(n_rows, n_classes, layout, dtype)
    how = launch.forward(n_rows, n_classes, vector=launching.vector(logits[:, None]))
    split = ["partial_kernel", "merge_kernel"] if how.parts > 1 else ["forward_kernel"]
    assert [x.kernel for x in launches] == [*split, "backward_kernel"]
    first, last = launches[0], launches[-2]  # the same where one program has the row
    together = reads(first) + reads(last) if how.parts > 1 else reads(first)
    assert_read_once(logits, target, together, how.parts)
    shares = n_rows * how.parts
    others = {"target_ptr": 8 * n_rows}
    if how.parts > 1:
        parts = {"parts[0]": 16 * shares, "parts[1]": 4 * shares}
        assert first.bytes_written() == parts and others | {"target_ptr": 8 * shares} == rest_of(first)
        assert int(reads(last).sum()) == int((target != -100).sum())  # the label's
        others |= parts
    assert rest_of(last) == others
    # loss, five scores, runner-up, (gap, max, sum_exp)
    assert last.bytes_written() == {f"outputs[{i}]": 4 * n * n_rows for i, n in enumerate((1, 5, 1, 3))}


def rest_of(launched):
    """Return the bytes read of all but the logits."""
    return {name: n for name, n in launched.bytes_read().items() if name != "logits[0]"}


@over_cases
def test_backward_reads_and_writes_each_logit_once(n_rows, n_classes, layout, dtype):
    logits, target, (*_, backward) = observe(n_rows, n_classes, layout, dtype)
    parts = launch.backward(n_rows, n_classes, vector=launching.vector(logits[:, None])).parts
    np.testing.assert_array_equal(reads(backward), counted(logits, target))
    assert (backward.times_written("grad[0]") == 1).all()
    assert rest_of(backward) == {
        "target_ptr": 8 * n_rows * parts, "saved_ptr": 12 * n_rows * parts, "upstream[0]": 4 * n_rows * parts,
    }  # fmt: skip
    assert backward.bytes_written() == {"grad[0]": logits.numel() * logits.element_size()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_rows", "n_classes", "layout", "dtype"),
    [
        (19, 10, "contiguous", torch.float32),
        (3, 1003, "contiguous", torch.bfloat16),
        (3, 1003, "padded_rows", torch.float32),  # softmax rows leave the alignment of logits rows
        (2, 2059, "contiguous", torch.float32),  # a program a row
        (2, 203, "transposed", torch.float32),  # three full tiles and a partial one
    ],
    ids=str,
)
def test_softmax_adds_one_read_and_one_write(n_rows, n_classes, layout, dtype):
    logits, target = draw(n_rows, n_classes, layout, dtype)
    with guard() as launches:
        *_, softmax = bonus_ops.bonus_cross_entropy_with_softmax(logits, target, implementation="triton")
    (only,) = launches
    assert_read_once(logits, target, reads(only), more=1, out=softmax)
    assert (only.times_written("softmax[0]") == 1).all()


def test_loss_alone_writes_no_scores():
    logits, target = draw(5, 65, "contiguous", torch.float32)
    with guard() as launches:
        bonus_ops.bonus_cross_entropy(logits, target, implementation="triton")
    # of a mean: losses and whether they count
    assert launches[0].bytes_written() == {"outputs[0]": 4 * 2 * 5, "outputs[3]": 4 * 3 * 5}


@pytest.mark.parametrize(
    ("n_classes", "label"),
    [(10, label) for label in (-1, 10, 2**31 - 1, 2**31 + 3, 2**40, -(2**40))] + [(1003, -1), (SPLIT_FORWARD, 2**40)],
)
def test_a_label_out_of_range_reads_nothing(label, n_classes):
    logits, target = typical(generator(), 2, n_classes, torch.float32)
    target[1] = max(label, n_classes) if label > 0 else label
    loss = bonus_ops.LogBonus()
    with guard() as launches:  # below the check that a CPU gets
        out = labels.forward(logits[:, None], target, -100, loss, True, False, PLAIN)
        grad = labels.backward(logits[:, None], target, out.saved, torch.ones(2), None, -100, loss, PLAIN)[:, 0]
    assert (sum(reads(x)[0] for x in launches) >= 2).all()
    assert all((reads(x)[1] == 0).all() for x in launches)
    assert out.loss.isnan().tolist() == [False, True]
    assert out.scores.isnan().all(0).tolist() == [False, True]
    assert out.runner_up[1] == -1
    assert grad.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("n_classes", [3, 10, 1000, 1003])
@pytest.mark.parametrize("layout", LAYOUTS)
@over_dtypes
def test_vectors_of_logits_and_output_start_on_16_bytes(layout, n_classes, dtype):
    """What kernels promise the compiler, which the interpreter would not notice."""
    logits = draw(5, n_classes, layout, dtype)[0][:, None]
    size = logits.element_size()
    for out in (logits, torch.empty_like(logits), torch.empty(5, n_classes + 1, dtype=dtype)[:, None, :n_classes]):
        vector = launching.vector(logits, out)
        assert vector in (0, 1, 16 // size)
        for row in range(5 if vector > 1 else 0):
            start = logits[row].data_ptr()
            head = -start % 16 // size
            assert (start + head * size) % 16 == (out[row].data_ptr() + head * size) % 16 == 0
    apart = 0 if logits.stride(0) == 1 else 1
    assert launching.vector(logits) == (16 // size if logits.stride(2) == 1 else apart)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(5, 50257)[:, :-1], torch.zeros(5, 1008)[:, :1003], torch.zeros(7, 1003)[1:], torch.zeros(2, 7, 3, 5)],
    ids=["all but the last", "padded", "from the second row", "classes apart"],
)
@over_dtypes
def test_gradients_start_where_their_logits_do(logits, dtype):
    """Else backward would read and write single elements."""
    logits = (
        torch.empty_strided(logits.shape, logits.stride(), dtype=dtype)
        if logits.storage_offset() == 0
        else (torch.zeros(7, 1003, dtype=dtype)[1:])
    )
    rows = as_rows(logits)
    grad = empty_at_phase(rows)
    assert grad.shape == rows.shape
    assert launching.vector(rows, grad) == launching.vector(rows) != 1
    assert grad.untyped_storage().nbytes() <= 16 * (len(rows) + 1) + logits.numel() * logits.element_size()


@triton.jit
def faulty_kernel(x_ptr, y_ptr, n, FAULT: tl.constexpr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    if FAULT == "past the end":
        x = tl.load(x_ptr + at + 1)
    elif FAULT == "overflow":
        x = tl.load(x_ptr + at, at * n < n)
    else:
        x = tl.load(x_ptr + at)
    if FAULT == "race":
        tl.store(y_ptr + at // 8, x)
    elif FAULT == "in place":
        tl.store(x_ptr + at, x)
    else:
        tl.store(y_ptr + at, x)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, None),
        ("past the end", "load out of bounds"),
        ("padding", "load out of bounds"),
        ("overflow", "int32 overflow"),
        ("race", "two programs write one place"),
        ("in place", "written and read in one launch"),
    ],
)
def test_guard_sees_faults(fault, message):
    x, y = torch.zeros(16), torch.zeros(16)
    if fault == "padding":
        x = torch.zeros(32)[::2]
    with guard(), pytest.raises(Exception, match=message) if fault else contextlib.nullcontext():
        faulty_kernel[(4,)](x, y, 2**30, FAULT=fault)
