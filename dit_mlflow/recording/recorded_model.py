"""The recorded model, optimizer and training set; names are those of the model without wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from dit_mlflow.errors import InputError, TrajectoryError, UnsupportedError
from dit_mlflow.recording.guards import equal, refuse_change
from dit_mlflow.replay.optimizers import describe_optimizer, optimizer_state
from dit_mlflow.told import logger_of
from dit_mlflow.torch_internals import tensor_slots
from dit_mlflow.trajectory import Record, State
from dit_mlflow.trajectory.manifest import ModelLayout, OptimizerLayout, TensorLayout
from dit_mlflow.workload.dataset_digest import dataset_digest, is_inert
from dit_mlflow.workload.workload import Optimizers
from dit_mlflow.workload.wrappers import plain_name, unwrapped

logger = logger_of(__name__)


class RecordedModel:
    """A model in training and the optimizer that trains it.

    Attributes:
        model: without wrappers.
        parameters: the model's, by plain name.
        model_layout, optimizer_layout: for the manifest.

    Raises:
        TrajectoryError: the optimizer is over another model.
        UnsupportedError: the optimizer's step cannot be differentiated.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers) -> None:
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
        """A copy of the current state, in the host's memory."""
        state = State(dict(self.parameters), self._buffers()).map(lambda value: value.detach().clone())
        state.optimizer.update(optimizer_state(self._optimizer, self._names))
        return state.to(torch.device("cpu"))

    def check_layouts(self, steps: int) -> None:
        """Raise :class:`UnsupportedError` if tensors were made, removed or reshaped by the first ``steps`` steps."""
        layout = self.model_layout
        for kind, found, expected in (
            ("parameter", _layouts(self.parameters), layout.parameters),
            ("buffer", _layouts(self._buffers()), layout.buffers),
        ):
            changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            if changed:
                refuse_change(kind, changed[0], steps - 1)

    def note_modules(self) -> None:
        """Some modules were replaced by their like; those that were attached since the beginning do not count."""
        found = {plain_name(name): module for name, module in self.model.named_modules()}
        self._modules = {name: found[name] for name in self._modules if name in found}

    def in_evaluation_mode(self) -> list[str]:
        """Names of the modules that are not in training mode."""
        return [name for name, module in self._modules.items() if not module.training]

    def missing_gradients(self) -> tuple[list[str], list[str]]:
        """Names of the parameters without a gradient, and of the frozen ones with one.

        Raises:
            UnsupportedError: the optimizer would step a frozen parameter by a gradient of earlier batches.
        """
        absent, frozen = [], []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                absent.append(name)
            elif not parameter.requires_grad:
                frozen.append(name)
                if name in self._held and parameter.grad.any():
                    raise UnsupportedError(
                        f"parameter {name!r} is frozen (requires_grad=False), but the optimizer still steps it by an "
                        "old gradient, which belongs to no sample of this step; call optimizer.zero_grad() after "
                        "freezing"
                    )
        return absent, frozen

    def shares_with(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer holds a parameter of the model."""
        return any(id(value) in self._names for group in optimizer.param_groups for value in group["params"])

    def _buffers(self) -> dict[str, Tensor]:
        found: dict[int, tuple[str, Tensor]] = {}
        for name, module in self._modules.items():
            for key, value in tensor_slots(module, "buffers").items():
                if value is not None:
                    found.setdefault(id(value), (f"{name}.{key}" if name else key, value))
        return dict(found.values())

    def _describe_optimizer(self) -> OptimizerLayout:
        layout = describe_optimizer(self._optimizer, self.model)
        groups = tuple(tuple(map(plain_name, group)) for group in layout.groups)
        return layout.model_copy(update={"groups": groups})


def _layouts(tensors: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    return {
        name: TensorLayout(shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in tensors.items()
    }


def resuming_step(begun: Record, now: State, recorded_model: RecordedModel) -> int:
    """The last step whose stored state equals ``now`` bit for bit.

    Raises:
        TrajectoryError: model or optimizer have another layout, or there is no such step.

    Cost: reads stored states, from the last one backwards.
    """

    def refused(reason: str) -> TrajectoryError:
        return TrajectoryError(f"cannot go on with the trajectory in {begun.directory}: {reason}")

    model, optimizer = recorded_model.model_layout, recorded_model.optimizer_layout
    old, trained = begun.manifest.model, begun.manifest.optimizer
    if model.parameters != old.parameters or model.buffers != old.buffers:
        raise refused(
            f"it is of a {old.name} with other parameters or buffers than this {model.name}; build the model as it "
            "was, or record into a new folder"
        )
    if (optimizer.name, optimizer.groups) != (trained.name, trained.groups):
        raise refused(
            f"it was trained with {trained.name} in {len(trained.groups)} parameter groups, this is {optimizer.name} "
            f"in {len(optimizer.groups)}; build the optimizer as it was, or record into a new folder"
        )
    same_weights = None
    for step in reversed(begun.checkpoint_steps):
        stored = begun.checkpoint(step)
        if equal(stored.parameters, now.parameters) and equal(stored.buffers, now.buffers):
            if _equal_optimizers(stored, now):
                return step
            same_weights = step
    if same_weights is not None:
        raise refused(
            f"the model is where it was at step {same_weights}, but the optimizer's state is not; load it too "
            "(optimizer.load_state_dict)"
        )
    raise refused(
        f"the model is at none of its {len(begun.checkpoint_steps)} stored states (the last is at step "
        f"{begun.checkpoint_steps[-1]}). Load what was saved beside recorder.checkpoint(), or record into a new folder"
    )


def _equal_optimizers(stored: State, now: State) -> bool:
    entries = [{name: entry for name, entry in state.optimizer.items() if entry} for state in (stored, now)]
    return entries[0].keys() == entries[1].keys() and all(
        equal(entry, entries[1][name]) for name, entry in entries[0].items()
    )


class TrainingSet:
    """Compares every watched data set with the first one, and with the recorded one.

    Args:
        expected: number of samples of the workload's training set, if there is a workload.

    Attributes:
        dataset: the first watched; ``None`` before.
        num_samples, digest: for the manifest, once they are known.
    """

    def __init__(self, expected: int | None) -> None:
        self._expected = expected
        self.dataset: Dataset[Any] | None = None
        self.num_samples: int | None = None
        self.digest: str | None = None

    def note(self, dataset: Dataset[Any]) -> None:
        """Note the data set of a watched loader.

        Raises:
            InputError: it is not the workload's, not the one before, or not the recorded one.
        """
        size = len(dataset)  # type: ignore[arg-type]
        if self._expected not in (None, size):
            raise InputError(
                f"watch() was given a loader over {size} samples; the workload's train_set has {self._expected}, and "
                "sample indices must mean the same in both"
            )
        digest = dataset_digest(dataset) if is_inert(dataset) else None
        another = self.dataset is not None and self.dataset is not dataset
        if another and (digest is None or digest != self.digest):
            raise InputError("watch() was given a second dataset; a trajectory has one training set")
        if self.num_samples not in (None, size) or (digest and self.digest and digest != self.digest):
            raise InputError(
                f"watch() was given another dataset than the trajectory that is continued was recorded on ({size} "
                f"samples, {self.num_samples} recorded); resume with the same one, or record into a new folder"
            )
        self.dataset, self.num_samples, self.digest = dataset, size, digest or self.digest

    def complete(self) -> None:
        """Take the digest, now that training is over and reading samples disturbs nothing."""
        if self.digest is None and self.dataset is not None:
            try:
                self.digest = dataset_digest(self.dataset)
            except Exception as error:  # Any kind: it is the user's, and training is over.
                logger.warning(
                    "the training set cannot be read sample by sample (%s: %s): whether a workload has the same one "
                    "will not be checked",
                    *(type(error).__name__, error),
                )
