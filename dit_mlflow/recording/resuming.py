"""Where in a trajectory a model is that goes on training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.recording.guards import same
from dit_mlflow.recording.recorded_model import RecordedModel
from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import State


def resuming_step(begun: Record, now: State, recorded_model: RecordedModel) -> int:
    """The last step whose stored state is ``now``, bit for bit.

    Raises:
        TrajectoryError: model or optimizer are laid out otherwise, or there is no such step.

    Cost: reads stored states, from the last one backwards.
    """
    model, optimizer = recorded_model.model_layout, recorded_model.optimizer_layout
    recorded = begun.manifest.model, begun.manifest.optimizer
    if model.parameters != recorded[0].parameters or model.buffers != recorded[0].buffers:
        raise TrajectoryError(
            f"cannot go on with the trajectory in {begun.directory}: it is of a {recorded[0].name} with other "
            f"parameters or buffers than this {model.name}; build the model as it was, or record into a new folder"
        )
    if (optimizer.name, optimizer.groups) != (recorded[1].name, recorded[1].groups):
        raise TrajectoryError(
            f"cannot go on with the trajectory in {begun.directory}: it was trained with {recorded[1].name} in "
            f"{len(recorded[1].groups)} parameter groups, this is {optimizer.name} in {len(optimizer.groups)}; build "
            "the optimizer as it was, or record into a new folder"
        )
    same_weights = None
    for step in reversed(begun.checkpoint_steps):
        stored = begun.checkpoint(step)
        if _equal(stored.parameters, now.parameters) and _equal(stored.buffers, now.buffers):
            if _equal_optimizers(stored, now):
                return step
            same_weights = step
    if same_weights is not None:
        raise TrajectoryError(
            f"cannot go on with the trajectory in {begun.directory}: the model is where it was at step {same_weights}, "
            "but the optimizer's state is not; load it too (optimizer.load_state_dict)"
        )
    raise TrajectoryError(
        f"cannot go on with the trajectory in {begun.directory}: the model is at none of its "
        f"{len(begun.checkpoint_steps)} stored states (the last is at step {begun.checkpoint_steps[-1]}). Load what "
        "was saved beside recorder.checkpoint(), or record into a new folder"
    )


def _equal_optimizers(stored: State, now: State) -> bool:
    entries = [{name: entry for name, entry in state.optimizer.items() if entry} for state in (stored, now)]
    return entries[0].keys() == entries[1].keys() and all(
        _equal(entry, entries[1][name]) for name, entry in entries[0].items()
    )


def _equal(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    if some.keys() != others.keys():
        return False
    return all(
        same(value, others[name]) if isinstance(value, Tensor) else value == others[name]
        for name, value in some.items()
    )
