"""Ground truth: train again without each sample, exactly as recorded otherwise."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dit_mlflow.errors import InputError
from dit_mlflow.influence import Influence, Kind, Query, Window
from dit_mlflow.influence.kind import Course, courses
from dit_mlflow.influence.question import Question
from dit_mlflow.trajectory import State, Trajectory, Workload
from dit_mlflow.trajectory.random_state import preserved_random_state
from dit_mlflow.trajectory.replay import Replay
from dit_mlflow.trajectory.rollout import Rollout
from dit_mlflow.trajectory.state import relative_drift
from dit_mlflow.trajectory.step import Step

_log = logging.getLogger(__name__)

CONTROL_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far the control (no sample removed) of a batched retraining may be from the recorded run, relative to
how far training moved."""


def leave_one_out(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    samples: Sequence[int] | int | None = None,
    dtype: torch.dtype = torch.float64,
    sample_seed: int = 0,
    memory_budget: int = 2 * 2**30,
) -> Influence:
    """Exact influence by retraining without each sample: ground truth for :func:`dit_mlflow.track`.

    Removing sample ``j`` sets its weight to 0 where the kind says so, and nothing else: other samples' coefficients,
    batch order, hyperparameters and random draws are as recorded; optimizer state and clipping follow.

    Args:
        trajectory, workload, windows, kind, queries: as for :func:`dit_mlflow.track`.
        samples: which samples to remove: indices, a number of them (drawn by ``sample_seed``), or ``None`` for all.
        dtype: of the retraining; in float32 rounding can hide the effect of one sample.
        sample_seed: seed of that draw.
        memory_budget: bytes that retrainings side by side may use.

    Returns:
        Scores ``[windows, queries, training samples]``, with the sign of :func:`dit_mlflow.track`; NaN for samples that
        were not asked for. A sample that a window never met scores exactly 0 (``local``, ``final``).

    Raises:
        InputError: a window, kind, query or sample that cannot be used.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.

    Cost: one training from the window's start per sample (``cumulative``: one for all windows). Retrainings run side by
    side under ``torch.func.vmap`` in chunks that fit ``memory_budget``, or one after the other, whichever a timed
    step shows to be faster.
    """
    question = Question.of(trajectory, workload, windows, kind, queries)
    removed = _choose_samples(samples, workload.num_samples, sample_seed)
    scores = np.full(question.shape, np.nan)
    scores[:, :, removed] = 0.0
    with preserved_random_state():
        retraining = _Retraining(trajectory.replay(workload, dtype), question.queries, memory_budget)
        for course in courses(question.kind, question.windows, trajectory.num_steps):
            changes = retraining.run(course, removed)
            for step, window, sign in course.measures:
                scores[window][:, removed] += sign * changes[step]
        drift = retraining.replay.max_drift
    return question.answer(scores, "leave_one_out", str(dtype), num_removed=len(removed), max_drift=drift)


def _choose_samples(samples: Sequence[int] | int | None, total: int, seed: int) -> np.ndarray:
    if samples is None:
        return np.arange(total)
    if isinstance(samples, Integral):
        count = int(samples)
        if not 1 <= count <= total:
            raise InputError(f"samples={count}; expected 1 … {total}, or None for all of them")
        return np.sort(np.random.default_rng(seed).choice(total, size=count, replace=False))
    given = np.atleast_1d(np.asarray(samples))
    indices = np.unique(given)
    if len(indices) == 0 or given.dtype.kind not in "iu" or indices[0] < 0 or indices[-1] >= total:
        raise InputError(f"samples={given[:5].tolist()}…: expected indices within 0 … {total - 1}")
    return indices


Changes = dict[int, np.ndarray]
"""Step of measurement -> change of each query ``[queries, samples]``."""


@dataclass(frozen=True, eq=False)
class _Baseline:
    """The recorded run along a course: where it starts, and its states and query values ``[queries]`` at measures."""

    start: State
    states: dict[int, State]
    values: dict[int, Tensor]


class _Retraining:
    """Runs courses without one sample at a time."""

    def __init__(self, replay: Replay, queries: Sequence[Query], memory_budget: int) -> None:
        self.replay = replay
        self.dynamics = replay.dynamics
        self.layout = replay.trajectory.manifest.optimizer
        self.queries = queries
        self.memory_budget = memory_budget
        self._chunk: int | None = None
        self._side_by_side: bool | None = None

    def run(self, course: Course, samples: np.ndarray) -> Changes:
        """Changes of the queries at each measure of ``course``; 0 for samples that it never meets."""
        steps = [self.replay.trajectory.step(t) for t in range(course.start, course.stop)]
        met = np.unique(np.concatenate([step.samples for step in steps if step.index < course.until]))
        affected = np.flatnonzero(np.isin(samples, met))
        baseline = self._baseline(course)
        changes = {c: np.zeros((len(self.queries), len(samples))) for c in baseline.states}
        if len(affected) == 0:
            return changes
        found = None
        if self._prefer_side_by_side(baseline.start, steps[0], len(affected)):
            found = self._side_by_side_changes(course, steps, baseline, samples[affected])
        if found is None:
            self._side_by_side = False
            found = self._single_changes(course, steps, baseline, samples[affected])
        for c, change in found.items():
            changes[c][:, affected] = change
        return changes

    def _baseline(self, course: Course) -> _Baseline:
        asked = {step for step, _, _ in course.measures}
        states: dict[int, State] = {}
        start: State | None = None
        for t, state in enumerate(self.replay.forward(course.start, course.stop), start=course.start):
            if t == course.start:
                start = state
            if t in asked:
                states[t] = state
        assert start is not None
        values = {t: self._ask(state.parameters, state.buffers) for t, state in states.items()}
        return _Baseline(start, states, values)

    def _single_changes(
        self, course: Course, steps: Sequence[Step], baseline: _Baseline, samples: np.ndarray
    ) -> Changes:
        """One retraining after the other, each as the recorded one ran."""
        changes: Changes = {c: np.zeros((len(self.queries), len(samples))) for c in baseline.values}
        for column, sample in enumerate(_progress(samples, course)):
            rollout = Rollout(self.dynamics, self.layout, baseline.start)
            for step in steps:
                weights = _weights(step, course, np.array([sample]), self._like(rollout))[0]
                rollout.advance(step, self.dynamics.load(step), weights)
                if (before := baseline.values.get(step.index + 1)) is not None:
                    after = self._ask(rollout.parameters, rollout.buffers)
                    changes[step.index + 1][:, column] = (after - before).cpu().numpy()
        return changes

    def _side_by_side_changes(
        self, course: Course, steps: Sequence[Step], baseline: _Baseline, samples: np.ndarray
    ) -> Changes | None:
        """Retrainings under one ``vmap``, in chunks; row 0 of each removes nothing.

        ``None`` if that row misses the recorded run.
        """
        size = self._chunk_size(baseline.start, steps[0])
        changes: Changes = {c: np.zeros((len(self.queries), len(samples))) for c in baseline.values}
        for first in _progress(range(0, len(samples), size), course):
            chunk = slice(first, first + size)
            removed = np.concatenate([[-1], samples[chunk]])
            rollout = Rollout(self.dynamics, self.layout, baseline.start, copies=len(removed))
            for step in steps:
                weights = _weights(step, course, removed, self._like(rollout))
                rollout.advance(step, self.dynamics.load(step), weights)
                if (state := baseline.states.get(step.index + 1)) is not None:
                    if not self._control_holds(rollout, state, baseline.start):
                        return None
                    values = self._ask_all(rollout)
                    changes[step.index + 1][:, chunk] = (values[:, 1:] - values[:, :1]).cpu().numpy()
        return changes

    def _control_holds(self, rollout: Rollout, recorded: State, origin: State) -> bool:
        control = State(
            {name: value.detach()[0] for name, value in rollout.parameters.items()},
            {name: value[0] for name, value in rollout.buffers.items()},
        )
        drift = relative_drift(control, recorded, origin)
        if drift <= CONTROL_TOLERANCE.get(self._like(rollout).dtype, 1e-3):
            return True
        _log.warning(
            "batched leave-one-out: its control run misses the recorded one by %.2g (random draws that differ "
            "under vmap, most likely); retraining one sample at a time instead",
            drift,
        )
        return False

    def _prefer_side_by_side(self, start: State, step: Step, count: int) -> bool:
        """Time one step of each way and compare what ``count`` samples would take."""
        if self._side_by_side is None:
            size = min(self._chunk_size(start, step), count)
            try:
                together = self._time_step(start, step, size + 1)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                _log.warning("batched leave-one-out is not possible here (%s); one sample at a time", error)
                self._side_by_side = False
            else:
                single = self._time_step(start, step, None)
                self._side_by_side = together * math.ceil(count / size) < single * count
        return self._side_by_side

    def _time_step(self, start: State, step: Step, copies: int | None) -> float:
        rollout = Rollout(self.dynamics, self.layout, start, copies)
        shape = (len(step.samples),) if copies is None else (copies, len(step.samples))
        weights = self._like(rollout).new_ones(shape)
        times = []
        for _ in range(3):
            batches = self.dynamics.load(step)
            begun = time.perf_counter()
            rollout.advance(step, batches, weights)
            if self.dynamics.device.type == "cuda":
                torch.cuda.synchronize(self.dynamics.device)
            times.append(time.perf_counter() - begun)
        if copies is not None:
            self._ask_all(rollout)
        return min(times)

    def _chunk_size(self, start: State, step: Step) -> int:
        """Retrainings that fit the budget: states, gradients, and what one forward pass keeps for backward."""
        if self._chunk is None:
            each = 3 * start.nbytes + 2 * self.dynamics.bytes_kept(start, step)
            self._chunk = max(1, self.memory_budget // max(each, 1))
        return self._chunk

    def _ask(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        """Values of the queries, ``[queries]``."""
        with torch.no_grad():
            return torch.stack([self.dynamics.evaluate(parameters, buffers, query) for query in self.queries])

    def _ask_all(self, rollout: Rollout) -> Tensor:
        """Values of the queries for every copy, ``[queries, K]``."""
        with torch.no_grad():
            return torch.func.vmap(self._ask, out_dims=1)(rollout.parameters, rollout.buffers)

    @staticmethod
    def _like(rollout: Rollout) -> Tensor:
        return next(iter(rollout.parameters.values())).detach()


def _progress(items: Sequence[int] | np.ndarray, course: Course) -> Iterable[int]:
    return tqdm(items, desc=f"leave-one-out {course.start}-{course.until}", disable=None)


def _weights(step: Step, course: Course, removed: np.ndarray, like: Tensor) -> Tensor:
    """``w`` of the step, ``[removed, sum B]``: 0 where the removed sample stands and the course says absent."""
    absent = (step.samples[None, :] == removed[:, None]) & (course.start <= step.index < course.until)
    return torch.from_numpy(~absent).to(like.device, like.dtype)
