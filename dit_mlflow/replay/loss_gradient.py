"""The gradient of a recorded step's loss, ``g_t(theta, b, w)``, and its clipping."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from dit_mlflow.errors import DitError, TrajectoryError
from dit_mlflow.replay.dynamics import Buffers, Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.narrow_layers import NarrowLayers
from dit_mlflow.replay.paths import Paths, operations_of
from dit_mlflow.trajectory.step_record import StepRecord

Term = Callable[[Parameters, Buffers, Tensor | None], Tensor]
"""``(parameters, buffers, weights [sum B]) -> scalar``: one of the terms that add up to a step's objective."""


class LossGradient:
    r"""``g_t(theta, b, w) = sum_{i in S_t} w_i c_{t,i} grad l_i(theta, b) + grad R(theta)``.

    Args:
        dynamics: model and data; its workload has losses, coefficients, regularizer and clipping.

    Attributes:
        paths: notes the way of each step whose gradient is taken without a graph; ``None`` = nothing does.
    """

    def __init__(self, dynamics: Dynamics) -> None:
        self.dynamics = dynamics
        self.paths: Paths | None = None
        self.workload = dynamics.workload
        self._position = {name: place for place, (name, _) in enumerate(dynamics.model.named_parameters())}

    def __call__(
        self,
        parameters: Parameters,
        buffers: Buffers,
        record: StepRecord,
        batches: list[MicroBatch],
        weights: Tensor | None = None,
        create_graph: bool = False,
    ) -> dict[str, Tensor]:
        """``g_t(theta, b, w)`` by parameter name, before clipping.

        Parameters whose recorded gradient was ``None`` are absent; frozen ones that the optimizer still stepped have 0.
        Micro-batches are added in the order in which ``backward()`` accumulates them, so that the sum equals the
        recorded one bit for bit.

        Args:
            weights: ``w_i`` for all samples of the step in batch order, ``[sum B]``; ``None`` = all 1.
            create_graph: keep the graph of the gradients, for a second derivative.
        """
        inputs = {
            name: value
            for name, value in parameters.items()
            if value.requires_grad and name not in record.no_gradient and name not in record.zero_gradient
        }
        total: dict[str, Tensor] = {}
        noted = None if create_graph else self.paths
        operations: Counter[type] = Counter()
        for term in self.terms(record, batches):
            with self._naming(record):
                value = self.value(term, parameters, buffers, weights)
            if noted is not None:
                operations.update(operations_of(value))
            if not inputs:
                continue
            parts = torch.autograd.grad(value, list(inputs.values()), create_graph=create_graph, allow_unused=True)
            for name, part in zip(inputs, parts, strict=True):
                if part is not None:
                    total[name] = total[name] + part if name in total else part
        if noted is not None:
            noted.note(record, operations)
        return {
            name: total[name] if name in total else torch.zeros_like(value)
            for name, value in parameters.items()
            if name in inputs or name in record.zero_gradient
        }

    def value(self, term: Term, parameters: Parameters, buffers: Buffers, weights: Tensor | None) -> Tensor:
        """What a term gives, ``[]``."""
        return term(parameters, buffers, weights)

    def terms(self, record: StepRecord, batches: list[MicroBatch]) -> Iterator[Term]:
        """Yield the terms whose gradients add up to ``g_t``: one per micro-batch, then the regularizer.

        The random state is the one that a term's forward pass needs; call the term before asking for the next.
        """
        self.dynamics.set_modes(record)
        offset = 0
        for micro in batches:
            with self.dynamics.as_recorded(micro.random_state):
                yield partial(self.data_term, micro, slice(offset, offset + micro.size))
            offset += micro.size
        if self.workload.regularizer is not None:
            with self.dynamics.as_recorded():
                yield self.regularizer_term

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

    def buffers_after(self, parameters: Parameters, buffers: Buffers, record: StepRecord) -> Buffers:
        """``B_t``, the buffers after the step's forward passes."""
        made = {name: value.clone() for name, value in buffers.items()}
        for term in self.terms(record, self.dynamics.load(record)):
            term(parameters, made, None)
        return made

    def bytes_kept(self, parameters: Parameters, buffers: Buffers, record: StepRecord) -> int:
        """Bytes that the forward passes of a step keep for the backward pass."""
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.buffers_after(parameters, buffers, record)
        return kept

    def data_term(
        self,
        micro: MicroBatch,
        part: slice,
        parameters: Parameters,
        buffers: Buffers,
        weights: Tensor | None,
    ) -> Tensor:
        losses = self.dynamics.call(
            parameters, buffers, lambda model: self.workload.sample_losses(model, micro.batch, micro.size)
        )
        coefficients = micro.coefficients.to(losses.dtype)
        if weights is None:
            return (coefficients * losses).sum()
        # Targets may give the loss another dtype than the parameters have.
        return torch.dot(weights[part] * coefficients.to(weights.dtype), losses.to(weights.dtype))

    def regularizer_term(self, parameters: Parameters, buffers: Buffers, weights: Tensor | None) -> Tensor:
        assert self.workload.regularizer is not None
        return self.dynamics.call(parameters, buffers, self.workload.regularizer)

    @contextmanager
    def _naming(self, record: StepRecord) -> Iterator[None]:
        """Name the step where a loss fails: its batch, buffers and modes come from the record."""
        try:
            yield
        except (DitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            why = "It is not the recorded workload, or the record has been changed"
            if self.dynamics.dtype is not None:
                why = (
                    f"This is computed in {self.dynamics.dtype} (dtype=…): tensors that the model or the loss makes "
                    "must have the dtype of its parameters or inputs. Or compute in the recorded one (dtype=None). If "
                    "the loss fails there too, it is not the recorded workload"
                )
            raise TrajectoryError(
                f"the workload's loss fails on the record of step {record.index}: {type(error).__name__}: {error}. "
                f"{why}"
            ) from error


class GradientSideBySide(LossGradient):
    """The gradients of ``K`` trainings, ``[K, *shape]`` each: that of the sum of their objectives.

    Parameters and buffers have a leading dimension ``K``, weights are ``[K, sum B]``; batches and random draws are
    shared.
    """

    def value(self, term: Term, parameters: Parameters, buffers: Buffers, weights: Tensor | None) -> Tensor:
        def one(own: Parameters, left: Buffers, row: Tensor | None) -> Tensor:
            given = dict(left)
            found = term(own, left, row)
            if any(left[name] is not given[name] for name in given):
                raise NotImplementedError("the model assigns buffers anew; copies side by side would lose them")
            return found

        with NarrowLayers():
            return torch.func.vmap(one, randomness="same")(parameters, buffers, weights).sum()

    @contextmanager
    def _naming(self, record: StepRecord) -> Iterator[None]:
        # What fails here says that vmap cannot run it; the record was compared before.
        yield
