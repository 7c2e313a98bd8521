"""Every subset of a few samples, trained by the plain loop: what Shapley and Banzhaf values are by definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from oracles import train_again, validation_loss
from torch.utils.data import Subset
from workloads import datasets, digits_workload

from dit_mlflow import Trajectory, Workload


def few_samples(count: int = 5, **changes: Any) -> Workload:
    """The first ``count`` digits, in batches of two; fast enough that effects are far from additive."""
    train_set, _ = datasets()
    settings = {"train_set": Subset(train_set, range(count)), "batch_size": 2, "epochs": 3, **changes}
    return digits_workload(**settings)


def all_subsets(count: int) -> np.ndarray:
    """Bool ``[2**count, count]``."""
    return np.array(list(product([False, True], repeat=count)))


def trained_on(workload: Workload, trajectory: Trajectory, kept: np.ndarray) -> np.ndarray:
    """Validation loss ``[subsets]`` at the end when the others have weight 0 throughout, in float64."""
    return np.array(
        [
            validation_loss(
                workload, train_again(workload, trajectory, lambda t, i, row=row: float(row[i]), trajectory.num_steps)
            )
            for row in kept
        ]
    )
