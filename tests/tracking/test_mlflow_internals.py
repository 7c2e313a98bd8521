"""What of MLflow is used without being documented still does what it is used for."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils import mlflow_tags

from dit_mlflow.tracking import mlflow_internals
from dit_mlflow.tracking.store import names


def test_a_store_downloads_one_file_and_keeps_to_its_uri(store: str, tmp_path: Path) -> None:
    with mlflow.start_run() as run:
        mlflow.log_text("told", "folder/a.txt")
    found = mlflow_internals.artifact_store(run.info.artifact_uri)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'other.db'}")
    mlflow_internals.download_file(found, "folder/a.txt", tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "told"


def test_a_failing_database_writes_its_traceback_to_the_logger(
    store: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mlflow"), "propagate", True)
    assert mlflow.search_experiments()
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as database:
        database.execute("DROP TABLE experiments")
    with pytest.raises(MlflowException):
        mlflow.search_experiments()
    assert {record.name for record in caplog.records if record.exc_info} == {mlflow_internals.DATABASE_LOGGER}


def test_clients_go_through_what_stands_before_their_store(store: str) -> None:
    asked: list[str] = []

    class Before:
        def __init__(self, behind: object) -> None:
            self.behind = behind

        def __getattr__(self, name: str) -> object:
            asked.append(name)
            return getattr(self.behind, name)

    with mlflow_internals.clients_through(Before, lambda request: request), mlflow.start_run():
        mlflow.log_metric("loss", 1.0)
        mlflow.log_text("told", "a.txt")
        before = len(asked)
        assert mlflow.MlflowClient().list_artifacts(mlflow.active_run().info.run_id)
        assert "get_run" in asked[before:]
    assert {"create_run", "log_metric", "get_run", "update_run_info"} <= set(asked)
    known = len(asked)
    mlflow.search_experiments()
    assert len(asked) == known


def test_documented_tags_are_those_that_mlflow_sets() -> None:
    assert names.NOTE == mlflow_tags.MLFLOW_RUN_NOTE
    assert names.RUN_NAME == mlflow_tags.MLFLOW_RUN_NAME
    assert names.PARENT_RUN == mlflow_tags.MLFLOW_PARENT_RUN_ID
    assert names.DATASET_CONTEXT == mlflow_tags.MLFLOW_DATASET_CONTEXT
