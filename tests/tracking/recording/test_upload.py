"""Trajectories uploaded in the background, to stores that are far away, slow or lost."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import processes
import pytest
from mlflow import MlflowClient
from stores import Door, Start, Store, tracking
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


@pytest.fixture
def door(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    """Before the server that is tracked to, by an uploader that is in a hurry."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(upload, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    found = Door(start("server"))
    with tracking(found.store, tmp_path, monkeypatch, tmp_path.name):
        yield found
    found.shut()


@pytest.mark.slow
def test_a_server_that_is_lost_does_not_stop_training(
    door: Door, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = MlflowClient().create_run(mlflow.get_experiment_by_name(tmp_path.name).experiment_id)
    with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
        train_recorded(60, {20: door.shut}, run_id=run.info.run_id)
    told = [record for record in caplog.records if record.name.startswith("dit_mlflow")]
    assert [record.levelname for record in told].count("WARNING") == 1, caplog.text
    assert "Training goes on" in told[0].message
    (folder,) = re.findall(r"log_trajectory\('(.+?)'", caplog.text)
    # What was uploaded before, and all of it once the server is back.
    door.open()
    log_trajectory(folder, run_id=run.info.run_id)
    whole = load_trajectory(run.info.run_id)
    assert (whole.num_steps, whole.complete) == (60, True)
    assert whole.verify(digits_workload()).max_drift == 0.0


@pytest.mark.slow
def test_a_server_that_comes_back_gets_what_it_missed(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    def come_back() -> None:
        time.sleep(0.5)
        door.open()

    with caplog.at_level(logging.WARNING, logger="dit_mlflow"), mlflow.start_run() as run:
        train_recorded(60, {20: door.shut, 40: come_back})
    whole = load_trajectory(run.info.run_id)
    assert (whole.num_steps, whole.complete) == (60, True)
    assert whole.verify(digits_workload()).max_drift == 0.0
    told = [record.message for record in caplog.records if record.name.startswith("dit_mlflow")]
    # Other libraries may warn too; and a server that has just come back may not take the first request.
    assert len(told) in (2, 4), caplog.text
    assert all("Training goes on" in message for message in told[::2])
    assert all("nothing is missing" in message for message in told[1::2])
    assert len(mlflow.get_run(run.info.run_id).inputs.dataset_inputs) == 1


def train_until_killed(ready: Callable[[], None], environment: dict[str, str], run_id: str) -> None:
    os.environ.update(environment)
    writer.FLUSH_SECONDS = 0.0
    ready()
    train_recorded(10**9, run_id=run_id)


@pytest.mark.parametrize("seconds", [0.3, pytest.param(1.1, marks=pytest.mark.slow)])
def test_a_killed_machine_loses_what_was_not_uploaded_and_nothing_else(
    remote_store: Store, seconds: float, tmp_path: Path
) -> None:
    run = MlflowClient().create_run(mlflow.get_experiment_by_name(tmp_path.name).experiment_id)
    environment = {**remote_store.environment, "MLFLOW_TRACKING_URI": remote_store.uri}
    with processes.running(train_until_killed, environment, run.info.run_id):
        deadline = time.monotonic() + 60
        while not any(item.path.endswith("manifest.json") for item in listing(run.info.run_id)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(seconds)
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
