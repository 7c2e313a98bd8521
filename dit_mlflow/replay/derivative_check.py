"""Whether autograd's derivatives of a training's steps and of queries are those of what they compute."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_mlflow.errors import UnsupportedError
from dit_mlflow.replay.adjoint import grad_or_zeros
from dit_mlflow.replay.double_backward import naming_missing_derivatives
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.loss_step import LossStep, leaves
from dit_mlflow.replay.not_finite import are_finite
from dit_mlflow.replay.own_step import OwnStep
from dit_mlflow.replay.paths import Paths
from dit_mlflow.replay.slope import STRIDES, Slope
from dit_mlflow.replay.traced_query import TracedQueries
from dit_mlflow.replay.traced_step import TracedStep
from dit_mlflow.replay.training_step import TrainingStep, slots_of
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.record import Record
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import floating_one

Ask = Callable[[nn.Module], Tensor]
"""A query: ``model -> scalar``."""

Measure = Callable[[Any, int], Slope]
"""``(step, attempt) -> slope``, the derivative taken by ``step``; each attempt has its own stride and directions."""

Asking = TrainingStep | TracedQueries
"""What has ``ask``, for queries."""

LONG = 200
"""Number of steps from which the check looks at five stored states instead of three."""

DRAWN, APART = 8, 50
"""Largest number of steps between stored states that a sweep looks at, and steps for each of them."""

ROUNDING = 1e-7
"""Share of a tensor's move that a change in the parameters' last places may make; more is rounding, amplified."""

_log = logger_of(__name__)


class DerivativeCheck:
    """Compares directional derivatives with central differences in float64, at some stored states of a training.

    A loss or a module may detach what depends on the parameters, reverse gradients, round with a straight-through
    estimator or change gradients in a hook. Then autograd's second derivative is not that of what training did, and
    autograd raises no error. A :class:`TracedStep` replaces the step where they differ. A step of the workload's own is
    a trace already, and refused where they differ.

    Between the stored states, a sweep looks at the states that it meets and the check :meth:`wants`.

    Args:
        trajectory: what was recorded.
        step: its step, in the dtype of a replay.
        first, last: the sweep's first and last state. The check reads no states stored elsewhere: the record may be
            remote.

    Cost: a copy of the model in float64, and about seven training steps for each of three to five states, and for each
    call of :meth:`right_at`.
    """

    def __init__(self, trajectory: Record, step: LossStep | OwnStep, first: int, last: int) -> None:
        self._trajectory = trajectory
        self._step = step
        self._ignored: bool | None = None
        stored = trajectory.checkpoint_steps
        self._before = max(t for t in stored if t <= first)
        self._after = min((t for t in stored if t >= last), default=stored[-1])
        self._stored = [t for t in stored if self._before <= t < max(last, self._before + 1)]
        self._drawn = set(random.Random(0).sample(range(first, last), min(DRAWN, (last - first) // APART)))

    def step(self) -> TrainingStep:
        """The given step, or a traced one if autograd's derivative of the given step is wrong.

        Raises:
            UnsupportedError: the step cannot be traced, or the trace's derivative is wrong too; or it ignores the
                samples' weights.
        """
        own = isinstance(self._step, OwnStep)
        slope: Callable[..., Slope] = self._slope_of_own_step if own else slope_of_step
        traced = None if own else lambda: self._traced_in_float64
        measures = (
            (f"step {t}", partial(slope, state, self._trajectory.step(t), self._moved)) for t, state in self._states()
        )
        if not all(self._right(measure, what, traced) for what, measure in measures):
            return TracedStep(self._step.dynamics)
        if self._ignored:
            raise UnsupportedError(
                "the samples' weights have no effect on Workload.step(model, optimizer, batch, weights), so that every "
                "influence would be 0; multiply the samples' losses by them: (weights * losses).mean()"
            )
        if isinstance(self._step, LossStep) and self._step.paths is None:
            self._step.watch(Paths())
        return self._step

    def right_throughout(self) -> bool:
        """Whether the given step's derivative is right wherever a stored state shows it, for those who make no sweep.

        Besides what :meth:`step` looks at: at stored states whose step goes another way, and at the last batch of the
        first epoch, which may be smaller. Steps that go another way between stored states are not seen.

        Raises:
            UnsupportedError: as :meth:`step`.

        Cost: a training step for each stored state.
        """
        if self.step() is not self._step:
            return False
        ended = self._trajectory.manifest.epoch_ends[0] - 1
        near = min(self._stored, key=lambda t: abs(t - ended))
        for t, stored in (*((t, t) for t in self._stored), (ended, near)):
            state, record = self._trajectory.checkpoint(stored), self._trajectory.step(t)
            state = state.to(self._step.dynamics.device, self._step.dynamics.dtype)
            self._step(state, record)
            if self.wants(record) and not self.right_at(state, record):
                return False
        return True

    def wants(self, record: StepRecord) -> bool:
        """Whether to look at a step that a replay has just made: its loss is made of other operations than those of all
        steps before, or it is one of a few that are drawn."""
        new_path = isinstance(self._step, LossStep) and self._step.paths is not None and self._step.paths.is_new(record)
        return new_path or record.index in self._drawn

    def right_at(self, state: State, record: StepRecord) -> bool:
        """Whether the given step, of a loss, has the right derivative at ``s_t``; ``False``: only a trace of it has.

        Raises:
            UnsupportedError: it is wrong, and the step cannot be traced, or the trace's derivative is wrong too.
        """
        self._drawn.discard(record.index)
        if not are_finite(state.parameters.values()):
            return True
        there = State(state.parameters, state.buffers).to(self._step.dynamics.device, torch.float64)
        measure = partial(slope_of_step, there, record, self._moved)
        return self._right(measure, f"step {record.index}", lambda: self._traced_in_float64)

    def right_of(self, query: Ask) -> bool:
        """Whether autograd's derivative of a query is right; ``False``: only that of a trace is.

        Raises:
            UnsupportedError: it cannot be traced, or the trace's derivative is wrong too.
        """
        measure = partial(slope_of_query, query, self._last_state, self._moved)
        what = f"query {getattr(query, 'name', query)!r}"
        return self._right(measure, what, lambda: TracedQueries(self._in_float64.dynamics))

    def _right(self, measure: Measure, what: str, traced: Callable[[], Asking] | None) -> bool:
        """``True``: the derivative is right, or cannot be compared. ``False``: only that of ``traced()`` is right."""
        refused: UnsupportedError | None = None
        try:
            if _agrees(measure, self._in_float64):
                return True
        except UnsupportedError as error:
            refused = error
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Any kind: a loss or a query may not work in float64.
            _log.info("%s: its derivative could not be compared with differences: %s", what, error)
            return True
        if traced is None and refused is not None:
            raise refused
        try:
            if traced is not None and _agrees(measure, traced()):
                _log.info("%s: autograd's derivative is not that of what was computed; it is taken from a trace", what)
                return False
        except UnsupportedError as error:
            raise (refused or error) from error
        slope = measure(self._in_float64 if traced is None else traced(), 0)
        raise UnsupportedError(
            f"{what}: the derivative that influence needs is {slope.taken:.6g} in a random direction, but the computed "
            f"value changes by {slope.difference:.6g} there, so scores would be wrong. The loss or a module has an "
            "operation whose derivative is not that of its values (a number read by .item(), fake quantization, a "
            "custom kernel). Use leave_one_out, which takes no derivative"
        )

    def _states(self) -> Iterator[tuple[int, State]]:
        """Stored states from which a step was made, in float64: the first, the last, and some between."""
        stored = self._stored
        parts = 4 if self._after - self._before >= LONG else 2
        for t in dict.fromkeys(stored[(len(stored) - 1) * part // parts] for part in range(parts + 1)):
            state = self._trajectory.checkpoint(t).to(self._step.dynamics.device, torch.float64)
            if t == stored[0] or are_finite(state.parameters.values()):
                yield t, state

    @cached_property
    def _last_state(self) -> State:
        *_, (_, state) = self._states()
        return state

    @cached_property
    def _moved(self) -> Mapping[str, Tensor]:
        """Which elements of the parameters training changed, bool by name; empty where it changed none, or diverged."""
        first, last = (self._trajectory.checkpoint(t) for t in (self._before, self._after))
        if not are_finite(last.parameters.values()):
            return {}
        device = self._step.dynamics.device
        found = {name: (value != last.parameters[name]).to(device) for name, value in first.parameters.items()}
        return found if any(bool(moved.any()) for moved in found.values()) else {}

    @cached_property
    def _in_float64(self) -> LossStep | OwnStep:
        dynamics = self._step.dynamics
        layouts = dynamics.manifest.model.parameters.values()
        if dynamics.dtype == torch.float64 or {layout.dtype for layout in layouts} == {"float64"}:
            return self._step
        return type(self._step)(Dynamics(dynamics.workload, dynamics.manifest, torch.float64, self._trajectory.batches))

    @cached_property
    def _traced_in_float64(self) -> TracedStep:
        return TracedStep(self._in_float64.dynamics)

    def _slope_of_own_step(
        self, state: State, record: StepRecord, moved: Mapping[str, Tensor], step: OwnStep, attempt: int
    ) -> Slope:
        """:func:`slope_of_step` of ``s_{t+1} - s_t`` by ``s_t`` and weights; notes whether weights have an effect."""
        random = torch.Generator().manual_seed(attempt)
        near, directions = _near(state, moved, random)
        slots = {"/".join(slot): value for slot, value in slots_of(state).items()}
        others = {name: state.buffers[name] for name in step.followed_buffers.shapes}
        others |= {_WEIGHTS: floating_one(near.values()).new_ones(len(record.samples))}
        directions |= {name: _direction(value, random) for name, value in others.items()}
        # A share of each element: second moments stay positive.
        directions |= {
            name: value * torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
            for name, value in slots.items()
        }
        fixed: dict[str, Tensor] = {}

        def value(given: Mapping[str, Tensor], own: bool) -> tuple[Tensor, float]:
            before = State(
                {name: given[name] for name in near},
                {name: given.get(name, value) for name, value in state.buffers.items()},
                {
                    name: {key: given.get(f"{name}/{key}", value) for key, value in entry.items()}
                    for name, entry in state.optimizer.items()
                },
            )
            step.dynamics.set_modes(record)
            made = step.forward if own else step.with_graph
            after = made(before, step.dynamics.load(record), given[_WEIGHTS], record)
            parts = (after.parameters, after.buffers, {"/".join(s): value for s, value in slots_of(after).items()})
            moves = [_moves(part, given) for part in parts]
            if not fixed:
                again = step.forward(_nudged(before), step.dynamics.load(record), given[_WEIGHTS].detach(), record)
                others_after = (again.parameters, again.buffers, {"/".join(s): v for s, v in slots_of(again).items()})
                for part, other in zip(moves, [_moves(part, given) for part in others_after], strict=True):
                    fixed.update(_cotangents(part, other, random))
            total = torch.stack([(fixed[name] * move).sum() for part in moves for name, move in part.items()]).sum()
            size = sum(
                float((fixed[name] * value).detach().abs().sum())
                for part in parts
                for name, value in part.items()
                if name in fixed
            )
            if not own and self._ignored is not False:
                (by_weight,) = grad_or_zeros(total, [given[_WEIGHTS]], retain_graph=True)
                self._ignored = not by_weight.any()
            return total, size

        with step.as_differentiated():
            return _slope(value, near | others | slots, directions, STRIDES[attempt])


def _moves(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step changes, by name: less what passes it unchanged, which would hide the rest."""
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if value.is_floating_point() and value.numel()
    }


def _nudged(state: State) -> State:
    """The same but for the last places of the parameters."""
    return State(
        {
            name: value.detach() * (1 + 1e-13) if value.is_floating_point() else value
            for name, value in state.parameters.items()
        },
        {name: value.detach() for name, value in state.buffers.items()},
        state.map(Tensor.detach).optimizer,
    )


def _cotangents(
    moves: Mapping[str, Tensor], nudged: Mapping[str, Tensor], random: torch.Generator
) -> dict[str, Tensor]:
    """Random ones, by name, such that all moves of a part of the state weigh 1 together: a learning rate makes those
    of parameters a thousandth of those of running statistics. 0 for what rounding alone moves: a gradient that is 0 in
    theory (a bias before BatchNorm, attention's key bias), which Adam makes as large as any other."""
    length = sum(float(move.detach().square().sum()) for move in moves.values()) ** 0.5
    found = {}
    for name, move in moves.items():
        drawn = torch.randn(move.shape, generator=random, dtype=torch.float64).to(move)
        apart = float((nudged[name] - move).detach().abs().max())
        steady = apart <= ROUNDING * float(move.detach().abs().max())
        found[name] = drawn / length if length and steady else torch.zeros_like(drawn)
    return found


def slope_of_step(state: State, record: StepRecord, moved: Mapping[str, Tensor], step: LossStep, attempt: int) -> Slope:
    r"""``<u, J v>`` for the Jacobian ``J`` of a step's gradients and buffers by parameters, buffers and weights.

    The directions ``u, v`` are random; ``v`` is 0 where training never ``moved`` a parameter: such an element
    (``Embedding(padding_idx=…)``) carries no influence. The derivative is taken near the state, not at it, because
    zeros of the initialisation may lie on a kink.

    Args:
        state: ``s_t``, in float64.
        record: step ``t``.
        moved: bool by parameter.
        step: in float64.
        attempt: position in :data:`STRIDES`, and the seed of the directions.

    Cost: five gradients, one of them differentiated.
    """
    random = torch.Generator().manual_seed(attempt)
    step.dynamics.set_modes(record)
    batches = step.dynamics.load(record)
    near, directions = _near(state, moved, random)
    ones = floating_one(near.values()).new_ones(len(record.samples))
    others = {name: state.buffers[name] for name in step.followed_buffers.shapes} | {_WEIGHTS: ones}
    directions |= {name: _direction(value, random) for name, value in others.items()}
    fixed: dict[str, Tensor] = {}

    def value(given: Mapping[str, Tensor], own: bool) -> tuple[Tensor, float]:
        buffers = {name: given.get(name, value).clone() for name, value in state.buffers.items()}
        if own:
            parameters = leaves({name: given[name] for name in near})
            found = step.gradient(parameters, buffers, record, batches, given[_WEIGHTS])
        else:
            parameters = {name: given[name] for name in near}
            found = step.gradients(parameters, buffers, given[_WEIGHTS], record, batches)
        found = {**found, **{name: value for name, value in buffers.items() if value.is_floating_point()}}
        for name, part in found.items():
            if name not in fixed:
                fixed[name] = torch.randn(part.shape, generator=random, dtype=torch.float64).to(part)
        parts = [fixed[name] * part for name, part in found.items()]
        size = sum(float(part.detach().abs().sum()) for part in parts)
        return torch.stack([part.sum() for part in parts]).sum(), size

    return _slope(value, near | others, directions, STRIDES[attempt])


def slope_of_query(query: Ask, state: State, moved: Mapping[str, Tensor], step: Asking, attempt: int) -> Slope:
    """The derivative of a query in a random direction; arguments as for :func:`slope_of_step`.

    Cost: five evaluations of the query, and one gradient.
    """

    def value(given: Mapping[str, Tensor], own: bool) -> tuple[Tensor, float]:
        # Gradients stay enabled: a query may take some itself.
        found = step.ask(given, state.buffers, query)
        return found, abs(found.item())

    near, directions = _near(state, moved, torch.Generator().manual_seed(attempt))
    return _slope(value, near, directions, STRIDES[attempt])


_WEIGHTS = ""
"""Stands for the samples' weights among the names of tensors."""


def _near(
    state: State, moved: Mapping[str, Tensor], random: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters a thousandth of their size away from the state's, and a random direction for each."""
    near = {
        name: _along(value, 1e-3, _direction(value, random, moved.get(name)))
        for name, value in state.parameters.items()
    }
    return near, {name: _direction(value, random, moved.get(name)) for name, value in near.items()}


def _slope(
    value: Callable[[Mapping[str, Tensor], bool], tuple[Tensor, float]],
    point: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    stride: float,
) -> Slope:
    """The derivative of ``value`` at ``point``, by autograd and by differences.

    Args:
        value: ``(tensors, own) -> scalar, size of its terms``; ``own``: as training computes it, without a graph.
    """
    given = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in point.items()}
    here, size = value(given, False)
    inputs = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
    found = grad_or_zeros(here, list(inputs.values())) if here.requires_grad else []
    taken = sum(float((part * directions[name]).sum()) for name, part in zip(inputs, found, strict=bool(found)))

    def at(length: float) -> float:
        return value({name: _along(tensor, length, directions[name]) for name, tensor in point.items()}, True)[0].item()

    return Slope.of(taken, here.item(), at, stride, size)


def _along(value: Tensor, length: float, direction: Tensor) -> Tensor:
    return value + length * direction if value.is_floating_point() else value


def _direction(value: Tensor, random: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """Random, of the size of ``value``; 0 outside of ``mask``."""
    if not value.is_floating_point() or not value.numel():
        return torch.zeros_like(value)
    size = max(float(value.square().mean().sqrt()), 1e-2)
    found = size * torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
    return found if mask is None else found * mask


def _agrees(measure: Measure, step: Asking) -> bool:
    """Whether the derivative by ``step`` agrees with differences in the first attempt that can tell, or none can.

    What computes in float32 inside may refute it by rounding at a short stride, and agrees exactly at a longer one.
    """
    told = refuted = False
    for attempt in range(len(STRIDES)):
        with naming_missing_derivatives():
            slope = measure(step, attempt)
        if slope.tells and slope.agrees and (not refuted or slope.exact):
            return True
        refuted = refuted or slope.refutes
        told = told or slope.tells
    return not told
