"""Replace or refuse what torch does not differentiate twice, or differentiates wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.checkpointing import WITHOUT_RECOMPUTATION
from dit_mlflow.torch_internals import MISSING_DERIVATIVE, REFUSING_NODE, weight_norm_kernel


class TwiceDifferentiable:
    """Changes a model so that it can be differentiated twice; the instance is the context in which to call it.

    Args:
        model: a copy that may be changed.

    - Sparse gradients (``Embedding(sparse=True)``) become dense; optimizers that accept both make the same step.
    - Weight normalisation and bags of embeddings are written out: the second derivative of torch's kernel for the first
      is wrong (torch 2.13, without an error), and the second has none.
    - Gradient checkpointing is skipped, see :mod:`dit_mlflow.replay.checkpointing`.
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
    """:func:`torch.nn.functional.embedding_bag` in ordinary operations.

    Calls with ``max_norm`` or ``scale_grad_by_freq`` go to torch's kernel; the recorder refuses such models.
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


@contextmanager
def naming_missing_derivatives() -> Iterator[None]:
    """Inside it, torch's error about a missing derivative becomes an :class:`UnsupportedError`."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(sign in str(error) for sign in MISSING_DERIVATIVE):
            raise
        raise UnsupportedError(
            f"the model or its loss cannot be differentiated twice, which influence needs: {error}. Use another "
            "implementation of that operation, one made of ordinary PyTorch operations"
        ) from error


def refuse_dead_ends(gradients: Iterable[Tensor]) -> None:
    """Raise for gradients that ``once_differentiable`` cut off: autograd would treat them as constants."""
    seen: set[Any] = set()
    left = [gradient.grad_fn for gradient in gradients]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == REFUSING_NODE:
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        left += [following for following, _ in node.next_functions]


class DerivativesInside(TorchFunctionMode):
    """Notes whether what runs inside it takes derivatives by ``torch.autograd.grad``, with and without their graph.

    Args:
        graphs: keep the graph in any case, so that they have derivatives in turn.
    """

    def __init__(self, graphs: bool = False) -> None:
        super().__init__()
        self._graphs = graphs
        self.with_graph = self.without_graph = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad and torch.is_grad_enabled():
            self.with_graph |= bool(kwargs.get("create_graph"))
            self.without_graph |= not kwargs.get("create_graph")
            if self._graphs:
                kwargs = {**kwargs, "create_graph": True}
        return func(*args, **kwargs)
