"""MLflow stores of every kind, started on loopback and ended by the processes that were started."""

from __future__ import annotations

import atexit
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

READY_SECONDS = 120.0
HOST = "127.0.0.1"


class Missing(Exception):
    """The software of a store is not on this machine."""


@dataclass(frozen=True)
class Store:
    """A running store.

    Attributes:
        uri: tracking URI.
        artifacts: where experiments put their artifacts; ``None`` = where the server says.
        environment: variables that its clients need.
        log: what the server wrote, if there is one.
    """

    uri: str
    artifacts: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None


Start = Callable[[str], Store]
"""Gives the store of a kind that runs already, or starts it."""


@contextmanager
def sqlite(folder: Path) -> Iterator[Store]:
    """A database file, and artifacts in a folder beside it."""
    yield Store(database(folder), (folder / "artifacts").as_uri())


def database(folder: Path, artifacts: str = "") -> str:
    """The URI of a SQLite database in ``folder``, with MLflow's tables; the one that is there, if there is one.

    ``artifacts``: where the experiment that MLflow makes itself puts them; default: beside the database.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mlflow.db"
    if not path.exists():
        with closing(sqlite3.connect(empty_database())) as empty, closing(sqlite3.connect(path)) as made:
            empty.backup(made)
            location = artifacts or (folder / "mlruns" / "0").as_uri()
            made.execute("UPDATE experiments SET artifact_location = ?", [location])
            made.commit()
    return f"sqlite:///{path}"


def copy(source: Path, target: Path) -> None:
    """Make the SQLite store in ``target`` what that in ``source`` is; both have their own files.

    The database is written in place: MLflow holds it open. Nor may a store move: MLflow remembers where a run's
    artifacts are.
    """
    shutil.rmtree(target / "artifacts", ignore_errors=True)
    shutil.copytree(source / "artifacts", target / "artifacts")
    with closing(sqlite3.connect(source / "mlflow.db")) as read, closing(sqlite3.connect(target / "mlflow.db")) as made:
        read.backup(made)


@cache
def empty_database() -> Path:
    """Made once: MLflow's tables come from its whole history of migrations, which takes a second or more."""
    folder = Path(tempfile.mkdtemp(prefix="dit-database-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = SqlAlchemyStore(f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlruns").as_uri())
    store.engine.dispose()
    return folder / "mlflow.db"


@contextmanager
def server(folder: Path, backend: str = "") -> Iterator[Store]:
    """``mlflow server`` that stands between its clients and the artifacts; default backend: SQLite."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", backend or database(folder, "mlflow-artifacts:/0")),
        *("--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")),
    ]
    url = f"http://{HOST}:{port}"
    # Its job runners are eight more processes, which no test needs.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with running(command, folder / "server.log", lambda: answers(f"{url}/health"), environment):
        yield Store(url, log=folder / "server.log")


@contextmanager
def postgresql(folder: Path) -> Iterator[Store]:
    """A PostgreSQL cluster spoken to directly, and artifacts in a folder."""
    if find_spec("psycopg2") is None:
        raise Missing("PostgreSQL: psycopg2 is not installed (pip install psycopg2-binary)")
    initdb, postgres = postgresql_program("initdb"), postgresql_program("postgres")
    # Not below pytest's folder, which only its owner may enter; PostgreSQL refuses to run as root.
    cluster = Path(tempfile.mkdtemp(prefix="dit-postgres-"))
    user = postgresql_user()
    try:
        if user is not None:
            shutil.chown(cluster, user)
        data, port = cluster / "data", free_port()
        create = [initdb, "-D", str(data), "-U", "dit", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run(create, check=True, capture_output=True, user=user, cwd=cluster)
        command = [postgres, "-D", str(data), "-h", HOST, "-p", str(port), "-k", str(cluster), "-c", "fsync=off"]
        # "Fast": ends the sessions of clients that are still there.
        with running(command, folder / "postgres.log", lambda: accepts(port), end=signal.SIGINT, user=user):
            yield Store(f"postgresql+psycopg2://dit:secret@{HOST}:{port}/postgres", (folder / "artifacts").as_uri())
    finally:
        shutil.rmtree(cluster)


@contextmanager
def s3(folder: Path) -> Iterator[Store]:
    """Artifacts in a bucket of an S3-compatible endpoint, runs in a database file."""
    for module in ("moto.server", "boto3"):
        if find_spec(module.partition(".")[0]) is None:
            raise Missing(f"S3: {module} is not installed (pip install 'moto[server]' boto3)")
    port = free_port()
    endpoint = f"http://{HOST}:{port}"
    environment = {
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "dit",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    with running(command, folder / "s3.log", lambda: answers(f"{endpoint}/moto-api/")):
        store = Store(database(folder), "s3://dit/artifacts", environment, folder / "s3.log")
        s3_client(store).create_bucket(Bucket="dit")
        yield store


def s3_client(store: Store):  # type: ignore[no-untyped-def]
    """A client of the endpoint of :func:`s3`, to look behind MLflow's back."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=store.environment["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id="dit",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    ready: Callable[[], bool],
    environment: Mapping[str, str] | None = None,
    end: signal.Signals = signal.SIGTERM,
    user: str | None = None,
) -> Iterator[None]:
    """A server process, from when it is ready until the block ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd="/",
            user=user,
            start_new_session=True,  # so that its children end with it
        )
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.send_signal(end)
        # On a machine with other work it may take its time; what it wrote is written.
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def postgresql_program(name: str) -> str:
    """Debian keeps PostgreSQL's programs out of PATH."""
    beside = sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))
    found = shutil.which(name) or (beside[-1] if beside else None)
    if found is None:
        raise Missing(f"PostgreSQL: no {name} in PATH or /usr/lib/postgresql/*/bin (apt-get install postgresql)")
    return found


def postgresql_user() -> str | None:
    """Whom to run PostgreSQL as: ``None`` = ourselves, if we are not root."""
    if os.geteuid() != 0:
        return None
    # The first is made by Debian's package; PostgreSQL from elsewhere may lack it.
    return "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def accepts(port: int) -> bool:
    """Whether PostgreSQL takes connections there."""
    import psycopg2

    try:
        psycopg2.connect(host=HOST, port=port, user="dit", dbname="postgres").close()
    except psycopg2.OperationalError:
        return False
    return True
