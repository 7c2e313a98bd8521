"""Trajectories and influence as artifacts of MLflow runs."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.influence import Influence
from dit_mlflow.tracking.names import INFLUENCE, RECORDING, TRAINING_RUN, TRAJECTORY
from dit_mlflow.trajectory import Trajectory
from dit_mlflow.trajectory.manifest import FILE_NAME


def log_trajectory(trajectory: Trajectory | str | Path, run_id: str | None = None) -> None:
    """Log a trajectory, or the folder of one, as ``trajectory/`` of a run (default: the active one)."""
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.open(trajectory)
    run_id = run_id or active_run_id()
    # The manifest last: until it is there, the store has no trajectory, or the one before.
    for name in (*trajectory.manifest.files, FILE_NAME):
        mlflow.log_artifact(str(trajectory.directory / name), TRAJECTORY, run_id=run_id)
    MlflowClient().set_tag(run_id, RECORDING, "true")


def load_trajectory(run_id: str) -> Trajectory:
    """The trajectory that a training run recorded.

    Read in place from a local artifact store; from a remote one, downloaded for as long as the trajectory is in use.

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
    if local_artifacts := artifact_folder(run.info.artifact_uri):
        return Trajectory.open(local_artifacts / TRAJECTORY)
    folder = mkdtemp(prefix="dit-mlflow-")
    try:
        download_artifacts(run_id=run_id, artifact_path=TRAJECTORY, dst_path=folder)
        trajectory = Trajectory.open(Path(folder) / TRAJECTORY)
    except BaseException:
        shutil.rmtree(folder)
        raise
    weakref.finalize(trajectory, shutil.rmtree, folder, ignore_errors=True)
    return trajectory


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
    with TemporaryDirectory() as temporary:
        return Influence.load(download_artifacts(run_id=run_id, artifact_path=folder, dst_path=temporary))


def active_run_id() -> str:
    """The active run's id; raises :class:`InputError` if there is none."""
    run = mlflow.active_run()
    if run is None:
        raise InputError("no MLflow run is active; expected one (with mlflow.start_run(): ...) or a run_id")
    return str(run.info.run_id)


def find_run(run_id: str) -> Run:
    """The run, or an :class:`InputError` that says where it was looked for."""
    try:
        return MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise InputError(
            f"no run {run_id!r} at the tracking URI {mlflow.get_tracking_uri()}: {error.message}"
        ) from error


def artifact_folder(uri: str) -> Path | None:
    """The folder that an artifact URI means on this machine, if it is one."""
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(url2pathname(parsed.path))
    # A scheme of one letter is a Windows drive.
    return Path(uri) if len(parsed.scheme) < 2 else None
