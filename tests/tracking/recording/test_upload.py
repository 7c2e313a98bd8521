"""Trajectories uploaded in the background, to stores that are far away, slow or lost."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import mlflow
import numpy as np
import pytest
import stores
from conftest import tracking
from mlflow import MlflowClient
from stores import Store
from test_recording import train_recorded
from torch.optim import SGD
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Window, track
from dit_mlflow.recording import writer
from dit_mlflow.tracking import load_trajectory, log_trajectory, record_trajectory
from dit_mlflow.tracking.recording import upload


def test_finished_segments_arrive_while_training_goes_on(remote_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    seen = []

    def look() -> None:
        deadline = time.monotonic() + 60
        while not MlflowClient().list_artifacts(run.info.run_id, "trajectory/manifest.json"):
            names = [Path(item.path).name for item in MlflowClient().list_artifacts(run.info.run_id, "trajectory")]
            if "manifest.json" in names:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        seen.append(load_trajectory(run.info.run_id))

    with mlflow.start_run() as run:
        train_recorded(30, {20: look})
    (halfway,) = seen
    assert not halfway.complete
    halfway.verify(digits_workload())
    whole = load_trajectory(run.info.run_id)
    assert (whole.num_steps, whole.complete) == (30, True)
    assert whole.verify(digits_workload()).max_drift == 0.0


def test_a_remote_run_is_resumed(remote_store: Store) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.5)
    run_id = None
    for _ in range(3):
        with (
            mlflow.start_run(run_id=run_id) as run,
            record_trajectory(model, optimizer, resume=True, checkpoint_every=1) as recorder,
        ):
            run_id = run.info.run_id
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()
    assert run_id is not None
    trajectory = load_trajectory(run_id)
    assert (trajectory.num_steps, trajectory.complete) == (9, True)
    assert trajectory.verify(digits_workload(optimizer=None)).max_drift == 0.0


def test_a_server_that_is_lost_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(upload, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    with ExitStack() as server:
        store = server.enter_context(stores.server(tmp_path / "server"))
        server_stack = tracking(store, tmp_path, monkeypatch)
        server_stack.__enter__()
        run = MlflowClient().create_run(mlflow.get_experiment_by_name("test").experiment_id)
        with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
            train_recorded(60, {20: server.close}, run_id=run.info.run_id)
    told = [record for record in caplog.records if record.name.startswith("dit_mlflow")]
    assert [record.levelname for record in told].count("WARNING") == 1, caplog.text
    assert "Training goes on" in told[0].message
    (folder,) = re.findall(r"log_trajectory\('(.+?)'", caplog.text)
    # What was uploaded before, and all of it once the server is back.
    port = int(store.uri.rpartition(":")[2])
    monkeypatch.setattr(stores, "free_port", lambda: port)
    with stores.server(tmp_path / "server"):
        log_trajectory(folder, run_id=run.info.run_id)
        whole = load_trajectory(run.info.run_id)
        assert (whole.num_steps, whole.complete) == (60, True)
        assert whole.verify(digits_workload()).max_drift == 0.0
        server_stack.__exit__(None, None, None)


def test_a_server_that_comes_back_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(upload, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    with ExitStack() as first, ExitStack() as second:
        store = first.enter_context(stores.server(tmp_path / "server"))
        port = int(store.uri.rpartition(":")[2])

        def lose() -> None:
            first.close()

        def come_back() -> None:
            time.sleep(0.5)
            monkeypatch.setattr(stores, "free_port", lambda: port)
            second.enter_context(stores.server(tmp_path / "server"))

        with tracking(store, tmp_path, monkeypatch), caplog.at_level(logging.WARNING, logger="dit_mlflow"):
            with mlflow.start_run() as run:
                train_recorded(60, {20: lose, 40: come_back})
            whole = load_trajectory(run.info.run_id)
            assert (whole.num_steps, whole.complete) == (60, True)
            assert whole.verify(digits_workload()).max_drift == 0.0
            told = [record.message for record in caplog.records if record.name.startswith("dit_mlflow")]
            # Other libraries may warn too; and a server that has just come back may not take the first request.
            assert len(told) in (2, 4), caplog.text
            assert all("Training goes on" in message for message in told[::2])
            assert all("nothing is missing" in message for message in told[1::2])
            assert len(mlflow.get_run(run.info.run_id).inputs.dataset_inputs) == 1


KILLED = """
import sys
sys.path[:0] = sys.argv[1:3]
import dit_mlflow.recording.writer as writer
from test_recording import train_recorded
writer.FLUSH_SECONDS = 0.0
print("ready", flush=True)
train_recorded(10**9, run_id=sys.argv[3])
"""


@pytest.mark.parametrize("seconds", [0.3, pytest.param(1.1, marks=pytest.mark.slow)])
def test_a_killed_machine_loses_what_was_not_uploaded_and_nothing_else(
    remote_store: Store, seconds: float, tmp_path: Path
) -> None:
    run = MlflowClient().create_run(mlflow.get_experiment_by_name(tmp_path.name).experiment_id)
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(here.parents[1]), run.info.run_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while not any(item.path.endswith("manifest.json") for item in listing(run.info.run_id)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
    killed = load_trajectory(run.info.run_id)
    assert not killed.complete
    workload = digits_workload()
    assert killed.verify(workload).max_drift == 0.0
    if killed.num_steps:
        scores = track(killed, workload, [Window(0, min(killed.num_steps, 20))]).scores
        assert np.isfinite(scores).all()
        assert np.abs(scores).max() > 0


def listing(run_id: str) -> list[mlflow.entities.FileInfo]:
    return MlflowClient().list_artifacts(run_id, "trajectory")
