"""Notes on runs and the links in them."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import Run

from dit_mlflow.explanation.run_note import Links
from dit_mlflow.explanation.training_note import training_note
from dit_mlflow.replay import Trajectory
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.store.names import INFLUENCE, NOTE
from dit_mlflow.tracking.ui.links import run_link, save_comparisons

_log = logger_of(__name__)


def set_note(run_id: str, note: str, former: str | None = None) -> None:
    """Set the description of a run to ``note`` (Markdown) if it is empty or ``former``; a user's own is kept."""
    client = MlflowClient()
    if client.get_run(run_id).data.tags.get(NOTE, "").strip() in ("", former):
        client.set_tag(run_id, NOTE, note)


def influence_links(run: Run, training_run_id: str, windows: list[Run]) -> Links:
    """The links in the note of the influence run ``run``; ``windows``: the runs of its windows."""
    client = MlflowClient()
    training = client.get_run(training_run_id)
    names = [item.path.rpartition("/")[2] for item in client.list_artifacts(run.info.run_id, INFLUENCE)]
    return Links(
        training=(training.info.run_name or training_run_id, run_link(training)),
        windows=[run_link(window) for window in windows],
        artifacts={name: run_link(run, f"/artifacts/{INFLUENCE}/{name}") for name in names},
        charts=run_link(run, "/model-metrics"),
        compare=save_comparisons(run.info.run_id),
    )


def note_training(run_id: str, trajectory: Trajectory, begun: Trajectory | None = None) -> None:
    """Set the note of a training run; ``begun``: the trajectory that it continues, whose note is replaced.

    An error is only logged, below a warning: training is over, and a missing note must not alarm.
    """
    try:
        former = None if begun is None else training_note(run_id, begun)
        set_note(run_id, training_note(run_id, trajectory), former)
    except Exception as error:  # Any kind: stores raise what their libraries raise.
        _log.info("the note of run %s could not be written: %s", run_id, error)
