"""What a training minimised, as methods that look at single states of it need to know."""

from __future__ import annotations

import numpy as np

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.influence.window import Window
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.step_record import StepRecord


def refuse_ascent(step: StepRecord) -> None:
    """Raise :class:`UnsupportedError` for a step uphill."""
    if any(settings.get("maximize") for settings in step.hyperparameters):
        raise UnsupportedError(
            "the training climbed (maximize=True), and this method follows the descent of a loss. Use dit, or train on "
            "the loss with its sign turned"
        )


def mean_coefficients(replay: Replay, steps: Window) -> np.ndarray:
    """Weights ``c_j`` of the objective that training followed on average in some steps, ``[n]``.

    ``1 / n`` for the mean loss and whole epochs; class weights, sums and samplers show in it.
    """
    found = [replay.dynamics.coefficients(replay.trajectory.step(t)) for t in range(steps.start, steps.end)]
    return np.mean(found, axis=0)


def shares(replay: Replay) -> np.ndarray:
    """The mean coefficients over all of training, ``[n]``, scaled to a sum of 1, for rankings.

    Raises:
        UnsupportedError: some are negative, or all 0.
    """
    found = mean_coefficients(replay, Window(0, replay.trajectory.num_steps))
    if found.min() < 0 or not found.any():
        raise UnsupportedError(
            f"the samples' coefficients in the loss are {found.min():g} to {found.max():g}; this method takes them for "
            "weights, and needs them 0 or more. Use influence_function or dit"
        )
    return found / found.sum()
