"""Handwritten digits, 1 against 7 (the paper's MNIST setting) or all ten, with optional damage to the training set.

See README.md in this folder for the settings and how the defaults were chosen.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from dit_mlflow import Workload, WorkloadError
from dit_mlflow.examples import (
    Damage,
    Decay,
    Labelled,
    NetworkName,
    OptimizerName,
    Preset,
    Recipe,
    Standardise,
    folder_of,
    image_workload,
    labelled_images,
    network,
    of_classes,
    recipe_for,
    split,
)

Classes = Literal["1,7", "all"]

HIDDEN: dict[Classes, int] = {"1,7": 8, "all": 32}

DEFAULTS: dict[Classes, dict[str, Recipe]] = {
    "1,7": {"logreg": Recipe(lr=0.03), "dnn": Recipe(lr=0.1), "cnn": Recipe(lr=0.1)},
    "all": {"logreg": Recipe(lr=0.03), "dnn": Recipe(lr=0.1), "cnn": Recipe(lr=0.3)},
}
"""Chosen by validation accuracy alone; ``python projects/choose_defaults.py projects/mnist`` prints the table."""

PAPER: dict[Classes, dict[str, Recipe]] = {
    "1,7": {
        "logreg": Recipe(lr=3e-3, decay="sqrt", l2=None),
        "dnn": Recipe(lr=5e-4, l2=1e-3),
        "cnn": Recipe(lr=4e-4, l2=1e-3),
    },
    "all": {},
}

FILES = "the four IDX files of MNIST (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-…), with .gz or without"


def workload(
    model: NetworkName = "dnn",
    preset: Preset = "default",
    classes: Classes = "1,7",
    data_dir: str | None = None,
    n_train: int = 256,
    n_validation: int = 256,
    n_test: int = 256,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    standardise: Standardise | None = None,
    hidden: int | None = None,
    epochs: int = 21,
    batch_size: int = 64,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """Digits 1 (label 0) against 7 (label 1), binary cross-entropy on one logit; or all ten, cross-entropy.

    Args:
        model: ``logreg`` 784-1, ``dnn`` 784-8-1 with ReLU, ``cnn`` two 3x3 convolutions (32, 64) and a linear layer.
        preset: ``paper`` sets ``lr``, ``decay``, ``l2`` and ``standardise`` as the authors' code does; what is given
            wins.
        classes: ``1,7``, or ``all`` ten, with ten outputs.
        data_dir: folder of MNIST's own files, whose test images are then the test split's source; default: the 5,000
            images in this folder.
        n_train, n_validation, n_test: samples in each split, drawn without overlap.
        data_seed: seed of the split.
        corrupt: share of training samples to damage.
        corrupt_seed: seed of the choice of damaged samples.
        corruption: what is done to them, before standardisation; see :func:`dit_mlflow.examples.corrupt`. ``ood``
            puts digits other than 1 and 7 in their place.
        standardise: subtract the mean and divide by the standard deviation of all training pixels (``channel``), of
            each training pixel (``pixel``), or of the image itself (``image``, the paper's).
        hidden: width of the ``dnn``'s hidden layer; default 8, for all ten classes 32.
        epochs, batch_size: of training.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` added to each sample's loss.
    """
    paper = preset == "paper"
    if paper and classes == "all":
        raise WorkloadError("preset=paper is of classes=1,7; the paper has no training on all ten digits")
    recipe = recipe_for(
        model,
        preset,
        {"default": DEFAULTS[classes], "paper": PAPER[classes]},
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        decay=decay,
        momentum=momentum,
        weight_decay=weight_decay,
        l2=l2,
    )
    pool, test, folder = _digits(data_dir)
    digits, foreign = tuple(range(10)), None
    if classes != "all":
        digits = (1, 7)
        pool, foreign = of_classes(pool, digits)
        test = of_classes(test, digits)[0] if test else None
    hidden = HIDDEN[classes] if hidden is None else hidden
    return image_workload(
        split(pool, n_train, n_validation, n_test, data_seed, "digits" if foreign is None else "ones and sevens", test),
        shape=(1, 28, 28),
        brightest=255,
        names=[str(digit) for digit in digits],
        noun="digit",
        model=network(model, (1, 28, 28), len(digits), hidden),
        recipe=recipe,
        standardise=standardise or ("image" if paper else "pixel"),
        corruption=corruption,
        corrupt_share=corrupt,
        corrupt_seed=corrupt_seed,
        foreign=foreign,
        settings={"data_dir": folder, "hidden": hidden},
    )


def _digits(data_dir: str | None) -> tuple[Labelled, Labelled | None, str | None]:
    """All digits, separate test digits if there are any, and the folder that they are from."""
    if data_dir is None:
        return _in_this_folder(), None, None
    folder = folder_of(data_dir, FILES)
    pool, test = (
        labelled_images(folder, f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte", (28, 28), range(10))
        for part in ("train", "t10k")
    )
    return pool, test, str(folder)


@lru_cache(maxsize=1)
def _in_this_folder() -> Labelled:
    """5,000 real MNIST digits, 500 of each: 784 pixels from 0 to 255."""
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images, labels = file["images"], file["labels"]
    return Labelled(images.reshape(len(images), -1), labels.astype(np.int64))
