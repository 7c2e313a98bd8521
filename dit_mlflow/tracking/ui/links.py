"""Links to pages of the MLflow UI."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from urllib.parse import quote

import mlflow
from mlflow import ActiveRun, MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion

from dit_mlflow.command import ui_command
from dit_mlflow.told import masked
from dit_mlflow.tracking.store.names import INFLUENCE, KIND, TRAINING_RUN
from dit_mlflow.tracking.ui.views import (
    INFLUENCES,
    TRAININGS,
    View,
    methods_view,
    save_views,
    strategies_view,
    windows_view,
)

MODE = "workflowType=machine_learning"
"""Without it the UI opens in its mode for language models."""

LOCAL = "http://127.0.0.1:5000"
"""Where ``mlflow ui`` serves."""

COMPARED: dict[str, tuple[str, Callable[[Run], View]]] = {
    INFLUENCE: ("windows", windows_view),
    "comparison": ("methods", methods_view),
    "cleansing": ("strategies", strategies_view),
}
"""For each kind of run with children: what the children are, and the view that compares them."""


def store_uri() -> str:
    """Where results are, as MLflow is told it."""
    return str(mlflow.get_tracking_uri())


def run_link(run: Run, tab: str = "") -> str:
    """The page of a run, or a tab of it (``/model-metrics``), from ``#`` on, as notes link to it."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}{tab}?{MODE}"


def model_link(model: LoggedModel) -> str:
    """The Artifacts tab of a LoggedModel, from ``#`` on."""
    return f"#/experiments/{model.experiment_id}/models/{model.model_id}/artifacts?{MODE}"


def version_link(version: ModelVersion) -> str:
    """The page of a registered model's version, from ``#`` on."""
    return f"#/models/{quote(version.name, safe='')}/versions/{version.version}?{MODE}"


def view_link(experiment_id: str, view: View) -> str:
    """The run list with the charts of a view saved by :func:`~dit_mlflow.tracking.ui.views.save_views`; from ``#``."""
    # No filter and no order: with either, the UI ignores the view.
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={view.key}&compareRunsMode=CHART&{MODE}"


def save_comparisons(run_id: str) -> dict[str, str]:
    """Save the views that compare the children of a run (see :data:`COMPARED`); returns links to them by name.

    Call it when the run's own metrics are logged. The links start with ``#``. Empty for runs of other kinds, and if the
    store does not keep views.
    """
    run = MlflowClient().get_run(run_id)
    kind = run.data.tags.get(KIND, "")
    if kind not in COMPARED:
        return {}
    title, make = COMPARED[kind]
    view, experiment = make(run), run.info.experiment_id
    if not save_views(experiment, view):
        return {}
    named = {title: view, "influence runs": INFLUENCES, "trainings": TRAININGS}
    return {name: view_link(experiment, found) for name, found in named.items()}


def where_is(link: str) -> str:
    """How to open a page of the UI, and, for a store without a server, how to start one first."""
    uri = masked(mlflow.get_tracking_uri())
    if uri.startswith("http"):
        return f"{'open':15}{uri.rstrip('/')}/{link}"
    start = f"{'start':15}{ui_command()} --backend-store-uri {shlex.quote(uri)}"
    return f"{start}\n{'then open':15}{LOCAL}/{link}"


def where_to_look(run: ActiveRun) -> str:
    """Where the MLflow UI shows the run and compares its children.

    Call it when the run has ended: it saves the views that compare.
    """
    uri = masked(mlflow.get_tracking_uri())
    server = uri.rstrip("/") if uri.startswith("http") else LOCAL
    found = save_comparisons(run.info.run_id)
    compared = [f"compare {name}\n{'':15}{server}/{link}" for name, link in found.items()]
    return "\n".join([where_is(run_link(run)), *compared, *_apart(run.info.run_id)])


def _apart(run_id: str) -> list[str]:
    """A line if the run and its training are in different experiments, whose runs the UI lists separately."""
    client = MlflowClient()
    run = client.get_run(run_id)
    # A comparison names several; the first stands for all.
    training = run.data.tags.get(TRAINING_RUN, "").partition(",")[0]
    if not training or (other := client.get_run(training).info.experiment_id) == run.info.experiment_id:
        return []
    names = [client.get_experiment(found).name for found in (run.info.experiment_id, other)]
    together = f"set MLFLOW_EXPERIMENT_NAME={shlex.quote(names[1])}"
    return [f"{'apart':15}this run is in experiment {names[0]!r}, its training in {names[1]!r}; together: {together}"]
