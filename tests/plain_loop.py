"""A plain loop around the recorder, for loops out of the ordinary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from workloads import datasets, sample_losses

from dit_mlflow import Trajectory, TrajectoryRecorder, Window, Workload

Loss = Callable[[nn.Module, Any], Tensor]


def record(
    directory: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    loss: Loss = sample_losses,
    step: Callable[[Tensor], None] | None = None,
    after: Callable[[], None] = lambda: None,
    epochs: int = 2,
    **settings: Any,
) -> Trajectory:
    """A plain loop; ``step(loss)`` may replace backward pass and step, ``after()`` follows each."""
    torch.manual_seed(1)
    with TrajectoryRecorder(model, optimizer, directory, **settings) as recorder:
        for _ in range(epochs):
            for batch in recorder.watch(DataLoader(datasets()[0], batch_size=8, shuffle=True)):
                optimizer.zero_grad()
                value = loss(model, batch).mean()
                if step is None:
                    value.backward()
                    optimizer.step()
                else:
                    step(value)
                after()
    return Trajectory.open(directory)


def whole(trajectory: Trajectory) -> list[Window]:
    return [Window(0, trajectory.num_steps)]


def assert_replays(trajectory: Trajectory, workload: Workload, model: nn.Module) -> None:
    """Bit for bit, up to the parameters that the loop really ended with."""
    assert trajectory.verify(workload).max_drift == 0
    assert trajectory.checkpoint_steps[-1] == trajectory.num_steps
    last = trajectory.checkpoint(trajectory.num_steps).parameters
    assert all(torch.equal(last[name], value) for name, value in model.named_parameters())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(inputs)))
