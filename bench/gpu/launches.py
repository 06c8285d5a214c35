"""A few dozen launches for compute-sanitizer: every kernel, dtype, alignment and edge once, on small inputs.

compute-sanitizer --tool memcheck python -m bench.gpu.launches
"""

from __future__ import annotations

import sys

import torch

from bonus_ops import (
    bonus_binary_cross_entropy_with_logits,
    bonus_cross_entropy,
    bonus_cross_entropy_with_scores,
    bonus_cross_entropy_with_softmax,
)

CLASSES = ((10, 0), (1003, 1), (5003, 3), (32779, 0))  # and elements past an aligned address
N_CLASSES = 1003  # of the other losses


def main(device: str) -> None:
    n_launches = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n_classes, offset in CLASSES:
            if device == "cpu" and n_classes > 2000:
                continue
            storage = torch.randn(3 * n_classes + offset, device=device).to(dtype)
            logits = storage[offset:].view(3, n_classes).requires_grad_()
            # the first and the last class, and an ignored row
            target = torch.tensor([0, n_classes - 1, -100], device=device)
            loss, _ = bonus_cross_entropy_with_scores(logits, target, reduction="none")
            loss.sum().backward()
            n_launches += 2 + (n_classes > 16000)
            if n_classes < 6000:
                bonus_cross_entropy_with_softmax(logits.detach(), target)
                n_launches += 1
    for dtype in (torch.float32, torch.bfloat16):
        storage = torch.randn(3 * N_CLASSES + 1, device=device).to(dtype)
        logits = storage[1:].view(3, N_CLASSES).requires_grad_()
        target = torch.tensor([0, N_CLASSES - 1, -100], device=device)
        probabilities = torch.rand(3, N_CLASSES, device=device).to(dtype)
        for loss in (
            bonus_cross_entropy(logits, target, label_smoothing=0.1),
            bonus_cross_entropy(logits, probabilities),
            bonus_binary_cross_entropy_with_logits(logits, probabilities),
        ):
            loss.backward()
            n_launches += 2
    for dtype in (torch.float32, torch.bfloat16):  # classes apart, and rows with gaps between them
        pixels = torch.randn(2, 21, 5, 5, device=device).to(dtype)
        shifted = torch.randn(3, N_CLASSES + 1, device=device).to(dtype)[:, :-1]
        for logits in (pixels, shifted):
            logits = logits.detach().requires_grad_()
            target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64, device=device)
            loss, _ = bonus_cross_entropy_with_scores(logits, target, softcap=30.0, reduction="none")
            loss.sum().backward()
            n_launches += 2
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{n_launches} launches of our kernels")


if __name__ == "__main__":
    main("cpu" if "--cpu" in sys.argv else "cuda")
