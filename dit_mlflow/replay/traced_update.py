"""The vector-Jacobian product of any optimizer's step, from a trace of its own code."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dit_mlflow.errors import UnsupportedError, first_line
from dit_mlflow.replay.adjoint import Adjoint, Flat, grad_or_zeros, vector_jacobian
from dit_mlflow.replay.optimizer_code import HighPrecision, NumbersAsTensors
from dit_mlflow.replay.optimizers import set_group
from dit_mlflow.replay.slope import STRIDES, Slope
from dit_mlflow.replay.step_adjoint import PulledGroup, UpdateGroup
from dit_mlflow.replay.traced import Function, near, traced
from dit_mlflow.told import logger_of
from dit_mlflow.trajectory.state import State

_log = logger_of(__name__)

Slot = tuple[str, str]
"""Name of a parameter, and key of its state."""


class TracedUpdate:
    """An optimizer that is not one of PyTorch's differentiable ones: a trace of its own ``step``.

    State of another shape than its parameter (factored moments) uses the first of the parameter's elements in an
    adjoint. Numbers that the code reads out of tensors stay tensors in the trace, if it can be traced so, and what it
    computes in low precision is differentiated in that of its inputs, with a warning.

    Args:
        optimizer: over no parameters; its param groups are the recorded ones.
        groups: names of the parameters in each param group.
        held: layout of all of them, in that order.

    Raises:
        UnsupportedError: the step cannot be traced; its state is larger than the parameter; it has no derivative in
            the gradients (it takes their signs alone); or its derivative is not the trace's (it computes
            with values that it takes out of tensors, or rounds); or it keeps a number that is no tensor of a
            parameter's state and depends on the gradients or the parameters.

    Cost: a trace for each step, since its counters are constants of the trace, a backward pass through it, and four
    optimizer steps. The derivative of the first, second, fourth, eighth … step is compared with differences, at about
    ten optimizer steps.
    """

    needs_values = True

    def __init__(self, optimizer: Optimizer, groups: Sequence[Sequence[str]], held: Flat) -> None:
        self._optimizer = optimizer
        self._groups = groups
        self._held = held
        self._name = type(optimizer).__qualname__
        self._step: Callable[..., Any] = inspect.unwrap(type(optimizer).step)
        self._calls = 0
        self._numbers_stay_tensors = True
        self._high_precision = HighPrecision(f"the optimizer {self._name}")
        # Of the last step: the state and the settings that are one number, or no floating tensor.
        self._numbers: dict[tuple[str | int, str], Any] = {}
        # Those of the state that depend on more than hyperparameters and the step's index.
        self._moving: set[Slot] = set()

    def __call__(
        self, state: State, groups: Sequence[UpdateGroup], gradients: Callable[[], Tensor], adjoint: Adjoint
    ) -> list[PulledGroup]:
        if not groups:
            return []
        names = [name for group in groups for name in group.names]
        settings = {name: dict(group.settings) for group in groups for name in group.names}
        flat = gradients()
        shapes = [self._held.shapes[name] for name in names]
        parts = torch.cat([flat[group.gradient] for group in groups]).split([shape.numel() for shape in shapes])
        grads = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        before = {(name, key): value for name in names for key, value in state.optimizer.get(name, {}).items()}
        slots = {slot: value.detach() for slot, value in before.items() if _is_slot(value)}
        rest = {slot: value for slot, value in before.items() if slot not in slots}
        after: list[Slot] = []

        def update(*values: Tensor) -> list[Tensor]:
            moved = {name: value.clone() for name, value in zip(names, values, strict=False)}
            for name, gradient in zip(names, values[len(names) :], strict=False):
                moved[name].grad = gradient.clone()
            entries: dict[str, dict[str, Any]] = defaultdict(dict)
            for (name, key), value in rest.items():
                entries[name][key] = value.clone() if isinstance(value, Tensor) else value
            for (name, key), value in zip(slots, values[2 * len(names) :], strict=True):
                entries[name][key] = value.clone()
            left = self._stepped(moved, settings, entries)
            # A number that a trace keeps as a tensor is no state.
            after[:] = after or left
            return [*moved.values(), *(left[slot] for slot in after)]

        def widened(*values: Tensor) -> list[Tensor]:
            with self._high_precision(values[0].dtype):
                return update(*values)

        inputs = [*(state.parameters[name].detach() for name in names), *grads, *slots.values()]
        self._calls += 1
        known = len(self._moving)
        self._note_moving(update, inputs)
        # Early steps and ever rarer later ones, since a step may take another branch than those before it.
        if self._calls & (self._calls - 1) == 0 or len(self._moving) > known:
            still = [not value.dim() and slot not in self._moving for slot, value in slots.items()]
            self._check(widened, [value.double() for value in inputs], len(names), [False] * 2 * len(names) + still)
        graph = self._traced(widened, inputs, len(names))
        self._high_precision.warn(
            state.parameters,
            *(lambda step=step: dict(zip(names, step(*inputs), strict=False)) for step in (update, widened)),
        )
        leaves = [value.detach().requires_grad_() for value in inputs]
        with torch.enable_grad():
            found = graph(*leaves)
        places = {name: self._held.slices[name] for name in names}
        cotangents = [
            *(adjoint.parameters[:, places[name]].view(-1, *self._held.shapes[name]) for name in names),
            *(
                self._cotangent(adjoint, name, key, value)
                for (name, key), value in zip(after, found[len(names) :], strict=True)
            ),
        ]
        pulled = vector_jacobian(found, leaves, cotangents, adjoint.rows, batched=True)
        by_theta, by_gradient = pulled[: len(names)], pulled[len(names) : 2 * len(names)]
        by_slot = dict(zip(slots, pulled[2 * len(names) :], strict=True))
        return [self._joined(group, names, by_theta, by_gradient, by_slot, adjoint) for group in groups]

    def _traced(self, update: Function, inputs: Sequence[Tensor], count: int) -> Function:
        def with_numbers(*values: Tensor) -> list[Tensor]:
            with NumbersAsTensors():
                return update(*values)

        if self._numbers_stay_tensors:
            try:
                found = traced(with_numbers, inputs, roots=True)
                if _lead_alike(found, update, inputs, count):
                    return found
                _log.info("%s: a trace with tensors in place of numbers leads elsewhere", self._name)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Any kind: code may do with a number what no tensor does.
                _log.info("%s: numbers that it reads are constants of its trace: %s", self._name, first_line(error))
        try:
            found = traced(update, inputs, roots=True)
        except Exception as error:
            raise UnsupportedError(
                f"the step of the optimizer {self._name} cannot be traced, and influence needs its derivative: "
                f"{type(error).__name__}: {error}. Use leave_one_out, which takes no derivative"
            ) from error
        self._numbers_stay_tensors = False
        return found

    def _note_moving(self, update: Function, inputs: Sequence[Tensor]) -> None:
        """Look which numbers depend on parameters, gradients and moments: at each step, since one may change rarely.

        Raises:
            UnsupportedError: one that no adjoint follows.
        """
        random = torch.Generator().manual_seed(0)
        update(*inputs)
        before = self._numbers
        # A share of each element: second moments stay positive, and signs stay.
        update(
            *(value * (1 + 1e-3 * _drawn(value, random).to(value.dtype)) if value.dim() else value for value in inputs)
        )
        for slot, value in self._numbers.items():
            if slot in before and _same(before[slot], value):
                continue
            if isinstance(slot[0], int) or not _is_slot(value):
                raise UnsupportedError(
                    f"the optimizer {self._name} keeps the number {slot[1]!r}, which depends on the gradients or the "
                    "parameters, so a sample has influence through it; keep it in a floating tensor of its state, or "
                    "use leave_one_out"
                )
            self._moving.add((slot[0], slot[1]))

    def _check(self, update: Function, inputs: Sequence[Tensor], count: int, still: Sequence[bool]) -> None:
        """Compare a directional derivative of the trace, in float64, with central differences of the step.

        Args:
            update: the step, as a function of ``inputs``.
            inputs: ``count`` parameters, their gradients, and state.
            still: which inputs are counters, that do not move.
        """
        random = torch.Generator().manual_seed(0)
        leaves = [value.clone().requires_grad_() for value in inputs]
        with torch.enable_grad():
            found = self._traced(update, inputs, count)(*leaves)
        weights = [_drawn(value, random) for value in found]
        # Relative to each element, so that second moments stay positive, and zeros stay 0.
        directions = [
            torch.zeros_like(value) if fixed else _drawn(value, random) * value
            for value, fixed in zip(inputs, still, strict=True)
        ]

        def total(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([(w * v).sum() for w, v in zip(weights, values, strict=False)]).sum()

        def at(length: float) -> float:
            moved = [value + length * direction for value, direction in zip(inputs, directions, strict=True)]
            return total(update(*moved)).item()

        here = total(found)
        parts = grad_or_zeros(here, leaves, retain_graph=True)
        # Of the parameters alone: state may depend on the gradients where the parameters depend on signs.
        moved = grad_or_zeros(total(found[:count]), leaves[count : 2 * count], retain_graph=True)
        stayed = all(torch.equal(after, before) for after, before in zip(found[:count], inputs[:count], strict=True))
        if not stayed and not any(bool(part.any()) for part in moved):
            raise UnsupportedError(
                f"the step of the optimizer {self._name} has the derivative 0 in the gradients, as where it depends on "
                "their signs alone, so every influence would be 0; use leave_one_out"
            )
        taken = sum(float((part * direction).sum()) for part, direction in zip(parts, directions, strict=True))
        size = sum(float((w * v).abs().sum().detach()) for w, v in zip(weights, found, strict=True))
        slopes = [Slope.of(taken, here.item(), at, stride, size) for stride in STRIDES]
        if not any(slope.tells and slope.agrees for slope in slopes):
            raise UnsupportedError(
                f"the step of the optimizer {self._name} changes by {slopes[0].difference:.6g} in a random direction, "
                f"but the derivative of its trace is {taken:.6g} there, so scores would be wrong: it computes with "
                "values that it takes out of tensors (float(), math, numpy), or rounds. Use leave_one_out, which takes "
                "no derivative"
            )

    def _stepped(
        self, moved: dict[str, Tensor], settings: dict[str, dict[str, Any]], entries: dict[str, dict[str, Any]]
    ) -> dict[Slot, Tensor]:
        """Make one step in place on ``moved``; returns the state that :func:`_is_slot`."""
        optimizer = self._optimizer
        for group, names in zip(optimizer.param_groups, self._groups, strict=True):
            own = [name for name in names if name in moved]
            if own:
                set_group(group, settings[own[0]], optimizer.defaults)
            group["params"] = [moved[name] for name in own]
            # Only steps of single tensors can be traced; those of lists of tensors give the same.
            group.update({flag: False for flag in ("foreach", "fused", "capturable") if flag in group})
        optimizer.state = defaultdict(dict, {moved[name]: entry for name, entry in entries.items()})
        try:
            self._step(optimizer)
            left = {name: optimizer.state.get(value, {}) for name, value in moved.items()}
            places: list[tuple[str | int, Any]] = [*left.items(), *enumerate(optimizer.param_groups)]
            self._numbers = {
                (place, key): value.detach().clone() if isinstance(value, Tensor) else value
                for place, entry in places
                for key, value in entry.items()
                if isinstance(value, (int, float))
                or (isinstance(value, Tensor) and not (_is_slot(value) and value.dim()))
            }
            return {
                (name, key): value for name, entry in left.items() for key, value in entry.items() if _is_slot(value)
            }
        finally:
            optimizer.state = defaultdict(dict)
            for group in optimizer.param_groups:
                group["params"] = []

    def _place(self, name: str, value: Tensor) -> slice:
        place = self._held.slices[name]
        if value.numel() > place.stop - place.start:
            raise UnsupportedError(
                f"the optimizer {self._name} keeps state of shape {list(value.shape)} for parameter {name!r}, which "
                "has fewer elements; a sweep cannot follow it. Use leave_one_out"
            )
        return slice(place.start, place.start + value.numel())

    def _cotangent(self, adjoint: Adjoint, name: str, key: str, value: Tensor) -> Tensor:
        place, found = self._place(name, value), adjoint.optimizer.get(key)
        if found is None:
            return adjoint.parameters.new_zeros((adjoint.rows, *value.shape))
        return found[:, place].view(-1, *value.shape)

    def _joined(
        self,
        group: UpdateGroup,
        names: Sequence[str],
        by_theta: Sequence[Tensor],
        by_gradient: Sequence[Tensor],
        by_slot: dict[Slot, Tensor],
        adjoint: Adjoint,
    ) -> PulledGroup:
        rows, own = adjoint.rows, [names.index(name) for name in group.names]
        optimizer: dict[str, Tensor] = {}
        for (name, key), value in by_slot.items():
            if name in group.names:
                place, size = self._place(name, value[0]), group.part.stop - group.part.start
                flat = optimizer.setdefault(key, adjoint.parameters.new_zeros((rows, size)))
                flat[:, place.start - group.part.start : place.stop - group.part.start] = value.reshape(rows, -1)
        return PulledGroup(
            torch.cat([by_theta[place].reshape(rows, -1) for place in own], dim=1),
            torch.cat([by_gradient[place].reshape(rows, -1) for place in own], dim=1),
            optimizer,
        )


def _lead_alike(one: Function, other: Function, inputs: Sequence[Tensor], count: int) -> bool:
    """Whether both make the same step of the ``count`` parameters among the inputs, and of the state."""
    pairs = [*zip(one(*inputs), other(*inputs), strict=True)]
    moves = [end - start for (_, end), start in zip(pairs, inputs[:count], strict=False)]
    moves += [end for _, end in pairs[count:]]
    ways = [float(move.abs().max()) if move.numel() else 0.0 for move in moves]
    return all(near(*pair, way, max(ways)) for pair, way in zip(pairs, ways, strict=True) if pair[1].numel())


def _is_slot(value: Any) -> bool:
    """Whether an adjoint follows a value of the state; other values are constants of the trace."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else bool(one == other)


def _drawn(value: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=random, dtype=torch.float64).to(value.device)
