"""Whether autograd's derivatives of a training's steps and of queries are those of what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.directional_derivative import slope_of_query, slope_of_state, slope_of_step
from dit_mlflow.replay.double_backward import naming_missing_derivatives
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.replay.own_step import OwnStep
from dit_mlflow.replay.slope import STRIDES, Slope
from dit_mlflow.replay.traced_query import TracedQueries
from dit_mlflow.replay.traced_step import TracedStep
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord

Measure = Callable[[Any, int], Slope]
"""A slope by the derivatives of a step, or of what asks queries, in the directions of an attempt."""

Asking = TrainingStep | TracedQueries
"""What asks queries."""

LONG = 200
"""Steps from which five stored states are looked at, instead of three."""

QUERIES_CHECKED = 32
"""Queries that are held against differences at the most: one of each that are the same code."""

_log = logger_of(__name__)


class DerivativeCheck:
    """Holds directional derivatives against central differences in float64, at some stored states of a training.

    A loss or a module may detach what depends on the parameters, reverse gradients, round with a straight-through
    estimator or change gradients in a hook. Then autograd's second derivative is another than that of what training
    did, without any error. Where it is, a :class:`TracedStep` takes its place. A step of the workload's own is traced
    from the start, and refused where that is wrong.

    Args:
        trajectory: what was recorded.
        step: its step, in the dtype of a replay.
        first, last: the states between which it is to be swept. What is stored elsewhere is not read: a record may lie
            far away.

    Cost: a copy of the model in float64, and some five training steps for each state that is looked at.
    """

    def __init__(self, trajectory: Record, step: LossStep | OwnStep, first: int, last: int) -> None:
        self._trajectory = trajectory
        self._step = step
        stored = trajectory.checkpoint_steps
        self._before = max(t for t in stored if t <= first)
        self._after = min((t for t in stored if t >= last), default=stored[-1])
        self._stored = [t for t in stored if self._before <= t < max(last, self._before + 1)]

    def step(self) -> TrainingStep:
        """The step given, or, where its derivative is another, the same traced.

        Raises:
            UnsupportedError: the traced one cannot be had, or is wrong too; a step ignores the samples' weights.
        """
        weighed = False
        for t, state in self._states():
            record = self._trajectory.step(t)

            def measure(step: Any, attempt: int, state: State = state, record: StepRecord = record) -> Slope:
                nonlocal weighed
                if isinstance(step, LossStep):
                    weighed = True
                    return slope_of_step(step, state, record, self._moved, attempt)
                slope, by_weight = slope_of_state(step, state, record, self._moved, attempt)
                weighed |= bool(by_weight.any())
                return slope

            traced = self._traced_in_float64 if isinstance(self._step, LossStep) else None
            if not self._right(measure, f"step {t}", self._in_float64, traced):
                return TracedStep(self._step.dynamics)
        if not weighed:
            raise UnsupportedError(
                "the samples' weights have no effect on Workload.step(model, optimizer, batch, weights), so that every "
                "influence would be 0; multiply the samples' losses by them: (weights * losses).mean()"
            )
        return self._step

    def asking(self, queries: Sequence[Callable[[nn.Module], Tensor]]) -> Asking:
        """What gives queries with the right derivative: the step given, or traces.

        Raises:
            UnsupportedError: there is none.
        """
        *_, (_, state) = self._states()
        for query in _one_of_each(queries)[:QUERIES_CHECKED]:

            def measure(asking: Any, attempt: int, query: Callable[[nn.Module], Tensor] = query) -> Slope:
                return slope_of_query(
                    lambda parameters, buffers: asking.ask(parameters, buffers, query), state, self._moved, attempt
                )

            traced = TracedQueries(self._in_float64.dynamics)
            if not self._right(measure, f"query {getattr(query, 'name', query)!r}", self._in_float64, traced):
                return TracedQueries(self._step.dynamics)
        return self._step

    def _right(self, measure: Measure, what: str, plain: Asking, traced: Asking | None) -> bool:
        """Whether the derivative of ``plain`` is right; ``False`` = that of ``traced`` is."""
        refused: UnsupportedError | None = None
        try:
            if _agrees(measure, plain) in (True, None):
                return True
        except UnsupportedError as error:
            refused = error
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Of whatever kind: a loss or a query may well take no float64.
            _log.info("%s: its derivative was not held against differences: %s", what, error)
            return True
        if traced is None and refused is not None:
            raise refused
        try:
            if traced is not None and _agrees(measure, traced) in (True, None):
                _log.info("%s: autograd's derivative is not that of what was computed; it is taken from a trace", what)
                return False
        except UnsupportedError as error:
            raise (refused or error) from error
        slope = measure(traced or plain, 0)
        raise UnsupportedError(
            f"{what}: the derivative that influence needs is {slope.taken:.6g} in a random direction, and what is "
            f"computed changes by {slope.difference:.6g} there, so scores would be wrong. A loss or a module has an "
            "operation whose derivative is not that of its values (fake quantization, a custom kernel). Use "
            "leave_one_out, which takes no derivative"
        )

    def _states(self) -> Iterator[tuple[int, State]]:
        """Stored states from which a step was made, in float64: the first, the last, and some between."""
        stored = self._stored
        parts = 4 if self._after - self._before >= LONG else 2
        for t in dict.fromkeys(stored[(len(stored) - 1) * part // parts] for part in range(parts + 1)):
            state = self._trajectory.checkpoint(t).to(self._step.dynamics.device, torch.float64)
            if t == stored[0] or _finite(state):
                yield t, state

    @cached_property
    def _moved(self) -> Mapping[str, Tensor]:
        """Where training changed parameters."""
        first, last = (self._trajectory.checkpoint(t) for t in (self._before, self._after))
        if not _finite(last):
            return {}
        device = self._step.dynamics.device
        return {name: (value != last.parameters[name]).to(device) for name, value in first.parameters.items()}

    @cached_property
    def _in_float64(self) -> LossStep | OwnStep:
        dynamics = self._step.dynamics
        if dynamics.floating_dtype == torch.float64:
            return self._step
        return type(self._step)(Dynamics(dynamics.workload, dynamics.manifest, torch.float64, self._trajectory.batches))

    @cached_property
    def _traced_in_float64(self) -> TracedStep:
        return TracedStep(self._in_float64.dynamics)


def _one_of_each(queries: Sequence[Callable[[nn.Module], Tensor]]) -> list[Callable[[nn.Module], Tensor]]:
    """The first of all that run the same code, on whatever data."""
    found: dict[object, Callable[[nn.Module], Tensor]] = {}
    for query in queries:
        function = getattr(query, "function", query)
        found.setdefault(getattr(function, "__code__", function), query)
    return list(found.values())


def _agrees(measure: Measure, step: Asking) -> bool | None:
    """Whether derivatives of ``step`` are those of differences; ``None`` = that cannot be told."""
    found: bool | None = None
    for attempt in range(len(STRIDES)):
        with naming_missing_derivatives():
            slope = measure(step, attempt)
        if slope.tells and slope.agrees:
            return True
        found = False if slope.tells else found
    return found


def _finite(state: State) -> bool:
    return all(bool(value.isfinite().all()) for value in state.parameters.values())
