"""Processes that record and track at once against one server lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import processes_at_once
import pytest
import stores
from mlflow import MlflowClient
from processes_at_once import WINDOWS, workload
from stores import Start

from dit_mlflow import Window, track
from dit_mlflow.tracking import load_influence, load_trajectory


@pytest.mark.slow
def test_processes_at_once_lose_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three on a server over SQLite, where writers wait for one another."""
    at_once(3, [start("server").uri], monkeypatch)


@pytest.mark.slow
def test_eight_processes_at_once_lose_nothing(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server over SQLite, then on one over PostgreSQL; the same processes, so that they start only once."""
    on_sqlite, database = start("server"), start("postgresql")
    with stores.server(tmp_path / "server", database.uri) as on_postgresql:
        at_once(8, [on_sqlite.uri, on_postgresql.uri], monkeypatch)


def at_once(processes: int, uris: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    experiment = f"{processes} at once"
    for uri in uris:
        MlflowClient(uri).create_experiment(experiment)
    command = [sys.executable, processes_at_once.__file__, str(processes), experiment, *uris]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [line["uri"] for line in found] == uris
    for line in found:
        print(f"{processes} processes on {line['uri']}: {line['seconds']:.1f} s")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", line["uri"])
        mlflow.set_tracking_uri(line["uri"])
        try:
            check(experiment, line["runs"])
        finally:
            mlflow.set_tracking_uri(None)


def check(experiment: str, found: list[tuple[str, str]]) -> None:
    """Every run is there, ended, and holds all that its process logged."""
    runs = {run.info.run_id: run for run in mlflow.search_runs(experiment_names=[experiment], output_format="list")}
    assert len(runs) == len(found) * (2 + len(WINDOWS))
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert len({runs[training].data.metrics["process"] for training, _ in found}) == len(found)
    for training, answer in found:
        trajectory = load_trajectory(training)
        assert (trajectory.complete, trajectory.num_steps) == (True, 9)
        assert trajectory.verify(workload()).max_drift == 0
        history = MlflowClient().get_metric_history(training, "loss")
        assert sorted(metric.step for metric in history) == [0, 1, 2]
        # With the whole run, as the influence job does: another number of windows rounds differently.
        expected = track(trajectory, workload(), [*WINDOWS, Window(0, 9)]).select(WINDOWS)
        np.testing.assert_array_equal(load_influence(answer).scores, expected.scores)
        children = [run for run in runs.values() if run.data.tags.get("mlflow.parentRunId") == answer]
        bounds = {(run.data.metrics["window_start"], run.data.metrics["window_end"]) for run in children}
        assert bounds == {(window.start, window.end) for window in WINDOWS}
        assert {run.data.tags["dit.training_run_id"] for run in children} == {training}
