"""Stores influence with the model: on its LoggedModel, and in the description and tags of a registered version."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dit_mlflow.command import option
from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.explanation.model_card import fidelity, with_card
from dit_mlflow.influence import Influence
from dit_mlflow.told import logger_of, told
from dit_mlflow.tracking.mlflow_internals import artifact_store
from dit_mlflow.tracking.store.artifacts import find_run, load_trajectory
from dit_mlflow.tracking.store.found_models import FoundModel, find_model
from dit_mlflow.tracking.store.names import (
    INFLUENCE,
    INFLUENCE_RUN,
    INFLUENCE_URI,
    KIND,
    METHOD,
    PARENT_RUN,
    TRAINING_RUN,
)
from dit_mlflow.tracking.store.remote import reading
from dit_mlflow.tracking.ui.card import card_facts
from dit_mlflow.tracking.ui.model_metrics import log_model_metrics, window_series

INFLUENCE_MODEL = "influence_model"
"""Value of the tag ``dit.kind`` on models that answer influence queries, which are not models that a run trained."""

logger = logger_of(__name__)


@dataclass(frozen=True)
class Registration:
    """The result of a registration.

    Attributes:
        version: of the registered model.
        created: whether the version is new; an existing one now has this influence.
        model_id: of the LoggedModel.
        influence: the stored scores.
        influence_run, training_run: their ids.
        replaced: another influence run, whose influence the model had before; ``None`` = there was none.
    """

    version: ModelVersion
    created: bool
    model_id: str
    influence: Influence
    influence_run: str
    training_run: str
    replaced: str | None


def register_influence(influence_run: str, model_name: str, model: str = "") -> Registration:
    """Store an influence run's results with the model that its training run logged.

    - The run's ``influence/`` becomes ``influence/`` on the model's Artifacts tab.
    - ``ground_truth/…``, ``detection/…``, ``trust/…`` and ``mean_over_windows/…`` become metrics of the model.
    - The registered model gets a version of that model, unless it has one; a part of the version's description says
      which samples harmed and helped, and tags say where the influence is.

    Registering again changes nothing. A model holds the influence of one run: registering another run of the same model
    replaces artifacts, tags and our part of the description, on every version made from the model that had it; the
    metrics of the run before stay, since MLflow keeps metrics, told apart by their source run.

    Args:
        influence_run: a finished run with ``influence/``.
        model_name: of the registered model, made if there is none.
        model: which of the training run's models, as ``m-<id>``, ``models:/m-<id>`` or ``models:/<name>/<version>``;
            needed if it logged several. A version of ``model_name`` gets the influence itself.

    Raises:
        InputError: before anything is changed: no such run, a run that is not finished or has no influence, a training
            run that logged no model or several, a model of another training, or a name that MLflow does not take.
    """
    check_name(model_name)
    run, training = asked_and_trained(influence_run)
    chosen = _model_of(training, model)
    with TemporaryDirectory() as temporary:
        with reading(run, f"{INFLUENCE}/"):
            folder = Path(download_artifacts(run_id=influence_run, artifact_path=INFLUENCE, dst_path=temporary))
        influence = Influence.load(folder)
        _check_trajectory(influence, training)
        return _register(run, training, chosen, model_name, influence, folder)


def check_name(name: str) -> None:
    """Raises :class:`InputError` for a name that MLflow does not accept for a registered model."""
    try:
        MlflowClient().get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            return  # No model has this name, or the store cannot tell: then creating one will fail.
        raise InputError(f"model_name={name!r} cannot be the name of a registered model: {error.message}") from error


def asked_and_trained(influence_run: str) -> tuple[Run, Run]:
    """The influence run and its training run; raises :class:`InputError` as :func:`register_influence` does."""
    run = find_run(influence_run)
    shown = f"run {influence_run} ({run.info.run_name})"
    with reading(run, f"{INFLUENCE}/"):
        files = {Path(item.path).name for item in MlflowClient().list_artifacts(influence_run, INFLUENCE)}
    if not {"scores.parquet", "metadata.json"} <= files:
        kind = run.data.tags.get(KIND)
        parent = run.data.tags.get(PARENT_RUN)
        hint = f"; it is a {kind} run" if kind else ""
        hint += f" of {parent}, which may be the one to name" if parent else ""
        raise InputError(f"{shown} has no artifact {INFLUENCE}/ with scores; expected an influence run{hint}")
    if run.info.status != "FINISHED":
        raise InputError(
            f"{shown} is {run.info.status}; only the influence of a run that is FINISHED is kept with a model: of "
            "others, the comparison with exact retraining may be missing"
        )
    training_run = run.data.tags.get(TRAINING_RUN)
    if not training_run:
        raise InputError(
            f"{shown} does not say which training it is about; set its tag {TRAINING_RUN} to the id of the training run"
        )
    return run, find_run(training_run)


def _model_of(training: Run, asked: str) -> FoundModel:
    """The LoggedModel that the training run made, or the one of them that was asked for."""
    shown = f"run {training.info.run_id} ({training.info.run_name})"
    models = _models_of(training)
    names = ", ".join(f"{model.model_id} ({model.name})" for model in models)
    if asked:
        found = find_model(asked)
        if found.model.model_id not in [model.model_id for model in models]:
            made = f"it was logged by run {found.model.source_run_id}"
            raise InputError(
                f"model {found} is not one that training {shown} logged ({made}), and influence of one model says "
                f"nothing about another; that run logged: {names or 'none'}"
            )
        return found
    if len(models) == 1:
        return FoundModel(models[0])
    if models:
        raise InputError(f"training {shown} logged {len(models)} models: {names}; say which: {option('model', '<id>')}")
    raise InputError(
        f"training {shown} logged no model. Log one in it, and register again: with mlflow.start_run(run_id="
        f"'{training.info.run_id}'): mlflow.pytorch.log_model(model, name='model', input_example=…)"
    )


def _models_of(training: Run) -> list[LoggedModel]:
    found = MlflowClient().search_logged_models(
        [training.info.experiment_id], filter_string=f"source_run_id = '{training.info.run_id}'"
    )
    return [model for model in found if model.status == "READY" and model.tags.get(KIND) != INFLUENCE_MODEL]


def _check_trajectory(influence: Influence, training: Run) -> None:
    """Raises :class:`InputError` if the scores were computed from another trajectory than the training run's."""
    computed_from = influence.metadata.get("trajectory_digest")
    try:
        recorded = load_trajectory(training.info.run_id).manifest.digest()
    except TrajectoryError:
        return  # It may have been deleted to save space; the scores are valid without it.
    if computed_from not in (None, recorded):
        raise InputError(
            f"this influence was computed from trajectory {computed_from[:12]}…, but run {training.info.run_id} "
            f"recorded {recorded[:12]}…; it is influence of another model"
        )


def _register(
    run: Run, training: Run, chosen: FoundModel, name: str, influence: Influence, folder: Path
) -> Registration:
    client = MlflowClient()
    model, run_id = chosen.model, run.info.run_id
    replaced = model.tags.get(INFLUENCE_RUN)
    by_window = window_series(run, len(influence.windows))
    _attach(model, folder)
    log_model_metrics(run, model.model_id, influence.queries[0], training, by_window)
    version, created = _version(chosen, training, name)
    tags = {
        INFLUENCE_URI: f"runs:/{run_id}/{INFLUENCE}",
        INFLUENCE_RUN: run_id,
        TRAINING_RUN: training.info.run_id,
        KIND: influence.kind,
        METHOD: influence.method,
        "dit.query": told(", ".join(influence.queries), 500),
        "dit.windows": str(len(influence.windows)),
        "dit.fidelity": fidelity(run.data.metrics) or "not compared with exact retraining",
    }
    facts = card_facts(run, training, model, influence, folder, by_window)
    for one in _versions(model, training, name, version):
        client.update_model_version(one.name, one.version, with_card(one.description or "", influence, facts))
        for key, value in tags.items():
            client.set_model_version_tag(one.name, one.version, key, value)
    client.set_logged_model_tags(model.model_id, {INFLUENCE_RUN: run_id, INFLUENCE_URI: tags[INFLUENCE_URI]})
    return Registration(
        client.get_model_version(name, version.version),
        created,
        model.model_id,
        influence,
        run_id,
        training.info.run_id,
        replaced if replaced != run_id else None,
    )


def _attach(model: LoggedModel, folder: Path) -> None:
    """Replace ``influence/`` of the model by the contents of ``folder``."""
    # MlflowClient.log_model_artifacts takes no folder to put them in, before 3.17 at least.
    store = artifact_store(model.artifact_location)
    store.log_artifacts(str(folder), INFLUENCE)
    kept = {f"{INFLUENCE}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*") if path.is_file()}
    left = [path for path in _files(model.model_id, INFLUENCE) if path not in kept]
    for path in left:
        try:
            store.delete_artifacts(path)
        except Exception as error:  # Any kind: stores raise what their libraries raise, and some cannot delete.
            logger.warning("%s of model %s, of another run, cannot be deleted: %s", path, model.model_id, error)


def _files(model_id: str, folder: str) -> list[str]:
    found = []
    for item in MlflowClient().list_logged_model_artifacts(model_id, folder):
        found += _files(model_id, item.path) if item.is_dir else [item.path]
    return found


def _version(chosen: FoundModel, training: Run, name: str) -> tuple[ModelVersion, bool]:
    """The (latest) version of ``name`` that is made from the model, and whether it is new."""
    if chosen.version is not None and chosen.version.name == name:
        return chosen.version, False
    model_id = chosen.model.model_id
    versions = [version for version in _made_from(model_id, training) if version.name == name]
    if versions:
        return max(versions, key=lambda version: int(version.version)), False
    # MLflow prints its success there; our own message says it.
    with redirect_stderr(io.StringIO()):
        return mlflow.register_model(f"models:/{model_id}", name), True


def _versions(model: LoggedModel, training: Run, name: str, version: ModelVersion) -> list[ModelVersion]:
    """The versions that describe the model's influence: the one asked for, and those that have done so before."""
    others = [
        other
        for other in _made_from(model.model_id, training)
        if INFLUENCE_RUN in other.tags and (other.name, int(other.version)) != (name, int(version.version))
    ]
    return [version, *others]


def _made_from(model_id: str, training: Run) -> list[ModelVersion]:
    found = MlflowClient().search_model_versions(f"run_id = '{training.info.run_id}'")
    return [version for version in found if version.source == f"models:/{model_id}"]
