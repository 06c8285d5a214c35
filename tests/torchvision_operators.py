"""Lets torchvision be imported beside a CPU build of torch: the registry's is of CUDA, its operators are missing.

timm needs torchvision, and transformers imports it where it is installed. Nothing here calls the operators.
"""

import contextlib
import importlib.util

import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # a build that fits defines them itself
            LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
