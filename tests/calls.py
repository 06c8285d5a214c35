"""Any call that is allowed against the specification in float64, any that is not against torch.

Hypothesis draws the calls, makes one that fails smaller, and prints it; ``--hypothesis-profile=long`` draws thousands.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import bonus_ops
from bonus_ops import reference
from bonus_ops.soft_targets import SoftTargets
from tests.budget import assert_within_budget
from tests.cases import LAYOUTS
from tests.threads import several_threads

OUTPUTS = ("loss", "scores", "softmax", "difficulty")
COLUMNS = ("loss", "el2n", "margin", "entropy", "energy")


class Case(NamedTuple):
    """One call: what it is given, and what is asked of it."""

    seed: int  # of the numbers
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the logits
    layout: str
    regime: str
    target: str  # "int64", "uint8", "strided" or "probabilities"
    ignore: str  # "nothing", "some", "a class", "all"
    weight: str  # "none", "uniform", "zeros" among them
    smoothing: float
    reduction: str
    bonus: bonus_ops.GapLoss | None
    outputs: str
    threads: int  # that share the rows of a batch on a CPU
    implementation: str


# --- numbers ----------------------------------------------------------------------------------------------------------


def regime_of(
    name: str, rng: torch.Generator, n_rows: int, n_classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return float64 logits [N, C] and labels [N]."""
    z = torch.randn(n_rows, n_classes, generator=rng, dtype=torch.float64)
    label = torch.randint(0, n_classes, (n_rows,), generator=rng)
    row = torch.arange(n_rows)
    lead = 45 * torch.rand(n_rows, generator=rng, dtype=torch.float64)
    other = (label + 1 + torch.randint(0, max(n_classes - 1, 1), (n_rows,), generator=rng)) % n_classes
    hit = torch.rand(n_rows, n_classes, generator=rng) < 0.3
    some = torch.rand(n_rows, generator=rng) < 0.5
    if name == "typical":
        z *= 3
    elif name == "confident":
        z[row, label] += lead
    elif name == "wrong":
        z[row, other] += lead
    elif name == "ties":
        z = (2 * z).round() / 2
    elif name == "offset":
        z = 3 * z + 10.0 ** int(torch.randint(2, 5 if dtype.itemsize == 2 else 8, (), generator=rng))
    elif name == "masked":
        z = torch.where(hit, -math.inf, 3 * z)
    elif name == "nan":
        z[row[some], torch.where(hit[:, 0], label, other)[some]] = math.nan
    elif name == "inf":
        z[row[some], torch.where(hit[:, 0], label, other)[some]] = math.inf
    elif name == "huge":
        z *= 3e3 if dtype == torch.float16 else 1e30
    elif name == "denormal":
        z *= torch.finfo(dtype).tiny / 4
    return z, label


REGIMES = ("typical", "confident", "wrong", "ties", "offset", "masked", "nan", "inf", "huge", "denormal")


def n_classes_of(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


def as_rows(x: Tensor) -> Tensor:
    """Return [C], [N, C] or [N, C, d1, ...] as [N d1 ..., C], differentiably."""
    return x[None] if x.dim() == 1 else x.movedim(1, -1).reshape(-1, x.shape[1])


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return (logits, target, weight, ignore_index) of a case."""
    rng = torch.Generator().manual_seed(case.seed)
    n_classes = n_classes_of(case.shape)
    n_rows = math.prod(case.shape) // n_classes
    z, label = regime_of(case.regime, rng, n_rows, n_classes, case.dtype)
    if len(case.shape) == 1:
        logits, label = z[0], label[0]
    else:
        inner = case.shape[2:]
        logits = z.view(case.shape[0], *inner, n_classes).movedim(-1, 1)
        label = label.view(case.shape[0], *inner)
    logits = laid_out(logits.to(case.dtype), case.layout)
    ignore_index = {"nothing": -100, "some": -7, "a class": n_classes - 1, "all": 255}[case.ignore]
    if case.ignore == "some" and case.target == "uint8":
        ignore_index = 251
    if case.ignore == "some":
        label = torch.where(torch.rand(label.shape, generator=rng) < 0.4, ignore_index, label)
    elif case.ignore == "all":
        label = torch.full_like(label, ignore_index)
    if case.target == "uint8":
        label = label.to(torch.uint8)
    elif case.target == "strided":
        label = torch.stack([label, label + 10**6], -1)[..., 0]
    elif case.target == "probabilities":
        mass = torch.rand(case.shape, generator=rng, dtype=torch.float64) ** 4
        label = (mass / mass.sum(0 if logits.dim() == 1 else 1, keepdim=True)).to(case.dtype)
    weight = None
    if case.weight != "none":
        weight = 2 * torch.rand(n_classes, generator=rng, dtype=torch.float64)
        if case.weight == "zeros":
            weight[torch.rand(n_classes, generator=rng) < 0.3] = 0
        weight = weight.to(case.dtype)
    return logits, label, weight, ignore_index


def laid_out(logits: Tensor, layout: str) -> Tensor:
    """Return the same logits elsewhere in memory, with NaN between them; "expanded_rows" repeats the first row."""
    if layout == "permuted":  # classes side by side, or the last axis where they were
        return logits.movedim(1 if logits.dim() > 1 else 0, -1).clone().movedim(-1, 1 if logits.dim() > 1 else 0)
    if logits.dim() == 2:
        return LAYOUTS[layout](logits)
    if layout == "transposed":
        axes = tuple(reversed(range(logits.dim())))
        return logits.permute(axes).contiguous().permute(axes)
    if layout == "expanded_rows":
        return logits[:1].clone().expand(logits.shape) if logits.dim() > 1 else logits.clone()
    step = 2 if layout == "column_slice" else 1
    pad = {"padded_rows": 3, "offset_1": 1, "offset_3": 3}.get(layout, 0)
    if layout in ("column_slice", "padded_rows"):
        wide = logits.new_full((*logits.shape[:-1], step * logits.shape[-1] + pad), math.nan)
        view = wide[..., : step * logits.shape[-1] : step]
    else:
        view = logits.new_full((logits.numel() + pad,), math.nan)[pad:].view(logits.shape)
    return view.copy_(logits)


# --- the specification ------------------------------------------------------------------------------------------------


def specified(
    case: Case, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, upstream: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return loss and gradient (of ``sum(upstream * loss)``) by the reference's formulas in the dtype of ``logits``.

    Reductions are written out again here, after the documentation of torch.
    """
    loss_of = case.bonus or bonus_ops.CrossEntropy()
    leaf = logits.detach().clone().requires_grad_()
    rows, n_classes, s = as_rows(leaf), n_classes_of(case.shape), case.smoothing
    wide = reference.accumulation_dtype(logits.dtype)
    weights = torch.ones(n_classes, dtype=wide) if weight is None else weight.to(wide)
    label, given = label_of(case, target), as_rows(target) if case.target == "probabilities" else None
    shape = target.shape if given is None else (*case.shape[:1], *case.shape[2:])
    shape = () if len(case.shape) == 1 else shape
    counts = label != ignore_index
    row_weight = torch.where(counts, weights[torch.where(counts, label, 0)], 0.0)
    divisor = row_weight.sum() if given is None else torch.tensor(float(len(rows)))
    soft = given is not None or s > 0
    if soft:
        each = reference.soft_rows(rows, label, ignore_index, loss_of, SoftTargets(given, weights, weights, s, s))
    else:
        each = reference.rows(rows.detach(), label, ignore_index, loss_of) * row_weight
    loss = each.view(shape) if case.reduction == "none" else each.sum() / (divisor if case.reduction == "mean" else 1)
    if upstream is None:
        return loss.detach(), loss.detach()
    upstream = upstream.to(wide)
    if soft:
        (grad,) = torch.autograd.grad((loss * upstream).sum(), leaf)
        return loss.detach(), grad.detach()
    if case.reduction != "mean":
        divisor = torch.ones(())
    of_row = upstream.reshape(-1) / divisor * row_weight
    grad = reference.gradient(rows.detach(), label, ignore_index, loss_of, of_row)
    if len(case.shape) > 1:
        grad = grad.view(case.shape[0], *case.shape[2:], n_classes).movedim(-1, 1)
    return loss, grad.view(case.shape)


def pulls_of(case: Case, rows: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Return what pulls each logit [N, C] up and down, the larger of both, where cross-entropy is paid by shares."""
    label, given = label_of(case, target), as_rows(target).double() if case.target == "probabilities" else None
    shares = SoftTargets(given, weight, weight, case.smoothing, case.smoothing)
    t = shares.of_cross_entropy(rows.shape[1]).of(shares.hard(label, rows.shape[1], torch.float64))
    pulls = torch.maximum(t, torch.softmax(rows, -1) * t.sum(-1, keepdim=True))
    if case.reduction != "mean":
        return pulls
    counts = label != ignore_index
    of_row = torch.ones(len(rows)) if weight is None or given is not None else weight[torch.where(counts, label, 0)]
    return pulls / torch.where(counts, of_row, 0.0).sum()


def label_of(case: Case, target: Tensor) -> Tensor:
    """Return the label of each row, of probabilities their argmax."""
    return as_rows(target).argmax(-1) if case.target == "probabilities" else target.reshape(-1).long()


def in_range(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the truth, infinite where ``dtype`` cannot hold it."""
    return torch.where(truth.to(dtype).isinf(), truth.to(dtype).double(), truth)


# --- the check --------------------------------------------------------------------------------------------------------


def call(case: Case, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Any, Any, Any]:
    """Return (loss, scores, probabilities), None where not asked for."""
    if case.outputs == "difficulty":
        scores = bonus_ops.difficulty_scores(
            logits, target, ignore_index=ignore_index, implementation=case.implementation
        )
        return None, scores, None
    function = {
        "loss": bonus_ops.bonus_cross_entropy,
        "scores": bonus_ops.bonus_cross_entropy_with_scores,
        "softmax": bonus_ops.bonus_cross_entropy_with_softmax,
    }[case.outputs]
    out = function(
        logits, target, weight, ignore_index=ignore_index, reduction=case.reduction, label_smoothing=case.smoothing,
        bonus=case.bonus, implementation=case.implementation,
    )  # fmt: skip
    return (out, None, None) if case.outputs == "loss" else (*out, None)[:3]


def check(case: Case) -> None:
    """Fail unless every output of a case is its float64 truth within the error budget."""
    logits, target, weight, ignore_index = inputs_of(case)
    before = logits.clone()
    leaf = logits.detach().requires_grad_()
    with several_threads(case.threads):
        loss, scores, probabilities = call(case, leaf, target, weight, ignore_index)
        upstream = None
        if loss is not None:
            rng = torch.Generator().manual_seed(case.seed)
            upstream = torch.randn(loss.shape, generator=rng).to(loss.dtype) if case.seed % 2 else torch.ones_like(loss)
            (grad,) = torch.autograd.grad(loss, leaf, upstream)
    assert torch.equal(logits.nan_to_num(0.5), before.nan_to_num(0.5)), "the logits were written"

    exact, rows = logits.double(), as_rows(logits.double())
    exact_weight = None if weight is None else weight.double()
    exact_target = target.double() if case.target == "probabilities" else target
    half = case.dtype.itemsize == 2
    epsilon = 2.0**-45 if case.dtype == torch.float64 else 2.0**-23  # kernels get parameters with 48 bits
    # the last cast; interpreted kernels truncate bfloat16
    truncates = case.implementation == "triton" and case.dtype == torch.bfloat16
    cast = (1.0 if truncates else 0.51) * torch.finfo(case.dtype).eps if half else 0.0
    # e^x by exp2 is accurate relative to x: the distance to the row's max, or the gap; beyond 200 it is 0
    top = rows.nan_to_num(0.0, 0.0, 0.0).amax(-1, keepdim=True)
    spread = (rows.nan_to_num(0.0, 0.0, 0.0) - top).abs().clamp(max=200)
    smallest = torch.finfo(case.dtype).tiny if case.dtype == torch.float16 else 1e-30
    label = label_of(case, target)
    true_scores = reference.scores(rows, label, ignore_index, torch.float64)
    gap = true_scores.margin.nan_to_num(0.0, 0.0, 0.0).abs().clamp(max=200)

    if loss is not None:
        truth, true_grad = specified(case, exact, exact_target, exact_weight, ignore_index, upstream.double())
        eager, eager_grad = specified(case, logits, target, weight, ignore_index, upstream)
        # a sum is accurate to the size of its terms
        terms = specified(case._replace(reduction="none"), exact, exact_target, exact_weight, ignore_index, None)[0]
        size = max(terms.nan_to_num(0.0, 0.0, 0.0).abs().flatten().tolist(), default=0.0)
        assert_within_budget(
            loss, in_range(truth, loss.dtype), eager, floor=2 * epsilon + cast,
            unit=max(1.0, size * (len(rows) if case.reduction == "sum" else 1)), what="loss",
        )  # fmt: skip
        got, true_rows = as_rows(grad), as_rows(true_grad)
        soft = case.target == "probabilities" or case.smoothing > 0
        floor = (8 + 1.5 * (gap[:, None] + spread) + 4) * epsilon + cast
        if soft:  # a sum over classes: accurate to the size of its terms, the row's largest
            largest = true_rows.nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True).clamp(min=smallest)
            ratio = largest / true_rows.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=smallest)
            floor = (2.0**-19 if epsilon > 1e-9 else 2.0**-42) * ratio.clamp(min=1.0) + cast
            # and each entry is a difference of two: of shares that are all alike nothing is left
            terms = 8 * epsilon * pulls_of(case, rows, target, exact_weight, ignore_index)
            terms = terms * max(upstream.abs().flatten().tolist(), default=0.0)
            floor = floor + terms / true_rows.abs().nan_to_num(0.0, 0.0, 0.0).clamp(min=smallest)
        # which entries a division by no weight makes infinite, which NaN, is nobody's promise
        if not soft or case.reduction == "none" or truth.isfinite():
            assert_within_budget(
                got, in_range(true_rows, grad.dtype), as_rows(eager_grad) if soft else None,
                factor=1.5, floor=floor, unit=smallest, what="gradient",
            )  # fmt: skip
    if scores is not None:
        for name in COLUMNS:
            relative = name in ("loss", "el2n")  # these keep relative accuracy in confident rows
            assert_within_budget(
                getattr(scores, name).reshape(-1), in_range(getattr(true_scores, name), torch.float32), None,
                unit=1e-30 if relative else 1.0, what=f"score {name}",
                floor=(8 + 1.5 * gap) * 2.0**-23 if relative else 8 * 2.0**-23,
            )  # fmt: skip
        assert torch.equal(scores.runner_up.reshape(-1), true_scores.runner_up), "score runner_up"
    if probabilities is not None:
        true_softmax = reference.softmax(rows, label, ignore_index)
        assert_within_budget(
            as_rows(probabilities), true_softmax, None, what="softmax", unit=smallest,
            floor=(8 + 1.5 * (gap[:, None] + spread)) * epsilon + cast,
        )  # fmt: skip


# --- drawing ----------------------------------------------------------------------------------------------------------

LABELS, IGNORED = ("int64", "uint8", "strided"), ("nothing", "some", "a class", "all")
FINITE = tuple(name for name in REGIMES if name not in ("masked", "nan", "inf", "huge"))
STRENGTHS = st.sampled_from([0.0, 0.3, 1.0, 1.7, -0.5])
WINDOWS = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"start": st.floats(0, 0.9)}),
    st.fixed_dictionaries({"abrupt": st.floats(0.1, 1)}),
)
WITH_WINDOWS = st.one_of(
    st.tuples(st.just(bonus_ops.LogBonus), st.one_of(st.sampled_from([0.0, 0.5, 0.75]), st.floats(0, 0.95))),
    st.tuples(st.just(bonus_ops.PowerBonus), st.one_of(st.sampled_from([0.5, 1.0, 2.0]), st.floats(0.1, 5))),
    st.tuples(st.just(bonus_ops.CosineBonus)),
)
FEW_BONUSES = st.sampled_from([None, bonus_ops.LogBonus(0.5, strength=0.3), bonus_ops.LogBonus(1.0)])
BONUSES = st.one_of(
    FEW_BONUSES,
    st.builds(lambda x, strength, window: x[0](*x[1:], strength=strength, **window), WITH_WINDOWS, STRENGTHS, WINDOWS),
    st.builds(bonus_ops.LogBonus, st.just(1.0), st.sampled_from([1e-5, 1e-2, None]), strength=STRENGTHS),
    st.builds(bonus_ops.SubDataBonus, st.floats(0, 0.95), strength=STRENGTHS),
    st.builds(bonus_ops.Focal, st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 5))),
    st.builds(bonus_ops.Poly1, st.floats(-1, 4)),
    st.builds(bonus_ops.GeneralizedCrossEntropy, st.floats(0.05, 1)),
)


@st.composite
def calls(draw: Any, implementation: str) -> Case:
    """Draw a call. Interpreted kernels, some milliseconds a program, get few rows."""
    interpreted = implementation == "triton"
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    few = st.one_of(st.integers(1, 3), st.integers(4, 70))
    n_classes = draw(few if interpreted else st.one_of(few, st.sampled_from([127, 128, 129, 255, 256, 257, 1003])))
    rows = draw(st.integers(0, 5 if interpreted else 20))
    one = (n_classes,), (rows, n_classes), (rows, n_classes, 3), (rows, n_classes, 2, 2)
    target = draw(st.sampled_from((*LABELS[: 2 if n_classes < 200 else 1], "strided", "probabilities")))
    soft = target == "probabilities"
    smoothing = draw(st.one_of(st.just(0.0), st.sampled_from([0.1, 1.0]), st.floats(0, 1)))
    # which infinite products vanish is a convention of its own, tested apart
    regime = draw(st.sampled_from(FINITE if soft or smoothing > 0 else REGIMES))
    if interpreted and regime == "denormal" and dtype.itemsize == 2:
        regime = "typical"  # the interpreter converts denormal halves wrongly
    return Case(
        seed=draw(st.integers(0, 2**31 - 1)), dtype=dtype, shape=draw(st.sampled_from(one[: 3 if interpreted else 4])),
        layout=draw(st.sampled_from([*LAYOUTS, "permuted"])), regime=regime, target=target,
        ignore="nothing" if soft else draw(st.sampled_from(IGNORED)),
        weight=draw(st.sampled_from(["none", "uniform", "zeros"])), smoothing=smoothing,
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        bonus=draw(BONUSES if dtype == torch.float32 else FEW_BONUSES),  # each other is compiled once a dtype
        outputs=draw(st.sampled_from(OUTPUTS)), threads=draw(st.sampled_from([1, 3])), implementation=implementation,
    )  # fmt: skip


# --- calls that torch refuses -----------------------------------------------------------------------------------------


@st.composite
def faulty_calls(draw: Any) -> dict[str, Any]:
    """Draw the arguments of a call, one of them wrong."""
    n_rows, n_classes = draw(st.integers(1, 5)), draw(st.integers(2, 9))

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    faults = {
        "label": ("target", lambda: torch.full((n_rows,), one(n_classes, -1, 2**40, -(2**40)))),
        "rows": ("target", lambda: torch.zeros(n_rows + one(-1, 1, 3), dtype=torch.int64)),
        "target dtype": (
            "target", lambda: torch.zeros(n_rows, dtype=one(torch.int32, torch.int8, torch.float32, torch.bool))
        ),
        "columns": ("target", lambda: torch.zeros(n_rows, n_classes + 1)),
        "whole shares": ("target", lambda: torch.zeros(n_rows, n_classes, dtype=torch.int64)),
        "dtype": ("input", lambda: torch.zeros(n_rows, n_classes).to(one(torch.int32, torch.int64, torch.bool))),
        "no axis": ("input", lambda: torch.zeros(())),
        "a list": ("input", lambda: [[0.0] * n_classes]),
        "weights": ("weight", lambda: torch.ones(n_classes + one(-1, 1))),
        "weight dtype": (
            "weight", lambda: torch.ones(n_classes, dtype=one(torch.float64, torch.int64, torch.bfloat16))
        ),
        "reduction": ("reduction", lambda: one("foo", None, "Mean")),
        "label_smoothing": ("label_smoothing", lambda: one(1.1, 7.0, math.inf)),
        "ignore_index": ("ignore_index", lambda: one(None, 1.0, "1")),
    }  # fmt: skip
    name, value = faults[draw(st.sampled_from(sorted(faults)))]
    return {"input": torch.zeros(n_rows, n_classes), "target": torch.zeros(n_rows).long(), name: value()}


def check_fault(arguments: dict[str, Any], implementation: str) -> None:
    """Fail unless the error has the class and first line of torch's."""
    raised = []
    for function, options in (
        (F.cross_entropy, {}),
        (bonus_ops.bonus_cross_entropy, {"bonus": None, "implementation": implementation}),
    ):
        try:
            function(**arguments, **options)
        except Exception as error:
            raised.append((type(error), str(error).split("\n")[0]))
        else:
            raise AssertionError(f"{function.__name__} accepts {arguments}")
    assert raised[0] == raised[1]
