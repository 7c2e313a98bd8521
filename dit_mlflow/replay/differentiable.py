"""What torch does not differentiate twice, or not rightly, done by what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
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
    - Weight normalisation: the second derivative of torch's kernel is wrong (torch 2.13, without an error); bags of
      embeddings have none. Both are written out.
    - Gradient checkpointing is left out: see :mod:`dit_mlflow.replay.checkpointing`.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._written_out = any(parametrize.is_parametrized(m) or isinstance(m, nn.EmbeddingBag) for m in modules)
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with WITHOUT_RECOMPUTATION(), _WrittenOut() if self._written_out else nullcontext():
            yield


class _WrittenOut(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._instead = {weight_norm_kernel(): weight_norm, F.embedding_bag: embedding_bag}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._instead.get(func, func)(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, norms over all dimensions but ``dim`` (-1: over all), as torch's kernel."""
    others = [axis for axis in range(v.dim()) if axis != dim] if dim != -1 else list(range(v.dim()))
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or largest elements of rows of ``weight``, bag by bag, as :func:`torch.nn.functional.embedding_bag`.

    ``max_norm`` and ``scale_grad_by_freq`` are torch's own: a recorder refuses them.
    """
    if max_norm is not None or scale_grad_by_freq:
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    if input.dim() == 2:
        bags, indices = len(input), input.reshape(-1)
        bag = torch.arange(bags, device=input.device).repeat_interleave(input.shape[1])
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        bags, indices = len(starts), input
        bag = torch.searchsorted(starts, torch.arange(len(input), device=input.device), right=True) - 1
    counted = torch.ones_like(indices, dtype=torch.bool)
    if padding_idx is not None:
        counted = indices != padding_idx % len(weight)
    bag, rows = bag[counted], F.embedding(indices[counted], weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1)[counted].unsqueeze(1)
    empty = rows.new_zeros((bags, weight.shape[1]))
    if mode == "max":
        return empty.scatter_reduce(0, bag.unsqueeze(1).expand_as(rows), rows, "amax", include_self=False)
    total = empty.index_add(0, bag, rows)
    if mode == "sum":
        return total
    sizes = torch.bincount(bag, minlength=bags).clamp(min=1).to(rows)
    return total / sizes.unsqueeze(1)
