"""Linear layers with few outputs, as trainings side by side compute them fast."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = 32
"""Number of outputs below which it is faster: measured with 8 and 64."""


class NarrowLayers(TorchFunctionMode):
    """Inside it, linear layers with few outputs compute ``(W x^T)^T``.

    Under ``vmap`` over ``W``, with inputs that all trainings share, PyTorch then makes one product; of ``x W^T`` it
    makes one for each training, with as many copies of ``x``, which takes two to three times as long with 8 outputs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.dim() != 2 or weight.dim() != 2 or len(weight) >= NARROW:
        return F.linear(input, weight, bias)
    found = (weight @ input.mT).mT
    return found if bias is None else found + bias
