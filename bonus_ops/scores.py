"""Scores: six stored columns per example, every other difficulty score derived from them without the logits."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_gap_loss
from .losses import CrossEntropy, GapLoss
from .number_checks import check_integer, check_number

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SCORES", "Score", "Scores"]


class Score(NamedTuple):
    """What a difficulty score is.

    ``direction`` is +1 where a higher score means a harder example, -1 where it means an easier one, 0 where the score
    does not order examples.
    """

    name: str
    formula: str
    unit: str
    range: str
    direction: int
    needs_label: bool
    paper: str


SCORES: dict[str, Score] = {
    score.name: score
    for score in (
        Score("loss", "-log p", "nats", "[0, inf)", +1, True, "small-loss selection; arXiv 1910.00762"),
        Score("el2n", "||softmax(z) - onehot(y)||_2", "1", "[0, sqrt 2]", +1, True, "arXiv 2107.07075"),
        Score("margin", "z_y - max over k != y of z_k", "logits", "real", -1, True, "AUM, arXiv 2001.10528"),
        Score("entropy", "-sum p_k log p_k", "nats", "[0, log C]", +1, False, "uncertainty sampling"),
        Score("energy", "-logsumexp(z)", "nats", "real", +1, False, "arXiv 2010.02759, T = 1"),
        Score("target_prob", "p = softmax(z)_y", "1", "[0, 1]", -1, True, "arXiv 1911.00068; arXiv 2009.10795"),
        Score("other_prob", "max over k != y of p_k", "1", "[0, 1]", +1, True, "derived"),
        Score("prob_margin", "target_prob - other_prob", "1", "[-1, 1]", -1, True, "arXiv 1911.00068"),
        Score("loss_minus_entropy", "loss - entropy", "nats", "(-log C, inf)", +1, True, "arXiv 2206.07137"),
        Score("max_logit", "max z_k", "logits", "real", -1, False, "arXiv 1911.11132"),
        Score("max_prob", "max p_k", "1", "[1/C, 1]", -1, False, "arXiv 1610.02136"),
        Score("grad_norm", "||dL/dz||_2 of the given loss", "1/logits", "[0, inf)", +1, True, "arXiv 1803.00942"),
        Score("runner_up", "argmax over k != y of z_k", "class", "-1 .. C-1", 0, True, "derived"),
        Score("prediction", "argmax z_k, lowest index on ties", "class", "-1 .. C-1", 0, True, "derived"),
        Score("correct", "prediction == y", "bool", "False, True", 0, True, "derived"),
    )
}


QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "max": 1.0}  # of the summary
REDUCTIONS = ("mean", "sum", "max", "last")


class _Columns(NamedTuple):
    loss: Tensor
    el2n: Tensor
    margin: Tensor
    entropy: Tensor
    energy: Tensor
    runner_up: Tensor


class Scores(_Columns):
    """Difficulty scores of a batch, detached, each column shaped like the target.

    Six columns are stored, float32 but for ``runner_up`` (int32); the properties and methods derive the rest. All are
    of the plain softmax: never smoothed, weighted or with the bonus. Ignored positions hold NaN (``runner_up`` and
    ``prediction`` -1, ``correct`` False); derived scores that need the top logit are NaN where the label's is -inf.
    `SCORES` tells unit, range, direction and source of each.

    A named tuple of the six columns, which knows its target besides: ``torch.save({**scores._asdict(), "target":
    scores.target}, path)`` and ``Scores(**torch.load(path))`` keep it, `cat` joins batches, `select` takes rows.

    Args:
        columns: the six, in the order of the attributes or by their names.
        target: what the scores are of: class indices shaped like them, or probabilities with the axis of the classes
            behind the first (the first of a single row). Kept as it is given; None where it is not known.

    Attributes:
        loss: cross-entropy -log p in nats, [0, inf); higher is harder.
        el2n: L2 norm of softmax minus one-hot label, [0, sqrt 2]; higher is harder (Paul et al. 2021).
        margin: label's logit minus the largest other logit, real; lower is harder (the term AUM averages).
        entropy: of the softmax in nats, [0, log C]; higher is harder; needs no label.
        energy: -logsumexp of the logits, real; higher is stranger; needs no label.
        runner_up: class of the largest logit other than the label's, lowest index on ties; -1 where there is none.
        target: as given.

    Example:
        >>> import torch
        >>> from bonus_ops import Scores, difficulty_scores
        >>> logits, target = torch.tensor([[2.0, 0.0], [1.0, 3.0], [0.0, 0.5]]), torch.tensor([0, 0, -100])
        >>> scores = Scores(*difficulty_scores(logits, target), target=target)
        >>> scores
        Scores of 3 rows, 1 ignored, accuracy 0.5000
                     mean       min       25%    median       75%       max
        loss        1.127     0.127     0.627     1.127     1.627     2.127
        el2n        0.707     0.169     0.438     0.707     0.976     1.246
        margin      0.000    -2.000    -1.000     0.000     1.000     2.000
        entropy     0.365     0.365     0.365     0.365     0.365     0.365
        energy     -2.627    -3.127    -2.877    -2.627    -2.377    -2.127
        >>> scores.hardest(2, by="el2n")
        tensor([1, 0])
    """

    target: Tensor | None = None

    def __new__(
        cls,
        loss: Tensor,
        el2n: Tensor,
        margin: Tensor,
        entropy: Tensor,
        energy: Tensor,
        runner_up: Tensor,
        *,
        target: Tensor | None = None,
    ) -> Self:
        scores = tuple.__new__(cls, (loss, el2n, margin, entropy, energy, runner_up))
        if target is not None:
            scores.target = target
        return scores

    def _replace(self, **columns: Any) -> Self:
        return type(self)(**{**self._asdict(), **self._beside(), "target": self.target, **columns})

    def __repr__(self) -> str:
        plain = all(type(column) is Tensor for column in self) and self.loss.device.type != "meta"
        if not plain or any(torch._C._functorch.is_functorch_wrapped_tensor(column) for column in self):
            return super().__repr__()
        n_rows, n_ignored = self.loss.numel(), int(self.ignored.sum())
        shape = f" {list(self.loss.shape)}" if self.loss.dim() > 1 else ""
        title = f"Scores of {n_rows} rows{shape}, {n_ignored} ignored"
        if self.target is not None:
            title += f", accuracy {float(self.accuracy()):.4f}"
        lines = [title, f"{'':7}" + "".join(f"{name:>10}" for name in ("mean", *QUANTILES))]
        for name, column in zip(self._fields[:-1], self, strict=False):
            known = column.detach().flatten().double()
            known = known[~known.isnan()]
            spread = [_quantile(known, q) for q in QUANTILES.values()]
            lines.append(f"{name:7}" + "".join(f"{x:10.3f}" for x in (known.mean().tolist(), *spread)))
        return "\n".join(lines)

    @property
    def target_prob(self) -> Tensor:
        """Probability of the label, [0, 1]; lower is harder."""
        return torch.exp(-self.loss)

    @property
    def other_prob(self) -> Tensor:
        """Largest probability of another class, [0, 1]; higher is harder."""
        return torch.exp(-self.loss - self.margin)

    @property
    def prob_margin(self) -> Tensor:
        """``target_prob - other_prob``, [-1, 1]; lower is harder."""
        return self.target_prob - self.other_prob

    @property
    def loss_minus_entropy(self) -> Tensor:
        """``loss - entropy`` in nats, (-log C, inf); higher is noisier. Absolute accuracy only."""
        return self.loss - self.entropy

    @property
    def max_logit(self) -> Tensor:
        """Largest logit; lower is stranger."""
        return -self.energy - self.loss - self.margin.clamp(max=0)

    @property
    def max_prob(self) -> Tensor:
        """Largest probability, [1/C, 1]; lower is harder."""
        return torch.exp(-self.loss - self.margin.clamp(max=0))

    @property
    def ignored(self) -> Tensor:
        """Which rows have no score at all, bool: ignored by the loss, or a row of logits with NaN."""
        return self.entropy.isnan() & self.loss.isnan()

    @property
    def label(self) -> Tensor:
        """Class of each row that the scores are of: the target, or the largest of its probabilities.

        Raises:
            ValueError: the target is not known.
        """
        if self.target is None:
            raise ValueError("expected scores that know their target, or the target as an argument, got neither")
        if self.target.is_floating_point():
            return self.target.argmax(1 if self.target.dim() > 1 else 0)
        return self.target.reshape(self.loss.shape)

    def prediction(self, target: Tensor | None = None) -> Tensor:
        """Return the predicted class (int64), lowest index on ties, -1 where ignored.

        Args:
            target: class indices shaped like the scores; of probabilities, ``target.argmax(1)``. Needed only where the
                scores do not know it, and the one they were made with: for next tokens, the shifted labels.

        Raises:
            TypeError: ``target`` is no Tensor.
            RuntimeError: it holds no class indices, or is not shaped like the scores.
            ValueError: the target is not known; or, on a CPU, the one given is not that of the scores.
        """
        target = self._checked_target(target)
        runner_up = self.runner_up.to(torch.int64)
        label_wins = (self.margin > 0) | ((self.margin == 0) & (target < runner_up))
        return torch.where(self.margin.isnan(), -1, torch.where(label_wins, target, runner_up))

    def correct(self, target: Tensor | None = None) -> Tensor:
        """Return whether the label is the prediction (bool), False where ignored; arguments as in `prediction`.

        Its mean counts what is ignored as wrong: `accuracy` does not.
        """
        target = self._checked_target(target)
        return (self.prediction(target) == target) & ~self.margin.isnan()

    def accuracy(self, target: Tensor | None = None) -> Tensor:
        """Return the share of right predictions among the rows that are not ignored, a scalar; NaN if there are none.

        Arguments and errors as in `prediction`.
        """
        return self.correct(target).sum().to(torch.float32) / (~self.margin.isnan()).sum()

    def _checked_target(self, target: Tensor | None) -> Tensor:
        """Return the labels to compare with, those given or those known."""
        if target is None:
            return self.label
        if isinstance(target, Tensor) and (
            target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
        ):
            argmax = "target.argmax(1)" if self.loss.dim() else "target.argmax()"
            raise RuntimeError(
                f"target must hold class indices, got {target.dtype} of shape {list(target.shape)}\nExpected {argmax} "
                "where target holds probabilities."
            )
        self._check_rows("target", target)
        if self.target is None or target is self.target or torch.compiler.is_compiling() or not _is_plain_cpu(target):
            return target
        differs = (target.reshape(self.loss.shape) != self.label) & ~self.loss.isnan()
        if _is_plain_cpu(differs) and differs.any():
            raise ValueError(
                f"target must be that of the scores, which differs in {int(differs.sum())} of {differs.numel()} rows\n"
                "Expected no argument, as the scores know their target (for next tokens, the shifted labels)."
            )
        return target

    def hardest(self, k: int, by: str = "loss") -> Tensor:
        """Return the ``k`` hardest rows, hardest first, never an ignored one; waits for the device.

        Args:
            k: how many; fewer come back where fewer have a score.
            by: as the name in `difficulty`.

        Returns:
            int64 [<= k], indices of rows; of scores with more axes, into ``loss.flatten()``.

        Raises:
            TypeError, ValueError: ``k`` is no int or negative; ``by`` as in `difficulty`.
        """
        check_integer("hardest", "k", k, 0)
        difficulty = self.difficulty(by).flatten()
        known = (~difficulty.isnan()).nonzero()[:, 0]
        return known[difficulty[known].argsort(descending=True, stable=True)[:k]]

    def select(self, rows: Any) -> Scores:
        """Return the scores of some rows, and their targets.

        Args:
            rows: whatever indexes the first axis of a tensor: indices, a bool mask, a slice.
        """
        return self._each(lambda column: column[rows])

    def flatten(self) -> Scores:
        """Return the scores with one axis."""
        return self._each(torch.flatten)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Scores:
        """Return the scores on a device."""
        return self._each(lambda column: column.to(device, non_blocking=non_blocking))

    def cpu(self) -> Scores:
        """Return the scores on the CPU."""
        return self.to("cpu")

    def _beside(self) -> dict[str, Tensor]:
        """Return what is known of the rows beside the columns."""
        return {} if self.target is None else {"target": self.label}

    def _each(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(*map(function, self), **{name: function(x) for name, x in self._beside().items()})

    @classmethod
    def cat(cls, batches: Iterable[Scores]) -> Scores:
        """Join the scores of several batches along the first axis; single rows as rows.

        Where batches differ in further axes, as sequences of different length, flatten them first.

        Raises:
            TypeError: one of ``batches`` is no `Scores`.
            ValueError: there are none, or some know their target and some do not.
        """
        several = list(batches)
        for scores in several:
            if not isinstance(scores, Scores):
                raise TypeError(f"Scores.cat: expected Scores, got {type(scores).__name__}")
        if not several:
            raise ValueError("Scores.cat: expected at least one batch, got none")
        several = [scores if scores.loss.dim() else scores.flatten() for scores in several]
        n_known = sum(scores.target is not None for scores in several)
        if n_known not in (0, len(several)):
            raise ValueError(f"Scores.cat: expected all to know their target or none, got {n_known} of {len(several)}")
        target = torch.cat([scores.label for scores in several]) if n_known else None
        return cls(*(torch.cat(columns) for columns in zip(*several, strict=True)), target=target)

    def to_sequences(self, reduction: str = "mean") -> Scores:
        """Reduce the scores of tokens to those of sequences, such as an `ExampleTracker` takes; without a wait.

        Args:
            reduction: over the tokens of each sequence that are not ignored. ``"mean"`` and ``"sum"`` of each column:
                the loss is the sequence's mean or whole negative log-likelihood; there is no runner-up (-1) and no
                target. ``"max"`` keeps the scores of the token with the largest loss, ``"last"`` of the last one.

        Returns:
            `Scores` shaped [N] of scores [N, T] or [N, d1, ...]; a sequence without tokens is ignored.

        Raises:
            ValueError: another reduction.
            RuntimeError: the scores have no axis of tokens.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"to_sequences: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if self.loss.dim() < 2:
            raise RuntimeError(f"to_sequences: expected scores of tokens [N, T], got shape {list(self.loss.shape)}")
        tokens = self._each(lambda column: column.flatten(1))
        known = ~tokens.ignored
        if reduction in ("mean", "sum"):
            count = known.sum(1)
            divisor = count if reduction == "mean" else (count > 0).to(count.dtype)
            sums = [torch.where(known, column, 0).sum(1) / divisor for column in tokens[:-1]]  # 0 / 0 is NaN
            sums = [torch.where(count > 0, column, math.nan) for column in sums]
            return Scores._make([*sums, torch.full_like(count, -1, dtype=torch.int32)])
        place = torch.arange(known.shape[1], device=known.device).expand_as(known)
        rank = torch.where(known, tokens.loss if reduction == "max" else place, -math.inf)
        chosen = rank.argmax(1, keepdim=True) if known.shape[1] else rank.sum(1, keepdim=True).long()
        return tokens._each(lambda column: column.gather(1, chosen)[:, 0])

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """Return what a logger takes: the mean of each column over the rows that have it, and how many rows.

        With a target, the accuracy too. One wait for the device; NaN where nothing is known.

        Args:
            prefix: of the names, such as ``"train/"``.
        """
        names = ["count", "ignored", *self._fields[:-1]]
        n_ignored = self.ignored.sum()
        values = [self.loss.numel() - n_ignored, n_ignored, *(column.double().nanmean() for column in self[:-1])]
        if self.target is not None:
            names, values = [*names, "accuracy"], [*values, self.accuracy()]
        numbers: list[float] = torch.stack([value.double() for value in values]).tolist()
        return {prefix + name: value for name, value in zip(names, numbers, strict=True)}

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`: a line a row, a column a score, with target, prediction and whether correct.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        pandas = importlib.import_module("pandas")  # optional, and without types
        derived = [name for name in SCORES if isinstance(getattr(Scores, name, None), property)]
        columns = self._asdict() | {name: getattr(self, name) for name in derived}
        if self.target is not None:
            columns |= {"target": self.label, "prediction": self.prediction(), "correct": self.correct()}
        index = None
        if self.loss.dim() > 1:
            index = pandas.MultiIndex.from_product([range(n) for n in self.loss.shape])
        table = {name: column.detach().flatten().tolist() for name, column in columns.items()}
        return pandas.DataFrame(table, index=index)

    def _check_rows(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, not {type(x).__name__}")
        one_row = self.loss.dim() == 0 and x.numel() == 1  # as torch, which takes a target (1) for logits (C)
        if x.shape != self.loss.shape and not one_row:
            raise RuntimeError(f"{name} must be shaped like the scores, {list(self.loss.shape)}, got {list(x.shape)}")

    def z_loss(self, z_loss: float) -> Tensor:
        """Return what the option ``z_loss`` of the losses adds to each row, ``z_loss * energy^2``.

        float32 in nats, [0, inf), NaN where ignored. TypeError or ValueError for a factor outside [0, inf), as there.
        """
        check_number("Scores.z_loss", "z_loss", z_loss, "[0, inf)")
        return z_loss * self.energy.square()

    def grad_norm(self, bonus: GapLoss | None = None, weight: Tensor | None = None) -> Tensor:
        """Return the norm of the row's gradient, ``||dL/dz||_2 = A sqrt(1 + Q2)``, exact for the loss given.

        Args:
            bonus: the loss that was used; None is plain cross-entropy, whose gradient norm is ``el2n``.
            weight: factor of each row shaped like ``loss`` (say ``class_weight[target]``), or None.

        Returns:
            float32, [0, inf); higher is harder.

        Raises:
            TypeError: ``bonus`` is no `GapLoss` instance, or ``weight`` no Tensor.
            RuntimeError: ``weight`` is not shaped like the scores.
        """
        check_gap_loss(bonus, " The gradient of a loss of all classes does not follow from the scores.")
        if weight is not None:
            self._check_rows("weight", weight)
        loss = CrossEntropy() if bonus is None else bonus
        rest = -torch.expm1(-self.loss)  # 1 - p
        # el2n = (1 - p) sqrt(1 + Q2); where p is 1 to the last bit Q2 is lost and its lower bound 0 stands in
        length = torch.where(rest > 0, self.el2n / rest, 1.0)
        gap = -self.loss - torch.log(rest)
        norm = loss.slope(gap).abs() * length
        norm = torch.where(self.margin == math.inf, 0.0, norm)  # a row with no rest teaches nothing
        norm = torch.where(self.loss.isnan(), math.nan, norm)
        return norm if weight is None else norm * weight.abs().to(norm.dtype)

    def difficulty(self, name: str, target: Tensor | None = None, bonus: GapLoss | None = None) -> Tensor:
        """Return the score ``name`` times its direction: higher is harder, whichever score is asked for.

        Args:
            name: a key of `SCORES` whose direction is not 0.
            target: unused by ordered scores; accepted so that callers need not know.
            bonus: the loss for ``grad_norm``; unused by the others.

        Returns:
            float32, shaped like the scores; higher is harder, NaN where ignored.

        Raises:
            ValueError: the name is unknown or the score orders nothing.
            TypeError: ``bonus`` is no `GapLoss` instance, where it is used.
        """
        ordered = [s.name for s in SCORES.values() if s.direction]
        if name not in ordered:
            raise ValueError(f"difficulty: name must be one of {', '.join(ordered)}, got {name!r}")
        score = self.grad_norm(bonus) if name == "grad_norm" else getattr(self, name)
        return SCORES[name].direction * score


def _is_plain_cpu(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _quantile(values: Tensor, q: float) -> float:
    """Return a quantile, between two neighbours linearly; `torch.quantile` takes 16 million values at most."""
    if not len(values):
        return math.nan
    place = q * (len(values) - 1)
    low, high = (float(values.kthvalue(int(at) + 1).values) for at in (math.floor(place), math.ceil(place)))
    return low if low == high else low + (high - low) * (place - math.floor(place))
