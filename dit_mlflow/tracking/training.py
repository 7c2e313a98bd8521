"""The training job: one top-level run with its trajectory."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import torch
from torch import nn
from torch.utils.data import Dataset

from dit_mlflow.evaluation import Metrics
from dit_mlflow.influence.query import CHUNK
from dit_mlflow.tracking.artifacts import log_trajectory
from dit_mlflow.tracking.names import KIND
from dit_mlflow.tracking.runs import log_metrics, log_series, project_run
from dit_mlflow.trajectory import Trajectory, Workload, to_like, train
from dit_mlflow.trajectory.manifest import FILE_NAME


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
    with (
        project_run(project_run_id, f"train {workload_title(workload)}", {KIND: "training"}),
        TemporaryDirectory() as temporary,
    ):
        run = mlflow.active_run()
        assert run is not None
        folder = Path(temporary) / "trajectory"
        mlflow.log_params(
            {
                **workload_params(workload),
                "resolved.init_seed": init_seed,
                "resolved.order_seed": order_seed,
                "resolved.checkpoint_every": checkpoint_every,
            }
        )
        started = time.perf_counter()
        try:
            trajectory = train(workload, folder, init_seed, order_seed, checkpoint_every)
        except BaseException:
            # Whatever ended it, a termination too: the steps until then are worth keeping.
            if (folder / FILE_NAME).is_file():
                _log_recorded(Trajectory.open(folder))
            raise
        seconds = time.perf_counter() - started
        _log_recorded(trajectory)
        mlflow.log_metric("cost/training_seconds", seconds)
        model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
        log_metrics(_scores(workload, model, workload.validation_set).prefixed("validation/"))
        if workload.test_set is not None:
            log_metrics(_scores(workload, model, workload.test_set).prefixed("test/"))
        return str(run.info.run_id)


def workload_title(workload: Workload) -> str:
    """Short name for runs: the project's folder and its model, if it has such a setting."""
    parts = [(workload.reference or "workload").rpartition("/")[2], str(workload.settings.get("model", ""))]
    return " ".join(part for part in parts if part)


def workload_params(workload: Workload) -> dict[str, Any]:
    """Reference and resolved settings, under names that do not collide with ``-P`` parameters."""
    return {
        "resolved.workload": workload.reference,
        **{f"workload.{name}": value for name, value in workload.settings.items()},
    }


def _log_recorded(trajectory: Trajectory) -> None:
    log_series("training/loss", [trajectory.step(t).loss for t in range(trajectory.num_steps)])
    log_trajectory(trajectory)


def _scores(workload: Workload, model: nn.Module, dataset: Dataset[Any]) -> Metrics:
    """Mean loss, and mean of the workload's own metrics, over a dataset."""
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
