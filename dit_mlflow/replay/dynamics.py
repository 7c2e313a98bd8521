"""The gradient of a recorded step, ``g_t(theta, b, w)``, and what stands between it and the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dit_mlflow.errors import DitError, TrajectoryError
from dit_mlflow.replay.differentiable import TwiceDifferentiable
from dit_mlflow.replay.recorded_dtype import RecordedDtype
from dit_mlflow.replay.recorded_workload import check_recorded
from dit_mlflow.replay.substitution import Substitution
from dit_mlflow.trajectory.manifest import DTYPES, Manifest
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.random_state import RandomState, fixed_draws, preserved_random_state
from dit_mlflow.workload.workload import Batch, Workload, to_like, with_tensors

Parameters = Mapping[str, Tensor]
Buffers = MutableMapping[str, Tensor]
"""Every call leaves here what the model made of them, in place or anew."""
Term = Callable[[Parameters, Buffers, Tensor | None], Tensor]
"""``(parameters, buffers, weights [sum B]) -> scalar``: a part of the objective of a step."""
Stored = Callable[[int], list[list[Tensor]] | None]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One forward pass of a step: the collated samples, their ``c_i`` [B], the random state before it."""

    batch: Batch
    coefficients: Tensor
    random_state: RandomState | None

    @property
    def size(self) -> int:
        return len(self.coefficients)


class Dynamics:
    """A workload's model and loss as functions of parameters, on a copy of the model.

    Args:
        workload: model, data, loss.
        manifest: what was recorded; the model's tensors must match it by name and shape.
        dtype: floating dtype of all computation; ``None`` = as recorded. Random numbers are drawn in the
            recorded dtype and then cast.
        stored: the recorded tensors of a step's micro-batches, if there are any.

    Raises:
        TrajectoryError: model or data are not those of the trajectory.
    """

    def __init__(
        self, workload: Workload, manifest: Manifest, dtype: torch.dtype | None = None, stored: Stored | None = None
    ) -> None:
        self.workload = workload
        self._stored = stored or (lambda t: None)
        self.dtype = dtype
        model = workload.build_model()
        check_recorded(workload, model, manifest)
        # Before the cast, which makes two tensors of a buffer that is known by two names.
        self._substituted = Substitution(model)
        if dtype is not None:
            model.to(dtype)
        recorded = next(iter(manifest.model.parameters.values())).dtype
        self._as_recorded: AbstractContextManager[object] = (
            nullcontext() if dtype is None else RecordedDtype(DTYPES[recorded])
        )
        self.device = next(model.parameters()).device
        self.model = model
        self._twice_differentiable = TwiceDifferentiable(model)
        self._substituted.withdraw()
        self._modules = dict(model.named_modules())
        self._position = {name: position for position, (name, _) in enumerate(model.named_parameters())}
        self._evaluation_mode: frozenset[str] | None = None

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
                # Drawn for its containers alone; the recorded state is that after the draw.
                batch, before_forward = with_tensors(batch, stored[position]), state
            if step.coefficients is not None:
                coefficients = torch.from_numpy(step.coefficients[position])
            else:
                coefficients = self.workload.batch_coefficients(batch, len(indices))
            loaded.append(
                MicroBatch(to_like(batch, self.device, self.dtype), coefficients.to(self.device), before_forward)
            )
        return loaded

    def coefficients(self, step: StepRecord) -> np.ndarray:
        """``c_j`` of every training sample in a step, ``[n]``: 0 for those not met; of those met twice, the sum.

        Loads no data, unless the workload computes them from its batches.
        """
        if step.coefficients is not None:
            parts: Sequence[np.ndarray] = step.coefficients
        elif self.workload.coefficients is None:
            parts = [np.full(len(met), 1 / (len(met) * self.workload.accumulate)) for met in step.indices]
        else:
            parts = [micro.coefficients.double().cpu().numpy() for micro in self.load(step)]
        found = np.zeros(self.workload.num_samples)
        np.add.at(found, step.samples, np.concatenate(parts))
        return found

    def terms(self, step: StepRecord, batches: list[MicroBatch]) -> Iterator[Term]:
        """The scalars whose gradients add up to ``g_t``: one per micro-batch, then the regularizer.

        Each is yielded under the random state that its forward pass needs; use it before asking for the next.
        """
        self.set_modes(step)
        offset = 0
        for micro in batches:
            with replaying(micro.random_state), self._as_recorded:
                yield partial(self._data_term, micro, slice(offset, offset + micro.size))
            offset += micro.size
        if self.workload.regularizer is not None:
            with self._as_recorded:
                yield self._regularizer_term

    def gradient(
        self,
        parameters: Parameters,
        buffers: Buffers,
        step: StepRecord,
        batches: list[MicroBatch],
        weights: Tensor | None = None,
        create_graph: bool = False,
    ) -> dict[str, Tensor]:
        """``g_t(theta, b, w)`` by parameter name, before clipping.

        Parameters whose recorded gradient was ``None`` are absent; frozen ones that were stepped all the same have 0.
        Micro-batches are added in the order in which ``backward()`` accumulates them, so that the sum is the recorded
        one bit for bit.

        Args:
            weights: ``w_i`` for all samples of the step in batch order, ``[sum B]``; ``None`` = all 1.
        """
        inputs = {
            name: value
            for name, value in parameters.items()
            if value.requires_grad and name not in step.no_gradient and name not in step.zero_gradient
        }
        total: dict[str, Tensor] = {}
        for term in self.terms(step, batches):
            with self._naming(step):
                value = term(parameters, buffers, weights)
            if not inputs:
                continue
            parts = torch.autograd.grad(value, list(inputs.values()), create_graph=create_graph, allow_unused=True)
            for name, part in zip(inputs, parts, strict=True):
                if part is not None:
                    total[name] = total[name] + part if name in total else part
        return {
            name: total[name] if name in total else torch.zeros_like(value)
            for name, value in parameters.items()
            if name in inputs or name in step.zero_gradient
        }

    @contextmanager
    def _naming(self, step: StepRecord) -> Iterator[None]:
        """A loss may well fail on a batch, a buffer or a mode that it never met: these come from the record."""
        try:
            yield
        except (DitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            why = "It is not the recorded workload, or the record has been changed"
            if self.dtype is not None:
                why = (
                    f"This is computed in {self.dtype} (dtype=…): tensors that the model or the loss makes must have "
                    "the dtype of its parameters or inputs. Or compute in the recorded one (dtype=None). If it fails "
                    "there too, it is not the recorded workload"
                )
            raise TrajectoryError(
                f"the workload's loss fails on the record of step {step.index}: {type(error).__name__}: {error}. {why}"
            ) from error

    def _data_term(
        self,
        micro: MicroBatch,
        part: slice,
        parameters: Parameters,
        buffers: Buffers,
        weights: Tensor | None,
    ) -> Tensor:
        losses = self.call(
            parameters, buffers, lambda model: self.workload.sample_losses(model, micro.batch, micro.size)
        )
        coefficients = micro.coefficients.to(losses.dtype)
        if weights is None:
            return (coefficients * losses).sum()
        # A loss may come out in another dtype than the parameters, by its targets.
        return torch.dot(weights[part] * coefficients.to(weights.dtype), losses.to(weights.dtype))

    def _regularizer_term(self, parameters: Parameters, buffers: Buffers, weights: Tensor | None) -> Tensor:
        assert self.workload.regularizer is not None
        return self.call(parameters, buffers, self.workload.regularizer)

    @property
    def clips(self) -> bool:
        """Whether the workload clips gradients."""
        return self.workload.clip_grad_norm is not None or self.workload.clip_grad_value is not None

    def clip(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The workload's clipping, differentiable; the same arithmetic as ``torch.nn.utils.clip_grad_*``."""
        clipped = dict(gradients)
        if (limit := self.workload.clip_grad_norm) is not None and gradients:
            # In the model's order, not the record's: rounding depends on it.
            ordered = sorted(gradients, key=lambda name: self._position.get(name, 0))
            norm = torch.linalg.vector_norm(
                torch.stack([torch.linalg.vector_norm(gradients[name]) for name in ordered])
            )
            factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
            clipped = {name: value * factor for name, value in clipped.items()}
        if (bound := self.workload.clip_grad_value) is not None:
            clipped = {name: value.clamp(-bound, bound) for name, value in clipped.items()}
        return clipped

    def call(self, parameters: Parameters, buffers: Buffers, function: Callable[..., Result]) -> Result:
        """``function(model)`` with the given tensors in place of the model's own."""
        with self._twice_differentiable():
            return self._substituted(parameters, buffers, function)

    def bytes_kept(self, state: State, step: StepRecord) -> int:
        """What the forward passes of a step keep for the backward pass, in bytes."""
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        theta = {
            name: value.detach().requires_grad_(value.is_floating_point()) for name, value in state.parameters.items()
        }
        buffers = {name: value.clone() for name, value in state.buffers.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for term in self.terms(step, self.load(step)):
                term(theta, buffers, None)
        return kept

    def evaluate(self, parameters: Parameters, buffers: Parameters, function: Callable[..., Result]) -> Result:
        """``function(model)`` in evaluation mode; ``buffers`` are left alone.

        What a model or a loss draws in that mode as well (the noise of an autoencoder or a diffusion model) is the
        same every time, so that values of two models differ by the models alone.
        """
        self._evaluation_mode = None
        self.model.eval()
        with fixed_draws(self.device), self._as_recorded:
            return self.call(parameters, {name: value.clone() for name, value in buffers.items()}, function)

    def set_modes(self, step: StepRecord) -> None:
        """Put every module into the mode it was recorded in."""
        if self._evaluation_mode == step.evaluation_mode:
            return
        if unknown := step.evaluation_mode - self._modules.keys():
            raise TrajectoryError(
                f"step {step.index} was recorded with module {sorted(unknown)[0]!r} in evaluation mode; the workload's "
                f"model ({type(self.model).__name__}) has none of that name"
            )
        for name, module in self._modules.items():
            module.training = name not in step.evaluation_mode
        self._evaluation_mode = step.evaluation_mode


@contextmanager
def replaying(state: RandomState | None) -> Iterator[None]:
    if state is None:
        yield
        return
    with preserved_random_state():
        state.restore()
        yield
