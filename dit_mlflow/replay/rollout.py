"""Training steps run again from a state: as recorded, or with weights on the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.replay.dynamics import Buffers, Dynamics, MicroBatch, Parameters, Term
from dit_mlflow.replay.optimizers import build_optimizer, set_hyperparameters
from dit_mlflow.trajectory.manifest import OptimizerLayout
from dit_mlflow.trajectory.state import COUNTERS, State
from dit_mlflow.trajectory.step_record import StepRecord


class Rollout:
    """A model in training, driven by the record through PyTorch's own optimizer.

    Args:
        dynamics: the gradient of each step.
        layout: optimizer class and groups.
        state: where to start; copied.
        copies: ``None`` for one model; ``K`` for ``K`` models side by side, each with its own weights, whose
            tensors then carry a leading dimension ``K``. Gradients come from one ``vmap``, random draws are
            the same for all.

    Cost of a step: one training step, or about ``K`` of them at once. Memory: ``K`` times parameters,
    gradients, optimizer state and activations.
    """

    def __init__(self, dynamics: Dynamics, layout: OptimizerLayout, state: State, copies: int | None = None) -> None:
        self.dynamics = dynamics
        self.copies = copies

        def own(value: Tensor) -> Tensor:
            return value.clone() if copies is None else value.expand(copies, *value.shape).clone()

        self.parameters = {
            name: own(value).requires_grad_(value.is_floating_point()) for name, value in state.parameters.items()
        }
        self.buffers = {name: own(value) for name, value in state.buffers.items()}

        def copied(key: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.clone() if key in COUNTERS else own(value)

        optimizer_state = {
            name: {key: copied(key, value) for key, value in entry.items()} for name, entry in state.optimizer.items()
        }
        self._optimizer = build_optimizer(layout, self.parameters, State({}, {}, optimizer_state))

    def advance(self, step: StepRecord, batches: list[MicroBatch], weights: Tensor | None = None) -> None:
        """Make one step. ``weights``: ``w_i``, ``[sum B]`` for one model, ``[K, sum B]`` for copies."""
        if self.copies is None:
            gradients = self.dynamics.gradient(self.parameters, self.buffers, step, batches, weights)
            gradients = self.dynamics.clip(gradients)
        else:
            assert weights is not None, "copies differ by their weights"
            gradients = self._stacked_gradient(step, batches, weights)
        self.buffers = {name: value.detach() for name, value in self.buffers.items()}
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        set_hyperparameters(self._optimizer, step.hyperparameters)
        try:
            self._optimizer.step()
        except Exception as error:
            if self.copies is not None or isinstance(error, torch.OutOfMemoryError):
                raise
            # Settings and state come from the record, and optimizers take what they are given on trust.
            raise TrajectoryError(
                f"torch.optim.{type(self._optimizer).__name__} cannot make step {step.index} with the settings and the "
                f"state that are recorded: {type(error).__name__}: {error}"
            ) from error

    def _stacked_gradient(self, step: StepRecord, batches: list[MicroBatch], weights: Tensor) -> dict[str, Tensor]:
        values = {name: value.detach() for name, value in self.parameters.items()}
        rest = {name: values.pop(name) for name in step.no_gradient | step.zero_gradient if name in values}

        def gradient(term: Term) -> dict[str, Tensor]:
            def objective(trained: Parameters, fixed: Parameters, buffers: Buffers, row: Tensor) -> Tensor:
                given = dict(buffers)
                value = term({**trained, **fixed}, buffers, row)
                if any(buffers[name] is not given[name] for name in given):
                    raise NotImplementedError("the model assigns buffers anew; copies side by side would lose them")
                return value

            stacked = torch.func.vmap(torch.func.grad(objective), randomness="same")
            return stacked(values, rest, self.buffers, weights)

        parts = [gradient(term) for term in self.dynamics.terms(step, batches)]
        total = {name: sum(part[name] for part in parts[1:]) + parts[0][name] for name in values}
        total |= {name: torch.zeros_like(rest[name]) for name in step.zero_gradient}
        return torch.func.vmap(self.dynamics.clip)(total)

    def snapshot(self, optimizer_values: bool = True, recycled: list[State] | None = None) -> State:
        """A copy of the current state (with the leading dimension, if there are copies).

        Args:
            optimizer_values: ``False`` = the optimizer's state has its keys only, each with ``None``.
            recycled: states that nobody needs any more; the copy may be written over one of them, which is taken away.
        """
        names = {parameter: name for name, parameter in self.parameters.items()}
        optimizer = {
            names[parameter]: {key: value for key, value in entry.items() if value is not None}
            for parameter, entry in self._optimizer.state.items()
        }
        state = State(self.parameters, self.buffers, optimizer)
        state = state if optimizer_values else state.without_optimizer_values()
        over = recycled.pop() if recycled else None
        if over is not None and over.copy_(state):
            return over
        return state.map(lambda value: value.detach().clone())
