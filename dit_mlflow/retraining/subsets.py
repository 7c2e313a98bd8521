"""Trainings on random parts of the data, made once and held against any number of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Kind, Query, Window
from dit_mlflow.influence.question import Question
from dit_mlflow.replay import Trajectory
from dit_mlflow.retraining.counterfactuals import Reweighted
from dit_mlflow.retraining.effort import Effort
from dit_mlflow.retraining.retrain import retrain
from dit_mlflow.workload import Workload


@dataclass(frozen=True, eq=False)
class Subsets:
    """Trainings on random parts of the data, made once and held against any number of methods.

    Attributes:
        kept: which samples each part holds, bool ``[subsets, samples]``.
        changes: of each query, against the recorded training, ``[windows, queries, subsets]``.
        windows: of the changes.
    """

    kept: np.ndarray
    changes: np.ndarray
    windows: tuple[Window, ...]


def train_on_subsets(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    subsets: int = 32,
    share: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    effort: Effort | None = None,
) -> Subsets:
    """Train again as recorded with weight 0 on the samples outside of random parts.

    As with leave-one-out, batches, their denominators and random draws stay; where the kind says a sample is
    absent, all samples outside the part are.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        subsets: how many parts.
        share: of the samples that each holds, drawn by ``seed`` without replacement.
        dtype, effort: as for :func:`dit_mlflow.leave_one_out`; the changes are large, the recorded dtype will do.

    Raises:
        InputError: fewer than 3 subsets, or a share that leaves a part empty or whole.

    Cost: one training for each subset (``local``: for each set of disjoint windows).
    """
    n = workload.num_samples
    size = round(share * n)
    if subsets < 3 or not 0 < size < n:
        raise InputError(
            f"{subsets} subsets with {size} of {n} samples; expected 3 or more, each a part of the samples"
        )
    generator = np.random.default_rng(seed)
    kept = np.zeros((subsets, n), dtype=bool)
    for row in kept:
        row[generator.choice(n, size=size, replace=False)] = True
    question = Question.of(trajectory, workload, windows, kind, queries)
    changes, _ = retrain(question, Reweighted(kept.astype(np.float64)), dtype, effort)
    return Subsets(kept, changes, tuple(windows))
