"""The interface of vector-Jacobian products of an optimizer's step, without clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_mlflow.replay.adjoint import Adjoint, Flat
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.state import COUNTERS, State
from dit_mlflow.trajectory.step_record import StepRecord


@dataclass(frozen=True, eq=False)
class UpdateGroup:
    """Consecutive parameters that an optimizer steps alike, so that they can be treated as one vector of ``size``.

    They have gradients, and share param group, counters and keys of state.

    Attributes:
        names: of the parameters.
        part: their elements among those of all parameters that the optimizer holds.
        gradient: the elements of their gradients among those of all gradients of the step.
        settings: hyperparameters of their param group.
        entry: the optimizer's state of the first parameter; its counters are those of all.
    """

    names: Sequence[str]
    part: slice
    gradient: slice
    settings: Mapping[str, Any]
    entry: Mapping[str, Any]

    def parameters(self, state: State) -> Tensor:
        """Their values in ``state``, ``[size]``."""
        return torch.cat([state.parameters[name].detach().reshape(-1) for name in self.names])

    def slot(self, state: State, key: str) -> Tensor:
        """Their optimizer state ``key`` in ``state``, ``[size]``."""
        return torch.cat([state.optimizer[name][key].detach().reshape(-1) for name in self.names])


@dataclass(frozen=True, eq=False)
class PulledGroup:
    """Derivatives with respect to a group's parameters, gradients and optimizer state before the step.

    Attributes:
        parameters: ``[A, size]``; may be a view of the adjoint after the step, which is not needed any more.
        gradients: ``[A, size]``.
        optimizer: ``[A, size]`` by key of the state.
        undefined: returns bool ``[size]``: the elements at which the step has no derivative, because every gradient
            was 0 up to and including this step (Adam's ``v = 0``); ``None`` = there are none.
    """

    parameters: Tensor
    gradients: Tensor
    optimizer: dict[str, Tensor]
    undefined: Callable[[], Tensor] | None = None


class StepAdjoint(Protocol):
    """Pulls adjoints back through one step of an optimizer, group by group.

    Attributes:
        needs_values: whether the optimizer's state must have its values; ``False`` = its keys are enough.
    """

    @property
    def needs_values(self) -> bool: ...

    def __call__(
        self, state: State, groups: Sequence[UpdateGroup], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledGroup]:
        """The groups' derivatives at ``t``, in the order of ``groups``.

        Args:
            state: ``s_t``.
            groups: of this step.
            gradients: returns the step's clipped gradients, ``[sum of sizes]``; called only if their values matter.
            adjoint: at ``t + 1``.
        """


def update_groups(
    layout: OptimizerLayout, held: Flat, state: State, step: StepRecord, gradients: Flat
) -> list[UpdateGroup]:
    """The groups of a step, in the optimizer's order; parameters without a gradient are in none.

    Args:
        layout: the recorded optimizer.
        held: the parameters that it holds, param group after param group.
        state: ``s_t``.
        step: the record of step ``t``, for its hyperparameters.
        gradients: layout of the gradients: first those of parameters in ``held``, in that order.
    """

    def kind(name: str) -> Any:
        entry = state.optimizer.get(name, {})
        return name in gradients.shapes, [(key, float(v) if key in COUNTERS else None) for key, v in entry.items()]

    def span(flat: Flat, names: Sequence[str]) -> slice:
        return slice(flat.slices[names[0]].start, flat.slices[names[-1]].stop)

    groups = []
    for group, settings in zip(layout.groups, step.hyperparameters, strict=True):
        for (active, _), members in groupby(group, key=kind):
            if active:
                names = tuple(members)
                entry = state.optimizer.get(names[0], {})
                groups.append(UpdateGroup(names, span(held, names), span(gradients, names), settings, entry))
    return groups
