"""Several trainings side by side as one step: each tensor of the state has a leading dimension for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dit_mlflow.replay.adjoint import Flat
from dit_mlflow.replay.dynamics import Buffers, Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.loss_gradient import GradientSideBySide
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.replay.narrow_layers import NarrowLayers
from dit_mlflow.replay.own_step import OwnStep
from dit_mlflow.replay.rounding import missed_by_rounding
from dit_mlflow.replay.running_statistics import BuffersApart, DifferentiableStatistics
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.replay.update import UpdateAdjoint
from dit_mlflow.trajectory.state import State, drifts
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import floating_one

TOLERANCE = {torch.float64: 1e-8}
"""Largest drift of a training side by side from the same training alone, relative to how far it moved; 1e-3 in other
dtypes."""


def tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, 1e-3)


def misses(
    training_step: TrainingStep,
    records: Sequence[StepRecord],
    origin: State,
    alone: State,
    states: State,
    copy: int,
) -> dict[str, float]:
    """By how much a training side by side, with weights of 1, misses the one ``alone``, by tensor: more than rounding.

    Args:
        training_step: of the one alone.
        records: the steps from ``origin`` to ``alone``.
        states: after the same steps, of trainings side by side.
        copy: its position among these.
    """
    own = State(states.parameters, states.buffers).map(lambda value: value[copy])
    allowed = tolerance(floating_one(own.parameters.values()).dtype)
    missed = {name: drift for name, drift in drifts(own, alone, origin).items() if drift > allowed}
    if missed:
        excused = missed_by_rounding(training_step, records, origin, alone, own)
        missed = {name: drift for name, drift in missed.items() if name not in excused}
    return missed


class SideBySide(LossStep):
    """A :class:`LossStep` of ``K`` trainings with weights of their own, the same batches and the same random draws.

    States have a leading dimension ``K``, weights are ``[K, sum B]``. The objective is the sum over the trainings. None
    of them depends on another, so the sum's derivatives by a training's tensors are that training's own. An adjoint's
    row holds those of all ``K``, ``[A, K * N]``, and weight gradients are ``[A, K, sum B]``.

    Args:
        dynamics: model and data.
        copies: ``K``.

    Raises, when a step is made or pulled back, besides what a :class:`LossStep` does:
        RuntimeError, ValueError, NotImplementedError: ``vmap`` cannot run the model, the loss or the optimizer.

    Cost: as one training on batches ``K`` times as large, where ``vmap`` has a rule for each operation.
    """

    def __init__(self, dynamics: Dynamics, copies: int) -> None:
        super().__init__(dynamics)
        self.copies = copies
        self.gradient = GradientSideBySide(dynamics)
        self.followed_parameters = _stacked(self.followed_parameters, copies)
        clip = torch.func.vmap(self.gradient.clip) if self.gradient.clips else None
        self._update_adjoint = UpdateAdjoint(self._layout, self.followed_parameters, self._optimizer, clip)
        self.follow(_stacked(self.followed_buffers, copies))

    def follow(self, buffers: Flat) -> None:
        self.followed_buffers = buffers
        self._apart = BuffersApart(buffers.shapes, self._buffers_after_of_first)

    def ask(self, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]) -> Tensor:
        return _ask_all(self, self.copies, parameters, buffers, query)

    def differentiable(self) -> AbstractContextManager[Any]:
        return DifferentiableStatistics(always=True) if self._has_statistics else nullcontext()

    def _buffers_after_of_first(self, parameters: Parameters, buffers: Buffers, record: StepRecord) -> Buffers:
        return self.gradient.buffers_after(_of(parameters, 0), _of(buffers, 0), record)


class OwnStepSideBySide(OwnStep):
    """The same of an :class:`OwnStep`: one ``vmap`` of the trace of a training serves all of them, and its derivative.

    Args:
        dynamics: model and data.
        copies: ``K``.

    Raises, when a step is made or pulled back, besides what an :class:`OwnStep` does:
        RuntimeError, ValueError, NotImplementedError: ``vmap`` cannot run the trace.

    Cost: one training step, and as one on batches ``K`` times as large.
    """

    def __init__(self, dynamics: Dynamics, copies: int) -> None:
        super().__init__(dynamics)
        self.copies = copies
        self.followed_parameters = _stacked(self.followed_parameters, copies)
        self.followed_buffers = _stacked(self.followed_buffers, copies)

    def with_graph(self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord) -> State:
        with torch.enable_grad():
            return self.of_all(state, batches, weights, record)

    def ask(self, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]) -> Tensor:
        return _ask_all(self, self.copies, parameters, buffers, query)


Together = SideBySide | OwnStepSideBySide


def together(step: TrainingStep, copies: int) -> Together:
    """The step of ``copies`` trainings of a kind."""
    return (OwnStepSideBySide if isinstance(step, OwnStep) else SideBySide)(step.dynamics, copies)


def _ask_all(
    step: TrainingStep, copies: int, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]
) -> Tensor:
    """The sum of the query's values over the trainings, ``[]``."""

    def one(own: Parameters, left: Parameters) -> Tensor:
        return step.dynamics.evaluate(own, left, query)

    with step.differentiable(), NarrowLayers():
        try:
            return torch.func.vmap(one, randomness="same")(parameters, buffers).sum()
        except RuntimeError:
            # A query may do what vmap cannot, such as take a gradient.
            each = [(_of(parameters, copy), _of(buffers, copy)) for copy in range(copies)]
            return torch.stack([one(*of) for of in each]).sum()


def _stacked(flat: Flat, copies: int) -> Flat:
    return Flat({name: torch.Size((copies, *shape)) for name, shape in flat.shapes.items()})


def _of(tensors: Mapping[str, Tensor], copy: int) -> dict[str, Tensor]:
    return {name: value[copy] for name, value in tensors.items()}
