"""Metrics, each with a value or the reason why it has none; and those of a model on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from dit_mlflow.errors import WorkloadError
from dit_mlflow.evaluation.figures import LOSS, by_default
from dit_mlflow.influence.query import CHUNK
from dit_mlflow.told import text_of
from dit_mlflow.workload import Batch, Workload, floating_one, to_like
from dit_mlflow.workload.random_state import fixed_draws
from dit_mlflow.workload.without_graph import without_graph


@dataclass(frozen=True)
class Metrics:
    """Named figures: metric name -> value, and for those without one, metric name -> reason."""

    values: Mapping[str, float] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)

    def prefixed(self, prefix: str) -> Metrics:
        """The same with ``prefix`` before every name."""
        return Metrics(
            {prefix + name: value for name, value in self.values.items()},
            {prefix + name: reason for name, reason in self.undefined.items()},
        )

    def and_(self, other: Metrics) -> Metrics:
        """Both; ``other`` wins where a name is in both."""
        return Metrics({**self.values, **other.values}, {**self.undefined, **other.undefined})

    def shown(self, every: bool) -> Metrics:
        """All of them, or those that are logged by default (:func:`dit_mlflow.evaluation.figures.by_default`)."""
        return self if every else self.only(*filter(by_default, [*self.values, *self.undefined]))

    def only(self, *names: str) -> Metrics:
        """Only the metrics named ``names``, as far as they are there."""
        return Metrics(
            {name: value for name, value in self.values.items() if name in names},
            {name: reason for name, reason in self.undefined.items() if name in names},
        )


def mean_scores(workload: Workload, model: nn.Module, dataset: Dataset[Any]) -> Metrics:
    """Means of :func:`sample_scores` over the samples."""
    found = sample_scores(workload, model, dataset)
    return Metrics({name: float(values.mean()) for name, values in found.items()})


def sample_scores(workload: Workload, model: nn.Module, dataset: Dataset[Any]) -> dict[str, np.ndarray]:
    """``loss``, and each of the workload's own metrics, of every sample of a data set, float64 ``[samples]``.

    Args:
        workload: its loss and metrics.
        model: in the mode to evaluate it in.
        dataset: of the workload's kind of samples.

    Random draws from torch are the same every time. Cost: a forward pass for the loss and one for the metrics.
    """
    size = len(dataset)  # type: ignore[arg-type]
    like = floating_one(model.parameters())
    parts: dict[str, list[np.ndarray]] = {}
    with fixed_draws(like.device):
        for start in range(0, size, CHUNK):
            indices = range(start, min(start + CHUNK, size))
            batch = to_like(workload.unvarying(dataset, indices), like.device, None)

            def measured(batch: Batch = batch, size: int = len(indices)) -> dict[str, Tensor]:
                told = {} if workload.metrics is None else workload.metrics(model, batch)
                return {LOSS: workload.sample_losses(model, batch, size), **told}

            values = without_graph(measured)
            for name, value in values.items():
                if not isinstance(value, Tensor) or value.shape != (len(indices),):
                    got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                    raise WorkloadError(
                        f"Workload.metrics returned {got} for {text_of(name, 100)!r} and a batch of {len(indices)} "
                        f"samples; expected a tensor of shape [{len(indices)}], one value per sample"
                    )
                parts.setdefault(text_of(name, 200), []).append(value.double().cpu().numpy())
    return {name: np.concatenate(found) for name, found in parts.items()}
