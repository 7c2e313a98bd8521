"""The backward walk over a trajectory, with all live adjoints along."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import InputError, UnsupportedError
from dit_mlflow.influence.adjoint import Adjoint, Flat, grad_or_zeros, vector_jacobian
from dit_mlflow.influence.buffers import BuffersApart
from dit_mlflow.influence.kind import Sweep
from dit_mlflow.influence.query import Query
from dit_mlflow.influence.update import Pulled, UpdateAdjoint
from dit_mlflow.influence.window_scores import Row, WindowScores
from dit_mlflow.progress import progress_bar
from dit_mlflow.replay.dynamics import MicroBatch
from dit_mlflow.replay.replay import Replay
from dit_mlflow.replay.running_statistics import DifferentiableStatistics, running_statistics
from dit_mlflow.torch_internals import MISSING_DERIVATIVE, REFUSING_NODE
from dit_mlflow.trajectory import State
from dit_mlflow.trajectory.step_record import StepRecord

ADJOINTS_IN_MEMORY = 2**30
"""Bytes that adjoints may take, unless told otherwise, before queries are answered in several walks."""


@dataclass(frozen=True, eq=False)
class Objective:
    """``m(theta, b, w) = <g_t(theta, b, w), lambda_g> + <B_t(theta, b), lambda_b>``, for ``rows`` adjoints.

    Attributes:
        gradients: ``g_t`` by parameter, with its graph.
        statistics: ``B_t``, with its graph.
        weights: ``w``, ``[sum B]``.
        held: ``theta``: the parameters that the optimizer holds.
        moving: ``b``: the running statistics.
        by_gradient, by_statistic: ``lambda_g`` and ``lambda_b``, ``[A, *shape]`` each.
        rows: ``A``.
    """

    gradients: Mapping[str, Tensor]
    statistics: Sequence[Tensor]
    weights: Tensor
    held: Mapping[str, Tensor]
    moving: Sequence[Tensor]
    by_gradient: Sequence[Tensor]
    by_statistic: Sequence[Tensor]
    rows: int

    def derivatives(self, inputs: Sequence[Tensor], batched: bool) -> list[Tensor]:
        """``dm / d input``, ``[A, *shape]`` each."""
        outputs, cotangents = [*self.gradients.values(), *self.statistics], [*self.by_gradient, *self.by_statistic]
        return vector_jacobian(outputs, inputs, cotangents, self.rows, batched)


class Engine:
    """Walks the trajectory backwards and carries all live adjoints along.

    Args:
        replay: of the trajectory; its drift is known afterwards.
        memory_budget: bytes for the states that the walk holds, and as many again for adjoints; ``None`` =
            what :meth:`Replay.backward` takes, and :data:`ADJOINTS_IN_MEMORY`.
    """

    def __init__(self, replay: Replay, memory_budget: int | None = None) -> None:
        self.replay = replay
        self.memory_budget = memory_budget
        self.dynamics = replay.dynamics
        self._looked_for_dead_ends = False
        self._warned = False
        self._largest: list[float] = []
        self._attends: bool | None = None
        # Batching a backward pass over rows unrolls convolutions into a slow fallback.
        self._batched = not any(isinstance(module, CONVOLUTIONS) for module in self.dynamics.model.modules())
        manifest = replay.trajectory.manifest
        shapes = {name: torch.Size(layout.shape) for name, layout in manifest.model.parameters.items()}
        self._held = Flat({name: shapes[name] for group in manifest.optimizer.groups for name in group})
        self._update = UpdateAdjoint(self.dynamics, manifest.optimizer, self._held)
        statistics = running_statistics(self.dynamics.model)
        self._moving = Flat(
            {name: torch.Size(layout.shape) for name, layout in manifest.model.buffers.items() if name in statistics}
        )
        self._unmoved = BuffersApart(self.dynamics, self._moving.shapes)

    def queries_at_once(self, planned: Sequence[Sweep], num_windows: int) -> int:
        """How many queries the memory budget allows in one walk.

        A row of the adjoint takes its parameters and optimizer state, before and after a step, what a step's backward
        pass keeps, and two lines of scores.
        """
        at_once = max(sum(other.stop < sweep.start <= other.start for other in planned) for sweep in planned)
        first = self.replay.trajectory.step(0)
        state = self.replay.trajectory.checkpoint(0).to(self.dynamics.device, self.dynamics.dtype)
        kept = self.dynamics.bytes_kept(state, first) if self._batched else 0
        scores = 8 * self.dynamics.workload.num_samples * (num_windows + at_once)
        each = at_once * (4 * self._state_bytes + 2 * kept) + scores
        return max(1, (self.memory_budget or ADJOINTS_IN_MEMORY) // each)

    @property
    def _state_bytes(self) -> int:
        last = self.replay.trajectory.checkpoint_steps[-1]
        return self.replay.trajectory.checkpoint(last).nbytes

    def run(self, queries: Sequence[Query], planned: Sequence[Sweep], num_windows: int) -> np.ndarray:
        """Scores ``[windows, queries, samples]``, float64."""
        collected = WindowScores(num_windows, len(queries), self.dynamics.workload.num_samples, planned)
        first, last = min(sweep.stop for sweep in planned), max(sweep.start for sweep in planned)
        rows: list[Row] = []
        adjoint: Adjoint | None = None
        with progress_bar(last - first, "influence") as progress:
            later: State | None = None
            for t, state in self.replay.backward(first, last, self.memory_budget, self._update.needs_values):
                if later is not None:
                    self._unmoved.check(state, later, self.replay.trajectory.step(t))
                later = state
                if adjoint is not None:
                    step = self.replay.trajectory.step(t)
                    adjoint, weight_gradients = self._pull_back(state, step, adjoint)
                    collected.add(rows, t, torch.from_numpy(step.samples), weight_gradients)
                    alive = [position for position, row in enumerate(rows) if row.sweep.stop < t]
                    if len(alive) < len(rows):
                        rows = [rows[position] for position in alive]
                        adjoint = adjoint.keep(alive) if alive else None
                    progress.update()
                for sweep in planned:
                    if sweep.start == t:
                        started = self._start(state, queries)
                        adjoint = started if adjoint is None else adjoint.append(started)
                        rows += [Row(sweep, query) for query in range(len(queries))]
        return collected.scores.numpy()

    def _start(self, state: State, queries: Sequence[Query]) -> Adjoint:
        """``lambda = grad q`` at ``state``, one row per query; 0 for the optimizer's state."""
        held = {name: state.parameters[name].detach().requires_grad_() for name in self._held.shapes}
        moving = {name: state.buffers[name].detach().requires_grad_() for name in self._moving.shapes}
        parameters, buffers = {**state.parameters, **held}, {**state.buffers, **moving}
        by_parameters, by_buffers = [], []
        for query in queries:
            with self._statistics():
                value = self.dynamics.evaluate(parameters, buffers, query)
            if not value.requires_grad:
                raise InputError(
                    f"query {query.name!r} does not depend on the trained parameters by differentiable operations; "
                    "expected a tensor computed from the model, without .item(), .detach() or no_grad()"
                )
            found = grad_or_zeros(value, [*held.values(), *moving.values()])
            by_parameters.append(self._held.join(found[: len(held)]))
            by_buffers.append(torch.cat([value.new_zeros(0), *(part.reshape(-1) for part in found[len(held) :])]))
        return Adjoint(torch.stack(by_parameters), torch.stack(by_buffers))

    def _pull_back(self, state: State, step: StepRecord, adjoint: Adjoint) -> tuple[Adjoint, Tensor]:
        """The adjoint at ``t`` from the one at ``t + 1``, and weight gradients ``[A, sum B]`` of the samples."""
        # Clipping looks at every gradient, also of parameters that the optimizer does not hold.
        held = self._held.shapes
        theta = {name: state.parameters[name].detach().requires_grad_() for name in held} | {
            name: value.detach().requires_grad_(value.is_floating_point())
            for name, value in state.parameters.items()
            if name not in held
        }
        batches = self.dynamics.load(step)
        like = next(iter(theta.values()))
        weights = like.new_ones(len(step.samples)).requires_grad_()
        moving = {name: state.buffers[name].detach().requires_grad_() for name in self._moving.shapes}
        # The forward pass works in place on buffers, and the state is still needed.
        buffers = {name: value.clone() for name, value in {**state.buffers, **moving}.items()}
        with _naming_missing_derivatives():
            with self._statistics(), self._plain_attention():
                gradients = self.dynamics.gradient(theta, buffers, step, batches, weights, create_graph=True)
            if not self._looked_for_dead_ends:
                _refuse_dead_ends(gradients.values())
                self._looked_for_dead_ends = True
            pulled = self._update(state, gradients, step, adjoint)
            objective = Objective(
                gradients,
                [buffers[name] for name in moving],
                weights,
                {name: theta[name] for name in held},
                list(moving.values()),
                pulled.gradients,
                self._moving.split_rows(adjoint.buffers),
                adjoint.rows,
            )
            by_weight, by_theta, by_buffer = self._derivatives(objective, state, step, batches)
        self._watch(step, gradients, weights, pulled, largest=float(by_weight.abs().max()))
        for total, part in zip(self._held.split_rows(pulled.adjoint.parameters), by_theta, strict=True):
            total += part
        if by_buffer:
            pulled.adjoint.buffers = self._moving.join_rows(by_buffer, adjoint.rows)
        return pulled.adjoint, -by_weight

    def _derivatives(
        self, objective: Objective, state: State, step: StepRecord, batches: list[MicroBatch]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Of ``m``: by the samples' weights ``[A, sum B]``, by the parameters (the Hessian), by the statistics."""
        inputs = [objective.weights, *objective.held.values(), *objective.moving]
        by_weight, *rest = objective.derivatives(inputs, self._batched)
        return by_weight, rest[: len(objective.held)], rest[len(objective.held) :]

    def _statistics(self) -> AbstractContextManager[Any]:
        return DifferentiableStatistics() if self._moving.shapes else nullcontext()

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Of the attention kernels, only the plain one can be differentiated twice.

        Choosing it takes a tenth of a small model's step, so the first step shows whether there is attention at all.
        """
        if self._attends is False:
            yield
            return
        with sdpa_kernel(SDPBackend.MATH), _Calls() as calls:
            yield
        self._attends = not calls.seen.isdisjoint(_ATTENTION)

    def _watch(
        self, step: StepRecord, gradients: dict[str, Tensor], weights: Tensor, pulled: Pulled, largest: float
    ) -> None:
        """Warn once if a sample has a gradient where the total has been 0 so far, and the step has no derivative.

        Such a weight gradient carries ``1 / eps``; looked at are steps whose largest one stands out, and the first few.
        """
        if self._warned or not gradients:
            return
        self._largest.append(largest)
        if len(self._largest) > 4 and largest < 10 * statistics.median(self._largest[-99:]):
            return
        undefined = pulled.undefined()
        cotangents = [mask * part for mask, part in zip(undefined, pulled.gradients, strict=True)]
        (by_weight,) = vector_jacobian(
            list(gradients.values()), [weights], cotangents, len(cotangents[0]), self._batched
        )
        row, place = divmod(int(by_weight.abs().argmax()), by_weight.shape[1])
        # Below that it is rounding, as in elements whose gradient is 0 by symmetry (the bias of attention's keys).
        if by_weight[row, place].abs() > 1e-6 * largest:
            self._warned = True
            names = [name for name, mask in zip(gradients, undefined, strict=True) if bool(mask.any())]
            warnings.warn(
                f"at step {step.index}, sample {step.samples[place]} has a gradient in elements of {names} where the "
                "batches' gradients have cancelled to exactly 0 in every step so far; the optimizer's step is not "
                "differentiable there (it divides by eps), so scores of such samples can be far too large. Check them "
                "with leave_one_out(samples=[...])",
                stacklevel=5,
            )


def _refuse_dead_ends(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients that autograd would take for constants: it does not run into the error that it planted there."""
    seen: set[Any] = set()
    left = [gradient.grad_fn for gradient in gradients]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == REFUSING_NODE:
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        left += [following for following, _ in node.next_functions]


@contextmanager
def _naming_missing_derivatives() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(sign in str(error) for sign in MISSING_DERIVATIVE):
            raise
        raise UnsupportedError(
            f"the model or its loss cannot be differentiated twice, which influence needs: {error}. Use another "
            "implementation of that operation, one made of ordinary PyTorch operations"
        ) from error


class _Calls(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers through which a backward pass of many rows at once is slower than one after the other."""
