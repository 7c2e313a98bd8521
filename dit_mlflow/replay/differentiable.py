"""What torch does not differentiate twice, or not rightly, done by what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode


class TwiceDifferentiable:
    """Makes a model, and contexts in which it is called, such that it can be differentiated twice.

    Args:
        model: one's own copy; it is changed.

    - Sparse gradients (``Embedding(sparse=True)``) are made dense; the optimizers that take both make the same step.
    - Weight normalisation: the second derivative of ``torch._weight_norm`` is wrong (torch 2.13, without an error);
      it is written out.
    - Gradient checkpointing (``torch.utils.checkpoint``) runs parts of the model again when the gradient is taken, with
      the parameters that the module has by then, and its older form cannot be differentiated twice. The parts are
      called as they are, which gives the same values, in the memory that it takes without checkpointing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._normalised = any(
            type(step).__name__ == "_WeightNorm" for module in model.modules() for step in _parametrizations(module)
        )
        for module in model.modules():
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                module.sparse = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        module = torch.utils.checkpoint
        found = {name: getattr(module, name) for name in _PLAIN}
        vars(module).update(_PLAIN)
        try:
            with _WrittenOut() if self._normalised else nullcontext():
                yield
        finally:
            vars(module).update(found)


class _WrittenOut(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (weight_norm if func is torch._weight_norm else func)(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, norms over all dimensions but ``dim`` (-1: over all), as ``torch._weight_norm``."""
    others = [axis for axis in range(v.dim()) if axis != dim] if dim != -1 else list(range(v.dim()))
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _parametrizations(module: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(module):
        return []
    lists: Any = module.parametrizations
    return [step for steps in lists.values() for step in steps]


class _Reentrant:
    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _not_reentrant(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


_PLAIN: dict[str, Any] = {
    "CheckpointFunction": _Reentrant,
    "_checkpoint_without_reentrant_generator": _not_reentrant,
}
"""What ``torch.utils.checkpoint.checkpoint`` reaches for, whichever way it was imported."""
