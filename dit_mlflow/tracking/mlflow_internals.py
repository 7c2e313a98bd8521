"""What of MLflow is used without being documented, each name here and nowhere else in ``dit_mlflow``.

All were seen in MLflow 3.13.0 and 3.17.2. ``tests/tracking/test_mlflow_internals.py`` fails when one goes. MLflow is
imported where it is used: the command line reads this module before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

DATABASE_LOGGER = "mlflow.store.db.utils"
"""The logger to which failing databases write tracebacks. If it goes, people see them above the message."""

SAVED_VIEW = "mlflow.sharedViewState."
"""Begins the tags in which the UI keeps saved views, in the form that ``tracking/ui/views.py`` writes. If it goes,
links open the list of runs without their columns and charts."""


def artifact_store(uri: str) -> ArtifactRepository:
    """The artifact store of a run or a model, with the tracking URI of now (``mlflow.store.artifact``).

    ``mlflow.artifacts`` and ``MlflowClient`` have no way to delete, to put files into a folder of a model, or to keep
    to a store while the tracking URI changes. If it goes, remote trajectories cannot be read: an ``ImportError``.
    """
    import mlflow
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(uri, tracking_uri=mlflow.get_tracking_uri())


def download_file(store: ArtifactRepository, artifact_path: str, path: Path) -> None:
    """Download one file (``ArtifactRepository._download_file``), which every store implements.

    The public ``download_artifacts`` around it lists the folder and draws a progress bar for each file, and hides why
    it failed. If it goes: an ``AttributeError``, at the first file.
    """
    store._download_file(artifact_path, str(path))
