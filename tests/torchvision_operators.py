"""Lets torchvision, which quanda imports, be imported beside a torch without CUDA: its usual build cannot load its
operators there, and then fails for want of the names of two. No test calls them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

spec = find_spec("torchvision")
for library in Path(spec.origin).parent.glob("_C.so") if spec and spec.origin else ():
    try:
        torch.ops.load_library(library)
    except OSError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
