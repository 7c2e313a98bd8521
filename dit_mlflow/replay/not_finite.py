"""Find where numbers that are not finite come from: the step, the samples, the parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import DitError, TrajectoryError, UnsupportedError
from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord

NAMED = 10
"""Largest number of samples that a message names."""

LOOKED_AT = 64
"""Largest number of a step's samples whose derivatives are computed one by one, once the step's is not finite."""


class NotFiniteError(UnsupportedError):
    """The derivative of a step is not finite, although the state is."""


def are_finite(tensors: Iterable[Tensor]) -> bool:
    # A finite sum has finite terms, and takes a third of the time; finite terms may have a sum that overflows.
    return all(bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all()) for tensor in tensors)


def named(samples: Iterable[int]) -> str:
    """``sample 3``, ``samples 3, 7 and 12 others``."""
    found = [int(sample) for sample in samples]
    listed = ", ".join(map(str, found[:NAMED]))
    more = f" and {len(found) - NAMED} others" if len(found) > NAMED else ""
    return f"sample{'s' * (len(found) != 1)} {listed}{more}"


def not_finite(parameters: Mapping[str, Tensor]) -> str | None:
    """The name of the first parameter that is not finite."""
    return next((name for name, value in parameters.items() if not are_finite([value])), None)


def refuse_diverged(state: State, t: int, trajectory: Record | None = None) -> None:
    """Raise :class:`TrajectoryError` if a parameter of ``s_t`` is not finite."""
    name = not_finite(state.parameters)
    if name is None:
        return
    until = ""
    if trajectory is not None:
        stored = (step for step in reversed(trajectory.checkpoint_steps) if step < t)
        good = next((step for step in stored if not_finite(trajectory.checkpoint(step).parameters) is None), 0)
        until = f" (at step {good}, the last such stored state)"
    raise TrajectoryError(
        f"training diverged: parameter {name!r} is not finite at step {t}, so influence is undefined there. Ask for "
        f"windows that end where it was finite{until}, or train with a lower learning rate"
    )


def refuse_derivative(step: TrainingStep, state: State, record: StepRecord, adjoint: Adjoint) -> None:
    """Raise for a step whose derivative is not finite; the message names the samples.

    Args:
        adjoint: only its shape matters.

    Raises:
        TrajectoryError: the state is not finite.
        NotFiniteError: the state is finite, its derivative is not.
    """
    refuse_diverged(state, record.index)
    found = _at_fault(step, state, record, adjoint)
    who = f"for {named(found)}" if found else f"for its batch ({named(dict.fromkeys(record.samples.tolist()))})"
    raise NotFiniteError(
        f"step {record.index}: the second derivative of the loss is not finite {who}, so no score of this or an "
        "earlier step is known. Look for a root, a norm or a standard deviation at 0 (add a small number inside the "
        f"root), or a division by 0. Ask for windows from step {record.index + 1} on, or use leave_one_out, which "
        "takes no derivative"
    )


def _at_fault(step: TrainingStep, state: State, record: StepRecord, like: Adjoint) -> list[int]:
    """Samples whose own derivatives are not finite; empty where the step cannot be made of one sample."""
    found = []
    for sample in list(dict.fromkeys(record.samples.tolist()))[:LOOKED_AT]:
        alone = replace(record, indices=(np.array([sample]),), coefficients=(np.ones(1),), random_states=(None,))
        ones = Adjoint(torch.ones_like(like.parameters), torch.ones_like(like.buffers))
        try:
            pulled, by_weight = step.pull_back(state, alone, ones)
        except (DitError, RuntimeError, ValueError, LookupError):
            return []
        if not are_finite([pulled.parameters, pulled.buffers, by_weight]):
            found.append(sample)
    return found
