"""How good a model is on a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dit_mlflow.evaluation.metrics import Metrics
from dit_mlflow.influence.query import CHUNK
from dit_mlflow.trajectory import Workload, to_like


def mean_scores(workload: Workload, model: nn.Module, dataset: Dataset[Any]) -> Metrics:
    """Mean ``loss``, and mean of each of the workload's own metrics, over the samples of a data set.

    Args:
        workload: its loss and metrics.
        model: in the mode in which it is to be judged.
        dataset: of the workload's kind of samples.

    Cost: a forward pass for the loss and one for the metrics, in chunks.
    """
    size = len(dataset)  # type: ignore[arg-type]
    like = next(model.parameters())
    totals: dict[str, float] = {}
    with torch.no_grad():
        for start in range(0, size, CHUNK):
            indices = range(start, min(start + CHUNK, size))
            batch = to_like(workload.collate(dataset, indices), like.device, None)
            values = {"loss": workload.sample_losses(model, batch, len(indices))}
            if workload.metrics is not None:
                values |= workload.metrics(model, batch)
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value.double().sum().item()
    return Metrics({name: total / size for name, total in totals.items()})
