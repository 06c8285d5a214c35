"""What runs: the implementation that was named, or an error; where none is named, the fastest that can.

Every cell of the table below is a call, forward and backward, whose launches are counted: of grids in Triton's
interpreter, of loops on their threads. The reference launches neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from bonus_ops import (
    GapLoss,
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    bonus_cross_entropy_with_softmax,
    call,
    difficulty_scores,
    linear_bonus_cross_entropy,
    mixup_cross_entropy,
    vocab_parallel,
)
from bonus_ops.kernels.cpu import threads
from bonus_ops.kernels.formulas.language import jit
from bonus_ops.kernels.formulas.scalar import log_sigmoid, sigmoid
from tests.conftest import INTERPRETED

# Rows: a kind of call, and the implementation that is asked for. Cells: what runs, or
#     none     NotImplementedError: it has no kernel for what was asked; the compiler raises an error that quotes it
#     cannot   RuntimeError: it cannot run here
#     .        there is no such call
#     -        not asked: another row goes the same way past the compiler, which takes half a second a cell
# Columns, each a way to call:
#     plain           float32 on the CPU
#     float64         float64 on the CPU
#     target64        a target of probabilities in float64, of float32 logits
#     target grad     the target requires a gradient
#     grad, vmap, jvp of torch.func
#     compile         by torch.compile
#     deep            by torch.compile, two transforms of torch.func inside
#     missing         neither Triton nor Numba is installed
#     meta            tensors of a device without kernels
TABLE = """
                                plain        float64      target64     target grad  grad         vmap         jvp          compile      deep         missing      meta
labels               triton     triton       triton       .            .            triton       triton       triton       triton       none         cannot       cannot
labels               numba      numba        numba        .            .            numba        numba        numba        numba        none         cannot       cannot
labels               reference  reference    reference    .            .            reference    reference    reference    reference    reference    reference    reference
labels               None       numba        numba        .            .            numba        numba        numba        numba        reference    reference    reference
smoothing            triton     triton       triton       .            .            none         none         none         triton       -            cannot       cannot
smoothing            numba      numba        numba        .            .            none         none         none         numba        -            cannot       cannot
smoothing            reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
smoothing            None       numba        numba        .            .            reference    reference    reference    -            reference    reference    reference
probabilities        triton     triton       triton       none         none         none         none         none         -            -            cannot       cannot
probabilities        numba      numba        numba        none         none         none         none         none         numba        -            cannot       cannot
probabilities        reference  reference    reference    reference    reference    reference    reference    reference    -            -            reference    reference
probabilities        None       numba        numba        reference    reference    reference    reference    reference    numba        reference    reference    reference
two labels           triton     triton       triton       .            .            triton       triton       triton       -            -            cannot       cannot
two labels           numba      numba        numba        .            .            numba        numba        numba        numba        -            cannot       cannot
two labels           reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
two labels           None       numba        numba        .            .            numba        numba        numba        -            reference    reference    reference
sigmoid              triton     triton       triton       triton       none         none         none         none         triton       -            cannot       cannot
sigmoid              numba      numba        numba        numba        none         none         none         none         numba        none         cannot       cannot
sigmoid              reference  reference    reference    reference    reference    reference    reference    reference    reference    -            reference    reference
sigmoid              None       numba        numba        numba        reference    reference    reference    reference    -            reference    reference    reference
softmax              triton     triton       triton       .            .            triton       triton       triton       -            -            cannot       cannot
softmax              numba      numba        numba        .            .            numba        numba        numba        numba        -            cannot       cannot
softmax              reference  reference    reference    .            .            reference    reference    reference    -            reference    reference    reference
softmax              None       numba        numba        .            .            numba        numba        numba        numba        -            reference    reference
options              triton     triton       triton       .            .            triton       triton       triton       -            -            cannot       cannot
options              numba      numba        numba        .            .            numba        numba        numba        numba        -            cannot       cannot
options              reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
options              None       numba        numba        .            .            numba        numba        numba        -            -            reference    reference
linear               triton     triton       triton       .            .            none         none         none         triton       none         cannot       cannot
linear               numba      numba        numba        .            .            none         none         none         -            -            cannot       cannot
linear               reference  reference    reference    .            .            reference    reference    reference    reference    -            reference    reference
linear               None       numba        numba        .            .            reference    reference    reference    numba        reference    reference    reference
linear, smoothing    triton     triton       triton       .            .            none         none         none         -            -            cannot       cannot
linear, smoothing    numba      numba        numba        .            .            none         none         none         numba        -            cannot       cannot
linear, smoothing    reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
linear, smoothing    None       numba        numba        .            .            reference    reference    reference    -            -            reference    reference
linear, options      triton     triton       triton       .            .            none         none         none         -            -            cannot       cannot
linear, options      numba      numba        numba        .            .            none         none         none         -            -            cannot       cannot
linear, options      reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
linear, options      None       numba        numba        .            .            reference    reference    reference    numba        -            reference    reference
own pair             triton     triton       triton       .            .            triton       triton       triton       -            -            cannot       cannot
own pair             numba      numba        numba        .            .            numba        numba        numba        numba        none         cannot       cannot
own pair             reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
own pair             None       numba        numba        .            .            numba        numba        numba        -            -            reference    reference
own pair, sigmoid    triton     triton       triton       triton       none         none         none         none         -            -            cannot       cannot
own pair, sigmoid    numba      numba        numba        numba        none         none         none         none         -            -            cannot       cannot
own pair, sigmoid    reference  reference    reference    reference    reference    reference    reference    reference    -            -            reference    reference
own pair, sigmoid    None       numba        numba        numba        reference    reference    reference    reference    numba        -            reference    reference
own pair, smoothing  triton     none         none         .            .            none         none         none         -            -            cannot       cannot
own pair, smoothing  numba      none         none         .            .            none         none         none         none         -            cannot       cannot
own pair, smoothing  reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
own pair, smoothing  None       reference    reference    .            .            reference    reference    reference    -            -            reference    reference
own formulas         triton     none         none         .            .            none         none         none         -            -            cannot       cannot
own formulas         numba      none         none         .            .            none         none         none         none         -            cannot       cannot
own formulas         reference  reference    reference    .            .            reference    reference    reference    -            -            reference    reference
own formulas         None       reference    reference    .            .            reference    reference    reference    reference    reference    reference    reference
"""  # noqa: E501


def cells() -> Iterator[Any]:
    """Return (kind, implementation, situation, expected) of every cell."""
    heads, *lines = (
        [cell.strip() for cell in line.strip().split("  ") if cell.strip()] for line in TABLE.strip().split("\n")
    )
    for kind, implementation, *expected in lines:
        assert len(expected) == len(heads), (kind, implementation)
        for situation, cell in zip(heads, expected, strict=True):
            if cell not in ".-":
                name = None if implementation == "None" else implementation
                yield pytest.param(kind, name, situation, cell, id=f"{kind}-{implementation}-{situation}-{cell}")


# --- kinds of calls ---------------------------------------------------------------------------------------------------


@jit
def doubled_value(gap, params):
    return -params[0] * log_sigmoid(gap)


@jit
def doubled_slope(gap, params):
    return params[0] * sigmoid(-gap)


@dataclasses.dataclass(frozen=True)
class Formulas(GapLoss):
    """Cross-entropy times a factor."""

    factor: float = 2.0

    def value(self, gap: Tensor) -> Tensor:
        return -self.factor * logsigmoid(gap)

    def slope(self, gap: Tensor) -> Tensor:
        return self.factor * torch.sigmoid(-gap)


class Pair(Formulas):
    """The same with its two functions."""

    kernel = (doubled_value, doubled_slope)


def of_layer(z: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return the loss of a layer whose output is its input."""
    return linear_bonus_cross_entropy(z, torch.eye(3, dtype=z.dtype, device=z.device), target, **options)


LABELS = torch.tensor([0, 2, 1, 2])
OTHERS = torch.tensor([1, 1, 0, 2])
PROBABILITIES = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [0.0, 1.0, 0.0], [0.3, 0.3, 0.4]])
KINDS: dict[str, tuple[Tensor, Callable[..., Tensor]]] = {  # the target, and a call of (logits, target)
    "labels": (LABELS, bonus_cross_entropy),
    "smoothing": (LABELS, lambda z, t, **k: bonus_cross_entropy(z, t, label_smoothing=0.1, **k)),
    "probabilities": (PROBABILITIES, bonus_cross_entropy),
    "two labels": (LABELS, lambda z, t, **k: mixup_cross_entropy(z, t, OTHERS.to(t.device), 0.3, **k)),
    "sigmoid": (PROBABILITIES, bonus_binary_cross_entropy_with_logits),
    "softmax": (LABELS, lambda z, t, **k: bonus_cross_entropy_with_softmax(z, t, **k)[0]),
    "options": (
        LABELS, lambda z, t, **k: bonus_cross_entropy(z, t, logit_scale=0.5, softcap=3.0, z_loss=0.1, **k)
    ),
    "linear": (LABELS, lambda z, t, **k: of_layer(z, t, **k)),
    "linear, smoothing": (LABELS, lambda z, t, **k: of_layer(z, t, label_smoothing=0.1, **k)),
    "linear, options": (LABELS, lambda z, t, **k: of_layer(z, t, label_smoothing=0.1, softcap=3.0, z_loss=0.1, **k)),
    "own pair": (LABELS, lambda z, t, **k: bonus_cross_entropy(z, t, bonus=Pair(), **k)),
    "own pair, sigmoid": (
        PROBABILITIES, lambda z, t, **k: bonus_binary_cross_entropy_with_logits(z, t, bonus=Pair(), **k)
    ),
    "own pair, smoothing": (
        LABELS, lambda z, t, **k: bonus_cross_entropy(z, t, bonus=Pair(), label_smoothing=0.1, **k)
    ),
    "own formulas": (LABELS, lambda z, t, **k: bonus_cross_entropy(z, t, bonus=Formulas(), **k)),
}  # fmt: skip


# --- situations -------------------------------------------------------------------------------------------------------


def logits_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, 12, dtype=dtype).view(4, 3).requires_grad_()


def plain(loss: Callable[..., Tensor], target: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    logits = logits_of(dtype)
    value = loss(logits, target)
    value.backward()
    return value.detach(), logits.grad


def float64(loss, target):
    return plain(loss, target.double() if target.is_floating_point() else target, torch.float64)


def target64(loss, target):
    return plain(loss, target.double())


def target_grad(loss, target):
    target = target.clone().requires_grad_()
    return *plain(loss, target), target.grad


def of_compiled(loss, target):
    return plain(torch.compile(loss, backend="eager", fullgraph=True), target)


def of_rows(loss, target):
    """Return the gradients of single rows."""
    return vmap(grad(lambda z, t: loss(z[None], t[None])))(logits_of().detach(), target)


def deep(loss, target):
    return torch.compile(lambda t: of_rows(loss, t), backend="eager", fullgraph=True)(target)


def two_rows_at_a_time(x: Tensor) -> Tensor:
    return x.view(2, 2, *x.shape[1:])


SITUATIONS: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "float64": float64,
    "target64": target64,
    "target grad": target_grad,
    "grad": lambda loss, target: grad(loss)(logits_of().detach(), target),
    "vmap": lambda loss, target: vmap(loss)(two_rows_at_a_time(logits_of().detach()), two_rows_at_a_time(target)),
    "jvp": lambda loss, target: jvp(lambda z: loss(z, target), (logits_of().detach(),), (torch.ones(4, 3),)),
    "compile": of_compiled,
    "deep": deep,
    "missing": plain,
    "meta": lambda loss, target: loss(logits_of().detach().to("meta"), target.to("meta")),
}


@pytest.fixture
def launches(monkeypatch) -> dict[str, int]:
    """Count launches of kernels and of loops."""
    count = {"triton": 0, "numba": 0}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args, **kwargs):
            count[name] += 1
            return real(*args, **kwargs)

        return run

    monkeypatch.setattr(threads, "run", counted("numba", threads.run))
    if INTERPRETED:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", counted("triton", GridExecutor.__call__))
    return count


@contextlib.contextmanager
def nothing_installed() -> Iterator[None]:
    """Let neither package be found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call, "_found", lambda package: False)
        yield


def one_row(kind: str, loss: Callable[..., Tensor], situation: str) -> Callable[..., Tensor]:
    """Return the call for a part of the rows where a situation makes parts; two labels then have one other label."""
    if kind == "two labels" and situation in ("vmap", "deep"):
        return lambda z, t, **k: mixup_cross_entropy(z, t, torch.zeros_like(t), 0.3, **k)
    return loss


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize(("kind", "implementation", "situation", "expected"), list(cells()))
def test_what_was_named_runs_or_raises(kind, implementation, situation, expected, launches):
    if implementation == "triton" and not INTERPRETED:
        pytest.skip("kernels run on no CPU here")
    if situation in ("compile", "deep"):
        torch._dynamo.reset()
    target, loss = KINDS[kind]
    loss = one_row(kind, loss, situation)

    def named(z: Tensor, t: Tensor) -> Tensor:
        return loss(z, t, implementation=implementation)

    with nothing_installed() if situation == "missing" else contextlib.nullcontext():
        if expected in ("none", "cannot"):
            error = NotImplementedError if expected == "none" else RuntimeError
            what = f"implementation='{implementation}'"
            if situation in ("compile", "deep"):  # the compiler raises its own, which quotes ours
                error, what = torch._dynamo.exc.TorchDynamoException, "raise NotImplementedError"
            with pytest.raises(error, match=what) as raised:
                SITUATIONS[situation](named, target)
            assert expected == "none" or not isinstance(raised.value, NotImplementedError)
            assert launches == {"triton": 0, "numba": 0}
            return
        found = SITUATIONS[situation](named, target)
    ran = [name for name, n in launches.items() if n] or ["reference"]
    assert ran == [expected]
    if situation != "meta":
        as_is = {"compile": plain, "deep": of_rows}.get(situation, SITUATIONS[situation])
        true = as_is(lambda z, t: loss(z, t, implementation="reference"), target)
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["triton", "numba", "reference", None])
def test_scores_alone_run_what_was_named(implementation, launches):
    if implementation == "triton" and not INTERPRETED:
        pytest.skip("kernels run on no CPU here")
    difficulty_scores(logits_of(), LABELS, implementation=implementation)
    ran = [name for name, n in launches.items() if n] or ["reference"]
    assert ran == [implementation or "numba"]


def test_one_package_does_not_stand_in_for_the_other(launches, monkeypatch):
    """Without Numba a CPU runs the reference, although Triton's interpreter is there."""
    monkeypatch.setattr(call, "_found", lambda package: package == "triton")
    bonus_cross_entropy(logits_of(), LABELS).backward()
    assert launches == {"triton": 0, "numba": 0}
    with pytest.raises(RuntimeError, match=r"numba is not installed; pip install 'bonus-ops\[cpu\]'"):
        bonus_cross_entropy(logits_of(), LABELS, implementation="numba")


def test_kernels_that_are_compiled_for_gpus_refuse_a_cpu(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="tensors are on the CPU and TRITON_INTERPRET is not set"):
        bonus_cross_entropy(logits_of(), LABELS, implementation="triton")


# --- what a training step does around a loss --------------------------------------------------------------------------

# Cells: right, the result is that of the reference on the logits; or what is raised instead
#     once     RuntimeError: no second derivative
#     func     NotImplementedError: no rule for torch.func
#     graph    an error of the compiler, which quotes ours: outside of torch.compile
STEPS = """
                      compile    autocast   checkpoint  scaler    twice      grad       vmap       jvp
labels                right      right      right       right     right      right      right      right
smoothing             right      right      right       right     right      right      right      right
linear                right      right      right       right     right      right      right      right
linear, smoothing     right      right      right       right     right      right      right      right
linear, options       right      right      right       right     right      right      right      right
sharded               graph      right      right       right     once       func       func       func
sharded, smoothing    graph      right      right       right     once       func       func       func
sharded linear        graph      right      right       right     once       func       func       func
"""
REFUSALS = {
    "once": (RuntimeError, "no second derivative"),
    "func": (NotImplementedError, "no rule for torch.func"),
    "graph": (torch._dynamo.exc.TorchDynamoException, "outside of torch.compile"),
}
SHARDED: dict[str, Callable[..., Tensor]] = {  # over one rank
    "sharded": lambda z, t: vocab_parallel.bonus_cross_entropy(z, t, group=None),
    "sharded, smoothing": lambda z, t: vocab_parallel.bonus_cross_entropy(z, t, group=None, label_smoothing=0.1),
    "sharded linear": lambda z, t: vocab_parallel.linear_bonus_cross_entropy(z, torch.eye(3), t, group=None),
}


def step_cells() -> Iterator[Any]:
    heads, *lines = ([cell for cell in line.split("  ") if cell.strip()] for line in STEPS.strip("\n").split("\n"))
    for kind, *expected in lines:
        for step, cell in zip(heads, expected, strict=True):
            yield pytest.param(kind.strip(), step.strip(), cell.strip(), id=f"{kind.strip()}-{step.strip()}")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist = torch.distributed
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_batches(loss: Callable[..., Tensor], target: Tensor) -> Any:
    found = []
    for n_rows in (4, 3):
        logits = logits_of().detach()[:n_rows].clone().requires_grad_()
        of_rows = target[:n_rows].clone()
        for x in (logits, of_rows):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        value = loss(logits, of_rows)
        value.backward()
        found += [value.detach(), logits.grad]
    return found


def by_batches_of_one_graph(loss: Callable[..., Tensor], target: Tensor) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        return by_batches(compiled, target)


def under_autocast(loss: Callable[..., Tensor], target: Tensor) -> Any:
    logits = logits_of(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(logits, target)
    value.backward()
    assert value.dtype == torch.float32
    return value.detach(), logits.grad.float()


def scaled_and_unscaled(loss: Callable[..., Tensor], target: Tensor) -> Any:
    logits = torch.nn.Parameter(logits_of().detach())
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD([logits])
    scaler.scale(loss(logits, target)).backward()
    scaler.unscale_(optimizer)
    return logits.grad


def checkpointed(loss: Callable[..., Tensor], target: Tensor) -> Any:
    logits = logits_of()
    value = checkpoint(lambda z: loss(z * 1, target), logits, use_reentrant=False)
    value.backward()
    return value.detach(), logits.grad


def twice(loss: Callable[..., Tensor], target: Tensor) -> Any:
    logits = logits_of()
    (first,) = torch.autograd.grad(loss(logits, target), logits, create_graph=True)
    return torch.autograd.grad(first.square().sum(), logits)


TRAINING: dict[str, Callable[..., Any]] = {
    "compile": by_batches_of_one_graph, "autocast": under_autocast, "checkpoint": checkpointed,
    "scaler": scaled_and_unscaled, "twice": twice, **{name: SITUATIONS[name] for name in ("grad", "vmap", "jvp")},
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "linear, options": dict(label_smoothing=0.1, softcap=3.0, z_loss=0.1),
    **dict.fromkeys(("smoothing", "linear, smoothing", "sharded, smoothing"), dict(label_smoothing=0.1)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "step", "expected"), list(step_cells()))
def test_steps_are_right_or_say_why_not(kind, step, expected, request):
    if kind in SHARDED:
        request.getfixturevalue("one_rank")
    loss = SHARDED.get(kind) or KINDS[kind][1]
    if expected in REFUSALS:
        error, words = REFUSALS[expected]
        with pytest.raises(error, match=words):
            TRAINING[step](loss, LABELS)
        return

    def true(z: Tensor, t: Tensor) -> Tensor:
        return bonus_cross_entropy(z, t, implementation="reference", **OPTIONS.get(kind, {}))

    found = TRAINING[step](loss, LABELS)
    truth = (by_batches if step == "compile" else TRAINING[step])(true, LABELS)
    rounding = dict(rtol=2.0**-7, atol=2.0**-9) if step == "autocast" else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, truth, **rounding)


# --- a kernel that Numba cannot compile -------------------------------------------------------------------------------


@jit
def unknown_value(gap, params):
    return gap.no_such_thing()


class Unknown(Formulas):
    """A pair that no compiler knows."""

    kernel = (unknown_value, doubled_slope)


def test_a_pair_that_numba_cannot_compile_is_named_with_its_reason(launches):
    with pytest.raises(
        NotImplementedError, match="numba cannot compile unknown_value or .*the kernel of Unknown: Unknown attribute"
    ):
        bonus_cross_entropy(logits_of(), LABELS, bonus=Unknown(), implementation="numba")
    value = bonus_cross_entropy(logits_of(), LABELS, bonus=Unknown())
    assert launches == {"triton": 0, "numba": 0}
    torch.testing.assert_close(value, bonus_cross_entropy(logits_of(), LABELS, bonus=Formulas()))
