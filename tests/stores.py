"""The stores of the tests, which are those of the benchmarks; a door before a server; tracking to a store."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from benchmarks.stores import HOST, Missing, Store, database, free_port, postgresql, s3, s3_client, server, sqlite

__all__ = ["Missing", "Store", "database", "free_port", "postgresql", "s3", "s3_client", "server", "sqlite"]

Start = Callable[[str], Store]
"""Gives the store of a kind that runs already, or starts it."""


def copy(source: Path, target: Path) -> None:
    """Make the SQLite store in ``target`` what that in ``source`` is; both have their own files.

    The database is written in place: MLflow holds it open. Nor may a store move: MLflow remembers where a run's
    artifacts are.
    """
    shutil.rmtree(target / "artifacts", ignore_errors=True)
    shutil.copytree(source / "artifacts", target / "artifacts")
    with closing(sqlite3.connect(source / "mlflow.db")) as read, closing(sqlite3.connect(target / "mlflow.db")) as made:
        read.backup(made)


@contextmanager
def tracking(
    chosen: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str = "test"
) -> Iterator[None]:
    """Track to a store, in an experiment that is made if it is not there."""
    for name, value in chosen.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", chosen.uri)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(chosen.uri)
    if mlflow.get_experiment_by_name(experiment) is None:
        MlflowClient().create_experiment(experiment, artifact_location=chosen.artifacts)
    mlflow.set_experiment(experiment)
    try:
        yield
    finally:
        while mlflow.active_run():
            mlflow.end_run()
        mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


class Door:
    """A port before a running server. Shut, it is to clients as if the server had ended; it can be opened again."""

    def __init__(self, server: Store) -> None:
        self._behind = (HOST, int(server.uri.rpartition(":")[2]))
        self._port = free_port()
        self._open: list[socket.socket] = []
        self.store = replace(server, uri=f"http://{HOST}:{self._port}")
        self.open()

    def open(self) -> None:
        listener = socket.create_server((HOST, self._port))
        self._open.append(listener)
        threading.Thread(target=self._let_in, args=(listener,), daemon=True).start()

    def shut(self) -> None:
        while self._open:
            end = self._open.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _let_in(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                ends = (listener.accept()[0], socket.create_connection(self._behind))
                self._open += ends
                for one, other in (ends, ends[::-1]):
                    threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while content := one.recv(65536):
            other.sendall(content)
        other.shutdown(socket.SHUT_WR)
