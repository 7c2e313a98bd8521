"""The record of a step: what was done at it, besides the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from dit_mlflow.workload.random_state import RandomState

Hyperparameters = Mapping[str, Any]


class StepFields(TypedDict):
    """The fields of a :class:`StepRecord` as plain values, which are faster to build during training."""

    index: int
    epoch: int
    indices: list[Sequence[int] | np.ndarray]
    coefficients: list[np.ndarray] | None
    hyperparameters: tuple[Hyperparameters, ...]
    loss: float | None
    random_states: list[RandomState | None]
    evaluation_mode: list[str]
    no_gradient: list[str]
    zero_gradient: list[str]


@dataclass(frozen=True, eq=False)
class StepRecord:
    """Step ``t`` of a trajectory.

    Attributes:
        index: ``t``.
        epoch: pass over the data that the step's last batch belongs to, from 0.
        indices: training sample indices, one array per micro-batch.
        coefficients: ``c_i`` per micro-batch; ``None`` = the workload's.
        hyperparameters: per parameter group, everything but ``params``.
        loss: what the loop logged, if anything.
        random_states: per micro-batch, the state before it was drawn of the generators that moved until the next one
            was; ``None`` where none moved.
        evaluation_mode: names of the modules that were in evaluation mode (``""`` is the whole model).
        no_gradient: names of the parameters whose gradient was ``None``: the optimizer does not step them.
        zero_gradient: names of the frozen parameters (``requires_grad=False``) with a gradient, which counts as 0: the
            optimizer steps them by momentum and weight decay.
    """

    index: int
    epoch: int
    indices: tuple[np.ndarray, ...]
    coefficients: tuple[np.ndarray, ...] | None
    hyperparameters: tuple[Hyperparameters, ...]
    loss: float | None
    random_states: tuple[RandomState | None, ...]
    evaluation_mode: frozenset[str]
    no_gradient: frozenset[str]
    zero_gradient: frozenset[str] = frozenset()

    @property
    def samples(self) -> np.ndarray:
        """All sample indices of the step, repeated ones included, in batch order."""
        return np.concatenate(self.indices)
