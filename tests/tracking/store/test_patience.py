"""A store that fails for a moment is asked again, in a job; what it made is not made twice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError
from stores import Start, postgresql, tracking

from benchmarks.faults.servers import Proxy
from dit_mlflow.tracking.mlflow_internals import clients_through
from dit_mlflow.tracking.store import patience
from dit_mlflow.tracking.store.patience import asked_again, patient_stores


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.001)


class Connection(Exception):
    """What the driver of a database with a server raises."""


def ended() -> MlflowException:
    try:
        raise MlflowException("ended") from OperationalError("SELECT 1", {}, Connection("closed"))
    except MlflowException as error:
        return error


def failing(times: int, error: Callable[[], BaseException] = ended) -> Callable[[], str]:
    left = iter(range(times))

    def ask() -> str:
        for _ in left:
            raise error()
        return "answer"

    return ask


def test_a_database_that_ended_the_connection_is_asked_ten_times() -> None:
    assert asked_again(failing(9), patience.disconnected) == "answer"
    with pytest.raises(MlflowException, match="ended"):
        asked_again(failing(10), patience.disconnected)


def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(ValueError, match="other"):
        asked_again(failing(1, lambda: ValueError("other")), patience.disconnected)


@pytest.fixture
def cut(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A server every third answer of which is cut when ``fault`` is set; the current store."""
    server = start("server")
    proxy = Proxy(server.uri)
    with tracking(replace(server, uri=proxy.uri), tmp_path, monkeypatch, tmp_path.name):
        yield proxy
        proxy.fault = lambda number: ""
    proxy.close()


def log(tmp_path: Path) -> str:
    (tmp_path / "told.txt").write_text("told " * 1000)
    with mlflow.start_run(run_name="one") as run:
        for step in range(5):
            mlflow.log_metric("loss", step, step=step)
        mlflow.set_tag("colour", "blue")
        mlflow.log_artifact(str(tmp_path / "told.txt"), "folder")
        with mlflow.start_run(run_name="child", nested=True):
            mlflow.log_param("a", 1)
    return str(run.info.run_id)


@pytest.mark.parametrize("first", range(3))
def test_answers_that_break_off_cost_nothing_and_make_nothing_twice(cut: Proxy, tmp_path: Path, first: int) -> None:
    cut.fault = lambda number: "cut" if number % 3 == first else ""
    with pytest.raises(MlflowException, match="Connection broken"):
        log(tmp_path)
    cut.fault = lambda number: ""
    while mlflow.active_run():
        mlflow.end_run()
    before = {run.info.run_id for run in mlflow.search_runs(output_format="list")}
    cut.fault = lambda number: "cut" if number % 3 == first else ""
    with patient_stores():
        run_id = log(tmp_path)
    cut.fault = lambda number: ""
    made = [run for run in mlflow.search_runs(output_format="list") if run.info.run_id not in before]
    assert sorted((run.info.run_name, run.info.status) for run in made) == [("child", "FINISHED"), ("one", "FINISHED")]
    found = mlflow.get_run(run_id)
    assert found.data.tags["colour"] == "blue"
    assert [m.value for m in mlflow.MlflowClient().get_metric_history(run_id, "loss")] == [0, 1, 2, 3, 4]
    assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/folder/told.txt") == "told " * 1000


def test_a_run_whose_answer_was_lost_is_found_again(store: str) -> None:
    class Losing:
        def __init__(self, behind: object) -> None:
            self.behind, self.lost = behind, False

        def __getattr__(self, name: str) -> object:
            return getattr(self.behind, name)

        def create_run(self, *asked: object) -> object:
            made = self.behind.create_run(*asked)  # type: ignore[attr-defined]
            if not self.lost:
                self.lost = True
                raise ended()
            return made

    losing = {}
    store_that_loses = clients_through(lambda found: losing.setdefault(id(found), Losing(found)), lambda ask: ask)
    with store_that_loses, patient_stores():
        mlflow.search_experiments()
        with mlflow.start_run(run_name="lost") as run:
            mlflow.log_metric("loss", 1.0)
    assert any(found.lost for found in losing.values())
    named = mlflow.search_runs(filter_string="attributes.run_name = 'lost'", output_format="list")
    assert [found.info.run_id for found in named] == [run.info.run_id]


def test_a_wrong_address_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    patient = patience._Patience()
    with pytest.raises(MlflowException):
        patient.ask(failing(1))
    assert not waits
    assert patient.ask(failing(0)) == "answer"
    assert patient.ask(failing(3)) == "answer"
    assert len(waits) == 3


@pytest.mark.slow
def test_a_database_that_restarts_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.1)
    with postgresql(tmp_path / "place") as found, tracking(found, tmp_path, monkeypatch):
        assert found.program is not None
        with patient_stores():
            mlflow.search_experiments()
            found.program.send(signal.SIGKILL)
            again = threading.Timer(3.0, found.program.start)
            again.start()
            run_id = log(tmp_path)
            again.join()
        assert mlflow.get_run(run_id).info.status == "FINISHED"
        assert len(mlflow.search_runs(output_format="list")) == 2
