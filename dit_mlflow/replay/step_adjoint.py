"""The contract of vector-Jacobian products of an optimizer's step, without clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.update_groups import UpdateGroup
from dit_mlflow.trajectory.state import State


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
