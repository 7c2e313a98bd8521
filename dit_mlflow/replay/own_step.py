"""A training step of the workload's own: run as it is, and in reverse through a trace of it."""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from dit_mlflow.errors import DitError, TrajectoryError, UnsupportedError, first_line
from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.dynamics import Dynamics, MicroBatch, Parameters
from dit_mlflow.replay.optimizer_code import HighPrecision, NumbersAsTensors
from dit_mlflow.replay.optimizers import emptied, every, groups_of, set_hyperparameters
from dit_mlflow.replay.rounding import missed_by_rounding
from dit_mlflow.replay.traced import Attempt, Function, Traces, followed, near
from dit_mlflow.replay.training_step import Slot, TrainingStep, slots_of
from dit_mlflow.torch_internals import reading_values
from dit_mlflow.trajectory.state import COUNTERS, State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import tensors_of, with_tensors

WAYS: tuple[tuple[Attempt, bool, bool], ...] = (
    *(("kept", True, True), ("anew", True, True), ("anew", False, True), ("as it ran", False, True)),
    *(("anew", False, False), ("as it ran", False, False)),
)
"""How to come by a trace; whether counters and learning rates are inputs of it, or numbers in it; and whether numbers
that optimizers read out of tensors stay tensors."""


class OwnStep(TrainingStep):
    """:attr:`Workload.step`: several optimizers, models or passes, averages of weights, whatever a loop does in a step.

    Forwards, the step runs as it is. In reverse, its operations are recorded below autograd, backward passes and
    optimizers among them, and differentiated as they ran. A trace serves all steps of its shapes: counters and learning
    rates are inputs of it, where the optimizers take them as tensors (those of ``torch.optim`` that have a flag
    ``differentiable``). Where it leads is held against where the step itself leads, each time; where that is another
    place (a branch, a counter that is a number), the step is traced anew. What optimizers compute in low precision is
    differentiated in that of the parameters, with a warning.

    Followed are all floating parameters and buffers, and the optimizers' state.

    Args:
        dynamics: model and data; its workload has a step.

    Raises:
        TrajectoryError: the workload's optimizers are not those recorded.
        UnsupportedError: in reverse, the step cannot be traced, or its trace leads elsewhere.

    Cost: forwards, the step; in reverse, the step and three to four more; a trace, some 1 ms an operation.
    """

    by_trace = True

    def __init__(self, dynamics: Dynamics) -> None:
        super().__init__(dynamics)
        workload = dynamics.workload
        assert workload.step is not None and workload.optimizer is not None
        self._step = workload.step
        self._layout = dynamics.manifest.optimizer
        model = workload.build_model()
        self._trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._optimizer = emptied(workload.optimizer(model), self._layout)
        self._traces = Traces()
        self._slots: dict[object, list[Slot]] = {}
        self._takes_tensors: dict[object, bool] = {}
        self._counters: set[int] = set()
        self._high_precision = HighPrecision(
            f"the optimizer {'+'.join(type(one).__qualname__ for one in every(self._optimizer))}"
        )
        self._differentiated = False
        self._branches = False

    def forward(
        self,
        state: State,
        batches: list[MicroBatch],
        weights: Tensor | None,
        record: StepRecord,
        over: State | None = None,
    ) -> State:
        if not batches:
            # All samples are taken out of the batch, and a step of none cannot be run: their weights are 0.
            batches, weights = self.dynamics.load(record), torch.zeros(len(record.samples))
        micro = _only(batches, record)
        after = state.copy(over)
        weights = torch.ones(micro.size) if weights is None else weights
        weights = weights.to(self.dynamics.device, self.dynamics.floating_dtype)
        try:
            with torch.enable_grad():
                return self._made(after, micro, weights, record)
        except (DitError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise TrajectoryError(
                f"Workload.step cannot make step {record.index} of the record: {type(error).__name__}: {error}"
            ) from error

    @contextmanager
    def as_differentiated(self) -> Iterator[None]:
        """Inside it, :meth:`forward` makes the step that a trace has the derivative of: without what optimizers round
        to low precision."""
        self._differentiated, before = True, self._differentiated
        try:
            yield
        finally:
            self._differentiated = before

    def vjp(
        self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord, adjoint: Adjoint
    ) -> tuple[Adjoint, Tensor]:
        def after(context: AbstractContextManager[Any]) -> Parameters:
            with context:
                return self.forward(state, self.dynamics.load(record), weights.detach(), record).parameters

        found = super().vjp(state, batches, weights, record, adjoint)
        self._high_precision.warn(
            state.parameters, lambda: after(nullcontext()), lambda: after(self.as_differentiated())
        )
        return found

    def with_graph(self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord) -> State:
        trace = self._trace(state, batches, weights, record)
        with self.dynamics.as_recorded(_only(batches, record).random_state), torch.enable_grad():
            return trace.state(trace.function(*trace.inputs))

    def forward_side_by_side(
        self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord, over: State | None = None
    ) -> State:
        """By one ``vmap`` of the trace."""
        with torch.no_grad():
            return self.of_all(state, batches, weights, record)

    def of_all(self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord) -> State:
        """The step of trainings side by side, by one ``vmap`` of the trace of the first."""
        first = state.map(lambda value: value[0], counters=False)
        try:
            trace = self._trace(first, batches, weights[0], record)
        except UnsupportedError as error:
            raise NotImplementedError(str(error)) from error
        if self._high_precision.needed:
            raise NotImplementedError("a trace of the step is in another precision than the step itself")
        if self._branches:
            raise NotImplementedError("the step reads values, by which each training may go another way")
        inputs = [*trace.inputs]
        copies = [*state.parameters.values(), *state.buffers.values(), *slots_of(state).values()]
        inputs[: len(copies)], inputs[trace.weights] = copies, weights
        dims = [0 if place < len(copies) or place == trace.weights else None for place in range(len(inputs))]
        with self.dynamics.as_recorded(_only(batches, record).random_state):
            return trace.state(torch.func.vmap(trace.function, tuple(dims), randomness="same")(*inputs))

    def _made(
        self,
        state: State,
        micro: MicroBatch,
        weights: Tensor,
        record: StepRecord,
        rates: Sequence[Tensor] | None = None,
        numbers_stay_tensors: bool = False,
    ) -> State:
        """The step on the tensors of ``state``, in place; with ``rates`` (may be empty), such that it can be traced."""
        parameters, buffers = state.parameters, dict(state.buffers)
        for name in self._trained:
            parameters[name].requires_grad_()
        set_hyperparameters(self._optimizer, record.hyperparameters)
        for group, names in zip(groups_of(self._optimizer), self._layout.groups, strict=True):
            group["params"] = [parameters[name] for name in names]
        names_of = {parameters[name]: name for names in self._layout.groups for name in names}
        for optimizer in every(self._optimizer):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            entries = {parameter: state.optimizer.get(names_of[parameter]) for parameter in own}
            optimizer.state = defaultdict(dict, {p: dict(entry) for p, entry in entries.items() if entry})
        try:
            with ExitStack() as stack:
                stack.enter_context(self.dynamics.as_recorded(micro.random_state))
                if rates is not None:
                    stack.enter_context(_traceable(every(self._optimizer), rates))
                if rates is not None or self._differentiated:
                    contexts: list[Callable[[], AbstractContextManager[Any]]] = [
                        partial(self._high_precision, self.dynamics.floating_dtype)
                    ]
                    contexts += [NumbersAsTensors] * numbers_stay_tensors
                    stack.enter_context(_stepping(every(self._optimizer), contexts))
                self.dynamics.call(
                    parameters, buffers, lambda model: self._step(model, self._optimizer, micro.batch, weights)
                )
            after = {
                names_of[parameter]: {key: value for key, value in entry.items() if value is not None}
                for optimizer in every(self._optimizer)
                for parameter, entry in optimizer.state.items()
            }
        finally:
            for optimizer in every(self._optimizer):
                optimizer.state = defaultdict(dict)
            for group in groups_of(self._optimizer):
                group["params"] = []
            for parameter in parameters.values():
                parameter.grad = None
        return State(parameters, buffers, after).map(Tensor.detach)

    def _trace(self, state: State, batches: list[MicroBatch], weights: Tensor, record: StepRecord) -> _Trace:
        """A trace that leads from ``state`` where the step does."""
        micro = _only(batches, record)
        plain = state.map(Tensor.detach)
        with self.as_differentiated():
            expected = self.forward(plain, self.dynamics.load(record), weights.detach(), record)
        slots = slots_of(state)
        rest = {
            (name, key): value
            for name, entry in state.optimizer.items()
            for key, value in entry.items()
            if (name, key) not in slots
        }
        counters = {slot: value.double() for slot, value in rest.items() if isinstance(value, Tensor)}
        rates = [torch.tensor(float(settings.get("lr", 0)), dtype=torch.float64) for settings in record.hyperparameters]
        inputs = [*state.parameters.values(), *state.buffers.values(), *slots.values(), *counters.values(), *rates]
        place = len(inputs)
        inputs += [weights, *tensors_of(micro.batch)]
        takes_tensors, numbers_stay_tensors, run = True, True, False
        key = (record.evaluation_mode, tuple(slots), tuple(rest))
        shapes = (key, tuple(value.shape for value in inputs))

        def function(*values: Tensor) -> list[Tensor]:
            nonlocal run
            run = True
            self._counters.clear()
            given = (value.clone() for value in values)
            parameters = {name: next(given) for name in state.parameters}
            buffers = {name: followed(next(given)) for name in state.buffers}
            entries: dict[str, dict[str, Any]] = defaultdict(dict)
            for name, key in slots:
                entries[name][key] = next(given)
            for name, key in counters:
                counter = next(given)
                entries[name][key] = counter if takes_tensors else rest[name, key].clone()
                self._counters.add(entries[name][key].data_ptr())
            for (name, key), value in rest.items():
                entries[name].setdefault(key, value)
            own_rates = [next(given) for _ in record.hyperparameters]
            own_weights = next(given)
            own = replace(micro, batch=with_tensors(micro.batch, list(given)))
            with torch.enable_grad(), self.differentiable(), sdpa_kernel(SDPBackend.MATH):
                before = State(parameters, buffers, entries)
                rates = own_rates if takes_tensors else ()
                after = self._made(before, own, own_weights, record, rates, numbers_stay_tensors)
            self._slots[shapes] = [*slots_of(after)]
            return [*after.parameters.values(), *after.buffers.values(), *slots_of(after).values()]

        detached = [value.detach() for value in inputs]
        problem = "it leads elsewhere than the step itself"
        for attempt, takes_tensors, numbers_stay_tensors in WAYS:  # noqa: B007, `function` reads them
            if takes_tensors and not self._takes_tensors.get(key, True):
                continue
            run = False
            try:
                graph = self._traces.of(key, function, detached, attempt, roots=True)
                trace = _Trace(graph, inputs, place, state, self._slots[shapes], expected)
                with self.dynamics.as_recorded(micro.random_state):
                    found = trace.run(detached, differentiable=attempt == "as it ran")
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
                continue
            missed = _missed(found, expected, plain)
            with self.as_differentiated():
                right = not missed or missed <= missed_by_rounding(
                    self, [record], plain, expected, found, weights.detach()
                )
            if right:
                if run:
                    self._refuse_numbers(function, detached, micro, record)
                    self._refuse_moving_numbers(plain, weights.detach(), record)
                self._takes_tensors[key] = takes_tensors
                return trace
        raise UnsupportedError(
            f"step {record.index}: Workload.step cannot be followed by a trace: {problem}. Influence needs its "
            "derivative: do the same each time it is called, on tensors alone (no numpy()), or use leave_one_out, "
            "which takes no derivative"
        )

    def _counts(self, value: Tensor) -> bool:
        """Whether it is a counter in an optimizer's state, on which no influence depends."""
        entries = (entry for optimizer in every(self._optimizer) for entry in optimizer.state.values())
        kept = {v.data_ptr() for entry in entries for k, v in entry.items() if k in COUNTERS and isinstance(v, Tensor)}
        return value.data_ptr() in kept | self._counters

    def _refuse_numbers(self, function: Function, inputs: list[Tensor], micro: MicroBatch, record: StepRecord) -> None:
        """Raise :class:`UnsupportedError` if numbers that the step reads out of tensors change where it leads.

        They are constants of the trace, so that influence through them is lost. Branches on them are left alone: they
        are taken as before, whether a number is a thousandth larger or smaller.
        """
        read: set[bool] = set()

        def outcome(factor: float) -> list[Tensor]:
            noted = reading_values(factor, self._counts, lambda value: read.add(value.is_floating_point()))
            with self.dynamics.as_recorded(micro.random_state), noted:
                return function(*inputs)

        def leads_elsewhere(factor: float) -> bool:
            try:
                there = outcome(factor)
            except Exception:  # Any kind: another number may be none that the step takes.
                return True
            return any(not torch.equal(one, other) for one, other in zip(here, there, strict=True))

        here = outcome(1.0)
        if read and all(leads_elsewhere(1 + change) for change in (-1e-3, 1e-3)):
            # Not to be taken for a trace that was accepted, where somebody asks again.
            self._traces = Traces()
            raise UnsupportedError(
                f"step {record.index}: Workload.step computes with a number that it reads out of a tensor (.item(), "
                "float(), numpy()), so that influence through it would be lost; compute with the tensor itself, or use "
                "leave_one_out, which takes no derivative"
            )
        # A loss that is only told decides nothing.
        self._branches |= False in read or (True in read and any(map(leads_elsewhere, (0.0, -1.0, 1e6))))

    def _refuse_moving_numbers(self, before: State, weights: Tensor, record: StepRecord) -> None:
        """Raise :class:`UnsupportedError` if numbers that the optimizers keep, or what is named like a counter, depend
        on the parameters: an adjoint follows other tensors alone."""

        def numbers(factor: float) -> dict[tuple[Any, str], Any]:
            moved = {
                name: value * factor if value.is_floating_point() else value
                for name, value in before.parameters.items()
            }
            after = self.forward(replace(before, parameters=moved), self.dynamics.load(record), weights, record)
            slots = slots_of(after)
            kept = [*after.optimizer.items(), *enumerate(groups_of(self._optimizer))]
            return {
                (place, key): value
                for place, entry in kept
                for key, value in entry.items()
                if (place, key) not in slots and key != "params"
            }

        here, there = numbers(1.0), numbers(1 + 1e-3)
        for (place, key), value in here.items():
            if not _is_number(value) or torch.equal(torch.as_tensor(value), torch.as_tensor(there[place, key])):
                continue
            self._traces = Traces()
            raise UnsupportedError(
                f"an optimizer keeps {key!r}, which depends on the gradients, and "
                + (
                    f"{key!r} is the name of a number in torch's optimizers that does not; give it another name"
                    if key in COUNTERS
                    else "no derivative follows a number; keep it in a floating tensor of its state"
                )
                + ", or use leave_one_out, which takes no derivative"
            )


@dataclass(frozen=True, eq=False)
class _Trace:
    """A traced step, what it is called with, and how its results are read.

    Attributes:
        weights: place of the samples' weights among the inputs.
        slots: the optimizers' tensors after the step.
        expected: ``s_{t+1}``, with the optimizers' counters.
    """

    function: Function
    inputs: list[Tensor]
    weights: int
    before: State
    slots: list[Slot]
    expected: State

    def run(self, inputs: list[Tensor], differentiable: bool) -> State:
        """Where it leads; raises if it is to be ``differentiable`` and is not."""
        with torch.set_grad_enabled(differentiable):
            leaves = [value.clone().requires_grad_(differentiable and value.is_floating_point()) for value in inputs]
            after = self.state(self.function(*leaves))
            if differentiable:
                # What works in place may run, and have no derivative.
                total = torch.stack([value.sum() for value in after.parameters.values()]).sum()
                torch.autograd.grad(total, leaves[: len(after.parameters)], allow_unused=True)
        return after.map(Tensor.detach)

    def state(self, results: Sequence[Tensor]) -> State:
        given = iter(results)
        parameters = {name: next(given) for name in self.before.parameters}
        buffers = {name: next(given) for name in self.before.buffers}
        entries = {name: dict(entry) for name, entry in self.expected.optimizer.items()}
        for name, key in self.slots:
            entries[name][key] = next(given)
        return State(parameters, buffers, entries)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor))


@contextmanager
def _traceable(optimizers: Sequence[Optimizer], rates: Sequence[Tensor]) -> Iterator[None]:
    """Optimizers step parameter by parameter, at ``rates`` that are tensors if there are any, and keep every graph."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group.update({flag: False for flag in ("foreach", "fused", "capturable") if flag in group})
    for group, rate in zip(groups, rates, strict=False):
        if "differentiable" in group:
            # SGD reads a rate that needs no gradient as a number.
            group.update(differentiable=True, lr=rate.requires_grad_())
    with _KeepingGraphs(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True", category=UserWarning)
        yield


@contextmanager
def _stepping(
    optimizers: Sequence[Optimizer], within: Sequence[Callable[[], AbstractContextManager[Any]]]
) -> Iterator[None]:
    """Optimizers make their steps inside of contexts, and without what wraps them."""

    def made(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack, torch.no_grad():
            for context in within:
                stack.enter_context(context())
            return inspect.unwrap(type(optimizer).step)(optimizer, *args, **kwargs)

    for optimizer in optimizers:
        optimizer.step = partial(made, optimizer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for optimizer in optimizers:
            vars(optimizer).pop("step", None)


class _KeepingGraphs(TorchFunctionMode):
    """Of the formulas for a backward pass, autograd takes those that can be differentiated; lists of tensors
    (``torch._foreach_…``, as in ``clip_grad_norm_``) are worked on one by one, which can be too."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (name := getattr(func, "__name__", "")).startswith(_ON_LISTS):
            one = getattr(Tensor, name.removeprefix(_ON_LISTS))
            parts = [
                one(*(arg[place] if isinstance(arg, (list, tuple)) else arg for arg in args), **kwargs)
                for place in range(len(args[0]))
            ]
            return None if name.endswith("_") else parts
        if func is Tensor.data.__set__:  # type: ignore[attr-defined]
            # A parameter gets other values, and stays the parameter.
            with torch.no_grad():
                args[0].copy_(args[1])
            return None
        if func is F.dropout and _draws(*args, **kwargs):
            return _dropout(*args, **kwargs)
        if len(args) < _CREATE_GRAPH.get(func, 0):
            kwargs["create_graph"] = True
        return func(*args, **kwargs)


_ON_LISTS = "_foreach_"

_CREATE_GRAPH = {Tensor.backward: 4, torch.autograd.grad: 5}
"""Positional arguments up to ``create_graph``."""


def _only(batches: list[MicroBatch], record: StepRecord) -> MicroBatch:
    if len(batches) != 1:
        raise TrajectoryError(
            f"step {record.index} was recorded with {len(batches)} batches; Workload.step makes a step of one"
        )
    return batches[0]


def _missed(found: State, expected: State, before: State) -> set[str]:
    """Parameters and buffers that differ after a step by more than rounding, or whose state in an optimizer does."""
    ours, old = slots_of(found), slots_of(before)
    pairs = [
        (name, getattr(found, part)[name], value, getattr(before, part)[name])
        for part in ("parameters", "buffers")
        for name, value in getattr(expected, part).items()
    ]
    pairs += [
        (slot[0], ours[slot], value, old.get(slot, torch.zeros_like(value)))
        for slot, value in slots_of(expected).items()
    ]
    pairs = [pair for pair in pairs if pair[2].is_floating_point() and pair[2].numel()]
    ways = [float((value - start).abs().max()) for _, _, value, start in pairs]
    longest = max(ways, default=0.0)
    return {name for (name, one, other, _), way in zip(pairs, ways, strict=True) if not near(one, other, way, longest)}


def _draws(value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and 0 < p < 1 and not value.is_contiguous()


def _dropout(value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``F.dropout`` of a tensor that is not contiguous: its mask is drawn in the order of its memory, which a trace
    without work in place would not do."""
    order = sorted(range(value.dim()), key=value.stride().__getitem__, reverse=True)
    drawn = torch.empty([value.shape[dim] for dim in order], dtype=value.dtype, device=value.device).bernoulli_(1 - p)
    dropped = value * drawn.permute([order.index(dim) for dim in range(value.dim())]).div(1 - p)
    return value.copy_(dropped) if inplace else dropped
