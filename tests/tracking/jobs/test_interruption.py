"""A job that is broken off, or loses its store, leaves a clear end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import mlflow
import processes
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from dit_mlflow.cli import cli, run_job
from dit_mlflow.tracking.jobs.signals import ending_on_signals
from dit_mlflow.tracking.store.failed_run import fail_project_run
from dit_mlflow.tracking.store.run_log import log_points, project_run

INTERRUPTED_IMPORT = """
import sys

class Interrupt:
    # Once, as a person does who sees the typing error.
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

from dit_mlflow.cli import cli

sys.meta_path.insert(0, Interrupt())
cli(["influence", "--kind", "local"])
"""


def test_an_interruption_of_the_imports_ends_the_run_that_mlflow_made(store: str) -> None:
    run = MlflowClient().create_run("1")
    environment = {**os.environ, "MLFLOW_RUN_ID": run.info.run_id}
    command = [sys.executable, "-c", INTERRUPTED_IMPORT]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode != 0
    found = mlflow.get_run(run.info.run_id)
    assert (found.info.status, found.data.tags["dit.error"]) == ("FAILED", "KeyboardInterrupt()"), ended.stderr


def test_the_reason_is_told_although_the_run_is_gone(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "beef")
    finished = CliRunner().invoke(cli, ["influence", "--kind", "foo"])
    assert finished.exit_code == 1
    assert isinstance(finished.exception, SystemExit)
    assert "kind='foo'" in finished.output


def log_without_end(ready: Callable[[], None], environment: dict[str, str]) -> None:
    os.environ.update(environment)

    def job(run_id: str | None) -> str:
        with project_run(run_id, "job", {}):
            ready()
            for step in range(10**6):
                log_points((f"m{name}", step, 1.0) for name in range(200))
        return "it ended"

    run_job("influence", job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        # By ``kill``; by the terminal, whose group ``mlflow run`` is in too.
        ([signal.SIGTERM], 143),
        ([signal.SIGINT, signal.SIGTERM], None),
    ],
    ids=["TERM", "INT, TERM"],
)
def test_signals_in_the_middle_of_logging_end_the_run(store: str, sent: list[signal.Signals], code: int | None) -> None:
    """MLflow's transactions hold the database's lock: broken off inside of one, no run could be ended any more."""
    run = MlflowClient().create_run("1")
    with processes.running(log_without_end, {"MLFLOW_TRACKING_URI": store, "MLFLOW_RUN_ID": run.info.run_id}) as job:
        assert job.pid is not None
        time.sleep(0.3)
        for number in sent:
            os.kill(job.pid, number)
            time.sleep(0.03)
        job.join(60)
        assert job.exitcode == code if code is not None else job.exitcode not in (0, None)
    assert mlflow.get_run(run.info.run_id).info.status == "FAILED"


@pytest.mark.slow
def test_a_signal_in_the_first_moments_ends_the_run_that_mlflow_made(store: str) -> None:
    run = MlflowClient().create_run("1")
    environment = {**os.environ, "MLFLOW_RUN_ID": run.info.run_id}
    # Before MLflow is imported, which takes seconds.
    script = """
import os, signal, threading
from dit_mlflow.cli import run_job

# The tests may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def job(run_id):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGHUP)).start()
    import mlflow
    while True:
        mlflow.get_run(run_id)

run_job("influence", job)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    found = mlflow.get_run(run.info.run_id)
    assert (ended.returncode, found.info.status) == (129, "FAILED"), ended.stderr
    assert found.data.tags["dit.error"] == "SystemExit(129)"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_lost_on_its_way_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python drops exceptions of finalizers."""
    monkeypatch.setattr("dit_mlflow.tracking.jobs.signals.PATIENCE", 0.1)

    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(SystemExit) as caught, ending_on_signals():
        started = time.monotonic()
        one = Finalized()
        del one
        assert time.monotonic() - started < 5
        time.sleep(10)
    assert caught.value.code == 143
    assert time.monotonic() - started < 5


def sleep_in_a_transaction(seconds: float) -> None:
    """As a function of SQLAlchemy's would, where signals wait for a better place."""
    exec("import time\ntime.sleep(seconds)", {"__name__": "sqlalchemy.engine", "seconds": seconds})


@pytest.mark.parametrize("again", [False, True])
def test_an_end_is_broken_off_only_if_it_is_asked_for_again(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was raised in a bad place is looked after, lest it be lost there; while it is handled, it is left alone."""
    monkeypatch.setattr("dit_mlflow.tracking.jobs.signals.PATIENCE", 0.1)
    ended = []
    started = time.monotonic()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as caught, ending_on_signals():
        try:
            sleep_in_a_transaction(10)
        finally:
            time.sleep(0.5)
            if again:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            ended.append(True)
    assert caught.value.code == 143
    assert bool(ended) != again
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_a_database_that_fails_is_told_in_a_few_lines(store: str) -> None:
    script = """
import sqlite3
from dit_mlflow.cli import prepare_environment, run_job
prepare_environment()

import mlflow

def job(run_id):
    mlflow.search_runs(["1"])
    with sqlite3.connect(mlflow.get_tracking_uri().removeprefix("sqlite:///")) as database:
        database.execute("DROP TABLE runs")
    mlflow.search_runs(["1"])

run_job("influence", job)
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 1
    # Outside of click's own main, which would print the rest in the same words.
    _, said = ended.stderr.split("click.exceptions.ClickException: ")
    assert said.splitlines() == [
        "(sqlite3.OperationalError) no such table: runs",
        "The tracking store failed; it may still show runs as RUNNING",
    ]
    assert "SQLAlchemy database error" not in ended.stderr


@pytest.mark.slow
def test_hangups_that_nohup_ignores_stay_ignored(store: str) -> None:
    script = """
import os, signal
from dit_mlflow.cli import run_job

signal.signal(signal.SIGHUP, signal.SIG_IGN)
run_job("influence", lambda _: os.kill(os.getpid(), signal.SIGHUP) or "went on")
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stdout) == (0, "went on\n"), ended.stderr


def test_what_came_to_its_end_is_not_failed_afterwards(store: str) -> None:
    client = MlflowClient()
    finished, failed = (client.create_run("1").info.run_id for _ in range(2))
    client.set_terminated(finished)
    client.set_terminated(failed, "FAILED")
    for run_id in (finished, failed):
        fail_project_run(run_id, "influence", "no more \udcff")
    assert mlflow.get_run(finished).info.status == "FINISHED" and "dit.error" not in mlflow.get_run(finished).data.tags
    assert mlflow.get_run(failed).data.tags["dit.error"] == "no more \\udcff"


def test_a_file_that_is_gone_is_named_without_a_traceback(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(request: object, run_id: str | None) -> str:
        raise FileNotFoundError(2, "No such file or directory", "/mnt/artifacts")

    monkeypatch.setattr("dit_mlflow.tracking.jobs.influence.main_job", gone)
    finished = CliRunner().invoke(cli, ["influence"])
    assert finished.exit_code == 1
    assert finished.output.endswith("Error: FileNotFoundError: [Errno 2] No such file or directory: '/mnt/artifacts'\n")
