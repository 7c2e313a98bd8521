"""A workload that classifies: data as arrays, a network, a recipe, and how people see the samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import TensorDataset

from dit_mlflow.examples.corruption import Damage
from dit_mlflow.examples.recipe import Recipe, build_optimizer, inverse_sqrt
from dit_mlflow.examples.splits import Labelled, Splits
from dit_mlflow.workload import Batch, Workload
from dit_mlflow.workload.appearance import Appearance

LOST_INPUT: Collection[Damage] = ("duplicate", "ood")
"""Damage after which the input no longer belongs to the sample's own class."""


@dataclass(frozen=True, eq=False)
class Captions:
    """Texts on training samples for reports.

    Attributes:
        names: of the classes.
        labels: what each training sample is trained to be, ``[samples]``.
        truth: what it was before the damage, ``[samples]``.
        corrupted: the damaged samples.
        kind: of the damage.
        noun: before the true class, such as ``digit``.
        notes: on damaged samples, by kind of damage; see :func:`notes`.
        detail: a few words on the input, one line.
    """

    names: Sequence[str]
    labels: np.ndarray
    truth: np.ndarray
    corrupted: np.ndarray
    kind: Damage
    noun: str
    notes: Mapping[Damage, str]
    detail: Callable[[int], str] | None = None

    def label(self, index: int) -> str:
        """The class that sample ``index`` is trained to be."""
        return self.names[self.labels[index]]

    def describe(self, index: int) -> str:
        """One line on training sample ``index``."""
        damaged = index in self.corrupted
        parts = [] if self.detail is None else [self.detail(index)]
        if not (damaged and self.kind in LOST_INPUT):
            parts.append(f"{self.noun} {self.names[self.truth[index]]}")
        parts.append(f"labelled {self.label(index)}")
        return ", ".join(parts) + (f" ({self.notes[self.kind]})" if damaged else "")


def notes(thing: str, stranger: str) -> dict[Damage, str]:
    """Notes on damaged samples whose input is a ``thing``; a foreign one is of ``stranger``."""
    return {
        "flip": "flipped",
        "class_flip": "flipped",
        "hard_flip": "flipped",
        "noise": f"noisy {thing}",
        "duplicate": f"{thing} of another sample",
        "ood": f"{thing} of {stranger}",
    }


def classification(
    splits: Splits,
    model: Callable[[], nn.Module],
    recipe: Recipe,
    captions: Captions,
    show: Callable[[int], Appearance],
    settings: Mapping[str, Any],
) -> Workload:
    """The workload of classifying ``splits``: binary cross-entropy on one logit for two classes, else cross-entropy.

    Args:
        splits: inputs as the model takes them, labels as it is trained with.
        model: makes the network; one output for two classes.
        recipe: of training; its L2 is chosen here if it is to be.
        captions: on the training samples.
        show: a training sample as people see it.
        settings: that the project has resolved; the recipe's are added.
    """
    l2 = recipe.penalty(splits.train.inputs, splits.train.labels)
    target = torch.float32 if len(captions.names) == 2 else torch.int64

    def dataset(samples: Labelled) -> TensorDataset:
        return TensorDataset(torch.from_numpy(samples.inputs).float(), torch.from_numpy(samples.labels).to(target))

    return Workload(
        model=model,
        loss=partial(sample_losses, l2=l2),
        train_set=dataset(splits.train),
        validation_set=dataset(splits.validation),
        test_set=dataset(splits.test) if len(splits.test) else None,
        optimizer=partial(build_optimizer, recipe=recipe),
        scheduler=inverse_sqrt if recipe.decay == "sqrt" else None,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        corrupted=tuple(captions.corrupted.tolist()),
        describe=captions.describe,
        show=show,
        label=captions.label,
        metrics=accuracy,
        settings={
            **settings,
            "lr": recipe.lr,
            "decay": recipe.decay,
            "l2": l2,
            "epochs": recipe.epochs,
            "batch_size": recipe.batch_size,
        },
    )


def sample_losses(module: nn.Module, batch: Batch, l2: float) -> Tensor:
    """Cross-entropy per sample, ``[B]``, each with the L2 term inside (as in the paper).

    Binary on logits ``[B]`` if the targets are floating point, else over logits ``[B, classes]``.
    """
    inputs, targets = batch
    if targets.is_floating_point():
        losses = binary_cross_entropy_with_logits(module(inputs), targets, reduction="none")
    else:
        losses = cross_entropy(module(inputs), targets, reduction="none")
    if l2:
        losses = losses + 0.5 * l2 * sum(parameter.square().sum() for parameter in module.parameters())
    return losses


def accuracy(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """1 where the class of highest logit is the target, else 0."""
    inputs, targets = batch
    logits = module(inputs)
    right = (logits > 0) == (targets > 0.5) if targets.is_floating_point() else logits.argmax(dim=1) == targets
    return {"accuracy": right.float()}
