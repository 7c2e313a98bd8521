from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
from torch.optim import SGD
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload, sample_losses

import dit_mlflow
from dit_mlflow import Influence, InputError, TrainingError, TrajectoryError, Window, track, train
from dit_mlflow.tracking import (
    load_influence,
    load_trajectory,
    log_influence,
    log_trajectory,
    record_trajectory,
    run_training,
)
from dit_mlflow.tracking.store.artifacts import artifact_folder
from dit_mlflow.tracking.store.names import RECORDING


def test_trajectory_comes_back_and_gives_the_same_scores(store: str, tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    with mlflow.start_run() as run:
        log_trajectory(trajectory)
        influence = track(trajectory, workload, [Window(0, 4), Window(4, 9)])
        log_influence(influence)
    loaded = load_trajectory(run.info.run_id)
    assert loaded.directory != trajectory.directory
    again = track(loaded, workload, [Window(0, 4), Window(4, 9)])
    np.testing.assert_array_equal(again.scores, influence.scores)
    np.testing.assert_array_equal(load_influence(run.info.run_id).scores, influence.scores)


def test_what_is_not_there_is_named(store: str, tmp_path: Path) -> None:
    with mlflow.start_run() as run:
        pass
    with pytest.raises(InputError, match=r"no run '123' at the tracking URI sqlite"):
        load_trajectory("123")
    with pytest.raises(TrajectoryError, match="has no artifact trajectory/"):
        load_trajectory(run.info.run_id)
    mlflow.MlflowClient().set_tag(run.info.run_id, RECORDING, "true")
    with pytest.raises(TrajectoryError, match="a recording has begun in it: wait"):
        load_trajectory(run.info.run_id)
    with pytest.raises(InputError, match="has no artifact influence/"):
        load_influence(run.info.run_id)
    with pytest.raises(TrajectoryError, match=r"manifest\.json is missing"):
        log_trajectory(tmp_path)


def test_training_that_fails_keeps_its_trajectory_on_a_failed_run(store: str) -> None:
    from torch.optim import SGD

    workload = digits_workload(optimizer=lambda model: SGD(model.parameters(), lr=1e38, momentum=0.9), epochs=20)
    with pytest.raises(TrainingError):
        run_training(workload)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"
    trajectory = load_trajectory(run.info.run_id)
    assert not trajectory.complete
    assert trajectory.num_steps > 0


def test_training_run_holds_settings_losses_and_scores(store: str) -> None:
    workload = digits_workload(test_set=digits_workload().validation_set)
    run = mlflow.get_run(run_training(workload, init_seed=3))
    assert run.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.data.tags["dit.kind"] == "training"
    assert run.data.params["resolved.init_seed"] == "3"
    assert run.data.metrics["validation/loss"] == pytest.approx(run.data.metrics["test/loss"])
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "training/loss")
    assert [metric.step for metric in history] == list(range(9))
    trajectory = load_trajectory(run.info.run_id)
    assert [metric.value for metric in history] == [trajectory.step(t).loss for t in range(9)]


@pytest.mark.parametrize("as_uri", [False, True])
@pytest.mark.parametrize("name", ["a%20b", "a b", "a#b", "a?b", "a%2520b", "100%", "é"])
def test_a_record_is_where_mlflow_looks_whatever_the_folder_is_called(
    store: str, tmp_path: Path, name: str, as_uri: bool
) -> None:
    """MLflow takes a plain path for a quoted one, too."""
    folder = tmp_path / name
    experiment = mlflow.create_experiment(name, folder.as_uri() if as_uri else str(folder))
    with mlflow.start_run(experiment_id=experiment) as run:
        model = digits_model()
        optimizer = SGD(model.parameters(), lr=0.1)
        with record_trajectory(model, optimizer) as recorder:
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8)):
                sample_losses(model, batch).mean().backward()
                optimizer.step()
    listed = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id, "trajectory")}
    assert "trajectory/manifest.json" in listed
    loaded = load_trajectory(run.info.run_id)
    assert (loaded.complete, loaded.num_steps) == (True, 3)
    assert tmp_path in loaded.directory.parents, "read in place"


def test_scores_that_the_store_refuses_are_kept_in_a_folder_that_a_message_names(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    influence = track(train(digits_workload(), tmp_path / "t"), digits_workload(), [Window(0, 9)])

    def refuse(*_: object, **__: object) -> None:
        raise OSError("No space left on device sftp://me:S3cr3t@host")

    with mlflow.start_run() as run, monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_artifacts", refuse)
        with pytest.raises(OSError, match=r"No space left .*//me:\*\*\*@host"):
            log_influence(influence)
    message = caplog.records[-1].getMessage()
    assert f"the scores of influence/ of run {run.info.run_id} are not in its store" in message
    eval(message.split(": ", 1)[1], {"dit_mlflow": dit_mlflow})  # The call that it names.
    np.testing.assert_array_equal(load_influence(run.info.run_id).scores, influence.scores)


def test_of_an_influence_folder_only_the_result_is_downloaded(store: str, tmp_path: Path) -> None:
    """Whatever else is in it, and how large."""
    found = Influence(np.zeros((1, 1, 2)), (Window(0, 1),), ("loss",), np.arange(2), "local", "dit")
    with mlflow.start_run() as run:
        log_influence(found)
    folder = artifact_folder(f"{run.info.artifact_uri}/influence")
    assert folder is not None
    (folder / "large").symlink_to("/proc/kmsg")
    with (folder / "report.html").open("wb") as file:
        file.truncate(2**40)
    assert load_influence(run.info.run_id).method == "dit"
    (folder / "metadata.json").unlink()
    with pytest.raises(InputError, match=r"no influence result in .*metadata\.json"):
        load_influence(run.info.run_id)
