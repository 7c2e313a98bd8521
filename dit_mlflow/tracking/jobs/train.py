"""The training job: one top-level run with its trajectory."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, suppress
from typing import Any

import mlflow
from mlflow import MlflowClient
from torch import nn
from torch.utils.data import Dataset

from dit_mlflow.evaluation import mean_scores
from dit_mlflow.evaluation.figures import TRAINING_LOSS, TRAINING_SECONDS
from dit_mlflow.recording import TrajectoryRecorder
from dit_mlflow.recording.loop import check_seeds, train_recorded
from dit_mlflow.tracking.recording.record_trajectory import record_trajectory
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.tracking.store.datasets import SampleSet, log_dataset, workload_source
from dit_mlflow.tracking.store.models import log_model
from dit_mlflow.tracking.store.names import KIND, TRAJECTORY
from dit_mlflow.tracking.store.run_log import log_metrics, log_params, log_series, project_run
from dit_mlflow.workload import Optimizers, Workload
from dit_mlflow.workload.dataset_digest import dataset_digest


def run_training(
    workload: Workload,
    init_seed: int = 0,
    order_seed: int = 0,
    checkpoint_every: str | int = "sqrt",
    project_run_id: str | None = None,
) -> str:
    """Train a workload in an MLflow run of its own and log trajectory, settings and metrics.

    Args:
        workload: what to train.
        init_seed, order_seed, checkpoint_every: see :func:`dit_mlflow.train`.
        project_run_id: the run that ``mlflow run`` made for this job; ``None`` = start one.

    Returns:
        The run's id. If training fails, the run is FAILED and holds what was recorded until then.
    """
    check_seeds(init_seed, order_seed)
    title = run_title("train", workload, seeds_title(init_seed, order_seed))
    with project_run(project_run_id, title, {KIND: "training"}) as run:
        run_id = str(run.info.run_id)
        log_params(
            {
                **workload_params(workload),
                "resolved.init_seed": init_seed,
                "resolved.order_seed": order_seed,
                "resolved.checkpoint_every": checkpoint_every,
            }
        )

        def recording(model: nn.Module, optimizer: Optimizers) -> AbstractContextManager[TrajectoryRecorder]:
            return record_trajectory(model, optimizer, workload, checkpoint_every=checkpoint_every)

        started = time.perf_counter()
        try:
            model = train_recorded(workload, recording, init_seed, order_seed).eval()
        except BaseException:
            # Whatever ended it, even a signal: keep the losses until then.
            with suppress(Exception):
                _log_losses(run_id)
            raise
        _log_losses(run_id)
        mlflow.log_metric(TRAINING_SECONDS.name, time.perf_counter() - started)
        model_id = log_model(model, workload)
        for context, dataset in (("validation", workload.validation_set), ("test", workload.test_set)):
            if dataset is not None:
                _log_scores(run_id, model_id, workload, model, dataset, context)
        return run_id


def seeds_title(init_seed: int | str, order_seed: int | str) -> str:
    """The seeds as a part of a run's name; empty for the default seeds."""
    return "" if int(init_seed) == int(order_seed) == 0 else f"init {init_seed} order {order_seed}"


def run_title(job: str, workload: Workload, *differs: str) -> str:
    """The name of a job's run: what tells it from others of the same job comes first, since the UI cuts long names."""
    return " · ".join([*filter(None, differs), f"{job} {workload.title}"])


def workload_params(workload: Workload) -> dict[str, Any]:
    """Reference and resolved settings, under names that do not collide with ``-P`` parameters."""
    return {
        "resolved.workload": workload.reference,
        **{f"workload.{name}": value for name, value in workload.settings.items()},
    }


def _log_losses(run_id: str) -> None:
    if not MlflowClient().list_artifacts(run_id, TRAJECTORY):
        return
    trajectory = load_trajectory(run_id)
    log_series(TRAINING_LOSS.name, [trajectory.step(t).loss for t in range(trajectory.num_steps)])


def _log_scores(
    run_id: str, model_id: str | None, workload: Workload, model: nn.Module, dataset: Dataset[Any], context: str
) -> None:
    """Log a data set as input of the run, and the model's scores on it."""
    source = workload_source(workload)
    size = len(dataset)  # type: ignore[arg-type]
    described = SampleSet(source.get("workload", context), dataset_digest(dataset), size, source)
    log_dataset(run_id, described, context)
    log_metrics(mean_scores(workload, model, dataset).prefixed(f"{context}/"), model_id, described)
