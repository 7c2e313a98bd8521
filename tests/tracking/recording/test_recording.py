"""Loops recorded straight into a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from stores import Store
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import TrajectoryError, UnsupportedError, train
from dit_mlflow.recording import writer
from dit_mlflow.tracking import load_trajectory, log_trajectory, record_trajectory, run_training
from dit_mlflow.tracking.store.artifacts import artifact_folder
from dit_mlflow.workload.dataset_digest import dataset_digest


def train_recorded(steps: int = 9, at: dict[int, Callable[[], None]] | None = None, run_id: str | None = None) -> None:
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    with record_trajectory(model, optimizer, run_id=run_id) as recorder:
        while recorder.num_steps < steps:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                if at and recorder.num_steps in at:
                    at.pop(recorder.num_steps)()
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()


def only_run() -> Run:
    (run,) = mlflow.search_runs(output_format="list")
    return run


def note(run: Run) -> str:
    return str(mlflow.get_run(run.info.run_id).data.tags["mlflow.note.content"])


def test_the_active_run_holds_trajectory_and_dataset(store: str) -> None:
    with mlflow.start_run() as run:
        train_recorded()
        assert mlflow.active_run() is not None
    trajectory = load_trajectory(run.info.run_id)
    assert (trajectory.num_steps, trajectory.complete) == (9, True)
    assert trajectory.verify(digits_workload()).max_drift == 0.0
    found = mlflow.get_run(run.info.run_id)
    assert found.data.tags["dit.kind"] == "training"
    (dataset,) = found.inputs.dataset_inputs
    digest = dataset_digest(datasets()[0])
    assert digest is not None
    assert (dataset.dataset.name, dataset.dataset.digest) == ("TensorDataset", digest[:32])
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "training")]


def test_without_an_active_run_one_is_made_and_ended(store: str) -> None:
    train_recorded()
    assert mlflow.active_run() is None
    run = only_run()
    assert run.info.status == "FINISHED"
    assert load_trajectory(run.info.run_id).complete


def test_finished_segments_are_in_the_store_while_training_goes_on(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.0)
    seen = []
    with mlflow.start_run() as run:
        train_recorded(60, {50: lambda: seen.append(load_trajectory(run.info.run_id))})
    (halfway,) = seen
    assert 45 <= halfway.num_steps <= 50
    assert not halfway.complete
    assert halfway.verify(digits_workload()).max_drift == 0.0


def test_a_run_holds_one_trajectory(store: str) -> None:
    with mlflow.start_run() as run:
        train_recorded()
        with pytest.raises(TrajectoryError, match=r"has a trajectory already.*resume=True"):
            train_recorded()

    def another() -> None:
        with pytest.raises(TrajectoryError, match="or is recording one"):
            train_recorded()

    with mlflow.start_run():
        train_recorded(9, {5: another})
    assert load_trajectory(run.info.run_id).num_steps == 9


def test_what_is_refused_leaves_the_run_free(store: str) -> None:
    model = digits_model()
    with mlflow.start_run():
        with (
            pytest.raises(UnsupportedError, match="Rprop"),
            record_trajectory(model, torch.optim.Rprop(model.parameters())),
        ):
            raise AssertionError("training was reached")
        train_recorded()


def test_training_that_fails_before_its_first_step_leaves_the_run_free(any_store: Store) -> None:
    model = digits_model()
    with mlflow.start_run() as run:
        for steps in (0, 3):
            optimizer = SGD(model.parameters(), lr=0.1)
            try:
                with record_trajectory(model, optimizer) as recorder:
                    for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                        if steps == 0:
                            raise RuntimeError("out of memory")
                        sample_losses(model, batch).mean().backward()
                        optimizer.step()
            except RuntimeError:
                continue
    trajectory = load_trajectory(run.info.run_id)
    assert (trajectory.num_steps, trajectory.complete) == (3, True)


def test_a_recorder_that_comes_second_takes_nothing_from_the_first(store: str, tmp_path: Path) -> None:
    """Also where nothing told it that there is a first: both began at once."""
    with mlflow.start_run() as run:
        folder = artifact_folder(run.info.artifact_uri)
        assert folder is not None
        first = train(digits_workload(), folder / "trajectory")
        model = digits_model()
        with (
            pytest.raises(TrajectoryError, match="already holds a trajectory"),
            record_trajectory(model, SGD(model.parameters(), lr=0.1)),
        ):
            raise AssertionError("training was reached")
    first.check_record()


def test_training_that_fails_leaves_what_was_recorded(store: str) -> None:
    def fail() -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train_recorded(at={5: fail})
    run = only_run()
    assert run.info.status == "FAILED"
    trajectory = load_trajectory(run.info.run_id)
    assert (trajectory.num_steps, trajectory.complete) == (5, False)
    assert "5 steps" in note(run)
    assert "Training was interrupted" in note(run)
    assert len(run.inputs.dataset_inputs) == 1


@pytest.mark.parametrize("edited", [False, True])
def test_a_run_is_resumed(edited: bool, store: str, tmp_path: Path) -> None:
    def some_steps(model: nn.Module, optimizer: SGD, resume: bool) -> None:
        with record_trajectory(model, optimizer, resume=resume) as recorder:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                optimizer.zero_grad()
                sample_losses(model, batch).mean().backward()
                optimizer.step()

    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5, momentum=0.5)
    with mlflow.start_run() as run:
        some_steps(model, optimizer, resume=True)
    assert "3 steps of SGD in 1 epoch on 24 samples" in note(run)
    if edited:
        MlflowClient().set_tag(run.info.run_id, "mlflow.note.content", "mine")
    with mlflow.start_run(run_id=run.info.run_id):
        some_steps(model, optimizer, resume=True)
    assert note(run) == "mine" if edited else "6 steps of SGD in 2 epochs on 24 samples" in note(run)
    trajectory = load_trajectory(run.info.run_id)
    assert (trajectory.num_steps, trajectory.complete) == (6, True)
    assert trajectory.verify(digits_workload(optimizer=None)).max_drift == 0.0


def test_a_store_that_cannot_be_written_does_not_stop_training(
    store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifacts = tmp_path / "artifacts"
    artifacts.write_text("a file where the store should be")
    with caplog.at_level(logging.WARNING, logger="dit_mlflow"), mlflow.start_run() as run:
        train_recorded()
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    retried, lost = (record.message for record in caplog.records)
    assert "cannot be uploaded" in retried
    (folder,) = re.findall(r"log_trajectory\('(.+?)'", lost)
    # The message says what to do; it works.
    artifacts.unlink()
    log_trajectory(folder, run_id=run.info.run_id)
    trajectory = load_trajectory(run.info.run_id)
    assert (trajectory.num_steps, trajectory.complete) == (9, True)
    assert trajectory.verify(digits_workload()).max_drift == 0.0


def test_a_training_run_shows_its_datasets_and_its_model(store: str) -> None:
    workload = digits_workload(test_set=digits_workload().validation_set)
    run = mlflow.get_run(run_training(workload))
    contexts = {dataset.tags[0].value: dataset.dataset for dataset in run.inputs.dataset_inputs}
    assert contexts.keys() == {"training", "validation", "test"}
    assert contexts["validation"].digest == contexts["test"].digest != contexts["training"].digest
    (output,) = run.outputs.model_outputs
    model = mlflow.pytorch.load_model(f"models:/{output.model_id}")
    last = load_trajectory(run.info.run_id).checkpoint(9).load_into(digits_model())
    inputs = datasets()[1].tensors[0]
    np.testing.assert_allclose(model(inputs).detach(), last(inputs).detach(), rtol=1e-6)
    logged = mlflow.get_logged_model(output.model_id)
    metrics = {metric.key: metric for metric in logged.metrics}
    assert metrics["validation/loss"].value == run.data.metrics["validation/loss"]
    assert metrics["validation/loss"].dataset_digest == contexts["validation"].digest


def test_a_model_that_cannot_be_exported_is_trained_all_the_same(store: str, caplog: pytest.LogCaptureFixture) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = digits_model()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.net(inputs if inputs.sum().item() > 0 else -inputs)

    with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
        run = mlflow.get_run(run_training(digits_workload(model=Branching)))
    assert run.info.status == "FINISHED"
    assert "the model is not logged" in caplog.text
    assert "validation/loss" in run.data.metrics
