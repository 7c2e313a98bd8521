"""The standard training step: the gradient of per-sample losses, then one step of an optimizer."""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import DitError, TrajectoryError
from dit_mlflow.replay.adjoint import Adjoint, Flat, vector_jacobian
from dit_mlflow.replay.double_backward import refuse_dead_ends
from dit_mlflow.replay.dynamics import Buffers, Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.loss_gradient import GradientSideBySide, LossGradient
from dit_mlflow.replay.optimizers import build_optimizer, is_others, set_hyperparameters
from dit_mlflow.replay.paths import Paths
from dit_mlflow.replay.running_statistics import BuffersApart, running_statistics
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.replay.update import Pulled, UpdateAdjoint
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord

LOOKED_AT = 4
"""First steps at which a sweep looks for elements without a derivative."""


@dataclass(frozen=True, eq=False)
class Objective:
    """``m(theta, b, w) = <g_t(theta, b, w), lambda_g> + <B_t(theta, b), lambda_b>``, for ``A = rows`` adjoints.

    Attributes:
        gradients: ``g_t`` by parameter, with its graph.
        statistics: the followed parts of ``B_t``, with their graph.
        weights: ``w``, ``[sum B]``.
        held: ``theta``, the parameters that the optimizer holds, by name.
        moving: ``b``, the followed buffers.
        by_gradient, by_statistic: ``lambda_g`` and ``lambda_b``, ``[A, *shape]`` each.
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


class LossStep(TrainingStep):
    r"""A loss, then an optimizer:

    .. math::
        g_t(\theta, b, w) &= \sum_{i \in S_t} w_i c_{t,i} \nabla l_i(\theta, b) + \nabla R(\theta) \\
        (\theta, o)_{t+1} &= U_t((\theta, o)_t, g_t), \quad b_{t+1} = B_t(\theta_t, b_t)

    ``U_t`` is the workload's clipping, then PyTorch's own optimizer; ``B_t`` is what the forward passes do to the
    buffers. In reverse, with ``m`` of :class:`Objective`,

    .. math::
        (\lambda_\theta, \lambda_o), \lambda_g = U_t'^{\top} \lambda, \quad
        \mu = \partial_w m, \quad \lambda_\theta \mathrel{+}= \partial_\theta m, \quad \lambda_b = \partial_b m,

    One backward pass through the graph of ``g_t`` gives the three derivatives of ``m`` for all rows. No gradient of a
    single sample is formed. An adjoint follows the parameters that the optimizer holds, and the running statistics of
    BatchNorm and InstanceNorm.

    Args:
        dynamics: model and data; its manifest describes the optimizer.

    Cost: one training step forwards, two to three in reverse.
    """

    def __init__(self, dynamics: Dynamics) -> None:
        super().__init__(dynamics)
        self.gradient = LossGradient(dynamics)
        self._side_by_side = GradientSideBySide(dynamics)
        self._layout = dynamics.manifest.optimizer
        self._optimizer = build_optimizer(self._layout, dynamics.workload)
        parameters, buffers = self.followed_parameters.shapes, self.followed_buffers.shapes
        self.followed_parameters = Flat(
            {name: parameters[name] for group in self._layout.groups for name in group if name in parameters}
        )
        moving = running_statistics(dynamics.model)
        self.follow(Flat({name: shape for name, shape in buffers.items() if name in moving}))
        clip = self.gradient.clip if self.gradient.clips else None
        self._update_adjoint = UpdateAdjoint(self._layout, self.followed_parameters, self._optimizer, clip)
        self.needs_optimizer_values = self._update_adjoint.needs_values
        self._looked_for_dead_ends = False
        self._warned = False
        self._largest: list[float] = []

    @property
    def paths(self) -> Paths | None:
        return self.gradient.paths

    def watch(self, paths: Paths | None) -> None:
        """Note the way of each step that is made from now on; ``None`` = no longer."""
        self.gradient.paths = self._side_by_side.paths = paths

    def follow(self, buffers: Flat) -> None:
        """Set the buffers that an adjoint has rows for."""
        self.followed_buffers = buffers
        self._apart = BuffersApart(buffers.shapes, self.gradient.buffers_after)

    def forward(
        self,
        state: State,
        batches: list[MicroBatch],
        weights: Tensor | None,
        record: StepRecord,
        over: State | None = None,
    ) -> State:
        after = state.copy(over)
        theta = leaves(after.parameters)
        gradients = self.gradient.clip(self.gradient(theta, after.buffers, record, batches, weights))
        try:
            return self._updated(after, gradients, record)
        except (DitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Settings and state come from the record, and optimizers do not check them.
            name = self._layout.name if is_others(self._layout.name) else f"torch.optim.{self._layout.name}"
            raise TrajectoryError(
                f"{name} cannot make step {record.index} with the recorded settings and state: "
                f"{type(error).__name__}: {error}"
            ) from error

    def forward_side_by_side(
        self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord, over: State | None = None
    ) -> State:
        """The gradients of one sum, then one step of the optimizer, which treats each element by itself."""
        if is_others(self._layout.name):
            raise NotImplementedError(f"{self._layout.name} may not treat each element by itself")
        after = state.copy(over)
        total = self._side_by_side(leaves(after.parameters), after.buffers, record, batches, weights)
        clipped = torch.func.vmap(self.gradient.clip)(total) if total else total
        return self._updated(after, clipped, record)

    def _updated(self, after: State, gradients: Mapping[str, Tensor], record: StepRecord) -> State:
        """One step of the optimizer, in place on ``after``."""
        optimizer, parameters = self._optimizer, after.parameters
        set_hyperparameters(optimizer, record.hyperparameters)
        for group, names in zip(optimizer.param_groups, self._layout.groups, strict=True):
            group["params"] = [parameters[name] for name in names]
        optimizer.state = defaultdict(dict, {parameters[name]: entry for name, entry in after.optimizer.items()})
        held = {parameters[name]: name for group in self._layout.groups for name in group}
        try:
            for parameter, name in held.items():
                parameter.grad = gradients.get(name)
            optimizer.step()
            entries = {
                held[parameter]: {key: value for key, value in entry.items() if value is not None}
                for parameter, entry in optimizer.state.items()
            }
        finally:
            for parameter in held:
                parameter.grad = None
        buffers = {name: value.detach() for name, value in after.buffers.items()}
        return State(parameters, buffers, entries)

    def vjp(
        self,
        state: State,
        batches: list[MicroBatch],
        weights: Tensor,
        record: StepRecord,
        adjoint: Adjoint,
        pulled: Pulled | None = None,
    ) -> tuple[Adjoint, Tensor]:
        """See :meth:`TrainingStep.vjp`; ``pulled``: the adjoint before the optimizer's step, where it is known."""
        theta, moving, buffers = self.tensors(state.parameters, state.buffers)
        gradients = self.gradients(theta, buffers, weights, record, batches)
        self._apart.check(state, buffers, record)
        if pulled is None:
            pulled = self._update_adjoint(state, gradients, record, adjoint)
        objective = Objective(
            gradients,
            [buffers[name] for name in moving],
            weights,
            {name: theta[name] for name in self.followed_parameters.shapes},
            list(moving.values()),
            pulled.gradients,
            self.followed_buffers.split_rows(adjoint.buffers),
            adjoint.rows,
        )
        by_weight, by_theta, by_buffer = self.derivatives(objective, state, record, batches)
        self._watch(record, lambda: gradients, weights, pulled, largest=float(by_weight.abs().max()))
        for total, part in zip(self.followed_parameters.split_rows(pulled.adjoint.parameters), by_theta, strict=True):
            total += part
        if by_buffer:
            pulled.adjoint.buffers = self.followed_buffers.join_rows(by_buffer, adjoint.rows)
        return pulled.adjoint, by_weight

    def tensors(
        self, parameters: Parameters, buffers: Parameters
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Leaves of a graph: ``theta``, first what the optimizer holds; the followed buffers; and a copy of all buffers
        that depends on these, for the forward pass to change."""
        held = self.followed_parameters.shapes
        # Clipping needs every gradient, also those of parameters that the optimizer does not hold.
        theta = leaves({name: parameters[name] for name in (*held, *(n for n in parameters if n not in held))})
        moving = leaves({name: buffers[name] for name in self.followed_buffers.shapes})
        return theta, moving, {name: value.clone() for name, value in {**buffers, **moving}.items()}

    def gradients(
        self,
        parameters: Parameters,
        buffers: Buffers,
        weights: Tensor,
        record: StepRecord,
        batches: list[MicroBatch],
    ) -> dict[str, Tensor]:
        """``g_t(theta, b, w)`` by parameter, before clipping; ``buffers`` become ``B_t``. Both keep their graph."""
        with self.differentiable(), sdpa_kernel(SDPBackend.MATH):
            gradients = self.gradient(parameters, buffers, record, batches, weights, create_graph=True)
        if not self._looked_for_dead_ends:
            refuse_dead_ends(gradients.values())
            self._looked_for_dead_ends = True
        return gradients

    def derivatives(
        self, objective: Objective, state: State, record: StepRecord, batches: list[MicroBatch]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Derivatives of ``m`` by the weights ``[A, sum B]``, the parameters (the Hessian term) and the statistics."""
        inputs = [objective.weights, *objective.held.values(), *objective.moving]
        by_weight, *rest = objective.derivatives(inputs, self.batched)
        return by_weight, rest[: len(objective.held)], rest[len(objective.held) :]

    def bytes_kept(self, state: State, record: StepRecord) -> int:
        try:
            return self.gradient.bytes_kept(leaves(state.parameters), state.buffers, record)
        except RuntimeError:  # The loss uses torch.func, inside of which autograd does not tell what it keeps.
            return super().bytes_kept(state, record)

    def _watch(
        self,
        record: StepRecord,
        graph: Callable[[], Mapping[str, Tensor]],
        weights: Tensor,
        pulled: Pulled,
        largest: float,
    ) -> None:
        """Warn once if a sample has a gradient where the batch's has been 0 so far: the step has no derivative there.

        Such a sample's weight gradient contains ``1 / eps``. The check runs at the first few steps, and at steps whose
        largest weight gradient stands out.

        Args:
            graph: gives ``g_t`` with its graph, in the order of ``pulled.gradients``.
        """
        if self._warned or not pulled.gradients:
            return
        self._largest.append(largest)
        if len(self._largest) > LOOKED_AT and largest <= 10 * statistics.median(self._largest[-99:]):
            return
        gradients, undefined = graph(), pulled.undefined()
        cotangents = [mask * part for mask, part in zip(undefined, pulled.gradients, strict=True)]
        (by_weight,) = vector_jacobian(
            list(gradients.values()), [weights], cotangents, len(cotangents[0]), self.batched
        )
        place = int(by_weight.abs().argmax())
        # Anything smaller is rounding, as in elements whose gradient is 0 by symmetry (the bias of attention's keys).
        if by_weight.view(-1)[place].abs() > 1e-6 * largest:
            place %= len(record.samples)
            self._warned = True
            names = [name for name, mask in zip(gradients, undefined, strict=True) if bool(mask.any())]
            warnings.warn(
                f"at step {record.index}, sample {record.samples[place]} has a gradient in elements of {names} where "
                "the batches' gradients have cancelled to exactly 0 in every step so far; the optimizer's step is not "
                "differentiable there (it divides by eps), so scores of such samples can be far too large. Check them "
                "with leave_one_out(samples=[...])",
                stacklevel=6,
            )


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in tensors.items()}
