"""What `python -m bench gpu` times."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bonus_ops import LogBonus

BONUS = LogBonus(0.75)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Case(NamedTuple):
    shape: tuple[int, ...]  # of the logits, [N, C, ...]
    dtype: str = "bf16"
    cut: bool = False  # all but the last class of a tensor that has one more
    shares: bool = False  # targets are probabilities

    def __str__(self) -> str:
        more = ", [:, :-1]" * self.cut + ", probabilities" * self.shares
        return f"{' x '.join(map(str, self.shape))} {self.dtype}{more}"

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def inputs(self, device: str) -> tuple[Tensor, Tensor]:
        """Return random logits and labels, each up to 12 ahead of what it drew; few on a CPU: nothing is timed."""
        n, c, *inner = self.shape if device != "cpu" else (2, min(self.shape[1], 40), *(5 for _ in self.shape[2:]))
        z = torch.randn(n, c + self.cut, *inner, device=device, dtype=DTYPES[self.dtype])[:, :c]
        y = torch.randint(c, (n, *inner), device=device)
        z.scatter_add_(1, y[:, None], 12 * torch.rand(n, 1, *inner, device=device).to(z.dtype))
        return z.requires_grad_(), (0.5 * z.detach()).softmax(1) if self.shares else y


class Layer(NamedTuple):
    """A last layer and its loss: hidden [N, H] to C classes, bf16."""

    n_rows: int
    size: int
    n_classes: int

    def __str__(self) -> str:
        return f"{self.n_rows} x {self.size} x {self.n_classes} bf16"

    @property
    def n_bytes(self) -> int:
        return 2 * (self.n_rows + self.n_classes) * self.size

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, weight and labels; logits of deviation 1, or every loss were log C."""
        n, size, c = self if device != "cpu" else (8, 16, 40)
        x = torch.randn(n, size, device=device, dtype=torch.bfloat16)
        w = torch.randn(c, size, device=device, dtype=torch.bfloat16) * size**-0.5
        return x.requires_grad_(), w.requires_grad_(), torch.randint(c, (n,), device=device)


CLASSES_1000, LLAMA2, GPT2, GPT2_PADDED, LLAMA3 = (
    Case((65536, 1000)), Case((8192, 32000)), Case((8192, 50257)), Case((8192, 50304)), Case((8192, 128256)),
)  # fmt: skip
GEMMA, FEW_ROWS = Case((8192, 262144)), Case((64, 262144))
ROWS = (CLASSES_1000, LLAMA2, GPT2, GPT2_PADDED, LLAMA3, Case((8192, 151936)), GEMMA, FEW_ROWS)
PIXELS = Case((16, 21, 512, 512)), Case((8, 150, 256, 256)), Case((16, 21, 513, 513))
CUT = Case((8192, 50257), cut=True)
OTHER_DTYPES = tuple(Case(case.shape, dtype) for dtype in ("fp16", "fp32") for case in (LLAMA2, LLAMA3))
SMALL = Case((128, 10), "fp32"), Case((128, 1000), "fp32"), Case((1024, 1000), "fp32")
LABELS = (*ROWS, *PIXELS, CUT, *OTHER_DTYPES, *SMALL)
SLOW_STARTS = CLASSES_1000, LLAMA2, LLAMA3  # of what compiles for each shape
TARGETS = CLASSES_1000, LLAMA2, PIXELS[0]  # that are no labels
LAYERS = Layer(8192, 4096, 128256), Layer(8192, 2304, 256000)
