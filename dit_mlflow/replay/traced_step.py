"""A loss, then an optimizer, where the backward pass itself is differentiated: right for any backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.adjoint import Flat
from dit_mlflow.replay.dynamics import Buffers, Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.loss_gradient import Term
from dit_mlflow.replay.loss_step import LossStep, leaves
from dit_mlflow.replay.traced import ATTEMPTS, Attempt, Traces, alike, followed
from dit_mlflow.replay.traced_query import WITHOUT_TRACE, TracedQueries, naming_what_cannot_be_traced
from dit_mlflow.replay.training_step import floating_shapes
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import tensors_of, with_tensors
from dit_mlflow.workload.random_state import RandomState

Values = list[Tensor]


class TracedStep(LossStep):
    """:class:`LossStep` whose reverse mode runs through a trace of the loop's own backward pass.

    The gradient that training followed need not be the gradient of a function: a loss or a module may detach what
    depends on the parameters, reverse or round gradients, or change them in hooks. Then its Jacobian is not
    symmetric, and autograd's second derivative is not that of what ran. Here the operations of forward and backward
    pass are recorded below autograd, and differentiated as they ran.

    All floating buffers are followed, also those that a loss or a module moves by itself.

    Every gradient of the trace is held against the loop's own, which is computed anew: a loss that goes another way
    (a Python branch, a number that changes) is traced again.

    Raises:
        UnsupportedError: the loss cannot be traced, or its trace gives another gradient.

    Cost: in reverse, three to four training steps; a trace, up to some seconds, for every shape of a batch.
    """

    by_trace = True

    def __init__(self, dynamics: Dynamics) -> None:
        super().__init__(dynamics)
        self.follow(Flat(floating_shapes(dynamics.manifest.model.buffers)))
        self._traces = Traces()
        self._queries = TracedQueries(dynamics)

    def gradients(
        self,
        parameters: Parameters,
        buffers: Buffers,
        weights: Tensor,
        record: StepRecord,
        batches: list[MicroBatch],
    ) -> dict[str, Tensor]:
        expected = self._own(parameters, buffers, weights, record, batches)
        before = dict(buffers)
        for attempt in ATTEMPTS:
            buffers.update(before)
            found: dict[str, Tensor] = {}
            try:
                for part in self._parts(record, batches, weights):
                    for name, value in self._gradient(part, parameters, buffers, record, attempt).items():
                        found[name] = found[name] + value if name in found else value
            except RuntimeError:
                # Shapes that depend on values (a selection by a mask) are those of another step.
                if attempt == ATTEMPTS[-1]:
                    raise
                continue
            found |= {name: torch.zeros_like(parameters[name]) for name in record.zero_gradient}
            if alike([found[name] for name in expected], list(expected.values())):
                return {name: found[name] for name in expected}
        raise UnsupportedError(
            f"step {record.index}: a trace of the workload's loss gives another gradient than the loss itself, so it "
            "does not do the same each time it is called (a counter, or draws that do not come from the global "
            f"generators). {WITHOUT_TRACE}"
        )

    def ask(self, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]) -> Tensor:
        return self._queries.ask(parameters, buffers, query)

    def _own(
        self, parameters: Parameters, buffers: Buffers, weights: Tensor, record: StepRecord, batches: list[MicroBatch]
    ) -> dict[str, Tensor]:
        """The gradient as training computed it."""
        left = {name: value.detach().clone() for name, value in buffers.items()}
        return self.gradient(leaves(parameters), left, record, batches, weights.detach())

    def _parts(self, record: StepRecord, batches: list[MicroBatch], weights: Tensor) -> Iterator[_Part]:
        offset = 0
        for micro in batches:
            yield _Part(micro.random_state, micro, weights[offset : offset + micro.size])
            offset += micro.size
        if self.gradient.workload.regularizer is not None:
            yield _Part()

    def _gradient(
        self, part: _Part, parameters: Parameters, buffers: Buffers, record: StepRecord, attempt: Attempt
    ) -> dict[str, Tensor]:
        """The part's gradient by parameter, with its graph; ``buffers`` go on."""
        absent = record.no_gradient | record.zero_gradient
        trained = [name for name, value in parameters.items() if value.requires_grad and name not in absent]
        names = [*parameters, *buffers]

        def function(*values: Tensor) -> Values:
            of = dict(zip(names, values, strict=False))
            theta = {name: of[name].clone() for name in parameters}
            for name in trained:
                theta[name].requires_grad_()
            # Not leaves: what works in place on them is followed.
            left = {name: followed(of[name]) for name in buffers}
            with torch.enable_grad(), self.differentiable(), sdpa_kernel(SDPBackend.MATH):
                term, weights = part.term(self, values[len(names) :])
                value = term(theta, left, weights)
                inputs = [theta[name] for name in trained]
                # Of the formulas for a backward pass, those that can be differentiated.
                found = (
                    torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
                    if value.requires_grad and inputs
                    else [None] * len(inputs)
                )
            gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, found, strict=True)]
            return [*gradients, *left.values()]

        values = [*parameters.values(), *buffers.values(), *part.tensors]
        key = (part.key, record.evaluation_mode, tuple(trained))
        with self.dynamics.as_recorded(part.random_state), naming_what_cannot_be_traced():
            graph = self._traces.of(key, function, [value.detach() for value in values], attempt)
        with self.dynamics.as_recorded(part.random_state), torch.enable_grad():
            found = graph(*values)
        for name, value in zip(buffers, found[len(trained) :], strict=True):
            buffers[name] = value
        return dict(zip(trained, found[: len(trained)], strict=True))


@dataclass(frozen=True, eq=False)
class _Part:
    """A term of a step's objective: of a micro-batch and its weights, or the regularizer."""

    random_state: RandomState | None = None
    micro: MicroBatch | None = None
    weights: Tensor | None = None

    @property
    def tensors(self) -> Values:
        if self.micro is None or self.weights is None:
            return []
        return [self.weights, self.micro.coefficients, *tensors_of(self.micro.batch)]

    @property
    def key(self) -> object:
        return None if self.micro is None else self.micro.size

    def term(self, step: TracedStep, tensors: tuple[Tensor, ...]) -> tuple[Term, Tensor | None]:
        """The term, with ``tensors`` in place of its own, and its weights."""
        if self.micro is None:
            return step.gradient.regularizer_term, None
        weights, coefficients, *batch = tensors
        micro = replace(self.micro, batch=with_tensors(self.micro.batch, batch), coefficients=coefficients)

        def term(parameters: Parameters, buffers: Buffers, weights: Tensor | None) -> Tensor:
            return step.gradient.data_term(micro, slice(None), parameters, buffers, weights)

        return term, weights
