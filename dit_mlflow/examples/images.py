"""Workloads on images: damage, standardisation, and the images as people see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import nn

from dit_mlflow.errors import WorkloadError
from dit_mlflow.examples.classification import Captions, classification, notes
from dit_mlflow.examples.corruption import Damage, corrupt
from dit_mlflow.examples.recipe import Recipe
from dit_mlflow.examples.splits import Labelled, Splits
from dit_mlflow.workload import Workload

Standardise = Literal["channel", "pixel", "image"]

FOREIGN = 5000
"""Images of other classes that may replace damaged ones, at most."""


def image_workload(
    splits: Splits,
    shape: Sequence[int],
    brightest: int,
    names: Sequence[str],
    noun: str,
    model: Callable[[], nn.Module],
    recipe: Recipe,
    standardise: Standardise,
    corruption: Damage,
    corrupt_share: float,
    corrupt_seed: int,
    settings: Mapping[str, Any],
    foreign: np.ndarray | None = None,
) -> Workload:
    """The workload of classifying images, with optional damage to the training set.

    Args:
        splits: pixels from 0 to ``brightest``, ``[samples, product of shape]``.
        shape: ``[channels, height, width]`` of an image; 1 or 3 channels.
        brightest: value of a white pixel.
        names: of the classes.
        noun: what an image shows, such as ``digit``.
        model: makes the network, on flat inputs.
        recipe: of training.
        standardise: see :func:`standardised`; the damage comes before it.
        corruption, corrupt_share, corrupt_seed: see :func:`dit_mlflow.examples.corrupt`.
        settings: see :func:`classification`.
        foreign: images of other classes, for ``ood``.
    """
    if not 0 <= corrupt_share <= 1:
        raise WorkloadError(f"corrupt is {corrupt_share}; expected a share between 0 and 1")
    before = splits.train
    others = foreign[:FOREIGN] / brightest if foreign is not None and corruption == "ood" else None
    damaged = corrupt(
        before.inputs / brightest, before.labels, corruption, corrupt_share, corrupt_seed, len(names), others
    )

    def prepared(pixels: np.ndarray) -> np.ndarray:
        return standardised(pixels, damaged.inputs, standardise, shape[0])

    channels, height, width = shape
    picture = (height, width) if channels == 1 else (channels, height, width)

    def show(index: int) -> np.ndarray:
        image = damaged.inputs[index].reshape(picture).clip(0, 1)
        return image if channels == 1 else np.moveaxis(image, 0, 2)

    return classification(
        Splits(
            Labelled(prepared(damaged.inputs), damaged.labels),
            Labelled(prepared(splits.validation.inputs / brightest), splits.validation.labels),
            Labelled(prepared(splits.test.inputs / brightest), splits.test.labels),
        ),
        model,
        recipe,
        Captions(
            names,
            labels=damaged.labels,
            truth=before.labels,
            corrupted=damaged.indices,
            kind=corruption,
            noun=noun,
            notes=notes("image", f"another {noun}"),
        ),
        show,
        {**settings, "standardise": standardise},
    )


def standardised(images: np.ndarray, training: np.ndarray, by: Standardise, channels: int = 1) -> np.ndarray:
    """``images`` less a mean, over a standard deviation (1 where that is 0).

    Args:
        images: ``[any, channels * height * width]``.
        training: the training images, ``[samples, channels * height * width]``.
        by: ``channel``: of all training pixels of a channel; ``pixel``: of each training pixel; ``image``: of the image
            itself (the paper's).
        channels: of the images.
    """
    if by == "image":
        mean, scale = images.mean(axis=1, keepdims=True), images.std(axis=1, keepdims=True)
    elif by == "pixel":
        mean, scale = training.mean(axis=0), training.std(axis=0)
    else:
        planes = np.split(training, channels, axis=1)
        size = training.shape[1] // channels
        mean = np.repeat([plane.mean() for plane in planes], size)
        scale = np.repeat([plane.std() for plane in planes], size)
    return (images - mean) / np.where(scale > 0, scale, 1)
