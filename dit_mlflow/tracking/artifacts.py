"""Trajectories and influence as artifacts of MLflow runs."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.influence import Influence
from dit_mlflow.tracking.names import INFLUENCE, TRAINING_RUN, TRAJECTORY
from dit_mlflow.trajectory import Trajectory


def log_trajectory(trajectory: Trajectory | str | Path, run_id: str | None = None) -> None:
    """Log a trajectory, or the folder of one, as ``trajectory/`` of a run (default: the active one)."""
    folder = trajectory.directory if isinstance(trajectory, Trajectory) else Path(trajectory)
    Trajectory.open(folder)
    mlflow.log_artifacts(str(folder), TRAJECTORY, run_id=run_id)


def load_trajectory(run_id: str) -> Trajectory:
    """The trajectory that a training run recorded.

    Read in place from a local artifact store, downloaded from a remote one.

    Raises:
        InputError: no such run.
        TrajectoryError: the run has no trajectory, or it is damaged.
    """
    run = find_run(run_id)
    if not MlflowClient().list_artifacts(run_id, TRAJECTORY):
        hint = run.data.tags.get(TRAINING_RUN)
        raise TrajectoryError(
            f"run {run_id} ({run.info.run_name}) has no artifact {TRAJECTORY}/; expected a training run of "
            "dit-mlflow" + (f"; it was computed from {hint}" if hint else "")
        )
    return Trajectory.open(download_artifacts(run_id=run_id, artifact_path=TRAJECTORY))


def log_influence(influence: Influence, run_id: str | None = None, folder: str = INFLUENCE) -> None:
    """Log scores and metadata as ``influence/`` of a run (default: the active one)."""
    with TemporaryDirectory() as temporary:
        mlflow.log_artifacts(str(influence.save(temporary)), folder, run_id=run_id)


def load_influence(run_id: str, folder: str = INFLUENCE) -> Influence:
    """The influence that a run logged.

    Raises:
        InputError: no such run, or it has no influence.
    """
    run = find_run(run_id)
    if not MlflowClient().list_artifacts(run_id, folder):
        raise InputError(f"run {run_id} ({run.info.run_name}) has no artifact {folder}/; expected an influence run")
    return Influence.load(download_artifacts(run_id=run_id, artifact_path=folder))


def find_run(run_id: str) -> Run:
    """The run, or an :class:`InputError` that says where it was looked for."""
    try:
        return MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise InputError(
            f"no run {run_id!r} at the tracking URI {mlflow.get_tracking_uri()}: {error.message}"
        ) from error
