"""Repeat a recorded training under other weights on the samples: many counterfactuals at once."""

from __future__ import annotations

import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import InputError, first_line
from dit_mlflow.influence import Query
from dit_mlflow.influence.kind import Course
from dit_mlflow.replay.loss_step import leaves
from dit_mlflow.replay.side_by_side import misses
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory import State, StepRecord
from dit_mlflow.workload.without_graph import without_graph

_log = logger_of(__name__)

Removal = Literal["weight", "absent"]
"""What removing a sample means: its weight becomes 0 and it stays in its batches, or it is not in them either."""


def is_absent(removal: str) -> bool:
    """Whether removed samples are taken out of their batches; raises :class:`InputError` for an unknown removal."""
    if removal not in get_args(Removal):
        raise InputError(
            f"removal={removal!r}; expected 'weight' (the sample's loss is taken away) or 'absent' (and the sample is "
            "not in its batches)"
        )
    return removal == "absent"


@dataclass(frozen=True, eq=False)
class Counterfactuals(ABC):
    """Trainings that differ from the recorded one in the weights of samples, numbered ``0 … R - 1``.

    Attributes:
        rows: ``[R, …]``, one for each; the subclass says what they are.
        absent: samples of weight 0 are taken out of their batches too.
    """

    rows: np.ndarray
    absent: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @abstractmethod
    def at(self, samples: np.ndarray) -> np.ndarray:
        """Weights ``[R, B]``, float64, of ``samples [B]``."""

    def changed_by(self, samples: np.ndarray) -> np.ndarray:
        """Which of them, bool ``[R]``, give one of ``samples`` another weight than 1."""
        return (self.at(samples) != 1).any(axis=1)

    def part(self, chosen: np.ndarray) -> Counterfactuals:
        """The counterfactuals numbered ``chosen``."""
        return replace(self, rows=self.rows[chosen])

    def identity(self) -> bytes:
        """Equal for equal weights."""
        how = " absent" if self.absent else ""
        return f"{type(self).__name__} {self.rows.dtype}{how}".encode() + self.rows.tobytes()


class LeftOut(Counterfactuals):
    """Each without one sample: ``rows [R]`` are their indices."""

    def at(self, samples: np.ndarray) -> np.ndarray:
        return (self.rows[:, None] != samples[None, :]).astype(np.float64)

    def changed_by(self, samples: np.ndarray) -> np.ndarray:
        # Without the weights [R, samples].
        return np.isin(self.rows, samples)


class Reweighted(Counterfactuals):
    """Each with weights of its own: ``rows [R, n]``."""

    def at(self, samples: np.ndarray) -> np.ndarray:
        return self.rows[:, samples].astype(np.float64)


Changes = dict[int, np.ndarray]
"""Step of measurement -> change of each query ``[queries, R]``."""

Advanced = Callable[[int], object]
"""Called with the number of steps made since the last call; negative if steps must be made again."""


@dataclass(frozen=True, eq=False)
class Baseline:
    """The recorded run along a course: its start, and states and query values ``[queries]`` by step of measurement."""

    start: State
    states: dict[int, State]
    values: dict[int, Tensor]


@dataclass(frozen=True, eq=False)
class Job:
    """One course, its recorded steps and run, and the counterfactuals to run along it."""

    course: Course
    steps: list[StepRecord]
    baseline: Baseline
    counterfactuals: Counterfactuals

    def part(self, rows: np.ndarray) -> Job:
        return replace(self, counterfactuals=self.counterfactuals.part(rows))

    def weights(self, step: StepRecord) -> Tensor:
        """``w`` of the step, ``[R, sum B]``; 1 outside of the course's ``start <= t < until``."""
        weights = self.counterfactuals.at(step.samples)
        if not self.course.start <= step.index < self.course.until:
            weights[:] = 1
        return torch.from_numpy(weights)


class Retraining:
    """Runs counterfactuals along a course, side by side or one after the other, whichever is faster in a timed step.

    Args:
        training_step: of the recorded training.
        queries: to evaluate at the course's measures.
        memory_budget: bytes that retrainings side by side may use.
        timed: otherwise side by side wherever that can be done, whatever a stop-watch says.
        refused: whether they are known not to run side by side.

    Attributes:
        refused: whether they have been found not to.
    """

    def __init__(
        self,
        training_step: TrainingStep,
        queries: Sequence[Query],
        memory_budget: int,
        timed: bool = True,
        refused: bool = False,
    ) -> None:
        self.training_step = training_step
        self.queries = queries
        self.memory_budget = memory_budget
        self.timed = timed
        self._chunk: int | None = None
        self.refused = refused
        self._side_by_side: bool | None = False if refused else None

    def run(self, job: Job, advanced: Advanced = lambda count: None) -> Changes:
        """Changes of the queries at each measure of the course."""
        found = None
        if job.counterfactuals.absent:
            # Each has batches of its own.
            return self._single_changes(job, advanced)
        with warnings.catch_warnings():
            # torch warns of operations that vmap runs one by one; the timed step includes their cost.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            if self._prefer_side_by_side(job.baseline.start, job.steps[0], len(job.counterfactuals)):
                found = self._side_by_side_changes(job, advanced)
            if found is None:
                self.refused |= bool(self._side_by_side)
                self._side_by_side = False
                found = self._single_changes(job, advanced)
        return found

    @property
    def copies(self) -> int:
        """How many ran side by side at the last call; 0 if they ran one after the other."""
        return (self._chunk or 0) if self._side_by_side else 0

    def ask(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        """Values of the queries, ``[queries]``."""
        dynamics = self.training_step.dynamics

        def values() -> Tensor:
            # A query may take gradients by the parameters.
            given = leaves(parameters) if torch.is_grad_enabled() else parameters
            return torch.stack([dynamics.evaluate(given, buffers, query) for query in self.queries])

        return without_graph(values)

    def _single_changes(self, job: Job, advanced: Advanced) -> Changes:
        """One retraining after the other."""
        changes = self._no_changes(job)
        for column in range(len(job.counterfactuals)):
            one = job.part(np.array([column]))
            state, over = job.baseline.start, None
            for step in job.steps:
                state = over = self.training_step(state, step, one.weights(step)[0], over, one.counterfactuals.absent)
                advanced(1)
                if (before := job.baseline.values.get(step.index + 1)) is not None:
                    after = self.ask(state.parameters, state.buffers)
                    changes[step.index + 1][:, column] = (after - before).cpu().numpy()
        return changes

    def _side_by_side_changes(self, job: Job, advanced: Advanced) -> Changes | None:
        """Retrainings under ``vmap``, in chunks; ``None`` if row 0 of one, the control, is not the recorded run."""
        start, count = job.baseline.start, len(job.counterfactuals)
        size = self._chunk_size(start, job.steps[0])
        changes = self._no_changes(job)
        made = 0
        for first in range(0, count, size):
            chunk = np.arange(first, min(first + size, count))
            part, copies = job.part(chunk), len(chunk)
            states, over = start.side_by_side(1 + copies), None
            for made_here, step in enumerate(job.steps, start=1):
                weights = part.weights(step)
                weights = torch.cat([torch.ones_like(weights[:1]), weights])
                try:
                    states = over = self.training_step(states, step, weights, over)
                except NotImplementedError as error:  # Of a step that goes another way than the one that was timed.
                    _log.info("step %d cannot be made side by side: %s", step.index, first_line(error))
                    advanced(-made)
                    return None
                advanced(copies)
                made += copies
                if (recorded := job.baseline.states.get(step.index + 1)) is not None:
                    if not self._control_holds(states, recorded, start, job.steps[:made_here]):
                        advanced(-made)
                        return None
                    values = self._ask_all(states)
                    changes[step.index + 1][:, chunk] = (values[:, 1:] - values[:, :1]).cpu().numpy()
        return changes

    def _control_holds(self, states: State, recorded: State, origin: State, steps: Sequence[StepRecord]) -> bool:
        if missed := misses(self.training_step, steps, origin, recorded, states, copy=0):
            name = max(missed, key=lambda name: missed[name])
            _log.warning(
                "retrainings side by side: the control run misses %r of the recorded one by %.2g; random draws differ "
                "under vmap. Retraining one after the other instead",
                name,
                missed[name],
            )
        return not missed

    def _prefer_side_by_side(self, start: State, step: StepRecord, count: int) -> bool:
        """Time one step of each way and compare the times that ``count`` retrainings would take."""
        if self._side_by_side is None:
            size = min(self._chunk_size(start, step), count)
            try:
                together = self._time_step(start, step, size + 1)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                _log.info("retrainings cannot run side by side: %s", first_line(error))
                _log.warning("this model cannot be retrained side by side; retraining one after the other instead")
                self._side_by_side, self.refused = False, True
            else:
                single = self._time_step(start, step, None) if self.timed else math.inf
                self._side_by_side = together * math.ceil(count / size) < single * count
        return self._side_by_side

    def _time_step(self, start: State, step: StepRecord, copies: int | None) -> float:
        state = start if copies is None else start.side_by_side(copies)
        over: State | None = None
        weights = torch.ones((len(step.samples),) if copies is None else (copies, len(step.samples)))
        device = self.training_step.dynamics.device
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            state = over = self.training_step(state, step, weights, over)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
        if copies is not None:
            self._ask_all(state)
        return min(times)

    def _chunk_size(self, start: State, step: StepRecord) -> int:
        """How many retrainings fit the budget: states, gradients, and what one forward pass keeps for backward."""
        if self._chunk is None:
            each = 3 * start.nbytes + 2 * self.training_step.bytes_kept(start, step)
            self._chunk = max(1, self.memory_budget // max(each, 1))
        return self._chunk

    def _ask_all(self, states: State) -> Tensor:
        """Values of the queries for every copy, ``[queries, K]``."""
        try:
            with torch.no_grad():
                return torch.func.vmap(self.ask, out_dims=1, randomness="same")(states.parameters, states.buffers)
        except RuntimeError:
            # A query may do what vmap cannot, such as take a gradient.
            copies = len(next(iter(states.parameters.values())))
            each = (State(states.parameters, states.buffers).map(itemgetter(copy)) for copy in range(copies))
            return torch.stack([self.ask(state.parameters, state.buffers) for state in each], dim=1)

    def _no_changes(self, job: Job) -> Changes:
        return {step: np.zeros((len(self.queries), len(job.counterfactuals))) for step in job.baseline.values}
