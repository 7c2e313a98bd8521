"""Check before a long training whether influence can be computed on it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from dit_mlflow.errors import TrainingError
from dit_mlflow.influence.sweep import track
from dit_mlflow.influence.window import Window
from dit_mlflow.recording import train
from dit_mlflow.workload import Workload

STEPS = 2


def rehearse(workload: Workload, memory_budget: int | None = None) -> None:
    """Train :data:`STEPS` steps into a temporary folder, replay and sweep them, so that errors come early.

    Args:
        workload: to be trained.
        memory_budget: as for :func:`dit_mlflow.track`, which refuses one that holds too few states.

    Raises:
        DitError: as :func:`dit_mlflow.train` and :func:`dit_mlflow.track`: the training does not replay, an operation
            has no second derivative, or a buffer changes in a way that cannot be followed.

    Cost: about ten training steps, and the validation loss with its gradient.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trajectory = train(workload, Path(folder) / "trajectory", max_steps=STEPS)
        except TrainingError:
            return  # Training itself will say so, and keep its record.
        track(trajectory, workload, [Window(0, trajectory.num_steps)], memory_budget=memory_budget)
