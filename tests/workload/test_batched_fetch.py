"""Datasets that fetch a batch at once (``__getitems__``), as torch's loader asks them, and pad it in there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import window_effect
from plain_loop import assert_replays, whole
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Subset

from dit_mlflow import Trajectory, TrajectoryRecorder, Workload, leave_one_out, track

LENGTHS = torch.randint(2, 9, (16,), generator=torch.Generator().manual_seed(0)).tolist()


class Padding(Dataset[Any]):
    """Sequences of several lengths, padded to the longest of those that are fetched together."""

    def __init__(self, as_batch: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = [torch.randn(length, 3, generator=generator) for length in LENGTHS]
        self.as_batch = as_batch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index], float(index % 2)

    def __getitems__(self, indices: list[int]) -> Any:
        longest = max(LENGTHS[index] for index in indices)
        rows = [pad(self.rows[index], (0, 0, 0, longest - LENGTHS[index])) for index in indices]
        targets = [float(index % 2) for index in indices]
        if self.as_batch:
            return {"x": torch.stack(rows), "y": torch.tensor(targets)}
        return list(zip(rows, targets, strict=True))


def pair(batch: Any) -> tuple[Tensor, Tensor]:
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else (batch[0], batch[1])


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Padding counts: a batch of another length gives another loss."""
    rows, targets = pair(batch)
    return (model(rows).tanh().mean((1, 2)) - targets.to(rows)).square()


def same(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize("as_batch", [False, True])
@pytest.mark.parametrize("part", [False, True])
def test_recorded_and_replayed_as_the_loader_fetches(as_batch: bool, part: bool, tmp_path: Path) -> None:
    data: Any = Padding(as_batch)
    if part:
        data = Subset(data, range(12))
    collate = same if as_batch else None
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    workload = Workload(
        lambda: nn.Linear(3, 2), loss, data, data, lambda m: torch.optim.SGD(m.parameters(), lr=0.3), collate_fn=collate
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t", workload) as recorder:
        loader = recorder.watch(DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate))
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
    trajectory = Trajectory.open(tmp_path / "t")
    assert_replays(trajectory, workload, model)
    (window,) = whole(trajectory)
    samples = [0, 3, 7]
    exact = leave_one_out(trajectory, workload, [window], samples=samples).of(window)[samples]
    plain = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in samples]
    np.testing.assert_allclose(exact, plain, rtol=1e-7, atol=1e-12)
    near = [window_effect(workload, trajectory, window, "local", j, 1 - 1e-4) / 1e-4 for j in samples]
    estimate = track(trajectory, workload, [window], dtype=torch.float64).of(window)[samples]
    np.testing.assert_allclose(estimate, near, rtol=1e-2, atol=1e-6)
    # Without the longest one, its batch is a shorter one.
    absent = leave_one_out(trajectory, workload, [window], samples=samples, removal="absent")
    assert np.isfinite(absent.of(window)[samples]).all()
