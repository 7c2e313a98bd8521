"""The undocumented names of MLflow that ``dit_mlflow`` uses, all in this file.

Seen in MLflow 3.13.0 and 3.17.2. If one goes, ``tests/tracking/test_mlflow_internals.py`` fails. MLflow is imported
inside the functions, since the command line loads this module first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

DATABASE_LOGGER = "mlflow.store.db.utils"
"""The logger of tracebacks from failing databases. If it goes, users see them above the message."""

SAVED_VIEW = "mlflow.sharedViewState."
"""Prefix of the tags in which the UI keeps saved views, in the form that ``tracking/ui/views.py`` writes. If it goes,
links open the list of runs without columns and charts."""


def artifact_store(uri: str) -> ArtifactRepository:
    """The artifact store of a run or a model, with the current tracking URI (``mlflow.store.artifact``).

    ``mlflow.artifacts`` and ``MlflowClient`` cannot delete, put files into a folder of a model, or keep to one store
    while the tracking URI changes. If it goes, remote trajectories cannot be read: an ``ImportError``.
    """
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri, tracking_uri=mlflow.get_tracking_uri())


@contextmanager
def clients_through(store: Callable[[Any], Any], request: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, MLflow's clients use what ``store`` makes of a tracking store, ``request`` of the function that requests.

    The registry of ``mlflow.tracking._tracking_service.utils``, and ``mlflow.utils.rest_utils``: stores are registered
    by the scheme of their URI, so there is no documented way to stand before each. If it goes: an ``AttributeError``
    when a job starts.
    """
    from mlflow.tracking._tracking_service import utils
    from mlflow.utils import rest_utils

    registry: Any = utils._tracking_store_registry
    places = ((registry, "get_store"), (rest_utils, "_get_http_response_with_retries"))
    found: list[Any] = [getattr(*place) for place in places]
    changed = (lambda *named, **options: store(found[0](*named, **options)), request(found[1]))
    try:
        for place, value in zip(places, changed, strict=True):
            setattr(*place, value)
        yield
    finally:
        for place, value in zip(places, found, strict=True):
            setattr(*place, value)


def download_file(store: ArtifactRepository, artifact_path: str, path: Path) -> None:
    """Download one file (``ArtifactRepository._download_file``, which every store implements).

    The public ``download_artifacts`` around it lists the folder, draws a progress bar for each file, and hides why it
    failed. If it goes: an ``AttributeError`` at the first file.
    """
    store._download_file(artifact_path, str(path))
