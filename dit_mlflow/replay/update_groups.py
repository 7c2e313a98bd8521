"""Which parameters an optimizer steps alike, so that they can be treated as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dit_mlflow.replay.adjoint import Flat
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

    @property
    def starts_momentum(self) -> bool:
        """Whether SGD makes its momentum buffer in this step."""
        return "nesterov" in self.settings and bool(self.settings["momentum"]) and "momentum_buffer" not in self.entry


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
