"""``dit-mlflow verify``: what it says, and its exit code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import TensorDataset
from workloads import datasets, digits_workload

from dit_mlflow import Trajectory, Workload, load_workload, train
from dit_mlflow.cli import cli
from dit_mlflow.tracking.store.artifacts import log_trajectory

HERE = f"{__name__}:named"


def named(optimizer: str = "SGD", hidden: int = 6, shift: float = 0.0, epochs: int = 3) -> Workload:
    """A workload that a record can name."""
    inputs, targets = datasets()[0].tensors
    return digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 3)),
        optimizer=lambda model: {"SGD": SGD, "Adam": Adam}[optimizer](model.parameters(), lr=0.05),
        train_set=TensorDataset(inputs + shift, targets),
        epochs=epochs,
    )


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def run_named(*arguments: Any) -> Result:
    return run(*arguments, "--workload", HERE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    train(load_workload(HERE), tmp_path / "t")
    return tmp_path / "t"


def test_what_holds_is_said(folder: Path) -> None:
    found = run_named(folder)
    assert found.exit_code == 0
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    count = len(list(folder.iterdir())) - 1
    lines = found.stdout.splitlines()
    assert lines[:5] == [
        f"trajectory     {folder}",
        f"files          {count}, {size / 1000:.1f} KB: whole, by their SHA-256",
        "record         9 steps in 3 epochs over 24 samples, 4 checkpoints: without a gap",
        "complete       yes",
        "recorded with  the same versions and thread count as here",
    ]
    assert lines[5:7] == [f"workload       {HERE}", "data           as recorded, by its digest"]
    table = [line.split() for line in lines[8:12]]
    assert table == [["from", "step", "to", "step", "drift"], ["0", "1", "0"], ["1", "4", "0"], ["4", "9", "0"]]
    assert lines[13] == "max drift      0 (bit for bit)"
    assert lines[-1] == "Everything holds."


def test_run_is_verified_and_no_other_is_made(store: str, folder: Path) -> None:
    with mlflow.start_run() as run_:
        log_trajectory(folder)
    found = run_named(run_.info.run_id)
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (0, "Everything holds.")
    assert f"of run {run_.info.run_id}" in found.stdout
    assert len(MlflowClient().search_runs([run_.info.experiment_id])) == 1
    found = run("f" * 32)
    assert found.exit_code == 1
    assert f"'{'f' * 32}' is no folder here, and no run" in found.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workload", HERE, "--shift", "0.001"], "train_set is not the recorded one: digest"),
        (["--trust-workload", "--hidden", "5"], "parameter '0.weight' has shape (5, 64), recorded (6, 64)"),
        (
            ["--workload", HERE, "--optimizer", "Adam"],
            "the workload's optimizer is Adam; the trajectory was recorded with SGD",
        ),
        (["--workload", HERE, "--hidden", "5"], "'0.weight' has shape (5, 64)"),
        (["--workload", "projects/nowhere"], "workload 'projects/nowhere' not found"),
        (["--workload", HERE, "--hidden", "many"], "setting hidden='many'"),
    ],
)
def test_what_has_changed_is_named(options: list[str], message: str, folder: Path) -> None:
    found = run(folder, *options)
    assert found.exit_code == 1
    assert found.stderr.startswith("Error: ")
    assert message in found.stderr
    assert "whole, by their SHA-256" in found.stdout
    assert "Everything holds" not in found.stdout


def test_damage_is_named(folder: Path) -> None:
    path = next(folder.glob("checkpoints*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = run(folder)
    assert found.exit_code == 1
    assert f"{path} is damaged: SHA-256" in found.stderr
    assert "whole" not in found.stdout


def test_without_a_workload_the_replay_is_said_to_be_missing(tmp_path: Path) -> None:
    train(digits_workload(), tmp_path / "t")
    found = run(tmp_path / "t")
    assert found.exit_code == 0
    assert "not replayed: the trajectory was recorded without a workload; name one" in found.stdout
    assert "Everything holds" not in found.stdout
    found = run(tmp_path / "t", "--workload", HERE)
    assert (found.exit_code, found.stdout.splitlines()[-1]) == (0, "Everything holds.")


def test_workload_of_the_record_is_not_looked_for_without_consent(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(HERE, "gone.away:named"))
    found = run(folder)
    assert found.exit_code == 1
    assert "the record names 'gone.away:named' as its workload, which does not come with the package" in found.stderr
    found = run(folder, "--trust-workload")
    assert found.exit_code == 1
    assert "workload 'gone.away:named': cannot import" in found.stderr


def test_incomplete_trajectory_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    """Written until the fifth step; the last checkpoint is at the fourth."""

    class Stopped(Exception):
        pass

    def stop(optimizer: Any) -> Any:
        def factor(t: int) -> float:
            if t == 5:
                raise Stopped
            return 1.0

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    with pytest.raises(Stopped):
        train(digits_workload(scheduler=stop), tmp_path / "t")
    assert Trajectory.open(tmp_path / "t").checkpoint_steps == (0, 1, 4)
    found = run(tmp_path / "t", "--workload", HERE)
    assert found.exit_code == 0
    assert "complete       no: recording broke off; what there is has been checked" in found.stdout
    assert "4          5  replayed; no checkpoint to compare with" in found.stdout


def test_of_many_segments_those_that_drift_most_are_listed(tmp_path: Path) -> None:
    train(load_workload(HERE, epochs=10), tmp_path / "t", checkpoint_every=1)
    found = run_named(tmp_path / "t")
    assert "(10 more segments, which drift no further)" in found.stdout
    assert sum(line.endswith("  0") for line in found.stdout.splitlines()) == 20


def test_trajectory_below_the_folder_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "run" / "trajectory")
    assert run_named(tmp_path / "run").exit_code == 0
    found = run(tmp_path)
    assert found.exit_code == 1
    assert f"no trajectory in {tmp_path}" in found.stderr
