"""A call of the linear form: what `Call` is for given logits, of logits that nobody makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .call import Call
from .checks import FLOATS, check_call, check_factor, checked_ignore_index
from .logit_options import checked_options
from .number_checks import check_integer
from .watchers import is_transformed

__all__ = ["LinearCall"]


class LinearCall(Call):
    """The checked arguments of `linear_bonus_cross_entropy` or a twin, and what runs."""

    def __init__(
        self, input: Any, linear_weight: Any, target: Any, *, bonus: Any, linear_bias: Any = None, weight: Any = None,
        reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0,
        bonus_smoothing: float | None = None, bonus_weight: Any = None, row_weight: Any = None,
        logit_scale: float = 1.0, softcap: float | None = None, z_loss: float = 0.0, budget: int | None = None,
        implementation: str | None = None, validate: bool = False, scores: bool = False, norm: bool = False,
        n_classes: int | None = None,
    ) -> None:  # fmt: skip
        options = checked_options(logit_scale, softcap, z_loss)
        _check_layer(input, linear_weight, linear_bias)
        device = input.device.type
        # under autocast products are made as those of a linear layer are
        autocast = device != "meta" and torch.is_autocast_enabled(device) and input.dtype != torch.float64
        self.product_dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        self.hidden = input.reshape(-1, input.shape[-1])
        self.linear_weight, self.linear_bias = linear_weight, linear_bias
        shape, n_local = input.shape[:-1], linear_weight.shape[0]
        n_classes = n_local if n_classes is None else n_classes  # more, of which the weight is a shard
        labels = _flat(target, shape, n_classes)
        # what the logits would be, as far as checks can see: one number of memory
        logits = input.new_empty((), dtype=self.product_dtype).expand(len(self.hidden), n_classes)
        # of one row first: torch, asked for its words, may compute on what it is shown
        check_call(logits[:1], labels[:1] if isinstance(labels, Tensor) else labels, weight,
                   checked_ignore_index(ignore_index), reduction, 0.0, autocast)  # fmt: skip
        self.row_weight_given = None
        if row_weight is not None:  # that of an ignored row is not looked at, and gets no gradient
            must = f"be shaped like target, {list(shape)}, one number a row"
            check_factor("row_weight", row_weight, must, shape, input)
            weights = row_weight.reshape(-1).to(reference.accumulation_dtype(input.dtype))
            self.row_weight_given = weights.masked_fill(labels == ignore_index, 0.0)
        self._tensors = input, linear_weight, target, linear_bias, weight, bonus_weight, row_weight
        super().__init__(
            logits, labels, weight, None, ignore_index, None, reduction, label_smoothing, bonus, bonus_smoothing,
            bonus_weight, options, implementation, validate, scores, False,
        )  # fmt: skip
        self.norm = norm
        self.row_shape = shape
        self.budget: int | None = None  # as many bytes a chunk as were measured to be enough
        if budget is not None:
            owner = "linear_bonus_cross_entropy"
            check_integer(owner, "budget", budget, 1)
            row_bytes = n_local * reference.accumulation_dtype(input.dtype).itemsize
            if budget < row_bytes:
                raise ValueError(f"{owner}: budget must hold the logits of one row, {row_bytes} bytes, got {budget}")
            self.budget = int(budget)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self._tensors

    def _only_by_formula(self) -> str | None:
        return super()._only_by_formula() or ("torch.func and forward mode" if is_transformed() else None)


def _check_layer(input: Any, linear_weight: Any, linear_bias: Any) -> None:
    given = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    for name, x in given.items():
        if x is None and name == "linear_bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"linear_bonus_cross_entropy: expected {name} to be a Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise RuntimeError(f"expected {name} to be dense (torch.strided), got {x.layout}")
        if x.dtype not in FLOATS:
            raise RuntimeError(f"expected {name} of float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.device != input.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device\nExpected {name} on the device of input, "
                f"{input.device}, got {x.device}."
            )
    if input.dim() == 0:
        raise RuntimeError("expected input [..., H], got shape []")
    if linear_weight.dim() != 2:
        raise RuntimeError(f"expected linear_weight [C, H], got shape {list(linear_weight.shape)}")
    (n_classes, size), n_rows = linear_weight.shape, input.shape[:-1].numel()
    if input.shape[-1] != size:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({n_rows}x{input.shape[-1]} and {size}x{n_classes})\nExpected "
            f"input [..., H] and linear_weight [C, H] of one H, got {list(input.shape)} and [{n_classes}, {size}]."
        )
    if linear_bias is not None and list(linear_bias.shape) != [n_classes]:
        raise RuntimeError(
            f"expected linear_bias [{n_classes}], one number a class of linear_weight, got {list(linear_bias.shape)}"
        )
    if input.device.type != "meta" and torch.is_autocast_enabled(input.device.type):
        return
    for name, x in given.items():
        if x is not None and x.dtype != input.dtype:
            raise RuntimeError(f"expected m1 and m2 to have the same dtype\nExpected {name} of the dtype of input, "
                               f"{input.dtype}, got {x.dtype}.")  # fmt: skip


def _flat(target: Any, shape: torch.Size, n_classes: int) -> Any:
    """Return the labels of the rows, one after another."""
    if not isinstance(target, Tensor):
        return target  # `check_call` has the words
    if target.is_floating_point() and target.shape == (*shape, n_classes):
        raise RuntimeError(
            f"expected class indices as target, got probabilities of {target.dtype}\nShares of all classes take the "
            "memory of the logits: bonus_cross_entropy(linear(input, linear_weight), target) has them."
        )
    if target.shape != shape and not (not shape and target.numel() == 1):
        raise ValueError(
            f"Expected input batch_size ({shape.numel()}) to match target batch_size ({target.numel()}).\nExpected "
            f"target of shape {list(shape)} for input of shape {[*shape, 'H']}, got {list(target.shape)}."
        )
    return target.reshape(-1)
