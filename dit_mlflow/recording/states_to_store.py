"""Which states of a training are stored, and the one taken last until it is written."""

from __future__ import annotations

import math
from collections.abc import Callable

from dit_mlflow.errors import InputError
from dit_mlflow.recording.recorded_model import RecordedModel
from dit_mlflow.recording.writer import TrajectoryWriter
from dit_mlflow.trajectory.state import State


class StatesToStore:
    """Takes states and hands each to the writer when the step that led to it is complete.

    Attributes:
        latest: the step of the last state taken, ``s_latest``.
    """

    def __init__(
        self, is_checkpoint: Callable[[int], bool], recorded_model: RecordedModel, writer: TrajectoryWriter
    ) -> None:
        self.latest = 0
        self._is_checkpoint = is_checkpoint
        self._recorded_model = recorded_model
        self._writer = writer
        self._taken: State | None = None

    def take_if_due(self, step: int) -> State | None:
        """Take ``s_step``, the present state, if it is one to be stored; returns the state that waits to be written."""
        if self._is_checkpoint(step):
            self.take(step)
        return self._taken

    def take(self, step: int) -> None:
        """Take ``s_step``, the present state, unless it is taken already or nothing can be written any more."""
        if self.latest < step and not self._writer.stopped:
            self._taken, self.latest = self._recorded_model.snapshot(), step

    def write(self) -> None:
        """Hand the state taken last to the writer, once."""
        if self._taken is not None:
            self._writer.add_checkpoint(self.latest, self._taken)
            self._taken = None


def checkpoint_rule(every: str | int) -> Callable[[int], bool]:
    """Whether ``s_t`` is to be stored, as a function of ``t``.

    Args:
        every: ``"sqrt"`` for square numbers, ``n > 0`` for every ``n``-th, ``0`` for none but the ends.

    Raises:
        InputError: ``every`` is none of these.
    """
    if every == "sqrt":
        return lambda step: math.isqrt(step) ** 2 == step
    if isinstance(every, int) and every >= 0:
        return lambda step: every > 0 and step % every == 0
    raise InputError(f"checkpoint_every is {every!r}; expected 'sqrt', or a number of steps (0: only the ends)")
