"""A store that freezes, is killed, answers 500 or cuts what it sends, while trainings are recorded and jobs run."""

from __future__ import annotations

import http.client
import os
import random
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.faults import work
from benchmarks.faults.counting import Place, Row, compared, counted, place, run_of, state_of, steps_of
from benchmarks.faults.load import quiet_scores
from benchmarks.faults.processes import HUNG, Worker, codes
from benchmarks.stores import HOST, Missing, free_port
from dit_mlflow import DitError
from dit_mlflow.tracking import load_trajectory

RECORDERS, JOBS = 4, 3
STEPS, SECONDS_PER_STEP = 1_500, 0.02
FROZEN_SECONDS, AWAY_SECONDS, ERROR_SECONDS = 15.0, 20.0, 15.0
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""For stores that do not come back: MLflow itself tries again for minutes by default."""
ENDPOINT = "MLFLOW_S3_ENDPOINT_URL"


class Proxy:
    """Hands requests to a server and answers back, as long as it is not told to do otherwise.

    Attributes:
        fault: ``(number of the request) -> ""``, ``"500"`` or ``"cut"``.
        faults: how many answers were spoilt.
    """

    def __init__(self, uri: str) -> None:
        self.fault: Callable[[int], str] = lambda number: ""
        self.faults = 0
        self._number = 0
        self._lock = threading.Lock()
        host, port = uri.removeprefix("http://").split(":")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy._next()
                if fault == "500":
                    self.send_response(500)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                connection = http.client.HTTPConnection(host, int(port), timeout=120)
                connection.request(self.command, self.path, content, dict(self.headers))
                answer = connection.getresponse()
                found = answer.read()
                # Of what is there, which an answer to HEAD does not hold.
                size = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(found))
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", size)
                self.end_headers()
                if fault == "cut":
                    found = found[: len(found) // 2]
                    self.close_connection = True
                self.wfile.write(found)
                connection.close()

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = pass_on

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *arguments: Any) -> None:
                pass  # A client that went away.

        self._server = Server((HOST, free_port()), Handler)
        self.uri = f"http://{HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _next(self) -> str:
        with self._lock:
            self._number += 1
            fault = self.fault(self._number)
            self.faults += bool(fault)
        return fault

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Scene:
    """A place with a fault: what to do to it while processes work, and what they need."""

    name: str
    kind: str
    act: Callable[[Place, Proxy | None], None]
    environment: Mapping[str, str] = field(default_factory=dict)
    proxied: bool = False
    back: Callable[[Place, Proxy | None], None] = lambda here, proxy: None
    """Done before it is looked at what the store holds."""


def freeze(here: Place, proxy: Proxy | None) -> None:
    assert here.store.program is not None
    here.store.program.send(signal.SIGSTOP)
    time.sleep(FROZEN_SECONDS)
    here.store.program.send(signal.SIGCONT)


def kill(here: Place, proxy: Proxy | None) -> None:
    assert here.store.program is not None
    here.store.program.send(signal.SIGKILL)


def start(here: Place, proxy: Proxy | None) -> None:
    assert here.store.program is not None
    here.store.program.start()


def kill_and_start(here: Place, proxy: Proxy | None) -> None:
    kill(here, proxy)
    time.sleep(AWAY_SECONDS)
    start(here, proxy)


def lock(here: Place, proxy: Proxy | None) -> None:
    """Hold the write lock of the database file, as another process's long transaction does."""
    with closing(sqlite3.connect(here.store.uri.removeprefix("sqlite:///"), timeout=60)) as database:
        database.execute("BEGIN IMMEDIATE")
        time.sleep(FROZEN_SECONDS)
        database.rollback()


def errors_for_a_while(here: Place, proxy: Proxy | None) -> None:
    assert proxy is not None
    proxy.fault = lambda number: "500"
    time.sleep(ERROR_SECONDS)
    proxy.fault = lambda number: ""


def errors_for_good(here: Place, proxy: Proxy | None) -> None:
    assert proxy is not None
    proxy.fault = lambda number: "500"


def cut_some(here: Place, proxy: Proxy | None) -> None:
    assert proxy is not None
    proxy.fault = lambda number: "cut" if number % 3 == 0 else ""


def end_fault(here: Place, proxy: Proxy | None) -> None:
    assert proxy is not None
    proxy.fault = lambda number: ""


SCENES = (
    Scene(f"frozen for {FROZEN_SECONDS:.0f} s", "server", freeze),
    Scene(f"killed, back after {AWAY_SECONDS:.0f} s", "server", kill_and_start),
    Scene("killed for good", "server", kill, IMPATIENT, back=start),
    Scene(f"500 for {ERROR_SECONDS:.0f} s", "server", errors_for_a_while, proxied=True),
    Scene("500 for good", "server", errors_for_good, IMPATIENT, proxied=True, back=end_fault),
    Scene("every third answer cut", "server", cut_some, proxied=True, back=end_fault),
    Scene(f"locked for {FROZEN_SECONDS:.0f} s", "SQLite", lock),
    Scene(f"frozen for {FROZEN_SECONDS:.0f} s", "PostgreSQL", freeze),
    Scene(f"killed, back after {AWAY_SECONDS:.0f} s", "PostgreSQL", kill_and_start),
    Scene("killed for good", "PostgreSQL", kill, back=start),
    Scene(f"frozen for {FROZEN_SECONDS:.0f} s", "S3", freeze),
    Scene(f"500 for {ERROR_SECONDS:.0f} s", "S3", errors_for_a_while, proxied=True),
    Scene("500 for good", "S3", errors_for_good, proxied=True, back=end_fault),
    Scene("every third answer cut", "S3", cut_some, proxied=True, back=end_fault),
)


def faults(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """Every scene: 4 trainings of 1,500 steps and 30 s are recorded, 3 main jobs train, and then the fault comes."""
    reference = quiet_scores(folder)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(_seen, scene, folder / f"scene-{at}", reference) for at, scene in enumerate(SCENES)]
        return [future.result() for future in futures]


def _seen(scene: Scene, folder: Path, reference: list[float]) -> Row:
    row: Row = {"store": scene.kind, "fault": scene.name}
    try:
        with place(scene.kind, folder) as behind, _proxied(behind, scene.proxied) as (here, proxy):
            return row | _counted(scene, here, behind, proxy, reference)
    except Missing as error:
        return row | {"not measured": str(error)}


@contextmanager
def _proxied(behind: Place, wanted: bool) -> Any:
    if not wanted:
        yield behind, None
        return
    endpoint = behind.store.environment.get(ENDPOINT)
    proxy = Proxy(endpoint or behind.store.uri)
    if endpoint is None:
        seen = replace(behind.store, uri=proxy.uri)
    else:
        seen = replace(behind.store, environment={**behind.store.environment, ENDPOINT: proxy.uri})
    try:
        yield replace(behind, store=seen), proxy
    finally:
        proxy.close()


def _counted(scene: Scene, here: Place, behind: Place, proxy: Proxy | None, reference: list[float]) -> Row:
    environment = dict(scene.environment)
    options = {"seconds_per_step": SECONDS_PER_STEP}
    recorders = [here.recorder(seed, STEPS, environment, **options) for seed in range(RECORDERS)]
    for worker in recorders:
        worker.until_ready()
    jobs = [here.asking(number, **environment) for number in range(JOBS)]
    for worker in jobs:
        worker.until_ready()
    time.sleep(1.0)
    scene.act(here, proxy)
    ended = codes([*recorders, *jobs])
    faults = proxy.faults if proxy is not None else None
    scene.back(here, proxy)
    found = behind.looked_at(recorders)
    runs = behind.answer("influence-runs", work.influence_runs, behind.experiment)
    scores = behind.answer("scores", work.scores_of, runs)
    row: Row = {
        "trainings": RECORDERS,
        "steps tried": RECORDERS * STEPS,
        "steps trained": sum(map(steps_of, recorders)),
        "exit 0": ended[:RECORDERS].count(0),
        "FINISHED": sum(one["status"] == "FINISHED" for one in found),
        **counted(found),
    }
    row["steps kept after log_trajectory"] = _again(behind, recorders, found)
    row |= {
        "jobs": JOBS,
        "jobs exit 0": ended[RECORDERS:].count(0),
        **compared(scores, reference),
        "influence runs RUNNING": behind.answer("statuses", work.statuses_of, runs).get("RUNNING", 0),
        "hung": ended.count(HUNG),
    }
    if faults is not None:
        row["answers spoilt"] = faults
    return row


def _again(here: Place, recorders: list[Worker], found: list[dict[str, Any]]) -> int:
    """Steps in the store once each message's ``log_trajectory(…)`` has been called."""
    kept = 0
    for number, (worker, one) in enumerate(zip(recorders, found, strict=True)):
        folder, run_id = work.kept_folder(worker.said), run_of(worker)
        if folder is not None and run_id is not None:
            arguments = (folder, run_id, state_of(worker))
            one = here.answer(f"again-{number}", work.uploaded_again, *arguments)
            assert not one["wrong"], one
        kept += one["steps"]
    return kept


def reading(folder: Path, sizes: dict[str, int]) -> list[Row]:
    """A whole trajectory is read through a proxy that cuts answers, or answers 500 to some."""
    rows = []
    with place("server", folder / "reading") as behind:
        worker = behind.recorder(0, 300)
        assert worker.exit_code() == 0, worker.said
        proxy = Proxy(behind.store.uri)
        here = replace(behind, store=replace(behind.store, uri=proxy.uri))
        rules = {
            "a tenth of the answers cut": _some("cut", 0.1),
            "a third of the answers cut": _some("cut", 0.33),
            "every answer cut": _some("cut", 1.0),
            "500 to a third of the requests": _some("500", 0.33),
            "500 to every request": _some("500", 1.0),
        }
        for name, rule in rules.items():
            proxy.fault = rule
            # Where nothing is ever read, each try takes a minute.
            before, tries = proxy.faults, 2 if name == "every answer cut" else 10
            outcomes = here.answer(
                name, read_often, run_of(worker), state_of(worker), tries, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"
            )
            rows.append({"fault": name, "tried": tries, **outcomes, "answers spoilt": proxy.faults - before})
        proxy.close()
    return rows


def _some(fault: str, share: float) -> Callable[[int], str]:
    """A fault of that share of the requests, drawn anew for each, from a seed."""
    draws = random.Random(0)
    return lambda number: fault if draws.random() < share else ""


def read_often(ready: Callable[[], None], run_id: str, state: str, tries: int) -> dict[str, int]:
    """Read a trajectory several times, each time without a cache: how often it was right, refused, wrong."""
    found = {"right": 0, "refused in our words": 0, "other error": 0, "wrong": 0}
    for _ in range(tries):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["DIT_MLFLOW_CACHE"] = cache
            try:
                one = work.checked(load_trajectory(run_id), state)
            except DitError as error:
                print("refused:", error)
                found["refused in our words"] += 1
            except Exception as error:  # Any kind: they are counted.
                print(f"other: {type(error).__module__}.{type(error).__name__}: {error}")
                found["other error"] += 1
            else:
                if "error" in one:
                    print("refused:", one["error"])
                    found["refused in our words"] += 1
                else:
                    found["wrong" if one["wrong"] or one["steps"] != 300 else "right"] += 1
    return found
