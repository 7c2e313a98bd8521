"""A copy of a workload's model as a function of tensors, and the recorded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.replay.double_backward import TwiceDifferentiable
from dit_mlflow.replay.optimizers import describe_optimizer
from dit_mlflow.replay.recorded_dtype import RecordedDtype
from dit_mlflow.replay.substitution import Substitution
from dit_mlflow.trajectory.manifest import Manifest
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import Batch, floating_one, to_like, with_tensors
from dit_mlflow.workload.modes import act, check_modes, set_modes
from dit_mlflow.workload.random_state import RandomState, fixed_draws, preserved_random_state
from dit_mlflow.workload.workload import Workload

Parameters = Mapping[str, Tensor]
Buffers = MutableMapping[str, Tensor]
"""Buffers by name; after a call, those that the model left, whether changed in place or assigned anew."""
Stored = Callable[[int], list[list[Tensor]] | None]
"""``step -> tensors of each micro-batch``, or ``None`` if the record stores none."""
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of a step: the collated samples, their ``c_i`` ``[B]``, the random state before the pass."""

    batch: Batch
    coefficients: Tensor
    random_state: RandomState | None

    @property
    def size(self) -> int:
        return len(self.coefficients)


class Dynamics:
    """A workload's model as a function of parameters and buffers, on a copy, and the batches of the record.

    Args:
        workload: model and data.
        manifest: of the record; the model's tensors must match it by name and shape.
        dtype: floating dtype of all computation; ``None`` = as recorded. Random numbers are drawn in the
            recorded dtype and then cast.
        stored: the recorded tensors of a step's micro-batches; ``None`` = all batches are fetched again.

    Raises:
        TrajectoryError: model or data are not those of the trajectory.
    """

    def __init__(
        self, workload: Workload, manifest: Manifest, dtype: torch.dtype | None = None, stored: Stored | None = None
    ) -> None:
        self.workload = workload
        self.manifest = manifest
        self._stored = stored or (lambda t: None)
        self.dtype = dtype
        model = workload.build_model()
        check_recorded(workload, model, manifest)
        check_modes(model)
        # Before the cast, which makes two tensors of a buffer that has two names.
        self._substituted = Substitution(model)
        if dtype is not None:
            model.to(dtype)
        self._recorded_dtype: AbstractContextManager[object] = (
            nullcontext() if dtype is None else RecordedDtype(manifest.model.dtype)
        )
        like = floating_one(model.parameters())
        self.device, self.floating_dtype = like.device, like.dtype
        self.model = model
        self._twice_differentiable = TwiceDifferentiable(model)
        self._substituted.withdraw()
        self._modules = dict(model.named_modules())
        self._evaluation_mode: frozenset[str] | None = None
        self._act = act(model)

    def load(self, step: StepRecord) -> list[MicroBatch]:
        """The step's micro-batches, drawn again under their recorded random state, or as stored."""
        stored = self._stored(step.index)
        loaded = []
        for position, indices in enumerate(step.indices):
            state = step.random_states[position]
            with replaying(state):
                batch = self.workload.batch(indices)
                before_forward = RandomState.capture() if state is not None else None
            if stored is not None:
                # Fetched for its containers alone; the recorded random state is that after the fetch.
                batch, before_forward = with_tensors(batch, stored[position]), state
            if step.coefficients is not None:
                coefficients = torch.from_numpy(step.coefficients[position])
            else:
                coefficients = self.workload.batch_coefficients(batch, len(indices))
            loaded.append(
                MicroBatch(to_like(batch, self.device, self.dtype), coefficients.to(self.device), before_forward)
            )
        return loaded

    def load_without(self, step: StepRecord, absent: np.ndarray) -> list[MicroBatch]:
        """:meth:`load`, with samples taken out of their micro-batches; one that is left without any is left out.

        The coefficients of the others stay. Their random draws too, where the dataset draws sample by sample; in the
        forward pass they begin as recorded, and a smaller batch then takes others.

        Args:
            step: the record.
            absent: bool ``[sum B]``.

        Raises:
            UnsupportedError: a stored tensor has no row for each sample.
        """
        stored = self._stored(step.index)
        left, offset = [], 0
        for position, micro in enumerate(self.load(step)):
            kept = ~absent[offset : offset + micro.size]
            offset += micro.size
            if kept.any() and not kept.all():
                with replaying(step.random_states[position]):
                    batch = self.workload.batch(step.indices[position], kept)
                if stored is not None:
                    batch = with_tensors(batch, [_rows(tensor, kept, step) for tensor in stored[position]])
                coefficients = micro.coefficients[torch.from_numpy(kept).to(self.device)]
                micro = MicroBatch(to_like(batch, self.device, self.dtype), coefficients, micro.random_state)
            if kept.any():
                left.append(micro)
        return left

    def coefficients(self, step: StepRecord) -> np.ndarray:
        """``c_j`` of every training sample in a step, ``[n]``: 0 for samples not in the step; repeats add up.

        Loads no data, unless the workload computes coefficients from its batches.
        """
        if step.coefficients is not None:
            parts: Sequence[np.ndarray] = step.coefficients
        elif self.workload.coefficients is None:
            parts = [np.full(len(batch), 1 / (len(batch) * self.workload.accumulate)) for batch in step.indices]
        else:
            parts = [micro.coefficients.double().cpu().numpy() for micro in self.load(step)]
        found = np.zeros(self.workload.num_samples)
        np.add.at(found, step.samples, np.concatenate(parts))
        return found

    @contextmanager
    def as_recorded(self, state: RandomState | None = None) -> Iterator[None]:
        """Inside it, random draws repeat those made from ``state`` on, in every dtype; the generators are put back."""
        with replaying(state), self._recorded_dtype:
            yield

    def call(self, parameters: Parameters, buffers: Buffers, function: Callable[..., Result]) -> Result:
        """``function(model)`` with the given tensors in place of the model's own."""

        def called(model: nn.Module) -> Result:
            # Now, since train() or eval() may compute values for the forward pass from the given tensors.
            if self._act and self._evaluation_mode is not None:
                set_modes(self._modules, self._evaluation_mode)
            return function(model)

        with self._twice_differentiable():
            return self._substituted(parameters, buffers, called)

    def evaluate(self, parameters: Parameters, buffers: Parameters, function: Callable[..., Result]) -> Result:
        """``function(model)`` in evaluation mode; ``buffers`` are left alone.

        Random draws in that mode (the noise of an autoencoder or a diffusion model) are the same every time, so that
        values of two models differ by the models alone.
        """
        self._set(frozenset(self._modules))
        with fixed_draws(self.device), self._recorded_dtype:
            return self.call(parameters, {name: value.clone() for name, value in buffers.items()}, function)

    def set_modes(self, step: StepRecord) -> None:
        """Put every module into the mode it was recorded in."""
        if self._evaluation_mode == step.evaluation_mode:
            return
        if unknown := step.evaluation_mode - self._modules.keys():
            raise TrajectoryError(
                f"step {step.index} was recorded with module {sorted(unknown)[0]!r} in evaluation mode; the workload's "
                f"model ({type(self.model).__name__}) has no such module"
            )
        self._set(step.evaluation_mode)

    def _set(self, evaluating: frozenset[str]) -> None:
        self._evaluation_mode = evaluating
        if not self._act:
            for name, module in self._modules.items():
                module.training = name not in evaluating


def _rows(tensor: Tensor, kept: np.ndarray, step: StepRecord) -> Tensor:
    """Of a stored tensor, those of the samples that stay."""
    if tensor.dim() == 0 or len(tensor) != len(kept):
        raise UnsupportedError(
            f"step {step.index}: a stored batch of {len(kept)} samples holds a tensor of shape {list(tensor.shape)}, "
            "from which no sample can be taken out; use removal='weight'"
        )
    return tensor[torch.from_numpy(kept)]


@contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    if state is None:
        yield
        return
    with preserved_random_state():
        state.restore()
        yield


def check_recorded(workload: Workload, model: nn.Module, manifest: Manifest) -> None:
    """Compare a workload and the ``model`` that it built with the record.

    Raises:
        TrajectoryError: parameters, buffers, the optimizer or the number of samples differ.
    """
    _check_model(model, manifest)
    _check_optimizer(workload, model, manifest)
    if manifest.num_samples not in (None, workload.num_samples):
        raise TrajectoryError(
            f"the trajectory was recorded on {manifest.num_samples} training samples; the workload's "
            f"train_set has {workload.num_samples}"
        )


def _check_model(model: nn.Module, manifest: Manifest) -> None:
    buffers = dict(model.named_buffers())
    if odd := sorted(buffers.keys() ^ manifest.model.buffers.keys()):
        raise TrajectoryError(
            f"the workload's model ({type(model).__name__}) is not the recorded one ({manifest.model.name}): "
            f"buffer {odd[0]!r} is in {'the workload' if odd[0] in buffers else 'the record'} only"
        )
    recorded = {name: layout.shape for name, layout in manifest.model.parameters.items()}
    given = {name: tuple(value.shape) for name, value in model.named_parameters()}
    if recorded == given:
        return
    name = next(name for name in [*recorded, *given] if recorded.get(name) != given.get(name))
    raise TrajectoryError(
        f"the workload's model ({type(model).__name__}) is not the recorded one ({manifest.model.name}): "
        f"parameter {name!r} has shape {given.get(name, 'none')}, recorded {recorded.get(name, 'none')}"
    )


def _check_optimizer(workload: Workload, model: nn.Module, manifest: Manifest) -> None:
    if workload.optimizer is None:
        return
    given, recorded = describe_optimizer(workload.optimizer(model), model), manifest.optimizer
    if given.name != recorded.name:
        raise TrajectoryError(
            f"the workload's optimizer is {given.name}; the trajectory was recorded with {recorded.name}"
        )
    if [set(group) for group in given.groups] != [set(group) for group in recorded.groups]:
        raise TrajectoryError(
            "the workload's optimizer has other parameter groups than the recorded one: "
            f"{[len(group) for group in given.groups]} parameters, recorded {[len(group) for group in recorded.groups]}"
        )
