"""What influence is asked on: a differentiable scalar of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.errors import InputError
from dit_mlflow.trajectory import Workload, to_like

CHUNK = 1024
"""Validation samples per forward pass."""


@dataclass(frozen=True, eq=False)
class Query:
    """A named scalar of the model, evaluated in evaluation mode.

    Attributes:
        name: appears in every result.
        function: ``function(model) -> scalar tensor``, differentiable. It may be called with float64 parameters,
            so it should move its data to the parameters' dtype (:func:`dit_mlflow.trajectory.to_like`).
    """

    name: str
    function: Callable[[nn.Module], Tensor]

    def __call__(self, model: nn.Module) -> Tensor:
        value = self.function(model)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"query {self.name!r} returned {shape}; expected a tensor with one element")
        return value.reshape(())


def mean_validation_loss(workload: Workload) -> Query:
    """The mean of ``workload.loss`` over the validation set: the default query.

    Cost: one forward pass of the validation set per evaluation.
    """
    size = len(workload.validation_set)  # type: ignore[arg-type]
    parts = np.array_split(np.arange(size), -(-size // CHUNK))
    batches = [workload.collate(workload.validation_set, part) for part in parts]

    def function(model: nn.Module) -> Tensor:
        like = next(model.parameters())
        losses = [
            workload.sample_losses(model, to_like(batch, like.device, like.dtype, fresh=True), len(part))
            for batch, part in zip(batches, parts, strict=True)
        ]
        return torch.cat(losses).mean()

    return Query("mean_validation_loss", function)


def resolve_queries(queries: Sequence[Query] | None, workload: Workload) -> list[Query]:
    """The queries given, or the default; raises :class:`InputError` for none or repeated names."""
    resolved = [mean_validation_loss(workload)] if queries is None else list(queries)
    names = [query.name for query in resolved]
    if not names or len(set(names)) != len(names):
        raise InputError(f"queries are named {names}; expected at least one, each with a name of its own")
    return resolved
