"""The evaluator's job: influence of every training sample on every row of the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact
from mlflow.models.evaluation.base import EvaluationResult

from dit_mlflow.errors import InputError
from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import ROWS
from dit_mlflow.explanation.row_tables import check_top, mean_over_rows, mean_table, rows_metrics, rows_table
from dit_mlflow.influence.row_queries import BatchOfRow, Features
from dit_mlflow.plots import plot_top_samples
from dit_mlflow.told import logger_of
from dit_mlflow.tracking.jobs.row_influence import RowQuestion
from dit_mlflow.tracking.store.artifacts import log_influence
from dit_mlflow.tracking.store.names import KIND, ROW_INFLUENCE, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import drawing, log_metrics, log_plot
from dit_mlflow.workload import Workload

ROWS_TABLE, MEAN_TABLE = "influence_on_rows", "influence_on_mean"

TYPES: dict[str, tuple[Any, str]] = {
    "training_run": (str, "the id of a run"),
    "windows": ((str, int), "'epochs', a number of equal windows, or ranges '0:80,80:160'"),
    "kind": (str, "local, final or cumulative"),
    "workload": ((str, Workload), "a reference, or a dit_mlflow.Workload"),
    "settings": (Mapping, "settings of the workload by name"),
    "trust_workload": (bool, "true to run the workload that the training run names, or false"),
    "batch": ((Callable, type(None)), "a function batch(features, targets)"),
}
"""Type of each setting, and its description."""

logger = logger_of(__name__)


@dataclass(frozen=True)
class Settings:
    """``evaluator_config``; see :class:`dit_mlflow.tracking.evaluator.DitEvaluator`."""

    training_run: str
    windows: str | int = "1"
    kind: str = "local"
    workload: Workload | str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    top: int = 5
    batch: BatchOfRow | None = None
    trust_workload: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], model_id: str | None) -> Settings:
        """Check names and values, and that the model was logged by the training run.

        Raises:
            InputError: an unknown name, no training run, or the model of another one.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in config if name not in known]
        if unknown:
            raise InputError(f"evaluator_config has {', '.join(map(repr, unknown))}; it takes: {', '.join(known)}")
        for name, (types, expected) in TYPES.items():
            if name in config and not isinstance(config[name], types):
                raise InputError(f"evaluator_config has {name}={config[name]!r}; expected {expected}")
        check_top(config.get("top", cls.top))
        asked = config.get("training_run")
        if model_id is None:
            if not asked:
                raise InputError(
                    "evaluator_config names no training_run, and the model is not one that MLflow knows the run of; "
                    "give {'training_run': <id of the run with the trajectory>}"
                )
            logger.warning("no logged model was given, so nothing says whether it is the one of run %s", asked)
            return cls(**config)
        logged_by = MlflowClient().get_logged_model(model_id).source_run_id
        if asked and asked != logged_by:
            raise InputError(
                f"model {model_id} was logged by run {logged_by}, not by training_run={asked}; influence tells of the "
                "model that its own run trained. Leave training_run out, or evaluate the model of that run"
            )
        return cls(**{**config, "training_run": logged_by})


def evaluate_rows(settings: Settings, features: Features, targets: np.ndarray | None, run_id: str) -> EvaluationResult:
    """Compute influence on each row's loss, and log it on the evaluation run.

    Logged: the tables ``influence_on_rows.json`` (most harmful and helpful training samples of each row and window) and
    ``influence_on_mean.json`` (of the mean loss); all scores as ``row_influence/``, which
    ``load_influence(run_id, "row_influence")`` loads. The result's metrics are those of
    :func:`dit_mlflow.explanation.row_tables.rows_metrics` over the whole training, prefixed with ``dit/``; the caller
    logs them, since only it knows the model.

    Args:
        settings: of the evaluation.
        features, targets: rows; see :func:`dit_mlflow.influence.row_losses`.
        run_id: the evaluation run, which is active.

    Raises:
        DitError: see :meth:`RowQuestion.of` and :meth:`RowQuestion.answer`.
    """
    question = RowQuestion.of(
        settings.training_run,
        settings.windows,
        settings.kind,
        settings.workload,
        settings.settings,
        settings.trust_workload,
    )
    answer = question.answer(features, targets, settings.batch, whole_run=True)  # type: ignore[arg-type]
    gallery, top, shown = answer.explanation.gallery, settings.top, answer.explanation.influence
    shown = replace(shown, metadata={**shown.metadata, "training_run": settings.training_run})
    _tag(run_id, settings.training_run)
    log_influence(shown, run_id, ROW_INFLUENCE)
    tables = {ROWS_TABLE: rows_table(shown, answer.losses, top, gallery), MEAN_TABLE: mean_table(shown, top, gallery)}
    for name, table in tables.items():
        _log_table(run_id, table, f"{name}.json")
    if len(shown.windows) > 1:
        path = f"{ROW_INFLUENCE}/influence_over_windows.png"
        with drawing(path, run_id):
            log_plot(plot_top_samples(mean_over_rows(shown), gallery), path, run_id)
    whole = answer.explanation.whole_run
    assert whole is not None
    found = rows_metrics(whole, answer.losses, whole.windows[0], top, gallery.corrupted).prefixed(ROWS)
    log_metrics(Metrics({}, found.undefined))
    artifacts = {name: JsonEvaluationArtifact(mlflow.get_artifact_uri(f"{name}.json")) for name in tables}
    return EvaluationResult(dict(found.values), artifacts, run_id)


def _tag(run_id: str, training_run: str) -> None:
    """Tag the run as an evaluation, unless it has a kind already."""
    client = MlflowClient()
    if KIND not in client.get_run(run_id).data.tags:
        client.set_tag(run_id, KIND, "evaluation")
        client.set_tag(run_id, TRAINING_RUN, training_run)


def _log_table(run_id: str, table: pd.DataFrame, path: str) -> None:
    client = MlflowClient()
    # MLflow would append rows to an existing table.
    if any(item.path == path for item in client.list_artifacts(run_id)):
        client.log_dict(run_id, table.to_dict(orient="split", index=False), path)
    else:
        client.log_table(run_id, table, path)
