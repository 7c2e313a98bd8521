"""What is written, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from plain_loop import record
from torch import nn
from torch.optim import SGD
from workloads import digits_model, digits_workload

from dit_mlflow import Trajectory, TrajectoryRecorder, UnsupportedError, train
from dit_mlflow.trajectory.steps_file import read_steps


def test_tensors_that_shards_cannot_hold_are_named_before_training(tmp_path: Path) -> None:
    model = digits_model()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with (
        pytest.raises(UnsupportedError, match=r"buffers/phase has dtype torch\.complex128"),
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t"),
    ):
        raise AssertionError("training was reached")


@pytest.mark.parametrize("draws", [False, True])
def test_random_states_are_stored_only_where_a_step_draws(draws: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 3), nn.Dropout(0.2 if draws else 0.0))
    model[1].train(draws)
    trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1))
    stored = [trajectory.step(t).random_states for t in range(trajectory.num_steps)]
    assert [len(states) for states in stored] == [1] * 6
    assert [states[0] is not None for states in stored] == [draws] * 6
    assert not draws or all(states[0].numpy is None and states[0].python is None for states in stored if states[0])


def test_records_without_the_later_columns_are_read(tmp_path: Path) -> None:
    trajectory = train(digits_workload(epochs=1), tmp_path / "t")
    part = trajectory.manifest.steps[-1]
    old = tmp_path / "old.parquet"
    pq.write_table(pq.read_table(tmp_path / "t" / part.file).drop_columns("zero_gradient"), old)
    assert [step.zero_gradient for step in read_steps(old, part, trajectory.manifest)] == [frozenset()] * 2
    assert Trajectory.open(tmp_path / "t").step(0).zero_gradient == frozenset()
