"""CIFAR-10: airplanes against automobiles with the paper's CNN, or all ten classes with a ResNet-9 with BatchNorm.

See README.md in this folder for the settings and the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dit_mlflow import Workload, WorkloadError
from dit_mlflow.examples import (
    Damage,
    Decay,
    Labelled,
    OptimizerName,
    Preset,
    Recipe,
    Standardise,
    download_folder,
    folder_of,
    image_workload,
    network,
    no_larger,
    of_classes,
    recipe_for,
    resnet9,
    split,
    torchvision,
)

Classes = Literal["0,1", "all"]

CLASSES: dict[str, Classes] = {"cnn": "0,1", "resnet9": "all"}
"""The classes that each model is for."""

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHAPE = (3, 32, 32)
ROW = 1 + 3 * 32 * 32
"""Bytes of an image in the binary version: the label, then the red, the green and the blue pixels."""

PRESETS: dict[Preset, dict[str, Recipe]] = {
    # Not chosen by a table: the images were not at hand.
    "default": {
        "cnn": Recipe(lr=0.03, epochs=50, batch_size=128),
        "resnet9": Recipe(lr=0.1, epochs=50, batch_size=128),
    },
    "paper": {"cnn": Recipe(lr=0.01, decay="sqrt", l2=1e-3, epochs=50, batch_size=128)},
}

TRAINING = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
FOLDER = "cifar-10-batches-bin"
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FILES = f"{FOLDER}, the unpacked binary version of CIFAR-10 (data_batch_1.bin … data_batch_5.bin, test_batch.bin)"


def workload(
    model: Literal["cnn", "resnet9"] = "cnn",
    preset: Preset = "default",
    classes: Classes | None = None,
    data_dir: str | None = None,
    n_train: int = 256,
    n_validation: int = 256,
    n_test: int = 256,
    data_seed: int = 0,
    corrupt: float = 0.1,
    corrupt_seed: int = 0,
    corruption: Damage = "flip",
    standardise: Standardise = "channel",
    width: int = 64,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: OptimizerName = "sgd",
    lr: float | None = None,
    decay: Decay | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    l2: float | None = None,
) -> Workload:
    """Class 0 against class 1, binary cross-entropy on one logit; or all ten classes, cross-entropy.

    Args:
        model: ``cnn`` two 3x3 convolutions (32, 64) and a linear layer; ``resnet9`` eight convolutions with BatchNorm.
        preset: ``paper`` sets ``lr``, ``decay``, ``l2``, ``epochs`` and ``batch_size`` as the authors' code does for
            ``cnn``; what is given wins.
        classes: ``0,1`` (the default of ``cnn``) or ``all`` (that of ``resnet9``).
        data_dir: folder of the binary version; default: downloaded through torchvision, if that is installed.
        n_train, n_validation, n_test: samples in each split, drawn without overlap, the last from the test file.
        data_seed: seed of the split.
        corrupt, corrupt_seed, corruption: share of training samples to damage, seed of the choice, and what is done to
            them before standardisation; see :func:`dit_mlflow.examples.corrupt`. ``ood`` puts images of the other
            eight classes in their place.
        standardise: by the training pixels of each colour (``channel``), each value (``pixel``), or the ``image``
            itself.
        width: channels of the ``resnet9``'s first layer.
        epochs, batch_size: of training; default 50 and 128.
        optimizer, lr, momentum, weight_decay: of the optimizer; momentum is SGD's.
        decay: ``sqrt`` divides the learning rate by ``sqrt(t + 1)`` at step ``t``.
        l2: ``0.5 * l2 * |theta|^2`` added to each sample's loss.
    """
    classes = classes or CLASSES[model]
    if preset == "paper" and classes == "all":
        raise WorkloadError("preset=paper is of classes=0,1; the paper has no training on all ten classes")
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
    folder = _folder(_download() if data_dir is None else folder_of(data_dir, FILES))
    pool, test, foreign = _images(folder, TRAINING), _images(folder, ["test_batch.bin"]), None
    names: Sequence[str] = NAMES
    if classes != "all":
        names = NAMES[:2]
        pool, foreign = of_classes(pool, (0, 1))
        test, _ = of_classes(test, (0, 1))
    return image_workload(
        split(pool, n_train, n_validation, n_test, data_seed, "images of these classes", test),
        shape=SHAPE,
        brightest=255,
        names=names,
        noun="class",
        model=network("cnn", SHAPE, len(names)) if model == "cnn" else resnet9(len(names), width),
        recipe=recipe,
        standardise=standardise,
        corruption=corruption,
        corrupt_share=corrupt,
        corrupt_seed=corrupt_seed,
        foreign=foreign,
        settings={"data_dir": None if data_dir is None else str(folder), "classes": classes},
    )


def _folder(given: Path) -> Path:
    """The folder of the six files: the one given, or the archive's folder inside it."""
    found = next((path for path in (given, given / FOLDER) if (path / TRAINING[0]).is_file()), given)
    missing = [name for name in (*TRAINING, "test_batch.bin") if not (found / name).is_file()]
    if missing:
        raise WorkloadError(f"data_dir: there is no {', '.join(missing)} in {found}; expected {FILES}")
    return found


def _images(folder: Path, names: Sequence[str]) -> Labelled:
    rows = np.concatenate([_rows(folder / name) for name in names])
    return Labelled(rows[:, 1:], rows[:, 0].astype(np.int64))


def _rows(path: Path) -> np.ndarray:
    data = np.fromfile(no_larger(path, 20_000 * ROW), dtype=np.uint8)
    if not len(data) or len(data) % ROW:
        raise WorkloadError(
            f"{path} has {len(data)} bytes, not a multiple of {ROW}, the size of an image: it is cut off, or not of "
            "the binary version"
        )
    rows = data.reshape(-1, ROW)
    if rows[:, 0].max() >= len(NAMES):
        raise WorkloadError(f"{path}: label {rows[:, 0].max()} in image {rows[:, 0].argmax()}; expected 0 to 9")
    return rows


def _download() -> Path:
    datasets = torchvision(FILES)
    root = download_folder()
    if not (root / FOLDER / "test_batch.bin").is_file():
        try:
            datasets.utils.download_and_extract_archive(ARCHIVE, str(root), md5=ARCHIVE_MD5)
        except (OSError, RuntimeError) as error:
            raise WorkloadError(
                f"CIFAR-10 cannot be downloaded into {root}: {error}; give data_dir: {FILES}"
            ) from error
    return root
