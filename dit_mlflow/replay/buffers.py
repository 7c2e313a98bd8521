"""Buffers that a sweep does not follow must not carry influence."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial

import torch
from torch import Tensor

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.dynamics import Buffers, Parameters
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.without_graph import without_graph


class BuffersApart:
    """Finds buffers that move with the parameters in a way that cannot be differentiated.

    A running mean of the inputs, a counter or a schedule do not depend on the parameters and are constants for
    influence; a code book or the vectors of spectral norm are not.

    Args:
        followed: names of the buffers that the sweep follows.
        buffers_after: ``(parameters, buffers, record)`` -> the buffers after the step's forward passes.
    """

    def __init__(
        self, followed: Container[str], buffers_after: Callable[[Parameters, Buffers, StepRecord], Buffers]
    ) -> None:
        self._followed = followed
        self._buffers_after = buffers_after
        self._harmless: set[str] = set()

    def check(self, before: State, after: Buffers, record: StepRecord) -> None:
        """Raise :class:`UnsupportedError` if the step moved such a buffer, from ``before`` to ``after``.

        Whether the parameters matter is tried, once per buffer that is seen to move: with other parameters, the step's
        forward passes must leave the very same values. Cost: two forward passes per moving buffer, once.
        """
        for name, value in before.buffers.items():
            if name in self._followed or name in self._harmless or not value.is_floating_point():
                continue
            if torch.equal(value, after[name]):
                continue
            other = {key: _perturbed(tensor) for key, tensor in before.parameters.items()}
            left, expected = (
                without_graph(partial(self._buffers_after, parameters, before.buffers, record))[name]
                for parameters in (other, before.parameters)
            )
            if not torch.equal(left, expected):
                raise UnsupportedError(
                    f"buffer {name!r} changes in training (step {record.index}) with the model's parameters, so a "
                    "sample's influence travels through it, but its update cannot be differentiated. Followed are the "
                    "running statistics of BatchNorm and InstanceNorm; leave_one_out follows all buffers"
                )
            self._harmless.add(name)


def _perturbed(tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    return tensor + 0.1 * noise
