"""Dynamic influence tracking: one backward sweep over a recorded trajectory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from dit_mlflow.errors import InputError
from dit_mlflow.influence.adjoint import Adjoint, Flat, vector_jacobian
from dit_mlflow.influence.buffers import BuffersApart
from dit_mlflow.influence.kind import Kind, Sweep, sweeps
from dit_mlflow.influence.ledger import Ledger, Row
from dit_mlflow.influence.query import Query
from dit_mlflow.influence.question import Question
from dit_mlflow.influence.result import Influence
from dit_mlflow.influence.update import Pulled, UpdateAdjoint
from dit_mlflow.influence.window import Window
from dit_mlflow.trajectory import State, Trajectory, Workload
from dit_mlflow.trajectory.random_state import preserved_random_state
from dit_mlflow.trajectory.replay import Replay
from dit_mlflow.trajectory.statistics import DifferentiableStatistics, running_statistics
from dit_mlflow.trajectory.step import Step


def track(
    trajectory: Trajectory,
    workload: Workload,
    windows: Sequence[Window],
    kind: Kind = "local",
    queries: Sequence[Query] | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
) -> Influence:
    r"""Influence of every training sample, for each window and query, by Dynamic Influence Tracking.

    First order in the sample's weight ``w_j``, at ``w_j = 1``. The adjoint starts at the query's gradient,
    ``lambda = grad q``, and runs back through the optimizer step and the gradient of each recorded step,

    .. math::
        \lambda_g = U_t'^{\top} \lambda, \quad
        \text{kick}_t[j] = -\partial_{w_j} \langle g_t, \lambda_g \rangle, \quad
        \lambda_\theta \mathrel{+}= \partial_\theta \langle g_t, \lambda_g \rangle;

    a score is the sum of the kicks of its window. For plain SGD this is the recursion of Xu and Wu 2025
    (arXiv 2502.10793); here it goes through PyTorch's own optimizer code.

    Args:
        trajectory: recorded; may be incomplete.
        workload: model, data and loss that were trained.
        windows: step ranges; they may overlap.
        kind: ``local`` (absent in the window, effect at its end), ``final`` (absent in the window, effect at the end of
            training) or ``cumulative`` (absent from step 0, change over the window).
        queries: default: the mean validation loss.
        dtype: ``None`` = as recorded; ``torch.float64`` replays one float64 trajectory from ``s_0``.

    Returns:
        Scores ``[windows, queries, training samples]`` in units of the query. **Sign**: change of the query caused by
        removing the sample; for a loss, positive = helpful, negative = harmful. Samples that a window never
        met score exactly 0 (``local``, ``final``).

    Raises:
        InputError: a window, kind or query that cannot be used.
        TrajectoryError: the trajectory is damaged, or the workload is not the recorded one.
        UnsupportedError: the training does something that cannot be differentiated here.

    Cost: the replay (one training) and two to three more trainings for the sweep, whatever the number of disjoint
    ``local`` windows or of ``final`` windows; each ``cumulative`` window and each query adds an adjoint, that is one
    backward pass per step of the shared graph. Memory: about ``2 sqrt(T)`` states beside one training step.
    """
    question = Question.of(trajectory, workload, windows, kind, queries)
    with preserved_random_state():
        engine = _Engine(trajectory.replay(workload, dtype), question.queries, memory_budget)
        scores = engine.run(sweeps(question.kind, question.windows, trajectory.num_steps), len(question.windows))
    return question.answer(scores, "dit", str(dtype or "recorded"), max_drift=engine.replay.max_drift)


class _Engine:
    """Walks the trajectory backwards and carries all live adjoints along."""

    def __init__(self, replay: Replay, queries: Sequence[Query], memory_budget: int | None) -> None:
        self.replay = replay
        self.memory_budget = memory_budget
        self.dynamics = replay.dynamics
        self.queries = queries
        self._warned = False
        self._attends: bool | None = None
        # Batching a backward pass over rows unrolls convolutions into a slow fallback.
        self._batched = not any(isinstance(module, _CONVOLUTIONS) for module in self.dynamics.model.modules())
        manifest = replay.trajectory.manifest
        shapes = {name: torch.Size(layout.shape) for name, layout in manifest.model.parameters.items()}
        self._held = Flat({name: shapes[name] for group in manifest.optimizer.groups for name in group})
        self._update = UpdateAdjoint(self.dynamics, manifest.optimizer, self._held)
        statistics = running_statistics(self.dynamics.model)
        self._moving = Flat(
            {name: torch.Size(layout.shape) for name, layout in manifest.model.buffers.items() if name in statistics}
        )
        self._unmoved = BuffersApart(self.dynamics, self._moving.shapes)

    def run(self, planned: Sequence[Sweep], num_windows: int) -> np.ndarray:
        """Scores ``[windows, queries, samples]``, float64."""
        ledger = Ledger(num_windows, len(self.queries), self.dynamics.workload.num_samples, planned)
        first, last = min(sweep.stop for sweep in planned), max(sweep.start for sweep in planned)
        rows: list[Row] = []
        adjoint: Adjoint | None = None
        with tqdm(total=last - first, desc="influence", unit="step", disable=None) as progress:
            later: State | None = None
            for t, state in self.replay.backward(first, last, self.memory_budget, self._update.needs_values):
                if later is not None:
                    self._unmoved.check(state, later, self.replay.trajectory.step(t))
                later = state
                if adjoint is not None:
                    step = self.replay.trajectory.step(t)
                    adjoint, kicks = self._pull_back(state, step, adjoint)
                    ledger.add(rows, t, torch.from_numpy(step.samples), kicks)
                    alive = [position for position, row in enumerate(rows) if row.sweep.stop < t]
                    if len(alive) < len(rows):
                        rows = [rows[position] for position in alive]
                        adjoint = adjoint.keep(alive) if alive else None
                    progress.update()
                for sweep in planned:
                    if sweep.start == t:
                        started = self._start(state)
                        adjoint = started if adjoint is None else adjoint.append(started)
                        rows += [Row(sweep, query) for query in range(len(self.queries))]
        return ledger.scores.numpy()

    def _start(self, state: State) -> Adjoint:
        """``lambda = grad q`` at ``state``, one row per query; 0 for the optimizer's state."""
        held = {name: state.parameters[name].detach().requires_grad_() for name in self._held.shapes}
        moving = {name: state.buffers[name].detach().requires_grad_() for name in self._moving.shapes}
        parameters, buffers = {**state.parameters, **held}, {**state.buffers, **moving}
        by_parameters, by_buffers = [], []
        for query in self.queries:
            with self._statistics():
                value = self.dynamics.evaluate(parameters, buffers, query)
            if not value.requires_grad:
                raise InputError(
                    f"query {query.name!r} does not depend on the trained parameters by differentiable operations; "
                    "expected a tensor computed from the model, without .item(), .detach() or no_grad()"
                )
            found = torch.autograd.grad(
                value, [*held.values(), *moving.values()], allow_unused=True, materialize_grads=True
            )
            by_parameters.append(self._held.join(found[: len(held)]))
            by_buffers.append(torch.cat([value.new_zeros(0), *(part.reshape(-1) for part in found[len(held) :])]))
        return Adjoint(torch.stack(by_parameters), torch.stack(by_buffers))

    def _pull_back(self, state: State, step: Step, adjoint: Adjoint) -> tuple[Adjoint, Tensor]:
        """The adjoint at ``t`` from the one at ``t + 1``, and the kicks ``[A, sum B]`` of the step's samples."""
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
        with self._statistics(), self._plain_attention():
            gradients = self.dynamics.gradient(theta, buffers, step, batches, weights, create_graph=True)
        pulled = self._update(state, gradients, step, adjoint)
        by_weight, *rest = vector_jacobian(
            [*gradients.values(), *(buffers[name] for name in moving)],
            [weights, *(theta[name] for name in held), *moving.values()],
            [*pulled.gradients, *self._moving.split_rows(adjoint.buffers)],
            adjoint.rows,
            self._batched,
        )
        if pulled.undefined is not None and not self._warned:
            self._warn_if_undefined(step, gradients, weights, pulled, largest=float(by_weight.abs().max()))
        by_theta, by_buffer = rest[: len(held)], rest[len(held) :]
        for total, part in zip(self._held.split_rows(pulled.adjoint.parameters), by_theta, strict=True):
            total += part
        if by_buffer:
            pulled.adjoint.buffers = self._moving.join_rows(by_buffer, adjoint.rows)
        return pulled.adjoint, -by_weight

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

    def _warn_if_undefined(
        self, step: Step, gradients: dict[str, Tensor], weights: Tensor, pulled: Pulled, largest: float
    ) -> None:
        """Warn once if a sample has a gradient where the total has been 0 so far, and the step has no derivative."""
        assert pulled.undefined is not None
        cotangents = [mask * part for mask, part in zip(pulled.undefined, pulled.gradients, strict=True)]
        (by_weight,) = vector_jacobian(
            list(gradients.values()), [weights], cotangents, len(cotangents[0]), self._batched
        )
        row, place = divmod(int(by_weight.abs().argmax()), by_weight.shape[1])
        # Below that it is rounding, as in elements whose gradient is 0 by symmetry (the bias of attention's keys).
        if by_weight[row, place].abs() > 1e-6 * largest:
            self._warned = True
            names = [name for name, mask in zip(gradients, pulled.undefined, strict=True) if bool(mask.any())]
            warnings.warn(
                f"at step {step.index}, sample {step.samples[place]} has a gradient in elements of {names} where the "
                "batches' gradients have cancelled to exactly 0 in every step so far; the optimizer's step is not "
                "differentiable there (it divides by eps), so scores of such samples can be far too large. Check them "
                "with leave_one_out(samples=[...])",
                stacklevel=5,
            )


class _Calls(TorchFunctionMode):
    """Notes which functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


_ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
