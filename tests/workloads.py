"""Small real workloads for tests: scikit-learn's digits 0 to 2, smooth models, float32 records."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from dit_mlflow import Workload

SAMPLES = 24


def digits_model() -> nn.Module:
    """``[B, 64] -> [B, 3]``, smooth, with three parameter shapes."""
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))


def sample_losses(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return cross_entropy(model(inputs), targets, reduction="none")


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Read once: some tests ask for every sample anew."""
    return load_digits(n_class=3, return_X_y=True)


def datasets() -> tuple[TensorDataset, TensorDataset]:
    images, labels = _digits()
    inputs, targets = torch.from_numpy(images / 16).float(), torch.from_numpy(labels.copy())
    return (
        TensorDataset(inputs[:SAMPLES], targets[:SAMPLES]),
        TensorDataset(inputs[100:116], targets[100:116]),
    )


def digits_workload(**changes: Any) -> Workload:
    train_set, validation_set = datasets()
    settings: dict[str, Any] = {
        "model": digits_model,
        "loss": sample_losses,
        "train_set": train_set,
        "validation_set": validation_set,
        "optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
        "batch_size": 8,
        "epochs": 3,
    }
    return Workload(**(settings | changes))
