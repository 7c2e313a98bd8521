"""A query by a trace of it: with the derivative of what it computes, whatever its backward pass would say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.dynamics import Dynamics, Parameters
from dit_mlflow.replay.running_statistics import DifferentiableStatistics
from dit_mlflow.replay.traced import ATTEMPTS, Traces, alike, followed
from dit_mlflow.workload.random_state import fixed_draws


class TracedQueries:
    """Asks queries of a model through traces of them, each held against the query's own value.

    Args:
        dynamics: the model.
    """

    def __init__(self, dynamics: Dynamics) -> None:
        self._dynamics = dynamics
        self._traces = Traces()

    def ask(self, parameters: Parameters, buffers: Parameters, query: Callable[[nn.Module], Tensor]) -> Tensor:
        """As :meth:`TrainingStep.ask`."""
        names, given = [*parameters, *buffers], [*parameters.values(), *buffers.values()]

        def function(*values: Tensor) -> list[Tensor]:
            of = dict(zip(names, values, strict=True))
            left = {name: followed(of[name]) for name in buffers}
            with torch.enable_grad(), DifferentiableStatistics(written_out=True), sdpa_kernel(SDPBackend.MATH):
                theta = {name: of[name].clone().requires_grad_(v.requires_grad) for name, v in parameters.items()}
                return [self._dynamics.evaluate(theta, left, query).reshape(())]

        detached = [value.detach() for value in given]
        # A query, as a loss, may take gradients by the parameters itself.
        theta = {name: value.detach().requires_grad_(value.requires_grad) for name, value in parameters.items()}
        left = {name: value.detach() for name, value in buffers.items()}
        expected = self._dynamics.evaluate(theta, left, query).detach()
        for attempt in ATTEMPTS:
            with naming_what_cannot_be_traced():
                graph = self._traces.of(query, function, detached, attempt)
            with fixed_draws(self._dynamics.device), torch.enable_grad():
                (value,) = graph(*given)
            if alike([value], [expected.reshape(())]):
                return value
        raise UnsupportedError(
            f"a trace of query {getattr(query, 'name', query)!r} gives another value than the query itself, so the "
            f"query does not do the same each time it is called. {WITHOUT_TRACE}"
        )


@contextmanager
def naming_what_cannot_be_traced() -> Iterator[None]:
    try:
        yield
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"the operations of the workload's loss cannot be traced: {type(error).__name__}: {error}. {WITHOUT_TRACE}"
        ) from error


WITHOUT_TRACE = (
    "Its backward pass is not the derivative of its forward pass (something is detached, or a hook or an autograd "
    "function changes gradients), so influence needs a trace of it. Change it so that it can be traced (no .item(), "
    "numpy() or branch on a tensor's value), or use leave_one_out, which takes no derivative"
)
