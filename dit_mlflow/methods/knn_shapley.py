"""Shapley values of the training samples in a nearest-neighbour classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.utils.data import Dataset

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.question import Question
from dit_mlflow.methods.last_layer import LastLayer, class_logits, first_samples, refuse_rows
from dit_mlflow.methods.method import Estimate, Method
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.trajectory import State
from dit_mlflow.workload.batches import tensors_of

QUERIES_AT_ONCE = 256
"""Validation samples whose distances are in memory at once."""


@dataclass(frozen=True)
class KnnShapley(Method):
    r"""Exact Shapley value of a sample for a k-nearest-neighbour classifier (Jia et al. 2019, arXiv 1908.08619).

    A coalition's worth for one validation sample is the share of its ``k`` nearest members that have its label (missing
    members count as wrong). With the training samples sorted by distance, nearest first, and ``1_i`` = 1 where the
    labels agree (theorem 1):

    .. math:: s_n = \frac{\min(k, n)}{k n} 1_n, \qquad s_i = s_{i+1} + \frac{1_i - 1_{i+1}}{k} \frac{\min(k, i)}{i}

    averaged over the validation set. Low = suspicious: its label disagrees with those around it. A negative score means
    that removal improves the neighbours' vote. Only the trained model's features enter: the query makes no difference,
    and removal from *training* is not measured.

    Attributes:
        k: neighbours.
        features: for Euclidean distances. ``penultimate`` = the input of the final model's last linear layer, in
            evaluation mode: it works for texts and whatever else the model takes (the paper has a network's features of
            images too), but samples whose wrong labels were memorised have moved towards that class. ``inputs`` = the
            samples' first tensor, flattened: better if near numbers mean alike samples (256 digits, a tenth of the
            labels flipped, mean of four trainings: AUROC 0.98, against 0.86), meaningless for token numbers.

    Raises:
        UnsupportedError: the labels are not classes, the model has no linear layer on one row per sample, or the inputs
            are not one row of numbers per sample.

    Cost: a forward pass over training and validation set, and ``O(m n (F + log n))`` for ``m`` validation samples of
    ``F`` features. Equal distances are taken in the order of the training set.
    """

    name = "knn_shapley"
    measures = "suspicion"

    k: int = 5
    features: Literal["penultimate", "inputs"] = "penultimate"

    def __post_init__(self) -> None:
        expected = "k of 1 or more, and features 'penultimate' or 'inputs'"
        self._expect(expected, self.k >= 1 and self.features in ("penultimate", "inputs"), "k", "features")

    def estimate(self, question: Question) -> Estimate:
        workload = question.workload
        replay = question.trajectory.replay(workload)
        state = replay.checkpoint(question.trajectory.num_steps)
        details: dict[str, Any] = {"k": self.k, "features": self.features}
        if self.features == "inputs":
            known, asked = (
                _inputs(replay.dynamics, state, part) for part in (workload.train_set, workload.validation_set)
            )
        else:
            layer = LastLayer(replay.dynamics, state, question.trajectory.num_steps)
            known, asked = (
                (x.features, x.labels) for x in map(layer.of, (workload.train_set, workload.validation_set))
            )
            details["layer"] = layer.name
        points, labels, asked_points, asked_labels = (tensor.cpu().numpy() for tensor in (*known, *asked))
        scores = knn_shapley_values(points, labels, asked_points, asked_labels, self.k)
        return Estimate(np.broadcast_to(scores, question.shape).copy(), details=details)


def knn_shapley_values(
    points: np.ndarray, labels: np.ndarray, asked: np.ndarray, asked_labels: np.ndarray, k: int
) -> np.ndarray:
    """Mean over validation samples of the exact Shapley values, ``[n]``.

    Args:
        points, labels: of the training samples, ``[n, F]`` and ``[n]``.
        asked, asked_labels: of the validation samples, ``[m, F]`` and ``[m]``.
        k: neighbours.
    """
    n, m = len(points), len(asked)
    ranks = np.arange(1, n)
    shares = np.minimum(k, ranks) / (k * ranks)
    total = np.zeros(n)
    for rows in np.array_split(np.arange(m), -(-m // QUERIES_AT_ONCE)):
        order = np.argsort(cdist(asked[rows], points), axis=1, kind="stable")
        agree = (labels[order] == asked_labels[rows, None]).astype(float)
        values = np.empty_like(agree)
        values[:, -1] = agree[:, -1] * min(k, n) / (k * n)
        steps = (agree[:, :-1] - agree[:, 1:]) * shares
        values[:, :-1] = values[:, -1:] + np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
        np.add.at(total, order, values)
    return total / m


def _inputs(dynamics: Dynamics, state: State, dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """The first tensor of every sample, flattened, ``[n, F]``, float64; and the labels ``[n]``."""
    size = len(dataset)  # type: ignore[arg-type]
    batch = dynamics.workload.unvarying(dataset, np.arange(size))
    first = tensors_of(batch)[0]
    if len(first) != size or first.dim() < 2:
        raise UnsupportedError(
            f"the first tensor of a batch of {size} samples has shape {list(first.shape)}; distances of inputs need "
            "one row of numbers for each. Use KnnShapley(features='penultimate')"
        )
    _, classes = class_logits(dynamics, state, first_samples(dynamics, state, 1), 1).shape
    features = first.flatten(1).double()
    refuse_rows(features, dataset, dynamics.workload)
    return features, dynamics.workload.class_labels(batch, classes)
