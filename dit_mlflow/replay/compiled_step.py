"""The standard step with its reverse mode compiled, where that is right and saves time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dit_mlflow.errors import InputError
from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.dynamics import Dynamics, MicroBatch
from dit_mlflow.replay.loss_step import LOOKED_AT, LossStep, Objective
from dit_mlflow.replay.step_graphs import CannotCompileError, StepGraphs, graphs_of, tensors_of_step
from dit_mlflow.replay.update import Pulled
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import Batch, map_tensors

Compile = Literal["auto", "always", "never"]
"""Whether the sweep's steps are compiled: where it saves time, wherever it is right, or nowhere."""

COMPILE_SECONDS = 20.0
"""What compiling a step is assumed to cost, and :data:`SECONDS_PER_TENSOR` for each of the model's parameters;
``benchmarks/speed.py --only compiled`` measures it."""

SECONDS_PER_TENSOR = 2.0

SAVING = 0.35
"""The share of an eager step that compiling is assumed to save; from the same benchmark."""

TIMED = 3
"""Steps that are timed before something is decided; the fastest counts."""

MEASURED = 32
"""Steps that are timed at most: a GPU must wait for it."""

MOST_KINDS = 4
"""Kinds of step (shapes of the batch, modes, numbers of adjoints) that are compiled at most."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
"""Largest difference from the eager step, relative to the largest entry; other dtypes are not compiled."""

_log = logger_of(__name__)


def check_compile(asked: str) -> Compile:
    """``asked`` if it is one of the three; raises :class:`InputError` if not."""
    if asked not in get_args(Compile):
        raise InputError(
            f"compile={asked!r}; expected 'auto' (steps are compiled where that saves time), 'always' or 'never'"
        )
    return asked  # type: ignore[return-value]


@dataclass(eq=False)
class _Times:
    """How many steps were made in one way, and the seconds of the fastest."""

    count: int = 0
    fastest: float = math.inf


@dataclass(eq=False)
class _Kind:
    """Steps with the same shapes, modes and number of adjoints."""

    graphs: StepGraphs | None = None
    slower: bool = False
    eager: _Times = field(default_factory=_Times)
    compiled: _Times = field(default_factory=_Times)

    @property
    def made(self) -> int:
        return self.eager.count + self.compiled.count


class CompiledStep(LossStep):
    """A :class:`LossStep` that is pulled back by graphs that ``torch.compile`` made, where that is right and pays.

    The gradient, and the derivatives of :class:`Objective`, are traced below autograd without values (so that none
    becomes a constant), and compiled. The optimizer's adjoint stays as it is. A kind of step (shapes, modes,
    number of adjoints) is compared with the eager step where it is first compiled. What cannot be traced or compiled,
    draws random numbers in the forward pass, changes its batch in place or differs stays eager for good; that is said
    once, and never an error.

    Args:
        dynamics: model and data.
        always: compile whatever it costs, at the first step; else where the steps to go are so many that it is assumed
            to pay, and keep it if a timed step is faster.

    Attributes:
        to_go: how many steps will be pulled back, as far as is known.

    Cost: compiling, some ten seconds for each kind of step (less where Inductor's cache has it from before); then, in
    reverse, one to two training steps in place of two to three.
    """

    def __init__(self, dynamics: Dynamics, always: bool = False) -> None:
        super().__init__(dynamics)
        self.to_go = 0
        self._always = always
        self._kinds: dict[object, _Kind] = {}
        self._chosen: _Kind | None = None
        self._seconds = 0.0
        self._refused = ""
        self._price = COMPILE_SECONDS + SECONDS_PER_TENSOR * len(dynamics.manifest.model.parameters)
        if dynamics.floating_dtype not in TOLERANCE:
            self._stay_eager(f"the model computes in {dynamics.floating_dtype}")

    def vjp(
        self,
        state: State,
        batches: list[MicroBatch],
        weights: Tensor,
        record: StepRecord,
        adjoint: Adjoint,
        pulled: Pulled | None = None,
    ) -> tuple[Adjoint, Tensor]:
        self.to_go = max(0, self.to_go - 1)
        kind = self._kind(batches, record, adjoint)
        if kind.graphs is None and self._pays(kind):
            # Compiled, and compared, in derivatives().
            self._chosen = kind
        times = kind.eager if kind.graphs is None else kind.compiled
        try:
            with self._timed(times):
                if kind.graphs is None:
                    return super().vjp(state, batches, weights, record, adjoint, pulled)
                return self._by_graphs(kind.graphs, state, batches, weights, record, adjoint)
        finally:
            self._chosen = None
            if not self._always and kind.compiled.count == TIMED and kind.compiled.fastest >= kind.eager.fastest:
                kind.graphs, kind.slower = None, True

    def derivatives(
        self, objective: Objective, state: State, record: StepRecord, batches: list[MicroBatch]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        found = super().derivatives(objective, state, record, batches)
        if self._chosen is not None:
            begun = time.perf_counter()
            try:
                self._chosen.graphs = self._compared(objective, found, state, record, batches)
            except Exception as error:  # Any kind: of the tracer, the compiler or the model.
                self._stay_eager(_reason(error))
            self._seconds += time.perf_counter() - begun
        return found

    @property
    def choice(self) -> str:
        """What was chosen, in a line, and what it would have cost otherwise."""
        kinds = self._kinds.values()
        eager, compiled = _per_step([kind.eager for kind in kinds]), _per_step([kind.compiled for kind in kinds])
        made, of_all = sum(kind.compiled.count for kind in kinds), self._made
        if self._refused:
            return f"eager{f' after {made} compiled steps' if made else ''}: {self._refused}"
        if any(kind.graphs for kind in kinds):
            return (
                f"compiled: {made} of {of_all} steps, {compiled} each; eager ones, {eager}; compiling took "
                f"{self._seconds:.3g} s"
            )
        if made:
            return f"eager: {eager} a step; compiled ones, {compiled}"
        seconds = sum(kind.eager.count * kind.eager.fastest for kind in kinds if kind.eager.count)
        return (
            f"eager: {of_all} steps in {seconds:.3g} s; compiled, about {seconds * (1 - SAVING):.3g} s, and about "
            f"{self._price:.3g} s to compile"
        )

    @property
    def _made(self) -> int:
        return sum(kind.made for kind in self._kinds.values())

    def _pays(self, kind: _Kind) -> bool:
        """Whether to compile a kind of step now: if it saves more in the steps to go, or in as many as there were."""
        compiled = sum(other.graphs is not None or other.slower for other in self._kinds.values())
        if self._refused or kind.slower or compiled >= MOST_KINDS:
            return False
        if self._always:
            return True
        # At the first steps, elements without a derivative are looked for.
        if (made := self._made) < LOOKED_AT + TIMED or kind.eager.count < TIMED:
            return False
        ahead = max(self.to_go, made) * kind.made / made
        return ahead * SAVING * kind.eager.fastest > self._price

    def _kind(self, batches: list[MicroBatch], record: StepRecord, adjoint: Adjoint) -> _Kind:
        key: object = None
        if not self._refused:
            try:
                key = (
                    *(adjoint.rows, record.evaluation_mode, record.no_gradient, record.zero_gradient),
                    *((micro.size, micro.coefficients.dtype, _shape(micro.batch)) for micro in batches),
                )
            except Exception as error:  # Any kind: of a container of the user's.
                self._stay_eager(_reason(error))
        return self._kinds.setdefault(key, _Kind())

    def _by_graphs(
        self,
        graphs: StepGraphs,
        state: State,
        batches: list[MicroBatch],
        weights: Tensor,
        record: StepRecord,
        adjoint: Adjoint,
    ) -> tuple[Adjoint, Tensor]:
        def graph() -> dict[str, Tensor]:
            theta, _, buffers = self.tensors(state.parameters, state.buffers)
            return self.gradients(theta, buffers, weights, record, batches)

        given = tensors_of_step(state, weights, batches)
        # Where no value is read, a gradient is known by its shape.
        of_gradient = [state.parameters[name] for name in graphs.names]
        by_statistic = self.followed_buffers.split_rows(adjoint.buffers)
        pulled: Pulled | None = None
        try:
            with torch.no_grad():
                values = of_gradient if graphs.gradient is None else graphs.gradient(*given)
            kept = values[len(graphs.names) :]
            gradients = dict(zip(graphs.names, values, strict=not kept))
            pulled = self._update_adjoint(state, gradients, record, adjoint)
            with torch.no_grad():
                by_weight, by_theta, *rest = graphs.derivative(*given, *pulled.gradients, *by_statistic, *kept)
        except Exception as error:  # Any kind: a compiled function is compiled anew for what it did not expect.
            self._stay_eager(_reason(error))
            return super().vjp(state, batches, weights, record, adjoint, pulled)
        left = rest[len(rest) - len(graphs.changed) :]
        self._apart.check(state, {**state.buffers, **dict(zip(graphs.changed, left, strict=True))}, record)
        self._watch(record, graph, weights, pulled, largest=float(by_weight.abs().max()))
        pulled.adjoint.parameters += by_theta
        if by_statistic:
            pulled.adjoint.buffers = rest[0]
        return pulled.adjoint, by_weight

    def _compared(
        self,
        objective: Objective,
        found: tuple[Tensor, list[Tensor], list[Tensor]],
        state: State,
        record: StepRecord,
        batches: list[MicroBatch],
    ) -> StepGraphs:
        """The graphs of a step, whose derivatives were ``found``; raises unless theirs are the same."""
        graphs = graphs_of(self._twin, objective, state, record, batches)
        given = tensors_of_step(state, objective.weights, batches)
        with torch.no_grad():
            kept: Sequence[Tensor] = []
            if graphs.gradient is not None:
                values = graphs.gradient(*given)
                gradients, kept = values[: len(graphs.names)], values[len(graphs.names) :]
                self._compare("gradients", gradients, list(objective.gradients.values()))
            by_weight, by_theta, *rest = graphs.derivative(
                *given, *objective.by_gradient, *objective.by_statistic, *kept
            )
        expected, by_parameter, by_buffer = found
        self._compare("derivatives by the samples' weights", [by_weight], [expected])
        joined = self.followed_parameters.join_rows(by_parameter, objective.rows)
        self._compare("derivatives by the parameters", [by_theta], [joined])
        if by_buffer:
            joined = self.followed_buffers.join_rows(by_buffer, objective.rows)
            self._compare("derivatives by the buffers", rest[:1], [joined])
        return graphs

    def _compare(self, what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        largest = max(float(part.abs().max()) for part in expected)
        apart = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
        # NaN is no agreement.
        if not apart <= TOLERANCE[self.dynamics.floating_dtype] * largest:
            raise CannotCompileError(f"compiled {what} differ by {apart:.2g}, where the largest is {largest:.2g}")

    @cached_property
    def _twin(self) -> LossStep:
        """A step to be traced, with a model of its own: what it keeps of a trace has no values."""
        return LossStep(Dynamics(self.dynamics.workload, self.dynamics.manifest, self.dynamics.dtype))

    def _stay_eager(self, reason: str) -> None:
        self._refused = reason
        for kind in self._kinds.values():
            kind.graphs = None
        wanted = self._always or self._chosen is not None
        _log.log(logging.WARNING if wanted else logging.INFO, "the sweep's steps are not compiled: %s", reason)

    @contextmanager
    def _timed(self, times: _Times) -> Iterator[None]:
        """Adds a step to ``times``, whose fastest is one without compiling."""
        if times.count >= MEASURED or self._chosen is not None:
            yield
        else:
            begun = self._clock()
            yield
            times.fastest = min(times.fastest, self._clock() - begun)
        times.count += 1

    def _clock(self) -> float:
        if self.dynamics.device.type == "cuda":
            torch.cuda.synchronize(self.dynamics.device)
            return time.perf_counter()
        return time.process_time()


def _shape(batch: Batch) -> str:
    """Containers, shapes and all else but the tensors' values: what a graph holds as constants."""

    # Not all of them need stand in the batch's own repr (attributes of a list, a field with repr=False).
    parts: list[Any] = []

    def described(value: Any) -> Any:
        if value is None or isinstance(value, (str, bytes, int, float, complex)):
            parts.append(value)
            return value
        raise CannotCompileError(f"batches hold a {type(value).__qualname__}")

    def shape(tensor: Tensor) -> Any:
        parts.append((tuple(tensor.shape), tensor.dtype, tensor.stride()))
        return parts[-1]

    try:
        return repr((map_tensors(batch, shape, described), parts))
    except AttributeError as error:
        # An array becomes a tensor and then an array again.
        raise CannotCompileError("batches hold NumPy arrays") from error


def _per_step(times: Sequence[_Times]) -> str:
    """Milliseconds of a step: the fastest of each kind, by how many of it were made."""
    known = [(one.count, one.fastest) for one in times if one.fastest < math.inf]
    if not known:
        return "not timed"
    return f"{1e3 * sum(count * each for count, each in known) / sum(count for count, _ in known):.3g} ms"


def _reason(error: BaseException) -> str:
    """What went wrong first, which others may have wrapped."""
    while error.__cause__ is not None and not isinstance(error, CannotCompileError):
        error = error.__cause__
    if isinstance(error, CannotCompileError):
        return str(error)
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {first}{f' {more[0]}' if more and first.endswith(':') else ''}"
