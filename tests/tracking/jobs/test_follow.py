"""A training is followed while another process records it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from test_influence_job import SMALL, children, runs
from torch.utils.data import DataLoader

from dit_mlflow import load_workload, parse_windows, track
from dit_mlflow.cli import cli
from dit_mlflow.tracking import load_influence, load_trajectory, record_trajectory


@pytest.mark.slow
def test_windows_are_there_before_the_training_ends(store: str, tmp_path: Path) -> None:
    workload = load_workload("projects/mnist", **SMALL)
    assert workload.optimizer is not None
    model = workload.build_model()
    optimizer = workload.optimizer(model)
    assert not isinstance(optimizer, dict)
    loader = DataLoader(workload.train_set, batch_size=16, shuffle=True)
    with mlflow.start_run() as training:
        command = [sys.executable, "-m", "dit_mlflow.cli", "follow", training.info.run_id, "--poll=0.2", "--every=3"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        follower = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert follower.stdout is not None
        try:
            with record_trajectory(model, optimizer, workload, checkpoint_every=1) as recorder:  # type: ignore[arg-type]
                for _ in range(4):
                    for batch in recorder.watch(loader):
                        optimizer.zero_grad()  # type: ignore[union-attr]
                        loss = workload.loss(model, batch).mean()
                        loss.backward()
                        optimizer.step()  # type: ignore[union-attr]
                        recorder.log(loss)
                    if recorder.num_steps == 6:
                        # Written now, not within ten seconds; and training waits, for the sake of the test alone.
                        recorder.checkpoint()
                        line = follower.stdout.readline()
                        assert MlflowClient().get_run(training.info.run_id).info.status == "RUNNING"
        except BaseException:
            follower.kill()
            raise
    rest, _ = follower.communicate(timeout=120)
    assert follower.returncode == 0
    assert re.match(r"steps 0-\d+: sample \d+ harms most", line)
    assert rest.count("harms most") >= 1 and "4 windows" in rest
    (parent,) = runs("influence")
    assert parent.info.status == "FINISHED"
    found = load_influence(parent.info.run_id)
    assert [str(window) for window in found.windows] == ["0-3", "3-6", "6-9", "9-12"]
    assert [child.info.run_name for child in children(parent)] == [f"w{k:03d} {w}" for k, w in enumerate(found.windows)]
    trajectory = load_trajectory(training.info.run_id)
    expected = track(trajectory, workload, parse_windows("4", trajectory))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-7)
    page = Path(mlflow.artifacts.download_artifacts(run_id=parent.info.run_id, artifact_path="influence/report.html"))
    assert "9–12" in page.read_text(encoding="utf-8") or "9-12" in page.read_text(encoding="utf-8")


def follow(*arguments: str) -> tuple[int, str]:
    finished = CliRunner().invoke(cli, ["follow", *arguments])
    return finished.exit_code, finished.output


@pytest.mark.slow
def test_a_finished_training_is_followed_to_its_end_by_epochs_and_a_few_at_a_time(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_mlflow.tracking.jobs.follow.AT_ONCE", 3)
    CliRunner().invoke(cli, ["train", *(f"--{name}={value}" for name, value in SMALL.items())])
    (training,) = runs("training")
    code, said = follow(training.info.run_id)
    assert code == 0, said
    assert re.findall(r"steps (\d+-\d+).* (\d+) steps behind", said) == [("0-9", "3"), ("9-12", "0")]
    (parent,) = runs("influence")
    assert [str(window) for window in load_influence(parent.info.run_id).windows] == ["0-3", "3-6", "6-9", "9-12"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--every=-1"], "every=-1"), (["--poll=0"], "poll=0.0"), (["--patience=0"], "patience=0.0")],
)
def test_bad_values_end_before_a_run(arguments: list[str], message: str, store: str) -> None:
    code, said = follow("beef", *arguments)
    assert code == 1 and message in said and not runs()


def test_a_training_that_records_nothing_is_given_up(store: str) -> None:
    training = MlflowClient().create_run(MlflowClient().get_experiment_by_name("test").experiment_id)
    begun = time.monotonic()
    code, said = follow(training.info.run_id, "--patience=0.3", "--poll=0.1")
    assert code == 1 and "before a window was recorded" in said and time.monotonic() - begun < 30
    assert runs("influence") == []
