"""Buffers that a sweep does not follow must not carry influence."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.trajectory import State
from dit_mlflow.trajectory.step_record import StepRecord


class BuffersApart:
    """Finds buffers that move with the parameters in a way that cannot be differentiated.

    A running mean of the inputs, a counter or a schedule do not depend on the parameters and are constants for
    influence; a code book or the vectors of spectral norm are not.

    Args:
        dynamics: to run steps with.
        followed: names of the buffers that the sweep follows.
    """

    def __init__(self, dynamics: Dynamics, followed: Container[str]) -> None:
        self._dynamics = dynamics
        self._followed = followed
        self._harmless: set[str] = set()

    def check(self, before: State, after: State, step: StepRecord) -> None:
        """Raise :class:`UnsupportedError` if ``step`` moved such a buffer.

        Whether the parameters matter is tried, once per buffer that is seen to move: with other parameters, the step's
        forward passes must leave the very same values. Cost: two forward passes per moving buffer, once.
        """
        for name, value in before.buffers.items():
            if name in self._followed or name in self._harmless or not value.is_floating_point():
                continue
            if torch.equal(value, after.buffers[name]):
                continue
            other = {key: _perturbed(tensor) for key, tensor in before.parameters.items()}
            if not torch.equal(
                self._left(before, other, step)[name], self._left(before, before.parameters, step)[name]
            ):
                raise UnsupportedError(
                    f"buffer {name!r} changes in training (step {step.index}) with the model's parameters, so a "
                    "sample's influence travels through it, but its update cannot be differentiated. Followed are the "
                    "running statistics of BatchNorm and InstanceNorm; leave_one_out follows all buffers"
                )
            self._harmless.add(name)

    def _left(self, before: State, parameters: dict[str, Tensor], step: StepRecord) -> dict[str, Tensor]:
        """The buffers after the step's forward passes."""
        buffers = {name: value.clone() for name, value in before.buffers.items()}
        with torch.no_grad():
            for term in self._dynamics.terms(step, self._dynamics.load(step)):
                term(parameters, buffers, None)
        return buffers


def _perturbed(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    return tensor + 0.1 * noise
