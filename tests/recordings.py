"""Small trajectories of every kind that the reader knows, and the workloads that they replay with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from plain_loop import record
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader
from workloads import datasets, digits_model, digits_workload

from dit_mlflow import Trajectory, TrajectoryRecorder, Workload, train


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def _dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
    model[0].requires_grad_(False)
    return model


def momentum(directory: Path) -> tuple[Trajectory, Workload]:
    """SGD with momentum, buffers that are floats and integers, two parameter groups."""

    def optimizer(model: Any) -> SGD:
        groups = [
            {"params": model[0].parameters(), "lr": 0.1},
            {"params": [*model[1].parameters(), *model[3].parameters()]},
        ]
        return SGD(groups, lr=0.2, momentum=0.9)

    workload = digits_workload(model=_normalised, optimizer=optimizer, epochs=2)
    return train(workload, directory), workload


def dropout(directory: Path) -> tuple[Trajectory, Workload]:
    """Adam with two micro-batches per step, and random states."""
    workload = digits_workload(
        model=_dropping, optimizer=lambda model: Adam(model.parameters(), lr=0.02), epochs=3, batch_size=4, accumulate=2
    )
    return train(workload, directory), workload


def batches(directory: Path) -> tuple[Trajectory, Workload]:
    """With the batches' own tensors."""
    torch.manual_seed(0)
    model = digits_model()
    return record(directory, model, SGD(model.parameters(), lr=0.5), store_batches=True), digits_workload(model=model)


def frozen(directory: Path) -> tuple[Trajectory, Workload]:
    """With a tensor that is stored once, for all checkpoints."""
    workload = digits_workload(model=_frozen, optimizer=lambda model: SGD(model.parameters(), lr=0.5, momentum=0.5))
    return train(workload, directory, checkpoint_every=3), workload


def resumed(directory: Path) -> tuple[Trajectory, Workload]:
    """Broken off after five steps, taken up at the fourth: a file holds more steps than count."""
    torch.manual_seed(0)
    model = digits_model()
    optimizer = Adam(model.parameters(), lr=0.02)

    def steps(recorder: TrajectoryRecorder, count: int) -> None:
        loader = DataLoader(datasets()[0], batch_size=8, shuffle=True)
        while True:
            for inputs, targets in recorder.watch(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
                count -= 1
                if count == 0:
                    return

    with TrajectoryRecorder(model, optimizer, directory) as recorder:
        steps(recorder, 4)
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        held = _copied(optimizer.state_dict())
        steps(recorder, 1)
    model.load_state_dict(saved)
    optimizer.load_state_dict(held)
    with TrajectoryRecorder(model, optimizer, directory, resume=True) as recorder:
        steps(recorder, 3)
    return Trajectory.open(directory), digits_workload(model=model, optimizer=None)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    entries = {number: {key: value.clone() for key, value in entry.items()} for number, entry in state["state"].items()}
    return {**state, "state": entries}


KINDS = {make.__name__: make for make in (momentum, dropout, batches, frozen, resumed)}
