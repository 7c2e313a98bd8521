"""Record a training loop straight into an MLflow run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Run
from torch import nn

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.recording import TrajectoryRecorder
from dit_mlflow.recording.folder import Written
from dit_mlflow.replay import Trajectory
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.recording.follower import Followed, Follower
from dit_mlflow.tracking.recording.upload import Upload
from dit_mlflow.tracking.store.artifacts import active_run_id, artifact_folder, find_run, load_trajectory
from dit_mlflow.tracking.store.datasets import SampleSet, log_dataset, workload_source
from dit_mlflow.tracking.store.names import KIND, RECORDING, TRAJECTORY
from dit_mlflow.tracking.ui.notes import note_training
from dit_mlflow.workload import Optimizers, Workload

logger = logger_of(__name__)


@contextmanager
def record_trajectory(
    model: nn.Module,
    optimizer: Optimizers,
    workload: Workload | None = None,
    run_id: str | None = None,
    *,
    resume: bool = False,
    live: bool | int = False,
    **options: Any,
) -> Iterator[TrajectoryRecorder]:
    """Record the training in the ``with`` block as ``trajectory/`` of a run, segment by segment.

    A local store is written in place; to any other store, finished segments are uploaded in the background, so that a
    lost machine loses one segment. The training set is logged as the run's dataset. A failing store or disk does not
    stop training: it is logged once, and files that could not be uploaded stay in a folder that the message names, for
    :func:`dit_mlflow.tracking.log_trajectory`.

    Args:
        model, optimizer, workload: see :class:`dit_mlflow.TrajectoryRecorder`.
        run_id: the run; default: the active one, or a new one.
        resume: continue the run's trajectory, if it has one, from the model's present state; see
            :class:`dit_mlflow.TrajectoryRecorder`. The run is ``run_id``, or one resumed before
            (``mlflow.start_run(run_id=...)``).
        live: log the ``local`` influence of each epoch (``True``), or of every so many steps (a number), while training
            goes on, as ``dit-mlflow follow`` does, in another process that this one starts and never waits for. It
            loads the workload by its name, so that ``workload`` must be one of :func:`dit_mlflow.load_workload`. It
            uses a core, or the GPU, beside the trainer (a replay and two to three times the steps of each window), goes
            on after the training until it has come to its end, and does not fail training if it fails. Of a training
            that is resumed, it begins anew.
        options: further arguments of :class:`dit_mlflow.TrajectoryRecorder`.

    Raises:
        InputError: no such run; ``live`` is no number of steps, or another process cannot load the workload by a name.
        WorkloadError: ``live``, and nothing of the workload's name can be imported.
        TrajectoryError: the run has a trajectory and ``resume`` is not set; or see
            :class:`dit_mlflow.TrajectoryRecorder`.
    """
    # Refused before a run exists.
    followed = None if live is False else Followed.of(workload, live)
    with ExitStack() as stack:
        if run_id is None and mlflow.active_run() is None:
            stack.enter_context(mlflow.start_run())
        run = find_run(run_id or active_run_id())
        begun = _begun(run, resume)
        folder, upload = _place(run)
        follower = None if followed is None else Follower(run, followed)
        if follower is not None:
            # Last of all, when the store holds the whole record.
            stack.callback(follower.end)
        if upload is not None:
            stack.callback(_finish, upload)
        listeners = [listener for listener in (upload, follower) if listener is not None]

        def on_written(written: Written) -> None:
            for listener in listeners:
                listener(written)

        recorder = TrajectoryRecorder(
            model, optimizer, folder, workload, resume=begun or False, on_written=on_written, **options
        )
        _tag(run)
        stack.callback(_note, run, recorder, upload, begun)
        stack.callback(_log_training_set, run, recorder, workload)
        entered = False
        try:
            with recorder:
                entered = True
                yield recorder
        except BaseException:
            # Not where another recorder was there first.
            if entered and begun is None and not recorder.num_steps:
                if follower is not None:
                    follower.give_up()
                _give_back(run, recorder, upload)
            raise


def _begun(run: Run, resume: bool) -> Trajectory | None:
    if RECORDING not in run.data.tags:
        return None
    if not resume:
        raise TrajectoryError(
            f"run {run.info.run_id} ({run.info.run_name}) has a trajectory already, or is recording one. A run "
            "holds one, of one model: record other models in runs of their own; to go on with this one, use resume=True"
        )
    return load_trajectory(run.info.run_id) if MlflowClient().list_artifacts(run.info.run_id, TRAJECTORY) else None


def _tag(run: Run) -> None:
    client = MlflowClient()
    client.set_tag(run.info.run_id, RECORDING, "true")
    if KIND not in run.data.tags:
        client.set_tag(run.info.run_id, KIND, "training")


def _place(run: Run) -> tuple[Path, Upload | None]:
    """The folder to write to: that of the run's artifacts, if it is local; else a temporary one that is uploaded."""
    artifacts = artifact_folder(run.info.artifact_uri)
    if artifacts is not None:
        try:
            (artifacts / TRAJECTORY).mkdir(parents=True, exist_ok=True)
            return artifacts / TRAJECTORY, None
        except OSError:
            pass  # The upload will fail too, and say so, but training has a folder to record to.
    folder = Path(mkdtemp(prefix="dit-mlflow-")) / TRAJECTORY
    folder.mkdir()
    return folder, Upload(folder, run.info.run_id)


def _give_back(run: Run, recorder: TrajectoryRecorder, upload: Upload | None) -> None:
    """Training failed before its first step, and another may be recorded: a trainer tries a smaller batch."""
    if upload is None:
        shutil.rmtree(recorder.directory, ignore_errors=True)
    MlflowClient().delete_tag(run.info.run_id, RECORDING)


def _finish(upload: Upload) -> None:
    upload.finish()
    if upload.failure is None:
        shutil.rmtree(upload.folder.parent, ignore_errors=True)
        return
    logger.error(
        "the trajectory of run %s is not in its store as a whole, but in %s. When the store is back: "
        "dit_mlflow.tracking.log_trajectory(%r, run_id=%r)",
        *(upload.run_id, upload.folder, str(upload.folder), upload.run_id),
    )


def _note(run: Run, recorder: TrajectoryRecorder, upload: Upload | None, begun: Trajectory | None) -> None:
    if upload is not None and upload.failure is not None:
        return  # A lost store answers late or never.
    try:
        trajectory = Trajectory.open(recorder.directory)
    except TrajectoryError:  # Nothing was recorded, which is reported elsewhere.
        return
    note_training(run.info.run_id, trajectory, begun)


def _log_training_set(run: Run, recorder: TrajectoryRecorder, workload: Workload | None) -> None:
    """A failure is only logged: training is over, and its result must not be lost."""
    if recorder.dataset is None:
        return
    source = workload_source(workload) if workload is not None else {}
    name = source.get("workload") or type(recorder.dataset).__name__
    size = len(recorder.dataset)  # type: ignore[arg-type]
    try:
        log_dataset(run.info.run_id, SampleSet(name, recorder.dataset_digest, size, source), "training")
    except Exception as error:  # Any kind: stores raise what their libraries raise.
        logger.error("the dataset of run %s could not be logged: %s", run.info.run_id, error)
