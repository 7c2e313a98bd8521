"""Make a model do in another floating dtype what it did in the recorded one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_mlflow.torch_internals import sampling_kernels
from dit_mlflow.workload.batches import map_tensors, tensors_of


class RecordedDtype(TorchFunctionMode):
    """Inside it, a model that was cast to another floating dtype does what it did in the recorded one, ``dtype``.

    A generator draws other numbers for float64 than for float32, and a replay in float64 needs those of the record. So
    random numbers for tensors of another dtype are drawn in ``dtype`` and then cast. Dropout draws the same mask in
    every dtype, and ``torch.randn(3)`` does not depend on the model's dtype. A dtype that is given to a factory is
    taken for the model's (``torch.randn(3, dtype=x.dtype)``).

    Tensors that a model or a loss creates (class weights, the first state of a recurrent layer) still have the
    recorded dtype. Where torch refuses to mix the two, tensors of the narrower dtype are cast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._draws_from = _DRAWS_FROM | sampling_kernels()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS_ANEW or func in _DRAWS_LIKE:
            asked = kwargs.get("dtype") or (args[0].dtype if func in _DRAWS_LIKE else None)
            if asked is not None and asked.is_floating_point:
                return func(*args, **{**kwargs, "dtype": self.dtype}).to(asked)
        if func in self._draws_from and (given := list(filter(_is_floating, (*args, *kwargs.values())))):
            found = func(*map(self._narrow, args), **{name: self._narrow(value) for name, value in kwargs.items()})
            return found.to(given[0].dtype) if found.is_floating_point() else found
        if func is F.gumbel_softmax:
            return self._gumbel_softmax(*args, **kwargs)
        if func in _DRAWS_INTO and args[0].is_floating_point():
            drawn = func(torch.empty_like(args[0], dtype=self.dtype), *map(self._narrow, args[1:]), **kwargs)
            return args[0].copy_(drawn)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, ValueError):
            dtypes = {tensor.dtype for tensor in tensors_of((args, kwargs), _as_it_is) if tensor.is_floating_point()}
            widest = min(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=self.dtype)
            if len(dtypes) < 2:
                raise
        args, kwargs = map_tensors((args, kwargs), lambda t: t.to(widest) if t.is_floating_point() else t, _as_it_is)
        return func(*args, **kwargs)

    def _gumbel_softmax(
        self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
    ) -> Tensor:
        """Written out, since this mode does not see the draw inside torch's."""
        noise = torch.empty_like(logits, dtype=self.dtype, memory_format=torch.legacy_contiguous_format).exponential_()
        soft = ((logits - noise.to(logits.dtype).log()) / tau).softmax(dim)
        if not hard:
            return soft
        chosen = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        return chosen - soft.detach() + soft

    def _narrow(self, value: Any) -> Any:
        return value.to(self.dtype) if _is_floating(value) else value


def _as_it_is(value: Any) -> Any:
    return value


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


_DRAWS_ANEW = {torch.rand, torch.randn, torch.normal}
_DRAWS_LIKE = {torch.rand_like, torch.randn_like}
_DRAWS_FROM = {
    torch.bernoulli,
    torch.normal,
    torch.poisson,
    torch.multinomial,
    torch.Tensor.bernoulli,
    torch.Tensor.multinomial,
}
_DRAWS_INTO = {
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    torch.Tensor.exponential_,
    torch.Tensor.log_normal_,
    torch.Tensor.cauchy_,
    torch.Tensor.geometric_,
    torch.Tensor.bernoulli_,
}
