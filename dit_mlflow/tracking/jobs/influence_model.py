"""A pyfunc model that answers influence queries: which training samples helped or hurt on the rows it is given."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, Schema

import dit_mlflow
from dit_mlflow.errors import InputError
from dit_mlflow.explanation.row_tables import check_top, rows_table
from dit_mlflow.influence import row_losses
from dit_mlflow.influence.row_queries import sample_as_row
from dit_mlflow.tracking.jobs.register_influence import INFLUENCE_MODEL, check_name
from dit_mlflow.tracking.jobs.row_influence import RowQuestion
from dit_mlflow.tracking.store.artifacts import load_trajectory
from dit_mlflow.tracking.store.found_models import versions_of
from dit_mlflow.tracking.store.names import KIND, TRAINING_RUN
from dit_mlflow.workload import Workload, WorkloadReference, comes_with_package

SCRIPT = Path(__file__).with_name("influence_model_script.py")
CONFIG = "dit.influence_model"
"""Tag with the checksum of a model's configuration, to recognise an existing model."""


class InfluenceModel(PythonModel):
    """Reads the trajectory of ``model_config["training_run"]`` when loaded, and sweeps it in each call.

    It holds no state of its own: where it is loaded, the tracking URI must be that of the store with the training run,
    and the workload's code must be importable.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Find trajectory and workload.

        Raises:
            DitError: see :meth:`dit_mlflow.tracking.jobs.row_influence.RowQuestion.of`.
        """
        config = context.model_config
        self._target, self._top = config["target"], config["top"]
        self._question = RowQuestion.of(
            config["training_run"], config["windows"], config["kind"], config["workload"], config["settings"]
        )

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A table of the training samples that hurt and helped each row most, per window.

        Args:
            context: MLflow's.
            model_input: a DataFrame, one column per value of the model's input (or one column of arrays), and the
                target's.
            params: unused.

        Returns:
            See :func:`dit_mlflow.explanation.row_tables.rows_table`; rows are numbered from 0 in the order given.

        Raises:
            DitError: rows that do not fit what was trained.
        """
        # Whatever the annotation, MLflow passes what the caller gave.
        columns = list(model_input.columns) if isinstance(model_input, pd.DataFrame) else []
        if self._target not in columns:
            shown = f"one with {columns[:5]}" if columns else f"a {type(model_input).__name__}"
            raise InputError(f"expected a DataFrame with the column {self._target!r}, which holds targets; got {shown}")
        targets = model_input[self._target].to_numpy()
        answer = self._question.answer(model_input.drop(columns=self._target), targets)
        return rows_table(answer.explanation.influence, answer.losses, self._top, answer.explanation.gallery)


@dataclass(frozen=True)
class LoggedInfluenceModel:
    """The id of an influence model's LoggedModel, and the registered version; ``None`` if it was not registered."""

    model_id: str
    version: str | None = None


def log_influence_model(
    training_run: str,
    windows: str | int = "1",
    kind: str = "local",
    name: str = "",
    top: int = 5,
    target: str = "target",
    workload: str = "",
    settings: dict[str, Any] | None = None,
    trust_workload: bool = False,
) -> LoggedInfluenceModel:
    """Log a model that answers influence queries for new rows, in the active run or one of its own.

    Nothing is pickled: MLflow stores a script of five lines and a configuration that names the training run. Loading
    the model therefore needs dit_mlflow, the workload's code, and the store with the trajectory.

    Args:
        training_run: a run with a trajectory, recorded with a workload by reference or with ``workload`` given.
        windows, kind: see :func:`dit_mlflow.track`; ``"1"`` = the whole training.
        name: of the registered model to add it to, unless that has a version of this configuration; empty = do not
            register.
        top: samples per row, window and side.
        target: the column of the rows' targets.
        workload: reference; needed if none was recorded, or one that does not come with the package.
        settings: of the workload, where none was recorded.
        trust_workload: run the workload that the training run names, whatever that is.

    Raises:
        DitError: before anything is logged: a setting, the trajectory or the workload cannot be used.
    """
    if name:
        check_name(name)
    check_top(top)
    question = RowQuestion.of(training_run, windows, kind, workload, settings, trust_workload)
    recorded = question.trajectory.manifest.workload
    config = {
        "training_run": training_run,
        "windows": ",".join(f"{window.start}:{window.end}" for window in question.windows),
        "kind": question.kind,
        # Named by the user, or with their consent. Whoever loads the model runs its script, and with it this.
        "workload": workload or _foreign(recorded),
        "settings": {} if recorded is not None else dict(settings or {}),
        "top": top,
        "target": target,
    }
    example = _example(question.workload, target)
    checksum = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    if name and (there := _registered(name, checksum)) is not None:
        return there
    title = f"influence model {question.workload.title}"
    tags = {KIND: INFLUENCE_MODEL, TRAINING_RUN: training_run}
    with nullcontext() if mlflow.active_run() else mlflow.start_run(run_name=title, tags=tags):
        logged = mlflow.pyfunc.log_model(
            name="influence",
            python_model=str(SCRIPT),
            model_config=config,
            signature=_signature(question.workload),
            input_example=example,
            pip_requirements=[f"dit-mlflow=={dit_mlflow.__version__}", f"torch=={torch.__version__.partition('+')[0]}"],
            tags={**tags, CONFIG: checksum},
        )
    if not name:
        return LoggedInfluenceModel(str(logged.model_id))
    # MLflow prints its success there; that is for the caller to say.
    with redirect_stderr(io.StringIO()):
        version = mlflow.register_model(f"models:/{logged.model_id}", name, tags={**tags, CONFIG: checksum})
    return LoggedInfluenceModel(str(logged.model_id), str(version.version))


def check_influence_model(
    training_run: str, workload: str = "", settings: dict[str, Any] | None = None, trust_workload: bool = False
) -> None:
    """Raise :class:`DitError` if :func:`log_influence_model` cannot make a model of this training run and workload."""
    if not workload and load_trajectory(training_run).manifest.workload is None:
        raise InputError(
            f"the trajectory of run {training_run} was recorded without a workload, which an influence model needs, "
            "and the influence run was made in Python, with one that has no name. Leave influence_model out, and name "
            f"the workload: dit_mlflow.tracking.log_influence_model({training_run!r}, name=…, "
            "workload='package.module:function')"
        )
    question = RowQuestion.of(training_run, workload=workload, settings=settings, trust_workload=trust_workload)
    _example(question.workload, "target")


def _foreign(recorded: WorkloadReference | None) -> str:
    """The recorded reference, unless the package has that workload itself."""
    return "" if recorded is None or comes_with_package(recorded.reference) else recorded.reference


def _signature(workload: Workload) -> ModelSignature:
    """A signature of the output alone, since rows may come as columns of numbers or as one column of arrays."""
    integers = dict.fromkeys(("row", "window_start", "window_end", "rank", "sample_index"), DataType.long)
    types = {**integers, "loss": DataType.double, "side": DataType.string, "score": DataType.double}
    types |= {"sample": DataType.string} if workload.describe is not None else {}
    types |= {"corrupted": DataType.boolean} if workload.corrupted else {}
    return ModelSignature(outputs=Schema([ColSpec(dtype, name) for name, dtype in types.items()]))


def _example(workload: Workload, target: str) -> pd.DataFrame:
    """The first training sample as a row; raises :class:`InputError` if this workload's samples cannot come as rows."""
    features, value = sample_as_row(workload)
    row_losses(workload, features[None], value[None])
    return pd.DataFrame({"features": [features.tolist()], target: [value.tolist()]})


def _registered(name: str, checksum: str) -> LoggedInfluenceModel | None:
    """The latest version of a registered model that has this configuration."""
    found = [version for version in versions_of(name) if version.tags.get(CONFIG) == checksum]
    if not found:
        return None
    return LoggedInfluenceModel(str(found[-1].source).removeprefix("models:/"), str(found[-1].version))
