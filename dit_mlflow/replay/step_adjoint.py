"""The contract of vector-Jacobian products of an optimizer's step, without clipping."""

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
    """Neighbouring parameters with a gradient that share param group, counters and kinds of state.

    Attributes:
        names: of the parameters.
        part: where they stand among all that the optimizer holds.
        gradient: where their gradients stand among the step's gradients.
        settings: hyperparameters of their group.
        entry: the optimizer's state of the first of them; its counters are those of all.
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
    """Adjoints of one run before the step: of its parameters, gradients and optimizer state.

    Attributes:
        parameters: ``[A, size]``; may be the adjoint's own part, which is not needed any more.
        gradients: ``[A, size]``.
        optimizer: ``[A, size]`` by key of the state.
        undefined: gives bool ``[size]``: where the step has no derivative, because every gradient there was 0 up to and
            including this step (Adam's ``v = 0``); ``None`` = nowhere.
    """

    parameters: Tensor
    gradients: Tensor
    optimizer: dict[str, Tensor]
    undefined: Callable[[], Tensor] | None = None


class StepAdjoint(Protocol):
    """How adjoints travel back through one step of an optimizer, run by run.

    Attributes:
        needs_values: whether the optimizer's state must have its values, or only its keys.
    """

    @property
    def needs_values(self) -> bool: ...

    def __call__(
        self, state: State, groups: Sequence[UpdateGroup], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledGroup]:
        """From ``adjoint`` at ``t + 1`` to the runs' parts at ``t``.

        Args:
            state: ``s_t``.
            runs: of this step.
            gradients: the step's gradients, clipped, ``[sum of sizes]``; asked only if their values matter.
            adjoint: at ``t + 1``.
        """
        ...


def update_groups(
    layout: OptimizerLayout, held: Flat, state: State, step: StepRecord, gradients: Flat
) -> list[UpdateGroup]:
    """The runs of a step, in the optimizer's order; parameters without a gradient are in none.

    Args:
        layout: the recorded optimizer.
        held: the parameters that it holds, group after group.
        state: ``s_t``.
        step: its hyperparameters.
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
