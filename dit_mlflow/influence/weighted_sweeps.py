"""Sweeps along trainings under several vectors of weights, side by side or one after the other."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import UnsupportedError, first_line
from dit_mlflow.influence.engine import ADJOINTS_IN_MEMORY, Engine
from dit_mlflow.influence.kind import Course, sweeps
from dit_mlflow.influence.query import Query
from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.replay import STATES_IN_MEMORY
from dit_mlflow.replay.rounding import MARGIN, NUDGES, nudged_state
from dit_mlflow.replay.side_by_side import Together, misses, together, tolerance
from dit_mlflow.replay.training_step import SampleWeights, TrainingStep
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory import State, StepRecord

_log = logger_of(__name__)

REFUSALS = (RuntimeError, ValueError, NotImplementedError, UnsupportedError)
"""What a model raises that cannot run side by side."""


class WeightedSweeps:
    """The derivative at each of several vectors of weights, along the training under each.

    Steps run side by side under ``vmap`` if three steps of a training, made in both ways, agree,
    and one of them is faster so. All others run one after the other.

    Args:
        engine: walks the trajectory.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._side_by_side: bool | None = None
        self._steps: dict[int, Together] = {}

    def __call__(
        self, queries: Sequence[Query], course: Course, num_windows: int, weights: Tensor
    ) -> Iterator[np.ndarray]:
        """For each of ``weights [M, samples]``, ``-dq / dw`` of the course's windows, 0 of the others.

        Yields ``[windows, queries, samples]``, in order.
        """
        planned, first = sweeps([course]), 0
        size = self._at_once(queries, course, num_windows, weights)
        while first < len(weights):
            chunk = weights[first : first + size]
            if len(chunk) > 1:
                found = self._together(queries, course, num_windows, chunk)
                if found is None:
                    self._side_by_side, size = False, 1
                    continue
                yield from found
            else:
                of = SampleWeights(chunk[0], course.start, course.until)
                yield self.engine.run(queries, planned, num_windows, of)
            first += size

    def _together(
        self, queries: Sequence[Query], course: Course, num_windows: int, weights: Tensor
    ) -> np.ndarray | None:
        """``[K, windows, queries, samples]``; ``None`` if a step cannot be made side by side."""
        of, step = SampleWeights(weights, course.start, course.until), self._step(len(weights))
        try:
            with _quiet():
                found = self.engine.run(queries, sweeps([course]), num_windows, of, step)
        except REFUSALS as error:  # Of a step that goes another way than those that were compared.
            _log.info("a sweep cannot run side by side: %s", first_line(error))
            return None
        return np.moveaxis(found.reshape(num_windows, len(queries), len(weights), -1), 2, 0)

    def _step(self, copies: int) -> Together:
        if copies not in self._steps:
            self._steps[copies] = together(self.engine.training_step, copies)
        return self._steps[copies]

    def _at_once(self, queries: Sequence[Query], course: Course, num_windows: int, weights: Tensor) -> int:
        """How many vectors of weights one walk takes."""
        if len(weights) == 1 or self._side_by_side is False:
            return 1
        length, engine = course.stop - course.start, self.engine
        engine.choose(course.start, course.stop)
        size = min(len(weights), self._fitting(queries, course, num_windows)) if engine.plain and length else 1
        if size > 1 and self._side_by_side is None:
            self._side_by_side = self._preferred(queries, course, weights[:size], len(weights))
        return size if self._side_by_side else 1

    def _fitting(self, queries: Sequence[Query], course: Course, num_windows: int) -> int:
        """How many trainings fit the budgets: the states of the walk, and adjoints with what a step keeps."""
        engine, replay = self.engine, self.engine.replay
        state = replay.checkpoint(replay.trajectory.checkpoint_steps[-1]).nbytes
        kept = engine.training_step.bytes_kept(replay.checkpoint(0), replay.trajectory.step(course.start))
        scores = 8 * engine.training_step.dynamics.workload.num_samples * (num_windows + 1)
        adjoints = len(queries) * (4 * state + 2 * kept + scores) + 2 * kept
        states = (course.stop - course.start + 2) * state
        budget = engine.memory_budget
        return int(min((budget or STATES_IN_MEMORY) // states, (budget or ADJOINTS_IN_MEMORY) // adjoints))

    def _preferred(self, queries: Sequence[Query], course: Course, weights: Tensor, count: int) -> bool:
        """Whether ``count`` trainings are right, and faster, side by side: as many at once as ``weights`` has rows."""
        seconds = self.compared(queries, course, weights)
        return seconds is not None and seconds[1] * math.ceil(count / len(weights)) < seconds[0] * count

    def compared(self, queries: Sequence[Query], course: Course, weights: Tensor) -> tuple[float, float] | None:
        """Seconds of a step alone, and side by side; ``None`` if these are not the same but for rounding."""
        engine = self.engine
        # Steps of their own: what they warn of, with other states than training had, is no news, and is said once.
        step = engine.training_step
        alone, of_all = type(step)(step.dynamics), together(step, len(weights))
        # The last as recorded, to be held against the one alone.
        weights = torch.cat([weights[:-1], torch.ones_like(weights[:1])])
        state, last = engine.replay.recorded(course.start), course.stop - 1
        states = state.side_by_side(len(weights))
        times = []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                starts = engine.start(state, queries), engine.start(states, queries, together=of_all)
                for t in sorted({course.start, (course.start + last) // 2, last}):
                    record = engine.replay.trajectory.step(t)
                    one = _made(alone, state, record, starts[0], torch.ones(len(record.samples)))
                    all_ = _made(of_all, states, record, starts[1], weights[:, record.samples])
                    times.append((one.seconds, all_.seconds))
                    missed = misses(alone, [record], state, one.after, all_.after, copy=-1)
                    if missed or not _same(all_.by_weight[:, -1], one, alone, state, record, starts[0]):
                        _log.info("step %d side by side is not the step alone; draws run one after the other", t)
                        return None
        except REFUSALS as error:
            _log.info("draws cannot run side by side: %s", first_line(error))
            return None
        # The first of each way prepares what the others use.
        single, at_once = (min(seconds) for seconds in zip(*times, strict=True))
        return single, at_once


@dataclass(frozen=True, eq=False)
class _Made:
    """A step forwards, its derivative by the weights, and the time that both took."""

    after: State
    by_weight: Tensor
    seconds: float


def _made(step: TrainingStep, state: State, record: StepRecord, adjoint: Adjoint, weights: Tensor) -> _Made:
    # A pull-back may change its adjoint.
    adjoint = adjoint.keep(list(range(adjoint.rows)))
    begun = time.perf_counter()
    after = step(state, record, weights)
    _, by_weight = step.pull_back(state, record, adjoint, weights)
    if step.dynamics.device.type == "cuda":
        torch.cuda.synchronize(step.dynamics.device)
    return _Made(after, by_weight, time.perf_counter() - begun)


def _same(
    by_weight: Tensor, one: _Made, step: TrainingStep, state: State, record: StepRecord, adjoint: Adjoint
) -> bool:
    """Whether a derivative is that of the step made alone, but for rounding.

    Adam's first step divides by the gradient's size, and what rounding does to a gradient near 0 then shows in full. So
    the derivative is also taken where the parameters differ in their last places.
    """
    apart, length = (by_weight - one.by_weight).norm(), one.by_weight.norm()
    if apart <= tolerance(apart.dtype) * length:
        return True
    random, ones = torch.Generator().manual_seed(0), torch.ones(len(record.samples))
    effects = [
        (_made(step, nudged_state(state, random), record, adjoint, ones).by_weight - one.by_weight).norm()
        for _ in range(NUDGES)
    ]
    return bool(apart <= MARGIN * max(effects))


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of operations that vmap runs one by one; the timed steps include their cost."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
