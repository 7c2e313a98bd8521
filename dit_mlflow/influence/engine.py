"""The backward walk over a trajectory, with all live adjoints along."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.kind import Sweep
from dit_mlflow.influence.query import Query, refuse_not_finite
from dit_mlflow.progress import progress_bar
from dit_mlflow.replay.adjoint import Adjoint, grad_or_zeros
from dit_mlflow.replay.compiled_step import Compile, CompiledStep, check_compile
from dit_mlflow.replay.derivative_check import DerivativeCheck
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.replay.not_finite import are_finite, refuse_derivative
from dit_mlflow.replay.own_step import OwnStep
from dit_mlflow.replay.replay import Replay
from dit_mlflow.replay.right_queries import RightQueries
from dit_mlflow.replay.side_by_side import Together
from dit_mlflow.replay.traced_step import TracedStep
from dit_mlflow.replay.training_step import TrainingStep, WeightsOf
from dit_mlflow.trajectory import State, StepRecord

ADJOINTS_IN_MEMORY = 2**30
"""Default bytes for adjoints; queries that need more are answered in several walks."""

ONLY_STANDARD = "eager: only a loss, then an optimizer, differentiated by autograd, is compiled"


class Engine:
    """Walks a trajectory backwards and pulls all adjoints of the current step back together.

    Args:
        replay: of the trajectory.
        memory_budget: bytes for the states that the walk holds, and as many again for adjoints; ``None`` = the default
            of :meth:`Replay.backward`, and :data:`ADJOINTS_IN_MEMORY`.
        shown: whether each walk has a progress bar.
        compile: whether the standard step is compiled, see :func:`dit_mlflow.track`.
    """

    def __init__(
        self,
        replay: Replay,
        memory_budget: int | None = None,
        shown: bool = True,
        compile: Compile = "never",
    ) -> None:
        self.replay = replay
        self.memory_budget = memory_budget
        self.shown = shown
        self.training_step = replay.training_step
        self._queries = RightQueries(replay.training_step, None)
        self._check: DerivativeCheck | None = None
        self._looked_at: list[tuple[int, int]] = []
        self._compile = check_compile(compile)
        self._compiled: CompiledStep | None = None
        self._walks = 1

    def parts(self, queries: int, planned: Sequence[Sweep], num_windows: int) -> Iterator[slice]:
        """Slices of the queries, each of as many as the memory budget allows in one walk.

        Each row of an adjoint takes memory for parameters and optimizer state before and after a step, for what a
        step's backward pass keeps, and for scores.
        """
        size = queries
        if queries > 1:
            trajectory, step = self.replay.trajectory, self.training_step
            at_once = max(sum(other.stop < sweep.start <= other.start for other in planned) for sweep in planned)
            kept = step.bytes_kept(self.replay.checkpoint(0), trajectory.step(0)) if step.batched else 0
            scores = 8 * step.dynamics.workload.num_samples * (num_windows + at_once)
            each = at_once * (4 * trajectory.checkpoint(trajectory.checkpoint_steps[-1]).nbytes + 2 * kept) + scores
            size = min(queries, max(1, (self.memory_budget or ADJOINTS_IN_MEMORY) // each))
        self._walks = math.ceil(queries / size)
        return (slice(first, first + size) for first in range(0, queries, size))

    def run(
        self,
        queries: Sequence[Query],
        planned: Sequence[Sweep],
        num_windows: int,
        weights: WeightsOf | None = None,
        together: Together | None = None,
    ) -> np.ndarray:
        """Scores ``[windows, queries, samples]``, float64: ``-dq / dw``, at ``w = 1``.

        With ``weights``, the derivative is taken at these, along the training under them from the first swept step on.
        With a step of ``K`` trainings ``together``, weights are ``[K, sum B]`` and scores ``[windows, queries,
        K * samples]``, training after training.
        """
        while True:
            try:
                return self._run(queries, planned, num_windows, weights, together)
            except _AnotherPath as error:
                self._take(TracedStep(self.training_step.dynamics))
                if together is not None:
                    raise UnsupportedError(str(error)) from error

    def _run(
        self,
        queries: Sequence[Query],
        planned: Sequence[Sweep],
        num_windows: int,
        weights: WeightsOf | None,
        together: Together | None,
    ) -> np.ndarray:
        copies, samples = None if together is None else together.copies, self.replay.dynamics.workload.num_samples
        offsets = samples * torch.arange(copies or 1)[:, None]
        collected = WindowScores(num_windows, len(queries), samples * len(offsets), planned)
        first, last = min(sweep.stop for sweep in planned), max(sweep.start for sweep in planned)
        self.choose(first, last)
        step = together or self._compiled or self.training_step
        if self._compiled is not None:
            self._compiled.to_go = (last - first) * self._walks
        rows: list[Row] = []
        beginning: dict[int, list[Sweep]] = {}
        for sweep in planned:
            beginning.setdefault(sweep.start, []).append(sweep)
        adjoint: Adjoint | None = None
        needs_values = self.training_step.needs_optimizer_values
        walk = self.replay.backward(first, last, self.memory_budget, needs_values, weights, copies)
        with progress_bar(last - first, "influence", shown=self.shown) as progress:
            for t, state in walk:
                if adjoint is not None:
                    record = self.replay.trajectory.step(t)
                    at = None if weights is None else weights(record)
                    self._refuse_another_path(state, record, copies)
                    adjoint, by_weight = step.pull_back(state, record, adjoint, at)
                    # Under other weights, training may diverge; the caller leaves such a draw out.
                    if weights is None and not are_finite([by_weight, adjoint.parameters, adjoint.buffers]):
                        refuse_derivative(step, state, record, adjoint)
                    # Removal lowers the weight.
                    met = torch.from_numpy(record.samples) + offsets
                    collected.add(rows, t, met.view(-1), -by_weight.flatten(1))
                    alive = [position for position, row in enumerate(rows) if row.sweep.stop < t]
                    if len(alive) < len(rows):
                        rows = [rows[position] for position in alive]
                        adjoint = adjoint.keep(alive) if alive else None
                    progress.update()
                for sweep in beginning.get(t, ()):
                    started = self.start(state, queries, t if weights is None else None, together)
                    adjoint = started if adjoint is None else adjoint.append(started)
                    rows += [Row(sweep, query) for query in range(len(queries))]
        return collected.scores.numpy()

    def _refuse_another_path(self, state: State, record: StepRecord, copies: int | None) -> None:
        if self._switched or self._check is None or not self._check.wants(record):
            return
        found = State(state.parameters, state.buffers)
        if not self._check.right_at(found if copies is None else found.map(lambda value: value[0]), record):
            raise _AnotherPath(f"step {record.index} goes another way than those that were looked at before")

    def choose(self, first: int, last: int) -> None:
        """Choose a step whose derivatives are right, where they have not been compared yet.

        Args:
            first, last: the walk's first and last state.
        """
        if self._switched or any(a <= first and last <= b for a, b in self._looked_at):
            return
        check = self.replay.derivative_check(first, last)
        if not self._looked_at:
            self._queries = self.replay.right_queries(first, last)
        self._looked_at.append((first, last))
        if check is not None:
            self._check = check
            self._take(check.step())
        if self._compile != "never" and self._compiled is None and type(self.training_step) is LossStep:
            self._compiled = CompiledStep(self.training_step.dynamics, always=self._compile == "always")

    @property
    def _switched(self) -> bool:
        """Whether a trace has taken the place of the replay's step."""
        return self.training_step is not self.replay.training_step

    def _take(self, step: TrainingStep) -> None:
        """Pull back by ``step`` from now on."""
        if step is not self.training_step:
            self.training_step = step
            self._compiled = None

    @property
    def plain(self) -> bool:
        """Whether autograd's derivatives, of queries and of steps of a loss and an optimizer, are right."""
        return type(self.training_step) in (LossStep, OwnStep) and self._queries.plain

    @property
    def details(self) -> dict[str, Any]:
        """Metadata of the computation, for a result."""
        traced = {"derivative": "traced"} if self.training_step.by_trace else {}
        chosen = ONLY_STANDARD if self._compiled is None else self._compiled.choice
        compiled = {} if self._compile == "never" else {"compile": chosen}
        return {"max_drift": self.replay.max_drift, **traced, **compiled}

    def start(
        self, state: State, queries: Sequence[Query], t: int | None = None, together: Together | None = None
    ) -> Adjoint:
        """``lambda = grad q`` at ``state``, one row per query; 0 for the optimizer's state.

        If ``state`` is the recorded ``s_t``, raises unless queries and gradients are finite.
        """
        step = together or self.training_step
        asked_by = step if together or self._switched else self._queries
        held = {name: state.parameters[name].detach().requires_grad_() for name in step.followed_parameters.shapes}
        moving = {name: state.buffers[name].detach().requires_grad_() for name in step.followed_buffers.shapes}
        parameters, buffers = {**state.parameters, **held}, {**state.buffers, **moving}
        by_parameters, by_buffers = [], []
        for query in queries:
            value = asked_by.ask(parameters, buffers, query)
            if not value.requires_grad:
                raise InputError(
                    f"query {query.name!r} does not depend on the trained parameters by differentiable operations; "
                    "expected a tensor computed from the model, without .item(), .detach() or no_grad()"
                )
            if together is not None and not self._queries.right(query, value):
                raise UnsupportedError(f"query {query.name!r} has no right derivative for models side by side")
            found = grad_or_zeros(value, [*held.values(), *moving.values()])
            if t is not None:
                refuse_not_finite(query, value, state, t, step.dynamics, self.replay.trajectory)
                if not are_finite(found):
                    raise UnsupportedError(
                        f"the derivative of query {query.name!r} is not finite at step {t}. Look for a root, a norm or "
                        "a standard deviation at 0 (add a small number inside the root), or a division by 0; or use "
                        "leave_one_out, which takes no derivative"
                    )
            by_parameters.append(step.followed_parameters.join(found[: len(held)]))
            by_buffers.append(torch.cat([value.new_zeros(0), *(part.reshape(-1) for part in found[len(held) :])]))
        return Adjoint(torch.stack(by_parameters), torch.stack(by_buffers))


class _AnotherPath(Exception):
    """Only a trace has the right derivative of a step, although autograd had it at the steps that were checked."""


@dataclass(frozen=True)
class Row:
    """One row of the adjoint: its sweep, and the position of its query."""

    sweep: Sweep
    query: int


class WindowScores:
    """Scores ``[windows, queries, samples]``, float64, filled in by a backward walk.

    Weight gradients are first summed per row over steps that belong to the same windows, then added to these windows,
    so that a step costs one addition, however many windows there are.

    Args:
        num_windows, num_queries, num_samples: of the scores.
        sweeps: of the walk; sums end where one of them, or a share of one, begins or ends.
    """

    def __init__(self, num_windows: int, num_queries: int, num_samples: int, sweeps: Sequence[Sweep]) -> None:
        self.scores = torch.zeros((num_windows, num_queries, num_samples), dtype=torch.float64)
        shares = [share for sweep in sweeps for share in sweep.shares]
        self._bounds = {sweep.start for sweep in sweeps} | {step for share in shares for step in (share.lo, share.hi)}
        self._rows: Sequence[Row] = ()
        self._pending = self.scores.new_zeros((0, num_samples))

    def add(self, rows: Sequence[Row], t: int, samples: Tensor, weight_gradients: Tensor) -> None:
        """Add the weight gradients ``[rows, sum B]`` of step ``t``; repeated samples add up.

        ``rows`` may change only where a sweep begins or ends.
        """
        if len(self._rows) == 0:
            self._rows = list(rows)
            self._pending = self.scores.new_zeros((len(rows), self.scores.shape[2]))
        self._pending.index_add_(1, samples, weight_gradients.detach().to(self._pending))
        if t not in self._bounds:
            return
        for row, weight_gradients in zip(self._rows, self._pending, strict=True):
            for share in row.sweep.shares:
                if share.lo <= t < share.hi:
                    self.scores[share.window, row.query].add_(weight_gradients, alpha=share.sign)
        self._rows = ()
