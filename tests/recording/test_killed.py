"""Training killed at any moment leaves a trajectory up to its last finished segment, or none; never a wrong one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from workloads import digits_workload

from dit_mlflow import Trajectory, Window, track, train

CODE = """
import sys
sys.path[:0] = [sys.argv[1]]
import dit_mlflow.recording.writer as writer
from dit_mlflow import train
from workloads import digits_workload
writer.FLUSH_SECONDS, writer.FLUSH_BYTES = 0.01, 10_000
print("ready", flush=True)
train(digits_workload(epochs=100_000), sys.argv[2], order_seed=3, checkpoint_every=eval(sys.argv[3]))
"""


@pytest.mark.parametrize(("every", "seed"), [("sqrt", 0), ("sqrt", 1), (1, 2), (0, 3), (7, 4)])
def test_a_killed_process_leaves_a_trajectory_that_can_be_swept(every: str | int, seed: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CODE, str(Path(__file__).parents[1]), str(tmp_path / "t"), repr(every)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        while not (tmp_path / "t" / "manifest.json").exists():
            time.sleep(0.001)
        time.sleep(random.Random(seed).uniform(0.0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
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
