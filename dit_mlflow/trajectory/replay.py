"""Rebuild every ``s_t`` from the checkpoints, forwards and backwards, within bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.trajectory.dataset import check_dataset
from dit_mlflow.trajectory.dynamics import Dynamics
from dit_mlflow.trajectory.rollout import Rollout
from dit_mlflow.trajectory.state import REPLAY_TOLERANCE, State, relative_drift
from dit_mlflow.trajectory.trajectory import Trajectory
from dit_mlflow.trajectory.workload import Workload

STATES_IN_MEMORY = 2**30
"""Bytes that a backward walk may spend on states before it replays a stretch twice instead."""


class Replay:
    """Walks a trajectory in the recorded dtype, or in another from ``s_0``.

    Construction replays the steps before the first checkpoint after ``s_0`` (one step, by default) and compares,
    so that a workload which is not the recorded one is refused before any long work. In another dtype nothing later can
    be compared, so all checkpoints are met first, in the recorded dtype, at the cost of one training.

    Attributes:
        dynamics: the step's gradient, for callers that need more than states.
        drift: checkpoint step -> relative drift found there so far (recorded dtype only).
    """

    def __init__(self, trajectory: Trajectory, workload: Workload, dtype: torch.dtype | None = None) -> None:
        check_dataset(workload.train_set, trajectory.manifest.dataset)
        self.trajectory = trajectory
        self.drift: dict[int, float] = {}
        self.dynamics = Dynamics(workload, trajectory.manifest)
        self._anchors = trajectory.checkpoint_steps
        if len(self._anchors) > 1:
            self._meet(self._anchors[1])
        if dtype is not None and dtype != _recorded_dtype(trajectory):
            self._meet(self._anchors[-1])
            self.dynamics = Dynamics(workload, trajectory.manifest, dtype)
            self._anchors = (0,)

    @property
    def max_drift(self) -> float:
        """Largest drift found so far; 0 = bit for bit."""
        return max(self.drift.values(), default=0.0)

    def forward(self, a: int, b: int) -> Iterator[State]:
        """Yield ``s_a … s_b``."""
        if not 0 <= a <= b <= self.trajectory.num_steps:
            raise InputError(f"states {a} … {b} were asked; the trajectory has 0 … {self.trajectory.num_steps}")
        anchor = max(step for step in self._anchors if step <= a)
        if anchor == b:
            yield self._anchor(b)
            return
        end = self._next_anchor(b)
        for lo, hi in pairwise([anchor, *(step for step in self._anchors if anchor < step < end), end]):
            for t, state in enumerate(self._segment(self._anchor(lo), lo, hi), start=lo):
                if a <= t <= b and (t < hi or t == end):
                    yield state

    def backward(self, a: int, b: int) -> Iterator[tuple[int, State]]:
        """Yield ``(b, s_b), (b - 1, s_{b-1}), …, (a, s_a)``.

        Memory: the states of one stretch between checkpoints, about ``2 sqrt(T)`` of them by default. A longer
        stretch (few checkpoints, or another dtype) is held whole if it fits in :data:`STATES_IN_MEMORY`, else
        it is walked in ``sqrt`` pieces, at the cost of one more replay.
        """
        anchors = [step for step in self._anchors if step < b]
        hi, first = self._next_anchor(b), True
        for lo in reversed(anchors):
            for t, state in self._backward_segment(self._anchor(lo), lo, hi):
                if t < a:
                    return
                if t <= b and (t < hi or first):
                    yield t, state
            hi, first = lo, False
        if b == 0:
            yield 0, self._anchor(0)

    def _backward_segment(self, start: State, lo: int, hi: int) -> Iterator[tuple[int, State]]:
        length = hi - lo
        held = max(2 * math.isqrt(self.trajectory.num_steps) + 1, STATES_IN_MEMORY // max(start.nbytes, 1))
        if length <= held:
            states = list(self._segment(start, lo, hi))
            while states:
                yield lo + len(states) - 1, states.pop()
            return
        stride = max(held // 2, math.isqrt(length))
        anchors = {
            t: state
            for t, state in enumerate(self._segment(start, lo, hi), start=lo)
            if t < hi and (t - lo) % stride == 0
        }
        stop = hi
        for at in reversed(list(anchors)):
            for t, state in self._backward_segment(anchors.pop(at), at, stop):
                if t < stop or stop == hi:
                    yield t, state
            stop = at

    def _segment(self, start: State, lo: int, hi: int) -> Iterator[State]:
        """Replay ``s_lo … s_hi`` from ``start``; a checkpoint at ``hi`` is compared, and yielded instead."""
        rollout = Rollout(self.dynamics, self.trajectory.manifest.optimizer, start)
        state = start
        for t in range(lo, hi):
            yield state
            step = self.trajectory.step(t)
            rollout.advance(step, self.dynamics.load(step))
            state = rollout.snapshot()
        if hi in self._anchors:
            recorded = self._anchor(hi)
            self._compare(hi, state, recorded, start)
            state = recorded
        yield state

    def _meet(self, checkpoint: int) -> None:
        """Replay up to a checkpoint for the sake of the comparison."""
        for _ in self.forward(0, checkpoint):
            pass

    def _next_anchor(self, t: int) -> int:
        """The first anchor at ``t`` or later, or ``t`` if there is none: a stretch should end in a comparison."""
        return min((step for step in self._anchors if step >= t), default=t)

    def _compare(self, t: int, replayed: State, recorded: State, origin: State) -> None:
        drift = self.drift[t] = relative_drift(replayed, recorded, origin)
        if drift > REPLAY_TOLERANCE:
            raise TrajectoryError(
                f"replaying up to step {t} misses the checkpoint there by {drift:.2g} of the distance that "
                f"training moved (allowed {REPLAY_TOLERANCE:g}): the workload does not do what the recorded "
                "loop did. Compare its loss (one value per sample), coefficients, accumulate, clipping, "
                "regularizer and data with the loop's. Batches that the loop drew but did not use (continue, a step "
                "that a GradScaler skipped) need recorder.discard() there; a loss scaled by hand needs coefficients"
            )

    def _anchor(self, t: int) -> State:
        return self.trajectory.checkpoint(t).to(self.dynamics.device, self.dynamics.dtype)


def _recorded_dtype(trajectory: Trajectory) -> torch.dtype:
    name = next(iter(trajectory.manifest.model.parameters.values())).dtype
    return getattr(torch, name)
