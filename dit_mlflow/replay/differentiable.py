"""What torch does not differentiate twice, or not rightly, done by what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from dit_mlflow.replay.checkpointing import WITHOUT_RECOMPUTATION
from dit_mlflow.torch_internals import weight_norm_kernel


class TwiceDifferentiable:
    """Makes a model, and contexts in which it is called, such that it can be differentiated twice.

    Args:
        model: one's own copy; it is changed.

    - Sparse gradients (``Embedding(sparse=True)``) are made dense; the optimizers that take both make the same step.
    - Weight normalisation: the second derivative of torch's kernel is wrong (torch 2.13, without an error); it is
      written out.
    - Gradient checkpointing is left out: see :mod:`dit_mlflow.replay.checkpointing`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parametrized = any(parametrize.is_parametrized(module) for module in model.modules())
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with WITHOUT_RECOMPUTATION(), _WrittenOut() if self._parametrized else nullcontext():
            yield


class _WrittenOut(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._kernel = weight_norm_kernel()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (weight_norm if func is self._kernel else func)(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, norms over all dimensions but ``dim`` (-1: over all), as torch's kernel."""
    others = [axis for axis in range(v.dim()) if axis != dim] if dim != -1 else list(range(v.dim()))
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))
