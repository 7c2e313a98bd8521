"""Copies aggregates of an influence run to the model, as metrics linked to the data set that they are about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Dataset, Metric, Run

from dit_mlflow.evaluation.figures import BY_WINDOW, DETECTION, MEAN_OVER_WINDOWS, TRUST, TRUTH
from dit_mlflow.explanation.tables import OF_WINDOWS
from dit_mlflow.tracking.store.names import DATASET_CONTEXT
from dit_mlflow.tracking.store.run_log import BATCH

GROUPS = (TRUTH, DETECTION, TRUST)
"""Prefixes of figures of the whole training; all of them are copied to the model."""
DEFAULT_QUERY = "mean_validation_loss"


def window_series(run: Run, count: int) -> dict[str, list[float | None]]:
    """The values of :data:`OF_WINDOWS` in each of ``count`` windows, where the run has them; the last logged counts.

    Their means over windows go to the model too.
    """
    found: dict[str, list[float | None]] = {}
    for figure in OF_WINDOWS:
        values: list[float | None] = [None] * count
        for metric in _history(run, figure.by_window):
            if metric.step < count:
                values[metric.step] = metric.value
        if any(value is not None for value in values):
            found[figure.name] = values
    return found


def log_model_metrics(
    run: Run, model_id: str, query: str, training: Run, by_window: Mapping[str, Sequence[float | None]]
) -> None:
    """Copy an influence run's aggregates to a model, each with its original time and the run as its source.

    Logging the same again changes nothing: MLflow identifies a model's metrics by name, time, step and run.

    Args:
        run: the influence run.
        model_id: of the model.
        query: of the influence run; the default one is about the validation set.
        training: the training run, whose inputs are the data sets.
        by_window: from :func:`window_series`.
    """
    datasets = {
        next((tag.value for tag in item.tags if tag.key == DATASET_CONTEXT), ""): item.dataset
        for item in (training.inputs.dataset_inputs if training.inputs else [])
    }
    metrics = []
    for name in sorted(run.data.metrics):
        if name.startswith(GROUPS):
            metrics += [_linked(metric, model_id, _about(name, query, datasets)) for metric in _history(run, name)[-1:]]
    for name, values in by_window.items():
        known = [value for value in values if value is not None]
        last = _history(run, BY_WINDOW + name)[-1]
        mean = Metric(MEAN_OVER_WINDOWS + name, sum(known) / len(known), last.timestamp, 0)
        metrics.append(_linked(mean, model_id, _about(name, query, datasets)))
    for start in range(0, len(metrics), BATCH):
        MlflowClient().log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])


def _about(name: str, query: str, datasets: Mapping[str, Dataset]) -> Dataset | None:
    """The data set of a metric: the training set for detection, else the set that the query is about."""
    if name.startswith(DETECTION):
        return datasets.get("training")
    return datasets.get("validation") if query == DEFAULT_QUERY else None


def _linked(metric: Metric, model_id: str, dataset: Dataset | None) -> Metric:
    named = (dataset.name, dataset.digest) if dataset is not None else (None, None)
    return Metric(metric.key, metric.value, metric.timestamp, metric.step, model_id, *named)


def _history(run: Run, name: str) -> list[Metric]:
    """A metric's values by time; empty if the run has no such metric."""
    if name not in run.data.metrics:
        return []
    return sorted(MlflowClient().get_metric_history(run.info.run_id, name), key=lambda metric: metric.timestamp)
