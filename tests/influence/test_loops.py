"""Loops and models of all kinds: the whole run's scores against finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from workloads import digits_workload

from dit_mlflow import Window, track, train


class Tied(nn.Module):
    """One weight used twice, and a parameter that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3, bias=False)
        self.outer = nn.Linear(64, 3, bias=False)
        self.outer.weight = self.inner.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tanh(self.inner(inputs)) + self.scale * self.outer(inputs)


class Attention(nn.Module):
    """The image's rows as a sequence of eight tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(inputs.view(-1, 8, 8)).mean(dim=1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.cell(inputs.view(-1, 8, 8))[0][:, -1])


def only_the_head(model: nn.Module) -> torch.optim.Optimizer:
    return SGD(model[2].parameters(), lr=0.5)  # type: ignore[index]


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    return AdamW(
        [
            {"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.2},  # type: ignore[index]
            {"params": [model[2].weight, model[2].bias], "lr": 0.05, "betas": (0.7, 0.9)},  # type: ignore[index]
        ]
    )


CASES: dict[str, dict[str, Any]] = {
    "tied, unused and scalar parameters": {"model": Tied},
    "attention": {"model": Attention, "optimizer": lambda model: Adam(model.parameters(), lr=0.01)},
    "LSTM": {"model": Recurrent},
    "part of the model trained, clipped over all of it": {"optimizer": only_the_head, "clip_grad_norm": 0.3},
    "regularizer linear in the parameters": {"regularizer": lambda model: sum(p.sum() for p in model.parameters())},
    "one step": {"batch_size": 24, "epochs": 1},
    "last accumulation cut short": {"batch_size": 7, "accumulate": 3},
    "scheduler": {"scheduler": lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (1 + t) ** 0.5)},
    "groups": {"optimizer": two_groups},
    "accumulate, unequal micro-batches": {"batch_size": 5, "accumulate": 2},
    "clip norm": {"clip_grad_norm": 0.3, "optimizer": lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9)},
    "clip value": {"clip_grad_value": 0.02, "optimizer": lambda model: Adam(model.parameters(), lr=0.02)},
    "regularizer": {"regularizer": lambda model: 0.1 * sum(p.pow(4).sum() for p in model.parameters())},
    "coefficients": {"coefficients": lambda batch: (1.0 + batch[1]) / 20},
}


@pytest.mark.parametrize("name", CASES)
def test_matches_finite_differences(name: str, tmp_path: Path) -> None:
    workload = digits_workload(**CASES[name])
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.verify(workload).max_drift == 0
    whole = Window(0, trajectory.num_steps)
    samples = range(0, workload.num_samples, 4)
    found = track(trajectory, workload, [whole], dtype=torch.float64).of(0)[list(samples)]
    for step in (1e-5, 1e-6):
        expected = finite_difference(workload, trajectory, whole, "local", samples, step)
        assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
