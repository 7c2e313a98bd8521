"""One step of training as a function of state and sample weights: forwards, side by side, and in reverse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import UnsupportedError, first_line
from dit_mlflow.replay.adjoint import Adjoint, Flat, vector_jacobian
from dit_mlflow.replay.double_backward import DerivativesInside, naming_missing_derivatives
from dit_mlflow.replay.dynamics import Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.running_statistics import DifferentiableStatistics, running_statistics
from dit_mlflow.trajectory.manifest import DTYPES, TensorLayout
from dit_mlflow.trajectory.state import COUNTERS, State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import floating_one

WeightsOf = Callable[[StepRecord], Tensor | None]
"""The weights of a step's samples, in batch order: ``[sum B]``, ``[K, sum B]``, or ``None`` = all 1, as recorded."""


@dataclass(frozen=True, eq=False)
class SampleWeights:
    """Weights of the training samples ``[n]`` (or ``[K, n]``) in the steps ``start <= t < end``; 1 in all others."""

    values: Tensor
    start: int
    end: int

    def __call__(self, record: StepRecord) -> Tensor | None:
        own = self.values[..., record.samples]
        if not self.start <= record.index < self.end:
            own = torch.ones_like(own)
        # Recorded steps are made without weights; with weights of 1, rounding may differ.
        return None if own.dim() == 1 and bool((own == 1).all()) else own


class TrainingStep(ABC):
    r"""Step ``t`` of training as a pure function of the state ``s = (theta, o, b)`` and the samples' weights ``w``:

    .. math:: s_{t+1} = \mathrm{step}_t(s_t, w), \qquad
              (\lambda_t, \mu_t) = \Big( \frac{\partial s_{t+1}}{\partial s_t}^{\top} \lambda_{t+1}, \;
                                         \frac{\partial s_{t+1}}{\partial w}^{\top} \lambda_{t+1} \Big)

    Batch, coefficients and random draws (:class:`MicroBatch`), modes and settings (:class:`StepRecord`) are those of
    the record. Replay computes the first equation at ``w = 1``, leave-one-out computes it with one weight 0, and the
    sweep computes the second.

    A subclass defines :meth:`forward`; the rest follows from it, by autograd and ``vmap``. Where that is slow, it may
    override :meth:`vjp`, :meth:`forward_side_by_side` and :meth:`bytes_kept`. Nothing else knows how a step is made.

    Args:
        dynamics: model and data.

    Attributes:
        followed_parameters, followed_buffers: layout of the parameters and buffers that an adjoint has derivatives
            for: here, all floating ones.
        batched: whether one backward pass for many rows is faster than one after the other; not with convolutions.
        needs_optimizer_values: whether :meth:`pull_back` needs the values of the optimizer's state; ``False`` = its
            keys are enough.
        by_trace: whether :meth:`pull_back` goes through a trace of what ran, rather than by autograd.
    """

    needs_optimizer_values: bool = True
    by_trace: bool = False

    def __init__(self, dynamics: Dynamics) -> None:
        self.dynamics = dynamics
        layout = dynamics.manifest.model
        self.followed_parameters = Flat(floating_shapes(layout.parameters))
        self.followed_buffers = Flat(floating_shapes(layout.buffers))
        self.batched = not any(isinstance(module, CONVOLUTIONS) for module in dynamics.model.modules())
        self._has_statistics = bool(running_statistics(dynamics.model))

    def __call__(
        self,
        state: State,
        record: StepRecord,
        weights: Tensor | None = None,
        over: State | None = None,
        absent: bool = False,
    ) -> State:
        """``s_{t+1}``.

        Args:
            state: ``s_t``; of ``K`` trainings side by side, with a leading dimension ``K``.
            record: step ``t``.
            weights: ``[sum B]`` in batch order, ``[K, sum B]`` for ``K`` trainings; ``None`` = all 1, as recorded.
            over: a state that is no longer needed, maybe ``state`` itself; its memory may be used for the result.
            absent: samples of weight 0, of one training, are taken out of their batches too. A step that is left
                without samples is made all the same, with a gradient of 0 (and the regularizer's), by momentum and
                weight decay.

        Raises:
            UnsupportedError: the step fails on the smaller batches.

        Cost: one training step; for ``K`` side by side, up to ``K`` training steps and ``K`` times the memory.
        """
        self.dynamics.set_modes(record)
        if absent and weights is not None and bool((gone := weights == 0).any()):
            return self._without(gone, state, record, weights, over)
        batches = self.dynamics.load(record)
        weights = None if weights is None else weights.to(_like(state))
        if weights is not None and weights.dim() == 2:
            return self.forward_side_by_side(state, batches, weights, record, over)
        return self.forward(state, batches, weights, record, over)

    def _without(self, gone: Tensor, state: State, record: StepRecord, weights: Tensor, over: State | None) -> State:
        batches = self.dynamics.load_without(record, gone.numpy())
        try:
            return self.forward(state, batches, weights[~gone].to(_like(state)), record, over)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            sizes = " and ".join(str(micro.size) for micro in batches) or "none"
            who = np.unique(record.samples[gone.numpy()])[:5].tolist()
            raise UnsupportedError(
                f"step {record.index} fails once samples {who} are taken out of its batches, which leaves {sizes}: "
                f"{first_line(error)}. removal='weight' leaves the batches as they are"
            ) from error

    def run(
        self,
        state: State,
        records: Iterable[StepRecord],
        weights: WeightsOf | None = None,
        over: State | None = None,
    ) -> State:
        """The state after the steps, from ``state``. Memory: one more state, or ``over``."""
        for record in records:
            state = over = self(state, record, None if weights is None else weights(record), over)
        return state

    def pull_back(
        self, state: State, record: StepRecord, adjoint: Adjoint, weights: Tensor | None = None
    ) -> tuple[Adjoint, Tensor]:
        """``lambda_t``, and ``mu_t [A, sum B]``, from ``lambda_{t+1}``, at any weights.

        Args:
            state: ``s_t``.
            record: step ``t``.
            adjoint: ``lambda_{t+1}``, ``A`` rows; may be changed in place.
            weights: ``[sum B]``; ``None`` = all 1.

        Raises:
            UnsupportedError: an operation has no second derivative, or a buffer cannot be followed.
        """
        self.dynamics.set_modes(record)
        batches = self.dynamics.load(record)
        like = _like(state)
        weights = like.new_ones(len(record.samples)) if weights is None else weights.to(like, copy=True)
        with naming_missing_derivatives():
            return self.vjp(state, batches, weights.requires_grad_(), record, adjoint)

    @abstractmethod
    def forward(
        self,
        state: State,
        batches: list[MicroBatch],
        weights: Tensor | None,
        record: StepRecord,
        over: State | None = None,
    ) -> State:
        """``s_{t+1}``; ``state`` and ``weights`` must not be changed. Modules are in the modes of ``record``.

        Unless :meth:`vjp` is overridden too, use ordinary operations on the tensors of state and weights, and take
        gradients by ``torch.func.grad`` (or with ``create_graph=True``, which excludes trainings side by side). Random
        draws are the recorded ones inside ``self.dynamics.as_recorded(micro.random_state)``. The batches are loaded for
        this call alone, so a loss may change them in place. ``over`` may be ignored.
        """

    def forward_side_by_side(
        self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord, over: State | None = None
    ) -> State:
        """:meth:`forward` of ``K`` trainings with the same random draws, under one ``vmap``."""
        counters: dict[str, dict[str, Any]] = {}

        def one(slots: _Slots, parameters: dict[str, Tensor], buffers: dict[str, Tensor], row: Tensor) -> Any:
            entries = {name: {**entry, **slots.get(name, {})} for name, entry in state.optimizer.items()}
            after = self.forward(State(parameters, buffers, entries), batches, row, record)
            counters.update(after.optimizer)
            return after.parameters, after.buffers, _slots(after)

        stacked = torch.func.vmap(one, randomness="same")
        parameters, buffers, slots = stacked(_slots(state), state.parameters, state.buffers, weights)
        merged = {name: {key: slots[name].get(key, value) for key, value in e.items()} for name, e in counters.items()}
        return State(parameters, buffers, merged)

    def vjp(
        self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord, adjoint: Adjoint
    ) -> tuple[Adjoint, Tensor]:
        """The result of :meth:`pull_back`, for ``weights [sum B]`` that require a gradient; by autograd through
        :meth:`forward`. The adjoint's keys for the optimizer's state are ``name/key``."""
        before = state.map(lambda value: value.detach().requires_grad_(value.is_floating_point()), counters=False)
        after = self.with_graph(before, batches, weights, record)
        parameters, buffers, slots = self._followed(before)
        moved, left, stored = self._followed(after)
        reached = [key for key in adjoint.optimizer if key in stored]
        by_weight, *found = vector_jacobian(
            [*moved, *left, *(stored[key] for key in reached)],
            [weights, *parameters, *buffers, *slots.values()],
            [
                *self.followed_parameters.split_rows(adjoint.parameters),
                *self.followed_buffers.split_rows(adjoint.buffers),
                *(adjoint.optimizer[key].view(-1, *stored[key].shape) for key in reached),
            ],
            adjoint.rows,
            self.batched,
        )
        by_parameters, found = found[: len(parameters)], found[len(parameters) :]
        by_buffers, by_slots = found[: len(buffers)], found[len(buffers) :]
        rows = adjoint.rows
        return Adjoint(
            self.followed_parameters.join_rows(by_parameters, rows),
            self.followed_buffers.join_rows(by_buffers, rows) if by_buffers else adjoint.buffers,
            {key: value.reshape(rows, -1) for key, value in zip(slots, by_slots, strict=True)},
        ), by_weight

    def with_graph(self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord) -> State:
        """``s_{t+1}``, such that autograd leads back to the tensors of state and weights: here, :meth:`forward`."""
        with torch.enable_grad(), self.differentiable(), sdpa_kernel(SDPBackend.MATH):
            return self.forward(state, batches, weights, record)

    def _followed(self, state: State) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """The followed parameters and buffers, and the optimizer's floating tensors by ``name/key``."""
        return (
            [state.parameters[name] for name in self.followed_parameters.shapes],
            [state.buffers[name] for name in self.followed_buffers.shapes],
            {f"{name}/{key}": value for (name, key), value in slots_of(state).items()},
        )

    def ask(self, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]) -> Tensor:
        """The query's value ``[]`` with its graph, in evaluation mode, for the model with the given tensors."""
        with self.differentiable(), DerivativesInside(graphs=True):
            return self.dynamics.evaluate(parameters, buffers, query)

    def differentiable(self) -> AbstractContextManager[Any]:
        """Inside it, running statistics of normalisation layers have derivatives; in a trace, layers have all."""
        wanted = self._has_statistics or self.by_trace
        return DifferentiableStatistics(written_out=self.by_trace) if wanted else nullcontext()

    def bytes_kept(self, state: State, record: StepRecord) -> int:
        """Upper bound of the bytes that a step keeps for its backward pass: here, of all tensors that it creates."""
        with _Made() as made:
            self(state, record)
        return made.nbytes


Slot = tuple[str, str]
"""Name of a parameter, and key of its state."""


def slots_of(state: State) -> dict[Slot, Tensor]:
    """The optimizer's floating tensors, but for counters."""
    return {
        (name, key): value
        for name, entry in _slots(state).items()
        for key, value in entry.items()
        if value.is_floating_point()
    }


_Slots = dict[str, dict[str, Tensor]]


def _slots(state: State) -> _Slots:
    """The optimizer's tensors, by parameter name and key, without :data:`COUNTERS`."""
    return {
        name: {key: value for key, value in entry.items() if key not in COUNTERS and isinstance(value, Tensor)}
        for name, entry in state.optimizer.items()
    }


def _like(state: State) -> Tensor:
    return floating_one(state.parameters.values())


def floating_shapes(layouts: Mapping[str, TensorLayout]) -> dict[str, torch.Size]:
    return {name: torch.Size(of.shape) for name, of in layouts.items() if DTYPES[of.dtype].is_floating_point}


class _Made(TorchFunctionMode):
    """Adds up the bytes of all tensors that functions return."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.nbytes += sum(
            part.nbytes for part in (made if isinstance(made, tuple) else (made,)) if isinstance(part, Tensor)
        )
        return made


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers through which one backward pass for many rows is slower than one after the other."""
