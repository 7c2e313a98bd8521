"""Training killed at any moment leaves a trajectory up to its last finished segment, or none; never a wrong one."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
from workloads import digits_workload

from dit_mlflow import Trajectory, Window, track, train
from dit_mlflow.recording import writer


def train_on(ready: Callable[[], None], folder: Path, every: str | int) -> None:
    writer.FLUSH_SECONDS, writer.FLUSH_BYTES = 0.01, 10_000
    ready()
    train(digits_workload(epochs=100_000), folder, order_seed=3, checkpoint_every=every)


@pytest.mark.parametrize(("every", "seed"), [("sqrt", 0), ("sqrt", 1), (1, 2), (0, 3), (7, 4)])
def test_a_killed_process_leaves_a_trajectory_that_can_be_swept(every: str | int, seed: int, tmp_path: Path) -> None:
    with processes.running(train_on, tmp_path / "t", every) as process:
        while not (tmp_path / "t" / "manifest.json").exists():
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0.0, 0.6))
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    killed = Trajectory.open(tmp_path / "t")
    assert not killed.complete
    assert killed.verify(digits_workload()).max_drift == 0.0
    # What is there is what an undisturbed training does.
    steps = killed.num_steps
    undisturbed = train(digits_workload(epochs=100_000), tmp_path / "u", order_seed=3, max_steps=max(steps, 1))
    for t in killed.checkpoint_steps:
        states = (next(iter(one.states(digits_workload(), t, t))) for one in (killed, undisturbed))
        weights = [state.parameters["0.weight"] for state in states]
        assert weights[0].equal(weights[1])
    if steps:
        window = [Window(0, min(steps, 30))]
        scores = [track(one, digits_workload(), window).scores for one in (killed, undisturbed)]
        assert abs(scores[0]).max() > 0.0
        assert (scores[0] == scores[1]).all()
