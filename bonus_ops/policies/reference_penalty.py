"""A penalty on changing what a frozen reference model says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_number

__all__ = ["kl_to_reference"]

CLOSE = 0.5  # of two log probabilities; below it their difference is summed as a series


def kl_to_reference(logits: Tensor, reference_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return ``KL(p_ref || p) = sum p_ref (log p_ref - log p)`` of each row, with its exact gradient.

    Add it to the loss, ``loss + strength * kl_to_reference(z, z_ref).mean()``, to fine-tune without forgetting, or as
    the distillation part of data replay. Its gradient is ``(p - p_ref) / T`` and none goes to the reference. Value and
    gradient keep their relative accuracy where the two models nearly agree, which is where fine-tuning starts.

    This penalises change of the output. Penalising change of the parameters, ``lam ||theta - theta_0||^2`` (arXiv
    2404.12292), is the optimizer's: weight decay towards the start.

    Args:
        logits: [C], [N, C] or [N, C, d1, ...], floating point, z.
        reference_logits: of the same shape, z_ref; detached.
        temperature: T > 0, default 1: p = softmax(z / T), p_ref = softmax(z_ref / T). Distillation multiplies the
            result by T^2 to keep the size of the gradient.

    Returns:
        The penalty of each row in nats, [0, inf), shaped like ``logits`` without C and of its dtype; inf where p is 0
        and p_ref is not. Differentiable twice in ``logits``, in reverse mode, `torch.func` and ``vmap`` included.
        Raises as all policies.

    Example:
        >>> import torch
        >>> from bonus_ops.policies import kl_to_reference
        >>> kl_to_reference(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]]))
        tensor([0.0000, 0.3278])

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531; Li & Hoiem, Learning
        without Forgetting, ECCV 2016, arXiv 1606.09282.
    """
    for name, x in (("logits", logits), ("reference_logits", reference_logits)):
        if not isinstance(x, Tensor):
            raise TypeError(f"kl_to_reference: {name} must be a Tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"kl_to_reference: {name} must be a floating point tensor, got {x.dtype}")
    if logits.dim() == 0:
        raise RuntimeError("kl_to_reference: logits must have shape [C], [N, C] or [N, C, d1, ...], got []")
    if logits.shape != reference_logits.shape:
        raise RuntimeError(
            f"kl_to_reference: reference_logits must have shape {list(logits.shape)}, got "
            f"{list(reference_logits.shape)}"
        )
    check_number("kl_to_reference", "temperature", temperature, "(0, inf)")
    classes = min(1, logits.dim() - 1)
    rows, reference = logits.movedim(classes, -1), reference_logits.detach().movedim(classes, -1)
    result: Tensor = _Divergence.apply(rows, reference, temperature)  # type: ignore[no-untyped-call]
    return result


class _Divergence(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
        return _divergence(*_widened(logits, reference), temperature)[0].to(logits.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        logits, reference, ctx.temperature = inputs
        ctx.save_for_backward(logits, reference)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, reference = ctx.saved_tensors
        gradient = _gradient(*_widened(logits, reference), ctx.temperature)
        slope = grads[0].to(gradient.dtype)[..., None] / ctx.temperature
        return (gradient * slope).to(logits.dtype), None, None


def _widened(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(logits.dtype, reference.dtype), torch.float32)
    return logits.to(dtype), reference.to(dtype)


def _divergence(z: Tensor, z_ref: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the divergence [...] and ``log p - log p_ref`` [..., C], 0 where p_ref is 0.

    With ``d = (z - z_ref) / T`` centred so that ``sum p_ref d = 0`` it is ``log sum p_ref exp(d)``: where every d is
    small, log1p of a sum of positive terms, in which nothing cancels.
    """
    p_ref = torch.softmax(z_ref / temperature, -1)
    dead = p_ref == 0  # z - z_ref may be inf or NaN there
    d = torch.where(dead, 0.0, (z - z_ref) / temperature)
    d = torch.where(dead, 0.0, d - (p_ref * d).sum(-1, keepdim=True))
    # a class that the reference rules out adds its p to the sum
    outside = torch.where(dead, torch.softmax(z / temperature, -1), 0.0).sum(-1)
    close = (d.abs().amax(-1) < CLOSE) & (outside == 0)
    near = torch.log1p((p_ref * _expm1_minus(torch.where(close[..., None], d, 0.0))).sum(-1))
    log_p = torch.log_softmax(z / temperature, -1)
    log_p_ref = torch.log_softmax(z_ref / temperature, -1)
    far = torch.where(dead, 0.0, p_ref * (log_p_ref - log_p)).sum(-1)
    value = torch.where(close, near, far)
    return value, torch.where(close[..., None], d - near[..., None], torch.where(dead, 0.0, log_p - log_p_ref))


def _expm1_minus(x: Tensor) -> Tensor:
    """Return ``exp(x) - 1 - x`` for |x| < 1/2 by its series, to the last bits of float64."""
    total = torch.ones_like(x)
    for k in range(16, 2, -1):
        total = 1 + total * x / k
    return total * x * x / 2


def _gradient(z: Tensor, z_ref: Tensor, temperature: float) -> Tensor:
    """Return ``p - p_ref``: as ``p_ref expm1(log p - log p_ref)`` where the two are close."""
    p = torch.softmax(z / temperature, -1)
    with torch.no_grad():
        _, log_ratio = _divergence(z, z_ref, temperature)
        p_ref = torch.softmax(z_ref / temperature, -1)
        close = (log_ratio.abs() < CLOSE) & (p_ref > 0)
        exact = torch.where(close, p_ref * torch.expm1(torch.where(close, log_ratio, 0.0)), p - p_ref)
        # of a class with nearly all of the probability the ratio keeps no digit; its gradient is what the others lack
        is_top = torch.arange(z.shape[-1], device=z.device) == p_ref.argmax(-1, keepdim=True)
        exact = torch.where(is_top, -torch.where(is_top, 0.0, exact).sum(-1, keepdim=True), exact)
    return exact + (p - p.detach())  # the value of one, the derivative of the other
