"""Finds LoggedModels by id, registered version or alias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import mlflow
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from dit_mlflow.command import command
from dit_mlflow.errors import InputError, cause
from dit_mlflow.influence import Influence
from dit_mlflow.influence.stored_result import RESULT_FILES
from dit_mlflow.told import masked
from dit_mlflow.tracking.store.names import INFLUENCE

Answer = TypeVar("Answer")

SCHEME = "models:/"
COPIES = 8
"""Most copies of copies of a version that are followed."""
FORMS = "models:/<name>/<version>, models:/<name>@<alias> or models:/m-<id>"


@dataclass(frozen=True)
class FoundModel:
    """A LoggedModel, and the registered version asked for, if any, before copies were followed."""

    model: LoggedModel
    version: ModelVersion | None = None

    def __str__(self) -> str:
        model_id = self.model.model_id
        return model_id if self.version is None else f"{self.version.name}, version {self.version.version} ({model_id})"


def find_model(reference: str) -> FoundModel:
    """The LoggedModel that ``models:/…`` or a bare ``m-…`` names.

    Raises:
        InputError: there is no such model, version or alias, or the version was not made from a LoggedModel.
    """
    rest = reference.removeprefix(SCHEME).strip("/")
    if "/" not in rest and "@" not in rest:
        if not rest.startswith("m-"):
            raise InputError(f"model {reference!r} cannot be read; expected {FORMS}")
        return FoundModel(_asked(reference, lambda client: client.get_logged_model(rest)))
    version = _version(reference, rest)
    found = version
    for _ in range(COPIES):
        source = str(found.source or "").removeprefix(SCHEME)
        if source == found.source:
            break
        if "/" not in source:
            return FoundModel(find_model(source).model, version)
        found = _version(reference, source)
    raise InputError(
        f"version {version.version} of model {version.name!r} was made from {version.source}, not from a LoggedModel; "
        "influence is kept with LoggedModels; register one of those (mlflow.register_model('models:/m-…', name))"
    )


def load_model_influence(reference: str, folder: str = INFLUENCE) -> Influence:
    """The influence that a model holds.

    Raises:
        InputError: see :func:`find_model`; or the model has none.
    """
    found = find_model(reference)
    model_id = found.model.model_id
    with TemporaryDirectory() as temporary:
        try:
            there = {Path(item.path).name for item in MlflowClient().list_logged_model_artifacts(model_id, folder)}
            location = f"{found.model.artifact_location.rstrip('/')}/{folder}"
            paths = [
                download_artifacts(artifact_uri=f"{location}/{name}", dst_path=temporary)
                for name in there & set(RESULT_FILES)
            ]
        except Exception as error:  # Each store raises its own: of requests, botocore, a missing library …
            raise InputError(
                f"cannot read {folder}/ of model {found}: {type(error).__name__}: {error}; check that its artifact "
                "store can be reached from here, and that your credentials may read there"
            ) from cause(error)
        if not there:
            raise InputError(
                f"model {found} has no {folder}/ among its artifacts; put it there: "
                + command("register", influence_run="<id>", model_name="<name>")
            )
        return Influence.load(Path(paths[0]).parent if paths else temporary)


def versions_of(name: str) -> list[ModelVersion]:
    """The versions of a registered model by number; empty if there is no such model."""
    quote = '"' if "'" in name else "'"
    found = MlflowClient().search_model_versions(f"name = {quote}{name}{quote}")
    return sorted(found, key=lambda version: int(version.version))


def _version(reference: str, rest: str) -> ModelVersion:
    if "@" in rest:
        name, _, alias = rest.rpartition("@")
        return _asked(reference, lambda client: client.get_model_version_by_alias(name, alias))
    name, _, number = rest.rpartition("/")
    if number == "latest":
        versions = _asked(reference, lambda _: versions_of(name))
        if versions:
            return versions[-1]
    elif number.isdecimal():
        return _asked(reference, lambda client: client.get_model_version(name, number))
    raise InputError(f"model {reference!r}: no version {number!r}; expected {FORMS}")


def _asked(reference: str, question: Callable[[MlflowClient], Answer]) -> Answer:
    """The store's answer; an :class:`InputError` says what was asked for, and where."""
    try:
        return question(MlflowClient())
    except MlflowException as error:
        store = masked(mlflow.get_registry_uri())
        raise InputError(f"no model {reference!r} at {store}: {error.message}; expected {FORMS}") from cause(error)
