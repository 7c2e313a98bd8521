"""Deliberate damage to training data, so that detection can be scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dit_mlflow.errors import InputError

Damage = Literal["flip", "class_flip", "hard_flip", "noise", "duplicate", "ood"]

FOLDS = 5
"""Parts of the data for ``hard_flip``; each is judged by a model of the others."""

NOISE = 1.0
"""Standard deviation of ``noise``, in units of that of all the inputs."""


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Training data after the damage.

    Attributes:
        inputs: ``[samples, ...]``.
        labels: ``[samples]``.
        indices: the damaged samples, ascending.
    """

    inputs: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


def corrupt(
    inputs: np.ndarray,
    labels: np.ndarray,
    kind: Damage,
    share: float,
    seed: int,
    classes: int,
    foreign: np.ndarray | None = None,
    noise: float = NOISE,
    features: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Corrupted:
    """Damage exactly ``round(share * samples)`` samples of a copy.

    - ``flip``: the label becomes another class, all equally likely.
    - ``class_flip``: label ``c`` becomes ``c + 1`` modulo ``classes``, class by class in random order, so that a small
      share comes from one class alone.
    - ``hard_flip``: labels as an annotator confuses them (instance-dependent noise): samples are drawn by how likely a
      logistic regression, which has not seen them, holds another class, and get the likeliest other one.
    - ``noise``: normal noise is added to the input, of standard deviation ``noise`` times that of all inputs.
    - ``duplicate``: the input becomes a copy of that of an undamaged sample of another class. The sample keeps its
      label, so the copy contradicts its original; a copy within the class would do little harm.
    - ``ood``: the input becomes one of ``foreign``, each used once; the label stays.

    But for ``class_flip`` and ``hard_flip``, every sample is equally likely to be damaged.

    Args:
        inputs: ``[samples, ...]``; floating point for ``noise``.
        labels: integers in ``[0, classes)``, ``[samples]``.
        kind: of the damage.
        share: of the samples, in [0, 1].
        seed: of the choice and of the damage.
        classes: how many there are, 2 or more where labels or classes matter.
        foreign: inputs that belong to no class, ``[any, ...]``, for ``ood``.
        noise: see above.
        features: what the logistic regression of ``hard_flip`` sees of inputs that are not numbers, ``[samples, any]``.

    Raises:
        InputError: an unknown kind, a share outside [0, 1], or data that the kind does not apply to.
    """
    if kind not in get_args(Damage):
        raise InputError(f"corruption={kind!r}; expected one of {', '.join(get_args(Damage))}")
    if not 0 <= share <= 1:
        raise InputError(f"corrupt is {share}; expected a share between 0 and 1")
    generator = np.random.default_rng(seed)
    count = round(share * len(labels))
    if kind == "hard_flip":
        seen = inputs if features is None else features(inputs)
        indices, likeliest = _confused(seen, labels, count, generator)
        labels = labels.copy()
        labels[indices] = likeliest
        return Corrupted(inputs.copy(), labels, indices)
    if kind == "class_flip":
        indices = _class_by_class(labels, count, classes, generator)
    else:
        indices = np.sort(generator.choice(len(labels), size=count, replace=False))
    inputs, labels = inputs.copy(), labels.copy()
    if not count:
        return Corrupted(inputs, labels, indices)
    if kind in ("flip", "class_flip"):
        labels[indices] = _other_class(labels[indices], classes, kind, generator)
    elif kind == "noise":
        inputs[indices] += _noise(inputs, count, noise, generator)
    elif kind == "duplicate":
        inputs[indices] = inputs[_of_another_class(labels, indices, generator)]
    else:
        inputs[indices] = _drawn(foreign, inputs, count, generator)
    return Corrupted(inputs, labels, indices)


def _confused(
    inputs: np.ndarray, labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Samples drawn by how likely another class is, ascending, and the likeliest other class of each."""
    known, own = np.unique(labels, return_inverse=True)
    if (smallest := np.bincount(own).min()) < FOLDS or len(known) < 2:
        raise InputError(
            f"corruption='hard_flip' on {len(known)} classes, the smallest of {smallest} samples; expected two or "
            f"more, of {FOLDS} samples each"
        )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    likely = cross_val_predict(model, inputs.reshape(len(inputs), -1), own, cv=parts, method="predict_proba")
    likely[np.arange(len(own)), own] = 0
    chances = likely.max(axis=1) + 1e-12
    indices = np.sort(generator.choice(len(own), size=count, replace=False, p=chances / chances.sum()))
    return indices, known[likely[indices].argmax(axis=1)]


def _class_by_class(labels: np.ndarray, count: int, classes: int, generator: np.random.Generator) -> np.ndarray:
    place = generator.permutation(classes)[labels]
    return np.sort(np.lexsort((generator.random(len(labels)), place))[:count])


def _other_class(labels: np.ndarray, classes: int, kind: Damage, generator: np.random.Generator) -> np.ndarray:
    if classes < 2:
        raise InputError(f"corruption={kind!r} with {classes} class; there is no other class to flip to")
    shift = generator.integers(1, classes, size=len(labels)) if kind == "flip" else 1
    return (labels + shift) % classes


def _noise(inputs: np.ndarray, count: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    if not np.issubdtype(inputs.dtype, np.floating):
        raise InputError(f"corruption='noise' on inputs of {inputs.dtype}; convert them to floating point first")
    return generator.normal(scale=noise * inputs.std(), size=(count, *inputs.shape[1:])).astype(inputs.dtype)


def _of_another_class(labels: np.ndarray, indices: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each damaged sample, an undamaged one of another class, drawn with replacement."""
    intact = np.setdiff1d(np.arange(len(labels)), indices)
    sources = np.empty(len(indices), dtype=np.int64)
    for label in np.unique(labels[indices]):
        others, own = intact[labels[intact] != label], labels[indices] == label
        if not len(others):
            raise InputError(
                f"corruption='duplicate' leaves no undamaged sample outside class {label}; lower the share"
            )
        sources[own] = generator.choice(others, size=int(own.sum()))
    return sources


def _drawn(foreign: np.ndarray | None, inputs: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    if foreign is None or foreign.shape[1:] != inputs.shape[1:] or len(foreign) < count:
        given = "none" if foreign is None else f"an array {list(foreign.shape)}"
        raise InputError(
            f"corruption='ood' needs {count} or more inputs {list(inputs.shape[1:])} in foreign; got {given}"
        )
    return foreign[generator.choice(len(foreign), size=count, replace=False)]
