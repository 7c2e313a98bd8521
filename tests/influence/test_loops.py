"""Loops and models of all kinds: the whole run's scores against finite differences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from workloads import datasets, digits_workload

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


def convolutional(*norm: nn.Module) -> Any:
    """Conv, the given layers over 4 channels, ReLU-free."""
    return lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, stride=2),
        *copy.deepcopy(norm),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def hidden(*layers: nn.Module) -> Any:
    """A hidden layer of six, then the given layers."""
    return lambda: nn.Sequential(nn.Linear(64, 6), *copy.deepcopy(layers), nn.Tanh(), nn.Linear(6, 3))


class Shared(nn.Module):
    """One BatchNorm layer used twice in a forward pass, another always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 3)
        self.norm, self.frozen = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.frozen.running_mean += 0.3

    def forward(self, inputs: Tensor) -> Tensor:
        self.frozen.eval()
        return self.last(self.frozen(torch.tanh(self.norm(torch.tanh(self.norm(self.first(inputs)))))))


class Embedded(nn.Module):
    """Grey levels as tokens, averaged; an index that no sample uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4, padding_idx=0)
        self.convolution = nn.Conv1d(4, 4, 5)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embedding((inputs * 16).long())
        return self.head(torch.tanh(self.convolution(tokens.transpose(1, 2))).mean(dim=2))


class TwoInputs(nn.Module):
    """Called by keyword, as in Hugging Face's models; returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(32, 5), nn.Linear(32, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, upper: Tensor, lower: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.left(upper)) * torch.sigmoid(self.right(lower)))}


class Halves(Dataset[Any]):
    """Dictionary samples: upper and lower half of an image, label, sample weight."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"upper": image[:32], "lower": image[32:], "labels": label, "weight": 0.5 + float(label)}


def halves_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(upper=batch["upper"], lower=batch["lower"])["logits"]
    return batch["weight"] * cross_entropy(logits, batch["labels"], reduction="none")


class NextPixel(nn.Module):
    """Predicts the next grey level of each row; rows of zeros are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(1, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.cell(inputs.unsqueeze(-1))[0]).squeeze(-1)


def next_pixel_losses(model: nn.Module, batch: Any) -> Tensor:
    """Sums over a sequence's tokens; the batch's number of tokens is in the coefficients."""
    inputs = batch[0]
    errors = (model(inputs[:, 20:39]) - inputs[:, 21:40]).square()
    return (errors * (inputs[:, 21:40] > 0)).sum(dim=1)


def by_tokens(batch: Any) -> Tensor:
    real = (batch[0][:, 21:40] > 0).sum()
    return torch.full((len(batch[0]),), 1.0) / real


def class_weighted(model: nn.Module, batch: Any) -> Tensor:
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=batch[0].dtype)
    return cross_entropy(model(batch[0]), batch[1], weight=weight, reduction="none")


def only_the_head(model: nn.Module) -> torch.optim.Optimizer:
    return SGD(model[2].parameters(), lr=0.5)  # type: ignore[index]


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    return AdamW(
        [
            {"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.2},  # type: ignore[index]
            {"params": [model[2].weight, model[2].bias], "lr": 0.05, "betas": (0.7, 0.9)},  # type: ignore[index]
        ]
    )


class _MovesAll(LambdaLR):
    """Changes momentum and weight decay too."""

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        for group in self.optimizer.param_groups:
            group["momentum"] *= 0.95
            group["weight_decay"] *= 1.2


def cyclic(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return _MovesAll(optimizer, lambda t: 1 / (1 + 0.1 * t))


def warm_up(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The first two steps have learning rate 0."""
    return LambdaLR(optimizer, lambda t: max(0, t - 1) / 4)


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
    "BatchNorm1d": {"model": hidden(nn.BatchNorm1d(6))},
    # No bias before BatchNorm: its gradient is 0 but for rounding, which Adam would make steps of.
    "BatchNorm1d, AdamW, accumulation": {
        "model": lambda: nn.Sequential(nn.Linear(64, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        "optimizer": lambda model: AdamW(model.parameters(), lr=0.02),
        "batch_size": 5,
        "accumulate": 2,
    },
    "BatchNorm1d, momentum None": {"model": hidden(nn.BatchNorm1d(6, momentum=None))},
    "BatchNorm1d without affine": {"model": hidden(nn.BatchNorm1d(6, affine=False))},
    "BatchNorm1d without running statistics": {"model": hidden(nn.BatchNorm1d(6, track_running_stats=False))},
    "BatchNorm used twice, and frozen": {"model": Shared},
    "BatchNorm2d": {"model": convolutional(nn.BatchNorm2d(4))},
    "InstanceNorm2d with running statistics": {
        "model": convolutional(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    },
    "LayerNorm and GroupNorm": {
        "model": hidden(nn.LayerNorm(6), nn.GroupNorm(2, 6)),
        "optimizer": lambda model: SGD(model.parameters(), lr=0.05),
    },
    "embedding and Conv1d": {"model": Embedded, "optimizer": lambda model: Adam(model.parameters(), lr=0.02)},
    "two inputs, dictionaries, sample weights": {
        "model": TwoInputs,
        "loss": halves_loss,
        "train_set": Halves(datasets()[0]),
        "validation_set": Halves(datasets()[1]),
    },
    "sequences, loss per token": {
        "model": NextPixel,
        "loss": next_pixel_losses,
        "coefficients": by_tokens,
        "optimizer": lambda model: SGD(model.parameters(), lr=0.02, momentum=0.9),
    },
    "class weights": {"loss": class_weighted},
    "warm-up from 0, Adam": {
        "optimizer": lambda model: Adam(model.parameters(), lr=0.02, weight_decay=0.1),
        "scheduler": warm_up,
    },
    "warm-up from 0, decoupled amsgrad": {
        "optimizer": lambda model: AdamW(model.parameters(), lr=0.02, amsgrad=True),
        "scheduler": warm_up,
    },
    "momentum and weight decay schedule": {
        "optimizer": lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.01),
        "scheduler": cyclic,
    },
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
