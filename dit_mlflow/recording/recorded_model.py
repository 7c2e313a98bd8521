"""What is recorded: a model and its optimizer, by the names that their plain forms have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.recording.guards import missing_gradients
from dit_mlflow.replay.optimizers import describe_optimizer, optimizer_state
from dit_mlflow.trajectory.manifest import ModelLayout, OptimizerLayout, TensorLayout
from dit_mlflow.trajectory.state import State
from dit_mlflow.workload.wrappers import plain_name, unwrapped


class RecordedModel:
    """A model in training and the optimizer that trains it.

    Attributes:
        model: without wrappers.
        parameters: the model's, by plain name.
        model_layout, optimizer_layout: how they are described in a manifest.

    Raises:
        TrajectoryError: the optimizer is over another model.
        UnsupportedError: the optimizer's step cannot be differentiated.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = unwrapped(model)
        self.parameters = {plain_name(name): value for name, value in self.model.named_parameters()}
        self._optimizer = optimizer
        self._modules = {plain_name(name): module for name, module in self.model.named_modules()}
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self.model_layout = ModelLayout(
            name=type(self.model).__name__, parameters=_layouts(self.parameters), buffers=_layouts(self._buffers())
        )
        self.optimizer_layout = self._describe_optimizer()
        self._held = {name for group in self.optimizer_layout.groups for name in group}

    def snapshot(self) -> State:
        """A copy of the present state, in the host's memory."""
        state = State(dict(self.parameters), self._buffers()).map(lambda value: value.detach().clone())
        state.optimizer.update(optimizer_state(self._optimizer, self._names))
        return state.to(torch.device("cpu"))

    def check_buffers(self) -> None:
        """To be called once training has begun: refuse buffers that were not there, or not so, before it.

        Raises:
            UnsupportedError: naming one of them.
        """
        found, expected = _layouts(self._buffers()), self.model_layout.buffers
        changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        if changed:
            raise UnsupportedError(
                f"buffer {changed[0]!r} was made, removed or given another shape or type by the first step; give it "
                "its form when the model is built (register_buffer in __init__): every state must have the same parts"
            )

    def in_evaluation_mode(self) -> list[str]:
        """Names of the modules that are not in training mode."""
        return [name for name, module in self._modules.items() if not module.training]

    def missing_gradients(self) -> tuple[list[str], list[str]]:
        """See :func:`dit_mlflow.recording.guards.missing_gradients`."""
        return missing_gradients(self.parameters, self._held)

    def _buffers(self) -> dict[str, Tensor]:
        return {plain_name(name): value for name, value in self.model.named_buffers()}

    def _describe_optimizer(self) -> OptimizerLayout:
        layout = describe_optimizer(self._optimizer, self.model)
        groups = tuple(tuple(map(plain_name, group)) for group in layout.groups)
        return layout.model_copy(update={"groups": groups})


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    return {
        name: TensorLayout(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in tensors.items()
    }
