"""Starts runs and logs metrics and plots on them."""

from __future__ import annotations

import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import mlflow
from mlflow import ActiveRun, MlflowClient
from mlflow.data.dataset import Dataset
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from dit_mlflow.evaluation import Metrics
from dit_mlflow.told import logger_of, text_of, told
from dit_mlflow.tracking.plugin import DitRunContext
from dit_mlflow.tracking.store.failed_run import TAG_CHARACTERS, error_text, storable
from dit_mlflow.tracking.store.names import NOT_DRAWN, RUN_NAME, UNDEFINED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logger_of(__name__)

NAME_CHARACTERS = 200
"""Most characters of the name of a run or a parameter; MLflow's databases take 250."""

BATCH = 1000
"""Most metrics that MLflow takes per request."""

EXPERIMENT = "dit-mlflow"
"""Of the runs of the command line, where the user has chosen none."""

CHOSEN, CHOSEN_ID = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
"""Variables by which MLflow is told the experiment."""


@contextmanager
def experiment_of(training_run: str) -> Iterator[None]:
    """Let runs start in the experiment of ``training_run``, or, if that is empty, in :data:`EXPERIMENT`.

    An experiment that the user has chosen (variables, ``mlflow.set_experiment``, ``mlflow run``) stays.
    """
    # On Databricks, an experiment's name is a path in the user's workspace.
    chosen = os.environ.get(CHOSEN) or os.environ.get(CHOSEN_ID) or mlflow.get_tracking_uri().startswith("databricks")
    if chosen:
        yield
        return
    name, value = CHOSEN, EXPERIMENT
    # Of a run that is not there, the job says so.
    with suppress(MlflowException):
        if training_run:
            name, value = CHOSEN_ID, MlflowClient().get_run(training_run).info.experiment_id
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _make_experiment() -> None:
    """Make :data:`EXPERIMENT` if runs go there; of two processes that do so at once, MLflow would fail one."""
    if os.environ.get(CHOSEN) == EXPERIMENT and MlflowClient().get_experiment_by_name(EXPERIMENT) is None:
        with suppress(MlflowException):
            MlflowClient().create_experiment(EXPERIMENT)


@contextmanager
def project_run(run_id: str | None, name: str, tags: Mapping[str, str]) -> Iterator[ActiveRun]:
    """A top-level run: the one that ``mlflow run`` made, or a new one. FAILED if the body raises."""
    name = told(name, NAME_CHARACTERS)
    if run_id is None:
        _make_experiment()
        with mlflow.start_run(run_name=name, tags=dict(tags)) as run:
            yield run
        return
    # MLflow applies context providers only to runs that it creates itself.
    with mlflow.start_run(run_id=run_id, tags={**DitRunContext().tags(), **tags}) as run:
        # A name of the form 'adjective-noun-123' was made up by MLflow; any other is the user's.
        if re.fullmatch(r"[a-z]+-[a-z]+-\d+", run.info.run_name or ""):
            mlflow.set_tag(RUN_NAME, name)
        yield run


def log_params(params: Mapping[str, object]) -> None:
    """Log parameters on the active run: names and values as MLflow takes and shows them, whatever they hold.

    Databases refuse NUL, halves of surrogate pairs and long names; terminals obey escapes.
    """
    mlflow.log_params({_taken(name): storable(text_of(value, TAG_CHARACTERS)) for name, value in params.items()})


def _taken(name: str) -> str:
    """A name as MLflow takes it, which may be a path: ``top-5 %`` is ``top-5 _``."""
    parts = re.sub(r"[^\w./: -]", "_", name).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)[:NAME_CHARACTERS]


def log_metrics(metrics: Metrics, model_id: str | None = None, dataset: Dataset | None = None) -> None:
    """Log the values of ``metrics`` on the active run; a missing or infinite value becomes a tag that says why.

    ``model_id``, ``dataset``: the model and data set that they belong to, where MLflow shows them too.
    """
    finite = {name: value for name, value in metrics.values.items() if math.isfinite(value)}
    reasons = dict(metrics.undefined)
    reasons |= {name: f"the value is {v}" for name, v in metrics.values.items() if name not in finite}
    if finite:
        taken = {_taken(name): value for name, value in finite.items()}
        mlflow.log_metrics(taken, model_id=model_id, dataset=dataset)
    if reasons:
        mlflow.set_tags({_taken(UNDEFINED + name): reason for name, reason in reasons.items()})


def log_series(name: str, values: Sequence[float | None], steps: Sequence[int] | None = None) -> None:
    """Log one value per step on the active run; ``None`` and NaN are left out.

    ``steps``: default ``0, 1, …``.
    """
    log_points((name, step, value) for step, value in zip(steps or range(len(values)), values, strict=True))


def log_points(points: Iterable[tuple[str, int, float | None]]) -> None:
    """Log ``(metric, step, value)`` on the active run, in few requests; ``None`` and NaN are left out."""
    run = mlflow.active_run()
    assert run is not None
    now = int(time.time() * 1000)
    metrics = [
        Metric(_taken(name), float(value), now, step)
        for name, step, value in points
        if value is not None and math.isfinite(value)
    ]
    for start in range(0, len(metrics), BATCH):
        MlflowClient().log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])


@contextmanager
def drawing(path: str, run_id: str) -> Iterator[None]:
    """Draw and log something of a run; if that fails, only this is missing, and a tag of the run says why.

    To be entered when what was computed is logged: it was expensive, and a picture can be drawn again.
    """
    try:
        yield
    except Exception as error:  # Any kind: samples, their texts and pictures are the user's.
        reason = error_text(error)
        _log.warning("%s of run %s is missing: %s", path, run_id, reason)
        MlflowClient().set_tag(run_id, NOT_DRAWN + path, reason)


def log_plot(figure: Figure, path: str, run_id: str) -> None:
    """Log a figure on a run. A character that the font lacks is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        MlflowClient().log_figure(run_id, figure, path)


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process, in MiB; ``None`` where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
