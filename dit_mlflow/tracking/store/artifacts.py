"""Trajectories and influence as artifacts of MLflow runs."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from dit_mlflow.errors import InputError, TrajectoryError, cause, masked_errors
from dit_mlflow.influence import Influence
from dit_mlflow.influence.stored_result import RESULT_FILES
from dit_mlflow.replay import Trajectory
from dit_mlflow.told import logger_of, masked
from dit_mlflow.tracking.store.found_models import load_model_influence
from dit_mlflow.tracking.store.names import INFLUENCE, RECORDING, TRAINING_RUN, TRAJECTORY
from dit_mlflow.tracking.store.patience import asked_again, broken_off
from dit_mlflow.tracking.store.remote import open_remote, reading
from dit_mlflow.tracking.ui.notes import note_training
from dit_mlflow.trajectory.manifest import FILE_NAME

_log = logger_of(__name__)


def log_trajectory(trajectory: Trajectory | str | Path, run_id: str | None = None) -> None:
    """Log a trajectory, or the folder of one, as ``trajectory/`` of a run (default: the active one)."""
    if not isinstance(trajectory, Trajectory):
        trajectory = Trajectory.open(trajectory)
    run_id = run_id or active_run_id()
    with trajectory.folder() as folder:
        # The manifest comes last: until then the store holds no trajectory, or the earlier one.
        for name in (*trajectory.manifest.files, FILE_NAME):
            with masked_errors():
                mlflow.log_artifact(str(folder / name), TRAJECTORY, run_id=run_id)
    with masked_errors():
        MlflowClient().set_tag(run_id, RECORDING, "true")
        note_training(run_id, trajectory)


def load_trajectory(run_id: str) -> Trajectory:
    """The trajectory that a training run recorded.

    It is read in place from a local artifact store. From a remote one, only the manifest is downloaded now; any other
    file is downloaded when first needed, into a cache by checksum (see :mod:`dit_mlflow.tracking.store.cache`).

    Raises:
        InputError: no such run, or its store cannot be read (with a remote store also later, while it is used).
        TrajectoryError: the run has no trajectory, or it is damaged.
    """
    run = find_run(run_id)
    if (local := artifact_folder(run.info.artifact_uri)) is None:
        trajectory = open_remote(run)
    else:
        trajectory = Trajectory.open(local / TRAJECTORY) if (local / TRAJECTORY).is_dir() else None
    if trajectory is None:
        tags = run.data.tags
        if TRAINING_RUN in tags:
            hint = f"; it was computed from {tags[TRAINING_RUN]}"
        else:
            begun = "; a recording has begun in it: wait for its upload, or log the folder that its messages name"
            hint = begun if RECORDING in tags else ""
        raise TrajectoryError(
            f"run {run_id} ({run.info.run_name}) has no artifact {TRAJECTORY}/ in {masked(run.info.artifact_uri)}; "
            f"expected a training run of dit-mlflow{hint}"
        )
    return trajectory


def log_influence(influence: Influence, run_id: str | None = None, folder: str = INFLUENCE) -> None:
    """Log scores and metadata as ``influence/`` of a run (default: the active one).

    If the store fails, its error is raised, and a message names the local folder where they are kept.
    """
    run_id = run_id or active_run_id()
    kept = influence.save(mkdtemp(prefix="dit-mlflow-"))
    try:
        with masked_errors():
            mlflow.log_artifacts(str(kept), folder, run_id=run_id)
    except BaseException:
        again = f"dit_mlflow.tracking.log_influence(dit_mlflow.Influence.load({str(kept)!r}), {run_id!r}, {folder!r})"
        _log.error("the scores of %s/ of run %s are not in its store, but in %s: %s", folder, run_id, kept, again)
        raise
    shutil.rmtree(kept)


def load_influence(source: str, folder: str = INFLUENCE) -> Influence:
    """The influence that a run logged or a model holds.

    Args:
        source: a run's id, ``runs:/<id>`` or ``runs:/<id>/<folder>``; or a model, as ``models:/<name>/<version>``,
            ``models:/<name>@<alias>`` or ``models:/m-<id>``.
        folder: the artifact folder.

    Raises:
        InputError: no such run or model, or it has no influence.
    """
    if not isinstance(source, str):
        raise InputError(f"source is a {type(source).__name__}; expected a run's id, runs:/… or models:/…, as a str")
    if source.startswith("models:"):
        return load_model_influence(source, folder)
    if source.startswith("runs:/"):
        run_id, _, path = source.removeprefix("runs:/").strip("/").partition("/")
        folder = path or folder
    else:
        run_id = source
    run = find_run(run_id)
    with TemporaryDirectory() as temporary:
        with reading(run, f"{folder}/"):
            listed = asked_again(partial(MlflowClient().list_artifacts, run_id, folder), broken_off)
            there = {Path(item.path).name for item in listed}
            # Not the folder, which may hold anything, of any size and under any name.
            fetch = partial(download_artifacts, run_id=run_id, dst_path=temporary)
            paths = [
                asked_again(partial(fetch, artifact_path=f"{folder}/{name}"), broken_off)
                for name in there & set(RESULT_FILES)
            ]
        if not there:
            raise InputError(f"run {run_id} ({run.info.run_name}) has no artifact {folder}/; expected an influence run")
        return Influence.load(Path(paths[0]).parent if paths else temporary)


def active_run_id() -> str:
    """The active run's id; raises :class:`InputError` if there is none."""
    run = mlflow.active_run()
    if run is None:
        raise InputError("no MLflow run is active; expected one (with mlflow.start_run(): ...) or a run_id")
    return str(run.info.run_id)


def find_run(run_id: str) -> Run:
    """The run; an :class:`InputError` says where it was searched, or that it is deleted."""
    store = f"the tracking URI {masked(mlflow.get_tracking_uri())}"
    try:
        run = asked_again(partial(MlflowClient().get_run, run_id), broken_off)
    except Exception as error:  # MLflow's own, or one of a database driver, which may be missing.
        if isinstance(error, MlflowException) and error.error_code in (
            "RESOURCE_DOES_NOT_EXIST",
            "INVALID_PARAMETER_VALUE",
        ):
            raise InputError(f"no run {run_id!r} at {store}: {error.message}") from cause(error)
        raise InputError(
            f"cannot ask {store} for run {run_id!r}: {type(error).__name__}: {error}; check that it can be reached "
            "from here, that its driver is installed, and that your credentials are right"
        ) from cause(error)
    if run.info.lifecycle_stage != "active":
        raise InputError(
            f"run {run_id} ({run.info.run_name}) is deleted; restore it: mlflow runs restore --run-id {run_id}"
        )
    return run


def artifact_folder(uri: str) -> Path | None:
    """The local folder that an artifact URI names, if it names one: where MLflow itself reads and writes."""
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(url2pathname(parsed.path))
    # A scheme of one letter is a Windows drive. MLflow decodes paths too: what is in a%20b to it is in "a b".
    return Path(url2pathname(uri)) if len(parsed.scheme) < 2 else None
