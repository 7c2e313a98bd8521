"""Tensors that do not change are stored once; files keep to their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import record
from torch import nn
from torch.optim import Adam
from workloads import digits_workload

from dit_mlflow import Trajectory, Window, track
from dit_mlflow.recording import writer
from dit_mlflow.trajectory import shards


def frozen_below() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    model[0].requires_grad_(False)
    return model


def stored_bytes(trajectory: Trajectory) -> int:
    files = trajectory.manifest.files
    return sum(entry.size for name, entry in files.items() if name.startswith("checkpoints"))


@pytest.mark.parametrize("at_once", [True, False], ids=["one shard", "a shard per checkpoint"])
def test_frozen_tensors_are_stored_once(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(writer, "FLUSH_BYTES", 1)
    model = frozen_below()
    frozen = model[0].weight.detach().clone()
    trajectory = record(tmp_path / "t", model, Adam(model[2].parameters()), checkpoint_every=1)
    assert len(trajectory.checkpoint_steps) == 7
    weight = 64 * 64 * 4
    # 7 times the small layer, its Adam state and the biases.
    assert weight < stored_bytes(trajectory) < weight + 7 * 5000
    for t in trajectory.checkpoint_steps:
        assert torch.equal(trajectory.checkpoint(t).parameters["0.weight"], frozen)
    unchanged = [entry.unchanged for entry in trajectory.manifest.checkpoints]
    assert unchanged == [{}] + 6 * [{0: ("parameters/0.weight",)}]
    workload = digits_workload(model=frozen_below, optimizer=None)
    assert trajectory.verify(workload).max_drift == 0.0
    assert abs(track(trajectory, workload, [Window(0, 6)]).scores).max() > 0


def test_a_tensor_that_changes_in_one_place_is_stored_again(tmp_path: Path) -> None:
    same = torch.arange(100_000, dtype=torch.float32)
    other = same.clone()
    other[12_345] += 1.0
    at_hand: dict[str, Any] = {}
    once = shards.StoredOnce(lambda step, key: at_hand[f"{step}/{key}"])
    homes = []
    for step, value in enumerate([same, same.clone(), other, other.clone(), same]):
        homes.append(once.home(step, "parameters/w", value, at_hand))
        if homes[-1] == step:
            at_hand[f"{step}/parameters/w"] = value
    # Back at its first value it is stored again: only the last one stored is compared.
    assert homes == [0, 0, 2, 2, 4]


def test_no_file_is_larger_than_stated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 3))
    trajectory = record(tmp_path / "t", model, Adam(model.parameters()), checkpoint_every=3, store_batches=True)
    sizes = {name: entry.size for name, entry in trajectory.manifest.files.items() if not name.startswith("steps")}
    headers = 4_000
    assert len(sizes) > 40
    assert max(sizes.values()) < 20_000 + headers
    for t in (0, 3, 6):
        assert len(trajectory.checkpoint(t).optimizer) == (14 if t else 0)
    last = trajectory.checkpoint(6)
    assert all(torch.equal(last.parameters[name], value) for name, value in model.named_parameters())
    batches = trajectory.batches(4)
    assert batches is not None
    assert batches[0][0].shape == (8, 64)
