"""A small transformer whose last layer is its embedding, trained without making its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bonus_ops import (
    LogBonus,
    Scores,
    linear_bonus_cross_entropy,
    linear_bonus_cross_entropy_with_scores,
    linear_difficulty_scores,
)

HEADS, RATE, WARM_UP, DECAY = 4, 3e-3, 50, 0.1
PLAIN, BONUS, LOGITS = "plain", "bonus", "F.cross_entropy on logits"
N_BINS = 15
CONTEXTS = 32  # of the files kept apart, from all of them, for a point of the curve
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden, weight, target


class Sizes(NamedTuple):
    n_pieces: int
    width: int
    depth: int
    context: int  # pieces
    batch: int  # contexts a step
    steps: int


class Transformer(nn.Module):
    """Pre-norm blocks of causal attention and a GELU network; `weight` is the embedding and the last layer."""

    def __init__(self, of: Sizes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(of.n_pieces, of.width) * of.width**-0.5)
        self.position = nn.Parameter(torch.randn(of.context, of.width) * 0.02)
        self.blocks = nn.ModuleList(Block(of.width) for _ in range(of.depth))
        self.norm = nn.LayerNorm(of.width)

    def forward(self, pieces: Tensor) -> Tensor:
        """Return the hidden states [B * T, H] of pieces [B, T]."""
        x = F.embedding(pieces, self.weight) + self.position[: pieces.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.network(self.between(x))


def on_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def linear(bonus: Any) -> Loss:
    """Return the same loss, and with a bonus more, from a call that never holds all logits."""
    return lambda hidden, weight, target: linear_bonus_cross_entropy(hidden, weight, target, bonus=bonus)


LOSSES: dict[str, Loss] = {LOGITS: on_logits, PLAIN: linear(None), BONUS: linear(LogBonus(0.75))}


class Training:
    """A model, its optimizer and its batches; of a seed all losses start alike and see the same."""

    def __init__(self, of: Sizes, pieces: Tensor, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.sizes, self.model, self.done = of, Transformer(of), 0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), RATE, (0.9, 0.99), weight_decay=DECAY)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.pieces, self.draw = pieces, torch.Generator().manual_seed(seed)

    def _rate(self, step: int) -> float:
        return min((step + 1) / WARM_UP, max(1 - step / self.sizes.steps, 0.02))

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return pieces [B, T] and those that follow [B * T]."""
        first = torch.randint(len(self.pieces) - self.sizes.context, (self.sizes.batch,), generator=self.draw)
        drawn = self.pieces[first[:, None] + torch.arange(self.sizes.context + 1)]
        return drawn[:, :-1], drawn[:, 1:].flatten()

    def step(self, loss: Loss, batch: tuple[Tensor, Tensor]) -> float:
        value = loss(self.model(batch[0]), self.model.weight, batch[1])
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.schedule.step()
        return value.item()


def train(name: str, of: Sizes, pieces: Tensor, validation: Tensor, tell: Callable[[int], None]) -> dict[str, Any]:
    """Return the curves of a run, and the scores of the pieces that follow those it did not train on."""
    training, curve, seen = Training(of, pieces), [], []
    bonus = LogBonus(0.75) if name == BONUS else None

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        value, scores = linear_bonus_cross_entropy_with_scores(hidden, weight, target, bonus=bonus)
        seen.append(scores.loss.mean().item())  # cross-entropy, whatever is trained on
        return value

    every = max(of.steps // 20, 1)
    for step in range(of.steps):
        training.step(loss, training.batch())
        if (step + 1) % every == 0:
            few = scored(training.model, of, validation, max(len(validation) // of.context // CONTEXTS, 1))
            curve.append([step + 1, sum(seen) / len(seen), few.loss.mean().item()])
            seen.clear()
            tell(step + 1)
    return {"curve": curve, "scores": scored(training.model, of, validation)}


def scored(model: Transformer, of: Sizes, pieces: Tensor, every: int = 1) -> Scores:
    """Return the scores [N] of pieces that follow others in every so many contexts, made without their logits."""
    n = (len(pieces) - 1) // of.context * of.context
    contexts, follow = (x.view(-1, of.context)[::every] for x in (pieces[:n], pieces[1 : n + 1]))
    with torch.no_grad():
        hidden = torch.cat([model(part) for part in contexts.split(of.batch)])
        return linear_difficulty_scores(hidden, model.weight, follow.flatten())


def quality(scores: Scores) -> dict[str, float]:
    """Return perplexity, accuracy and calibration, all from scores: the label or the runner-up is the likeliest."""
    p, right = torch.exp(-scores.loss.double()), scores.margin > 0
    confidence = torch.where(right, p, p * torch.exp(-scores.margin.double())).clamp(max=1.0)
    bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    off = torch.zeros(N_BINS, dtype=torch.float64).index_add_(0, bins, confidence - right.double())
    return {
        "perplexity": scores.loss.double().mean().exp().item(), "accuracy": 100 * right.double().mean().item(),
        "ece": 100 * off.abs().sum().item() / len(p), "confidence": 100 * confidence.mean().item(),
    }  # fmt: skip
