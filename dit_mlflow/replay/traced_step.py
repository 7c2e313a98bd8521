"""The standard step, with a derivative that is right for any backward pass: that of a trace of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.adjoint import Flat
from dit_mlflow.replay.dynamics import Buffers, Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.loss_step import LossStep, leaves
from dit_mlflow.replay.traced import ATTEMPTS, Attempt, Traces, alike, followed
from dit_mlflow.replay.traced_query import WITHOUT_TRACE, TracedQueries, naming_what_cannot_be_traced
from dit_mlflow.replay.training_step import floating_shapes
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import tensors_of, with_tensors
from dit_mlflow.workload.random_state import RandomState

Values = list[Tensor]

Part = tuple[RandomState | None, object, Values, Callable[[Parameters, Buffers, Sequence[Tensor]], Tensor]]
"""A term of a step's objective: its random state, a key of its kind, the tensors that it depends on besides parameters
and buffers, and ``term(parameters, buffers, tensors) -> scalar``."""


class TracedStep(LossStep):
    """:class:`LossStep` whose reverse mode goes through a trace of the loop's own backward pass.

    The gradient that training followed need not be the gradient of a function: a loss or a module may detach what
    depends on the parameters, reverse or round gradients, or change them in hooks. Then its Jacobian is not
    symmetric, and autograd's second derivative is not that of what ran. Here the operations of the forward and the
    backward pass are traced below autograd, and differentiated as they ran.

    All floating buffers are followed, also those that a loss or a module changes by itself.

    Gradients and buffers of the trace are compared with the loop's own, which are computed anew. A loss that takes
    another path (a Python branch, a number that changes) is traced again.

    Raises:
        UnsupportedError: the loss cannot be traced, or its trace gives other gradients or buffers.

    Cost: in reverse, three to four training steps; a trace takes up to some seconds for each shape of a batch.
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
        left = {name: value.detach().clone() for name, value in buffers.items()}
        expected = self.gradient(leaves(parameters), left, record, batches, weights.detach())
        before, moving = dict(buffers), list(self.followed_buffers.shapes)
        for attempt in ATTEMPTS:
            buffers.update(before)
            found: dict[str, Tensor] = {}
            try:
                for part in self._parts(batches, weights):
                    for name, value in self._gradient(part, parameters, buffers, record, attempt).items():
                        found[name] = found[name] + value if name in found else value
            except RuntimeError:
                # A stored trace may have shapes that depended on the values of another step (a selection by a mask).
                if attempt == ATTEMPTS[-1]:
                    raise
                continue
            found |= {name: torch.zeros_like(parameters[name]) for name in record.zero_gradient}
            gradients = alike([found[name] for name in expected], list(expected.values()))
            # A number read from a counter (BatchNorm's mean of all batches) may change these alone.
            if gradients and alike([buffers[name] for name in moving], [left[name] for name in moving]):
                return {name: found[name] for name in expected}
        raise UnsupportedError(
            f"step {record.index}: a trace of the workload's loss gives other values than the loss itself, so the "
            "loss does not do the same each time it is called (a counter, or draws that do not come from the global "
            f"generators). {WITHOUT_TRACE}"
        )

    def ask(self, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]) -> Tensor:
        return self._queries.ask(parameters, buffers, query)

    def _parts(self, batches: list[MicroBatch], weights: Tensor) -> Iterator[Part]:
        for micro, own in zip(batches, weights.split([micro.size for micro in batches]), strict=True):

            def term(theta: Parameters, left: Buffers, tensors: Sequence[Tensor], micro: MicroBatch = micro) -> Tensor:
                own, coefficients, *batch = tensors
                given = replace(micro, batch=with_tensors(micro.batch, batch), coefficients=coefficients)
                return self.gradient.data_term(given, slice(None), theta, left, own)

            yield micro.random_state, micro.size, [own, micro.coefficients, *tensors_of(micro.batch)], term
        if self.gradient.workload.regularizer is not None:
            yield None, None, [], lambda theta, left, _: self.gradient.regularizer_term(theta, left, None)

    def _gradient(
        self, part: Part, parameters: Parameters, buffers: Buffers, record: StepRecord, attempt: Attempt
    ) -> dict[str, Tensor]:
        """The part's gradient by parameter, with its graph; ``buffers`` become those after its forward pass."""
        random_state, kind, tensors, term = part
        absent = record.no_gradient | record.zero_gradient
        trained = [name for name, value in parameters.items() if value.requires_grad and name not in absent]
        names = [*parameters, *buffers]

        def function(*values: Tensor) -> Values:
            of = dict(zip(names, values, strict=False))
            theta = {name: of[name].clone().requires_grad_(name in trained) for name in parameters}
            # Not leaves, so that operations in place on them are followed.
            left = {name: followed(of[name]) for name in buffers}
            inputs = [theta[name] for name in trained]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            with torch.enable_grad(), self.differentiable(), sdpa_kernel(SDPBackend.MATH):
                value = term(theta, left, values[len(names) :])
                if value.requires_grad and inputs:
                    # With create_graph, autograd takes the formulas of a backward pass that can be differentiated.
                    found = torch.autograd.grad(value, inputs, create_graph=True, allow_unused=True)
            gradients = [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, found, strict=True)]
            return [*gradients, *left.values()]

        values = [*parameters.values(), *buffers.values(), *tensors]
        key = (kind, record.evaluation_mode, tuple(trained))
        with self.dynamics.as_recorded(random_state), naming_what_cannot_be_traced():
            graph = self._traces.of(key, function, [value.detach() for value in values], attempt)
        with self.dynamics.as_recorded(random_state), torch.enable_grad():
            found = graph(*values)
        buffers.update(zip(buffers, found[len(trained) :], strict=True))
        return dict(zip(trained, found[: len(trained)], strict=True))
