"""What is written, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_loop import record
from torch import nn
from torch.optim import SGD
from workloads import digits_model

from dit_mlflow import TrajectoryRecorder, UnsupportedError


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


def test_files_can_be_read_by_whoever_reads_other_new_files(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    model = digits_model()
    record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), store_batches=True)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "t").iterdir()}
    assert {name.partition("-")[0] for name in modes} == {"manifest.json", "checkpoints", "steps", "batches"}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode}
