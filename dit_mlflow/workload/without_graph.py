"""Compute values without their graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from dit_mlflow.workload.batches import map_tensors

Result = TypeVar("Result")

NEEDS_GRAPH = "does not require grad"
"""In the message of ``torch.autograd.grad`` where gradients are off."""


def without_graph(function: Callable[[], Result]) -> Result:
    """``function()`` without gradients; if it takes gradients itself (forces, penalties), with them and detached.

    Cost: in the second case, up to two calls.
    """
    try:
        with torch.no_grad():
            return function()
    except RuntimeError as error:
        if NEEDS_GRAPH not in str(error):
            raise
    with torch.enable_grad():
        found: Result = map_tensors(function(), Tensor.detach)
    return found
