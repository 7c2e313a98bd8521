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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import urlopen

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
        program: the server, if there is one.
    """

    uri: str
    artifacts: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    log: Path | None = None
    program: Program | None = None


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
    with running(command, folder / "server.log", lambda: answers(f"{url}/health"), environment) as program:
        yield Store(url, log=folder / "server.log", program=program)


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
        with running(command, folder / "postgres.log", lambda: accepts(port), end=signal.SIGINT, user=user) as program:
            uri = f"postgresql+psycopg2://dit:secret@{HOST}:{port}/postgres"
            yield Store(uri, (folder / "artifacts").as_uri(), program=program)
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
    with running(command, folder / "s3.log", lambda: answers(f"{endpoint}/moto-api/")) as program:
        store = Store(database(folder), "s3://dit/artifacts", environment, folder / "s3.log", program)
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


class Program:
    """A server program, which can be frozen, killed and started again.

    Attributes:
        log: what it wrote.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        end: signal.Signals = signal.SIGTERM,
        user: str | None = None,
    ) -> None:
        self.log = log
        self._command, self._ready, self._end, self._user = command, ready, end, user
        self._environment = {**os.environ, **(environment or {})}

    def start(self) -> None:
        """Returns when it is ready."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd="/",
                user=self._user,
                start_new_session=True,  # so that its children end with it
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"{' '.join(self._command)} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.send_signal(self._end)
        # On a machine with other work it may take its time; what it wrote is written.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and to all that it started: PostgreSQL's children have groups of their own."""
        import psutil

        first = psutil.Process(self._process.pid)
        for process in [first, *first.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()


@contextmanager
def running(*arguments: Any, **options: Any) -> Iterator[Program]:
    """A :class:`Program` of these arguments, from when it is ready until the block ends."""
    program = Program(*arguments, **options)
    program.start()
    try:
        yield program
    finally:
        program.stop()


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
