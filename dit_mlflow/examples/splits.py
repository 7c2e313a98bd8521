"""Training, validation and test samples drawn without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_mlflow.errors import WorkloadError


@dataclass(frozen=True, eq=False)
class Labelled:
    """Samples with their classes.

    Attributes:
        inputs: ``[samples, ...]``.
        labels: integers from 0, ``[samples]``.
    """

    inputs: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: np.ndarray) -> Labelled:
        return Labelled(self.inputs[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Splits:
    """Samples to train on, to choose by, and to judge by."""

    train: Labelled
    validation: Labelled
    test: Labelled


def split(
    pool: Labelled, n_train: int, n_validation: int, n_test: int, seed: int, what: str, test: Labelled | None = None
) -> Splits:
    """Draw the three splits: all from ``pool``, or the last from a pool of its own.

    Args:
        pool: what there is.
        n_train, n_validation, n_test: samples to draw.
        seed: of the draw. What is drawn from one pool does not depend on the other.
        what: the samples' name in messages, in the plural.
        test: where test samples come from, if they are kept apart already.

    Raises:
        WorkloadError: more than there are, or none for training or validation.
    """
    for name, size, least in (("n_train", n_train, 1), ("n_validation", n_validation, 1), ("n_test", n_test, 0)):
        if size < least:
            raise WorkloadError(f"{name} is {size}; expected {least} or more")
    from_pool = n_train + n_validation + (n_test if test is None else 0)
    chosen = _drawn(pool, from_pool, seed, what if test is None else f"{what} to train and validate with")
    train, validation, rest = np.split(chosen, [n_train, n_train + n_validation])
    held_out = pool[rest] if test is None else test[_drawn(test, n_test, seed, f"{what} to test with")]
    return Splits(pool[train], pool[validation], held_out)


def of_classes(samples: Labelled, classes: Sequence[int]) -> tuple[Labelled, np.ndarray]:
    """The samples of the given classes, which become 0, 1, … in that order; and the inputs of all the others."""
    position = np.full(max(*classes, int(samples.labels.max(initial=0))) + 1, -1)
    position[list(classes)] = np.arange(len(classes))
    labels = position[samples.labels]
    kept = labels >= 0
    return Labelled(samples.inputs[kept], labels[kept]), samples.inputs[~kept]


def _drawn(pool: Labelled, count: int, seed: int, what: str) -> np.ndarray:
    if count > len(pool):
        raise WorkloadError(f"{count} samples were asked; there are {len(pool)} {what}")
    return np.random.default_rng(seed).permutation(len(pool))[:count]
