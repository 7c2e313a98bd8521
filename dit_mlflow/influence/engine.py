"""The backward walk over a trajectory, with all live adjoints along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.kind import Sweep
from dit_mlflow.influence.query import Query, refuse_not_finite
from dit_mlflow.influence.window_scores import Row, WindowScores
from dit_mlflow.progress import progress_bar
from dit_mlflow.replay.adjoint import Adjoint, grad_or_zeros
from dit_mlflow.replay.not_finite import are_finite, refuse_derivative
from dit_mlflow.replay.replay import Replay
from dit_mlflow.replay.training_step import WeightsOf
from dit_mlflow.trajectory import State

ADJOINTS_IN_MEMORY = 2**30
"""Bytes that adjoints may take, unless told otherwise, before queries are answered in several walks."""


class Engine:
    """Walks the trajectory backwards and carries all live adjoints along.

    Args:
        replay: of the trajectory; its drift is known afterwards.
        memory_budget: bytes for the states that the walk holds, and as many again for adjoints; ``None`` =
            what :meth:`Replay.backward` takes, and :data:`ADJOINTS_IN_MEMORY`.
        shown: whether each walk has a progress bar.
    """

    def __init__(self, replay: Replay, memory_budget: int | None = None, shown: bool = True) -> None:
        self.replay = replay
        self.memory_budget = memory_budget
        self.shown = shown
        self.training_step = self._asked_by = replay.training_step
        self._chosen = False

    def parts(self, queries: int, planned: Sequence[Sweep], num_windows: int) -> Iterator[slice]:
        """Which queries to answer in one walk: as many as memory allows."""
        size = queries if queries == 1 else min(queries, self.queries_at_once(planned, num_windows))
        return (slice(first, first + size) for first in range(0, queries, size))

    def queries_at_once(self, planned: Sequence[Sweep], num_windows: int) -> int:
        """How many queries the memory budget allows in one walk.

        A row of the adjoint takes its parameters and optimizer state, before and after a step, what a step's backward
        pass keeps, and two lines of scores.
        """
        at_once = max(sum(other.stop < sweep.start <= other.start for other in planned) for sweep in planned)
        first = self.replay.trajectory.step(0)
        state, step = self.replay.checkpoint(0), self.training_step
        kept = step.bytes_kept(state, first) if step.batched else 0
        scores = 8 * step.dynamics.workload.num_samples * (num_windows + at_once)
        each = at_once * (4 * self._state_bytes + 2 * kept) + scores
        return max(1, (self.memory_budget or ADJOINTS_IN_MEMORY) // each)

    @property
    def _state_bytes(self) -> int:
        last = self.replay.trajectory.checkpoint_steps[-1]
        return self.replay.trajectory.checkpoint(last).nbytes

    def run(
        self,
        queries: Sequence[Query],
        planned: Sequence[Sweep],
        num_windows: int,
        weights: WeightsOf | None = None,
    ) -> np.ndarray:
        """Scores ``[windows, queries, samples]``, float64: ``-dq / dw``, at ``w = 1``.

        With ``weights``, at these, along the training that they make: it leaves the recorded one at the first step that
        is swept.
        """
        collected = WindowScores(num_windows, len(queries), self.training_step.dynamics.workload.num_samples, planned)
        first, last = min(sweep.stop for sweep in planned), max(sweep.start for sweep in planned)
        self._choose(first, last, queries)
        rows: list[Row] = []
        beginning: dict[int, list[Sweep]] = {}
        for sweep in planned:
            beginning.setdefault(sweep.start, []).append(sweep)
        adjoint: Adjoint | None = None
        needs_values = self.training_step.needs_optimizer_values
        with progress_bar(last - first, "influence", shown=self.shown) as progress:
            for t, state in self.replay.backward(first, last, self.memory_budget, needs_values, weights):
                if adjoint is not None:
                    record = self.replay.trajectory.step(t)
                    at = None if weights is None else weights(record)
                    adjoint, by_weight = self.training_step.pull_back(state, record, adjoint, at)
                    # Along another training, a draw that diverged is left out.
                    if weights is None and not are_finite([by_weight, adjoint.parameters, adjoint.buffers]):
                        refuse_derivative(self.training_step, state, record, adjoint)
                    # Removal takes the weight away.
                    collected.add(rows, t, torch.from_numpy(record.samples), -by_weight)
                    alive = [position for position, row in enumerate(rows) if row.sweep.stop < t]
                    if len(alive) < len(rows):
                        rows = [rows[position] for position in alive]
                        adjoint = adjoint.keep(alive) if alive else None
                    progress.update()
                for sweep in beginning.get(t, ()):
                    started = self._start(state, queries, None if weights is not None else t)
                    adjoint = started if adjoint is None else adjoint.append(started)
                    rows += [Row(sweep, query) for query in range(len(queries))]
        return collected.scores.numpy()

    def _choose(self, first: int, last: int, queries: Sequence[Query]) -> None:
        """Once: the steps that give gradients of steps and of queries their right derivatives."""
        if self._chosen:
            return
        self._chosen = True
        check = self.replay.derivative_check(first, last)
        if check is not None:
            self.training_step = self._asked_by = check.step()
            if self.training_step is self.replay.training_step:
                self._asked_by = check.asking(queries)

    @property
    def details(self) -> dict[str, Any]:
        """What a result says of the computation."""
        swept = self.training_step is not self.replay.training_step
        return {"max_drift": self.replay.max_drift, **({"derivative": "traced"} if swept else {})}

    def _start(self, state: State, queries: Sequence[Query], t: int | None) -> Adjoint:
        """``lambda = grad q`` at ``state``, one row per query; 0 for the optimizer's state.

        At a recorded ``s_t``, both must be finite.
        """
        step = self.training_step
        held = {name: state.parameters[name].detach().requires_grad_() for name in step.followed_parameters.shapes}
        moving = {name: state.buffers[name].detach().requires_grad_() for name in step.followed_buffers.shapes}
        parameters, buffers = {**state.parameters, **held}, {**state.buffers, **moving}
        by_parameters, by_buffers = [], []
        for query in queries:
            value = self._asked_by.ask(parameters, buffers, query)
            if not value.requires_grad:
                raise InputError(
                    f"query {query.name!r} does not depend on the trained parameters by differentiable operations; "
                    "expected a tensor computed from the model, without .item(), .detach() or no_grad()"
                )
            found = grad_or_zeros(value, [*held.values(), *moving.values()])
            if t is not None:
                refuse_not_finite(query, value, state, t, step.dynamics, self.replay.trajectory)
                if not are_finite(found):
                    raise UnsupportedError(
                        f"the derivative of query {query.name!r} is not finite at step {t}: a root, a norm or a "
                        "standard deviation at 0, or a division by what can be 0. Add a small number inside the root, "
                        "or use leave_one_out, which takes no derivative"
                    )
            by_parameters.append(step.followed_parameters.join(found[: len(held)]))
            by_buffers.append(torch.cat([value.new_zeros(0), *(part.reshape(-1) for part in found[len(held) :])]))
        return Adjoint(torch.stack(by_parameters), torch.stack(by_buffers))
