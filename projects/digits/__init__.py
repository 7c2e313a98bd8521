"""scikit-learn's 8 x 8 digits, all ten classes: the smallest project, with nothing to fetch.

See README.md in this folder for the settings and how the defaults were chosen.
"""

from __future__ import annotations

from typing import Literal

from sklearn.datasets import load_digits

from dit_mlflow import Workload
from dit_mlflow.examples import (
    Damage,
    Decay,
    Labelled,
    OptimizerName,
    Recipe,
    Standardise,
    image_workload,
    network,
    recipe_for,
    split,
)

DEFAULTS: dict[str, Recipe] = {"dnn": Recipe(lr=0.3), "cnn": Recipe(lr=0.1)}
"""Chosen by validation accuracy alone; ``python projects/choose_defaults.py projects/digits`` prints the table."""


def workload(
    model: Literal["dnn", "cnn"] = "dnn",
    n_train: int = 256,
    n_validation: int = 256,
    n_test: int = 256,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    standardise: Standardise = "pixel",
    hidden: int = 32,
    epochs: int = 21,
    batch_size: int = 64,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """Digits 0 to 9, cross-entropy.

    Args:
        model: ``dnn`` 64-32-10 with ReLU, ``cnn`` two 3x3 convolutions (32, 64) and a linear layer.
        n_train, n_validation, n_test: samples in each split, drawn without overlap; there are 1,797.
        data_seed: seed of the split.
        corrupt, corrupt_seed, corruption: share of training samples to damage, seed of the choice, and what is done to
            them before standardisation; see :func:`dit_mlflow.examples.corrupt`. There are no images for ``ood``.
        standardise: by the training pixels together (``channel``), each (``pixel``), or the ``image`` itself.
        hidden: width of the ``dnn``'s hidden layer.
        epochs, batch_size: of training.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` added to each sample's loss.
    """
    recipe = recipe_for(
        model,
        "default",
        {"default": DEFAULTS},
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        decay=decay,
        momentum=momentum,
        weight_decay=weight_decay,
        l2=l2,
    )
    pixels, labels = load_digits(return_X_y=True)
    return image_workload(
        split(Labelled(pixels, labels), n_train, n_validation, n_test, data_seed, "digits"),
        shape=(1, 8, 8),
        brightest=16,
        names=[str(digit) for digit in range(10)],
        noun="digit",
        model=network(model, (1, 8, 8), 10, hidden),
        recipe=recipe,
        standardise=standardise,
        corruption=corruption,
        corrupt_share=corrupt,
        corrupt_seed=corrupt_seed,
        settings={},
    )
