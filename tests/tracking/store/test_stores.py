"""The same trajectories and influence through every kind of MLflow store."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import FileInfo
from plain_loop import record
from stores import Store
from torch.optim import AdamW
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import Trajectory, Window, track, train
from dit_mlflow.tracking import load_influence, load_trajectory, log_influence, log_trajectory, record_trajectory
from dit_mlflow.tracking.jobs.influence import main_job
from dit_mlflow.tracking.jobs.request import Request

WINDOWS = [Window(0, 2), Window(2, 6)]


def adamw() -> tuple[torch.nn.Module, AdamW]:
    torch.manual_seed(0)
    model = digits_model()
    return model, AdamW(model.parameters(), lr=0.02)


def artifacts(run_id: str, folder: str) -> dict[str, FileInfo]:
    return {Path(item.path).name: item for item in MlflowClient().list_artifacts(run_id, folder)}


def test_a_recorded_loop_comes_back_and_gives_the_same_scores(any_store: Store, tmp_path: Path) -> None:
    workload = digits_workload(optimizer=lambda model: AdamW(model.parameters(), lr=0.02))
    here = record(tmp_path / "here", *adamw(), workload=workload)
    model, optimizer = adamw()
    torch.manual_seed(1)
    with mlflow.start_run() as run, record_trajectory(model, optimizer, workload) as recorder:
        for _ in range(2):
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8, shuffle=True)):
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()
    there = load_trajectory(run.info.run_id)
    assert (there.complete, there.num_steps) == (True, 6)
    assert there.verify(workload).max_drift == 0
    influence = track(there, workload, WINDOWS)
    np.testing.assert_array_equal(influence.scores, track(here, workload, WINDOWS).scores)
    with mlflow.start_run() as answer:
        log_influence(influence)
    np.testing.assert_array_equal(load_influence(answer.info.run_id).scores, influence.scores)
    assert {mlflow.get_run(found.info.run_id).info.status for found in (run, answer)} == {"FINISHED"}


def test_files_are_few_and_arrive_as_they_were_recorded(any_store: Store, tmp_path: Path) -> None:
    trajectory = train(digits_workload(epochs=100), tmp_path / "t")
    with mlflow.start_run() as run:
        log_trajectory(trajectory)
    stored = artifacts(run.info.run_id, "trajectory")
    recorded = {path.name: path.stat().st_size for path in trajectory.directory.iterdir()}
    assert {name: item.file_size for name, item in stored.items()} == recorded
    assert trajectory.num_steps == 300
    # A checkpoint shard and a steps file at the beginning and at the end, and as much again if training took 10 s.
    assert len(recorded) <= 7
    assert load_trajectory(run.info.run_id).manifest == trajectory.manifest


def test_a_trajectory_can_be_copied_to_another_run(any_store: Store, tmp_path: Path) -> None:
    workload = digits_workload()
    with mlflow.start_run() as run:
        log_trajectory(train(workload, tmp_path / "t"))
    with mlflow.start_run() as other:
        log_trajectory(load_trajectory(run.info.run_id))
    copy = load_trajectory(other.info.run_id)
    assert copy.manifest == Trajectory.open(tmp_path / "t").manifest
    assert copy.verify(workload).max_drift == 0


def test_main_job_trains_and_answers_then_answers_again_from_the_store(any_store: Store) -> None:
    small = {
        "model": "logreg",
        "n_train": "40",
        "n_validation": "20",
        "n_test": "20",
        "epochs": "2",
        "batch_size": "16",
    }
    main_job(Request(settings=small, windows="1", ground_truth="4"))
    (training,) = runs("training")
    (first,) = runs("influence")
    main_job(Request(training_run=training.info.run_id, windows="1", ground_truth="none"))
    second = next(run for run in runs("influence") if run.info.run_id != first.info.run_id)
    assert {run.info.status for run in runs()} == {"FINISHED"}
    assert len(runs("window")) == 2
    scores = [load_influence(run.info.run_id).scores for run in (first, second)]
    # To rounding: a stop-watch says which retrainings run side by side.
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-4 * np.abs(scores[0]).max())
    assert np.isfinite(load_influence(first.info.run_id, "ground_truth").of(0)).sum() == 4
    assert first.data.metrics["replay/max_drift"] == 0
    assert "against_leave_one_out.png" in artifacts(first.info.run_id, "influence")


def runs(kind: str | None = None) -> list[mlflow.entities.Run]:
    found = mlflow.search_runs(output_format="list")
    return [run for run in found if kind in (None, run.data.tags.get("dit.kind"))]
