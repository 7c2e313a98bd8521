"""``live=True``: another process computes influence while this one trains."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from torch.optim import SGD
from torch.utils.data import DataLoader

from dit_mlflow import InputError, Workload, WorkloadError, load_workload, parse_windows, track
from dit_mlflow.evaluation.figures import FOLLOW_SECONDS, STEPS_BEHIND
from dit_mlflow.tracking import load_influence, load_trajectory, record_trajectory
from dit_mlflow.tracking.recording import follower

LONG = 300.0
"""Seconds until a follower that does nothing counts as a failure; it takes about ten."""


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other tests, a follower that yields to all of them would take minutes."""
    monkeypatch.setattr(follower, "PRIORITY", 0)


def found_after_a_while(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LONG
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.2)
    return found


def runs(kind: str) -> list[Run]:
    return mlflow.search_runs(filter_string=f"tags.`dit.kind` = '{kind}'", output_format="list")


def finished() -> Run:
    """The run of the follower, when it has come to its end by itself."""
    return found_after_a_while(lambda: [run for run in runs("influence") if run.info.status != "RUNNING"])[0]


def small_digits() -> Workload:
    return load_workload("projects/digits", n_train=40, n_validation=30, n_test=20, epochs=4, batch_size=16, lr=0.1)


def recorded(
    workload: Workload,
    at_epoch: Callable[[int, Any], None] | None = None,
    run_id: str | None = None,
    live: bool | int = True,
) -> None:
    """Four epochs of three steps; ``at_epoch``: called at the end of each, with the recorder."""
    torch.manual_seed(0)
    model = workload.build_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(workload.train_set, batch_size=16, shuffle=True)
    with record_trajectory(model, optimizer, workload, run_id, live=live, checkpoint_every=1) as recorder:
        for epoch in range(4):
            for batch in recorder.watch(loader):
                optimizer.zero_grad()
                workload.loss(model, batch).mean().backward()
                optimizer.step()
            if at_epoch is not None:
                at_epoch(epoch, recorder)


@pytest.mark.slow
def test_influence_is_there_while_training_runs(store: str, capfd: pytest.CaptureFixture[str]) -> None:
    workload = small_digits()
    waited: list[str] = []

    def wait_for_the_first_window(epoch: int, recorder: Any) -> None:
        if epoch == 1:
            # Written now, not within ten seconds; and training waits, for the sake of the test alone.
            recorder.checkpoint()
            found_after_a_while(lambda: any(STEPS_BEHIND.name in run.data.metrics for run in runs("influence")))
            assert len(runs("window")) == 1
            waited.append(MlflowClient().get_run(training.info.run_id).info.status)

    with mlflow.start_run() as training:
        recorded(workload, wait_for_the_first_window)
        ended = time.monotonic()
    assert time.monotonic() - ended < 2 and waited == ["RUNNING"]
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert all(word in said.err for word in (training.info.run_id, FOLLOW_SECONDS.name, STEPS_BEHIND.name))

    run = finished()
    assert (run.info.status, run.info.experiment_id) == ("FINISHED", training.info.experiment_id)
    found = load_influence(run.info.run_id)
    assert [str(window) for window in found.windows] == ["0-3", "3-6", "6-9", "9-12"]
    trajectory = load_trajectory(training.info.run_id)
    expected = track(trajectory, workload, parse_windows("4", trajectory))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-7)
    costs = run.data.metrics
    assert costs[FOLLOW_SECONDS.name] > 0 and costs[STEPS_BEHIND.name] == 0
    (before, *_) = MlflowClient().get_metric_history(run.info.run_id, STEPS_BEHIND.name)
    assert (before.step, before.value) == (0, 3)  # Epoch 0 was computed when epoch 1 was recorded.
    log = Path(mlflow.artifacts.download_artifacts(run_id=training.info.run_id, artifact_path="follow.log"))
    assert "steps 0-3: sample" in log.read_text(encoding="utf-8") and log.name in said.err


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["lightning", "huggingface"])
def test_the_callbacks_have_it_too(trainer: str, store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers" if trainer == "huggingface" else trainer)
    tests = __import__(f"test_{trainer}")
    named = load_workload(f"test_{trainer}:workload")
    with mlflow.start_run() as training:
        folder = {"folder": tmp_path} if trainer == "huggingface" else {}
        tests.fit(tests.TrajectoryCallback(named, live=True), **folder)
    run = finished()
    assert run.info.status == "FINISHED"
    trajectory = load_trajectory(training.info.run_id)
    found = load_influence(run.info.run_id)
    assert [window.end for window in found.windows] == list(trajectory.epoch_ends)
    expected = track(trajectory, named, parse_windows("epochs", trajectory))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        (None, InputError, "one that was built in this process"),
        ("__main__:workload", InputError, "__main__:workload; expected a workload=load_workload"),
        ("nowhere.at_all:workload", WorkloadError, "cannot import 'nowhere.at_all'"),
        ("projects/nowhere", WorkloadError, "projects/nowhere"),
    ],
)
def test_a_workload_that_another_process_cannot_load_is_refused_before_a_run(
    reference: str | None, error: type[Exception], message: str, store: str
) -> None:
    loaded = small_digits()
    workload = Workload(loaded.model, loaded.loss, loaded.train_set, loaded.validation_set, reference=reference)
    with pytest.raises(error, match=message):
        recorded(workload)
    model = loaded.build_model()
    with pytest.raises(InputError, match="live=0; expected True"):
        recorded(loaded, live=0)
    with pytest.raises(InputError, match="no workload"), record_trajectory(model, SGD(model.parameters()), live=True):
        pass
    assert mlflow.search_runs(output_format="list") == []


ELSEWHERE = """
import os
from dit_mlflow import Workload, load_workload

def workload() -> Workload:
    if os.getpid() != int(os.environ["TRAINER"]):
        raise RuntimeError("not here")
    digits = load_workload("projects/digits", n_train=40, n_validation=30, n_test=20)
    return Workload(digits.model, digits.loss, digits.train_set, digits.validation_set)
"""


@pytest.mark.slow
def test_a_follower_that_fails_is_told_once_and_training_goes_on(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRAINER", str(os.getpid()))
    caplog.set_level(logging.WARNING)

    def wait_for_the_failure(epoch: int, recorder: Any) -> None:
        if epoch == 1:
            recorder.checkpoint()
            found_after_a_while(lambda: caplog.records)

    with mlflow.start_run() as training:
        recorded(load_workload("elsewhere:workload"), wait_for_the_failure)
    assert load_trajectory(training.info.run_id).complete
    (warning,) = caplog.messages
    assert "is no longer followed (exit code 1), and training goes on" in warning and "not here" in warning
    assert runs("influence") == []


@pytest.mark.slow
def test_a_training_that_fails_before_its_first_step_leaves_no_follower(store: str) -> None:
    workload = small_digits()
    model = workload.build_model()
    with (
        pytest.raises(MemoryError),
        mlflow.start_run() as training,
        record_trajectory(model, SGD(model.parameters()), workload, live=True),
    ):
        raise MemoryError
    # The run can record another training, which is followed.
    recorded(workload, run_id=training.info.run_id, live=5)
    found = load_influence(finished().info.run_id)
    assert [str(window) for window in found.windows] == ["0-5", "5-10", "10-12"]
    assert len(runs("influence")) == 1


KILLED = """
import os, signal, sys
sys.path.append(sys.argv[1])
from test_follower import follower, recorded, small_digits
follower.PRIORITY = 0

def die(epoch, recorder):
    if epoch == 2:
        recorder.checkpoint()
        os.kill(os.getpid(), signal.SIGKILL)

recorded(small_digits(), die)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_the_follower_ends_by_itself_when_the_trainer_is_killed(store: str) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent)]
    killed = subprocess.run(command, env={**os.environ, "MLFLOW_TRACKING_URI": store}, check=False, timeout=LONG)
    assert killed.returncode == -9
    run = finished()
    assert run.info.status == "FINISHED"
    assert [str(window) for window in load_influence(run.info.run_id).windows] == ["0-3", "3-6", "6-9"]
    (training,) = runs("training")
    assert training.info.status == "RUNNING"
