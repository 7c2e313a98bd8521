"""Queries with the derivative of what they compute, by autograd or, where that is wrong, by a trace."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dit_mlflow.replay.derivative_check import Ask, DerivativeCheck
from dit_mlflow.replay.dynamics import Parameters
from dit_mlflow.replay.paths import operations_of
from dit_mlflow.replay.traced_query import TracedQueries
from dit_mlflow.replay.training_step import TrainingStep


class RightQueries:
    """Asks queries of a step's model, and compares the derivative of each kind of them with differences, once.

    Queries of the same code, on whatever data, whose values are made of the same operations are of one kind.

    Args:
        step: evaluates the model.
        check: compares; ``None`` = nothing is compared.
    """

    def __init__(self, step: TrainingStep, check: DerivativeCheck | None) -> None:
        self._step, self._check = step, check
        self._traced = TracedQueries(step.dynamics)
        self._right: dict[object, bool] = {}

    @property
    def plain(self) -> bool:
        """Whether autograd was right about all queries so far."""
        return all(self._right.values())

    def ask(self, parameters: Parameters, buffers: Parameters, query: Ask) -> Tensor:
        """As :meth:`TrainingStep.ask`.

        Raises:
            UnsupportedError: neither autograd nor a trace has the right derivative.
        """
        value = self._step.ask(parameters, buffers, query)
        return value if self.right(query, value) else self._traced.ask(parameters, buffers, query)

    def right(self, query: Ask, value: Tensor) -> bool:
        """Whether autograd's derivative of a query is right; ``value``: the query's, with its graph."""
        if self._check is None or not value.requires_grad:
            return True
        kind = _code_of(query), frozenset(operations_of(value))
        if kind not in self._right:
            self._right[kind] = self._check.right_of(query)
        return self._right[kind]


def _code_of(query: Ask) -> object:
    function = getattr(query, "function", query)
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", type(function))
