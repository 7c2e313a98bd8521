"""Handwritten letters, A against B in both cases (the paper's EMNIST setting), with optional damage.

See README.md in this folder for the settings and the files.
"""

from __future__ import annotations

from pathlib import Path

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
    download_folder,
    folder_of,
    image_workload,
    labelled_images,
    network,
    of_classes,
    recipe_for,
    split,
    torchvision,
)

PRESETS: dict[Preset, dict[str, Recipe]] = {
    # projects/mnist's, which the same table chose there: the letters themselves were not at hand.
    "default": {"logreg": Recipe(lr=0.03), "dnn": Recipe(lr=0.1), "cnn": Recipe(lr=0.1)},
    "paper": {
        "logreg": Recipe(lr=3e-3, decay="sqrt", l2=None),
        "dnn": Recipe(lr=0.06, decay="sqrt", l2=1e-3),
        "cnn": Recipe(lr=0.2, decay="sqrt", l2=1e-3),
    },
}

FILES = (
    "a folder with emnist-letters-train-images-idx3-ubyte, emnist-letters-train-labels-idx1-ubyte, and the same with "
    "test for train, as they are or with .gz (gzip.zip at nist.gov/itl/products-and-services/emnist-dataset)"
)


def workload(
    model: NetworkName = "dnn",
    preset: Preset = "default",
    data_dir: str | None = None,
    n_train: int = 256,
    n_validation: int = 256,
    n_test: int = 256,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    standardise: Standardise | None = None,
    hidden: int = 8,
    epochs: int = 21,
    batch_size: int = 64,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """Letters A (label 0) against B (label 1), binary cross-entropy on one logit.

    Args:
        model: ``logreg`` 784-1, ``dnn`` 784-8-1 with ReLU, ``cnn`` two 3x3 convolutions (32, 64) and a linear layer.
        preset: ``paper`` sets ``lr``, ``decay``, ``l2`` and ``standardise`` as the authors' code does; what is given
            wins.
        data_dir: folder of the letters' IDX files; default: downloaded through torchvision, if that is installed.
        n_train, n_validation, n_test: samples in each split, drawn without overlap, the last from the test files.
        data_seed: seed of the split.
        corrupt, corrupt_seed, corruption: share of training samples to damage, seed of the choice, and what is done to
            them before standardisation; see :func:`dit_mlflow.examples.corrupt`. ``ood`` puts other letters in
            their place.
        standardise: by the training pixels together (``channel``), each (``pixel``, the default), or the ``image``
            itself (the paper's).
        hidden: width of the ``dnn``'s hidden layer.
        epochs, batch_size: of training.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` added to each sample's loss.
    """
    recipe = recipe_for(
        model,
        preset,
        PRESETS,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        decay=decay,
        momentum=momentum,
        weight_decay=weight_decay,
        l2=l2,
    )
    folder = _download() if data_dir is None else folder_of(data_dir, FILES)
    pool, foreign = of_classes(_letters(folder, "train"), (1, 2))
    test, _ = of_classes(_letters(folder, "test"), (1, 2))
    return image_workload(
        split(pool, n_train, n_validation, n_test, data_seed, "letters A and B", test),
        shape=(1, 28, 28),
        brightest=255,
        names=["A", "B"],
        noun="letter",
        model=network(model, (1, 28, 28), 2, hidden),
        recipe=recipe,
        standardise=standardise or ("image" if preset == "paper" else "pixel"),
        corruption=corruption,
        corrupt_share=corrupt,
        corrupt_seed=corrupt_seed,
        foreign=foreign,
        settings={"data_dir": None if data_dir is None else str(folder)},
    )


def _letters(folder: Path, part: str) -> Labelled:
    """Letters 1 to 26, upright: the files hold them with rows and columns exchanged."""
    names = f"emnist-letters-{part}-images-idx3-ubyte", f"emnist-letters-{part}-labels-idx1-ubyte"
    letters = labelled_images(folder, *names, (28, 28), range(1, 27))
    upright = np.swapaxes(letters.inputs.reshape(-1, 28, 28), 1, 2).reshape(-1, 784)
    return Labelled(upright, letters.labels)


def _download() -> Path:
    datasets = torchvision(FILES)
    root = download_folder()
    try:
        return Path(datasets.EMNIST(str(root), split="letters", download=True).raw_folder)
    except (OSError, RuntimeError) as error:
        raise WorkloadError(f"EMNIST cannot be downloaded into {root}: {error}; give data_dir: {FILES}") from error
