"""Whether a step's second derivative, as autograd takes it, is that of what the step does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dit_mlflow.replay.adjoint import Adjoint, grad_or_zeros
from dit_mlflow.replay.dynamics import Parameters
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.replay.slope import STRIDES, Slope
from dit_mlflow.replay.training_step import TrainingStep, slots_of
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import floating_one


def slope_of_step(step: LossStep, state: State, record: StepRecord, moved: Mapping[str, Tensor], attempt: int) -> Slope:
    r"""``<u, J v>`` for the step's Jacobian ``J``, of gradients and buffers by parameters, buffers and weights.

    The directions ``u, v`` are random, ``v`` only where training ``moved`` the parameters: a row that it never moves
    (``Embedding(padding_idx=…)``) carries no influence. They are taken near the state, not at it, where zeros of the
    initialisation may lie on a kink.

    Args:
        step: in float64.
        state: ``s_t``, in float64.
        record: step ``t``.
        moved: bool by parameter.
        attempt: of :data:`STRIDES`, which; each has directions of its own.

    Cost: two gradients, and one that is differentiated.
    """
    random = torch.Generator().manual_seed(attempt)
    step.dynamics.set_modes(record)
    batches = step.dynamics.load(record)
    ones = floating_one(state.parameters.values()).new_ones(len(record.samples))
    directions = {name: _direction(value, random, moved.get(name)) for name, value in state.parameters.items()}
    directions |= {name: _direction(state.buffers[name], random) for name in step.followed_buffers.shapes}
    by_weight = _direction(ones, random)
    near = {name: _along(value, 1e-3, directions[name]) for name, value in state.parameters.items()}
    directions |= {name: _direction(value, random, moved.get(name)) for name, value in near.items()}
    fixed: dict[str, Tensor] = {}

    def measured(gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        found = {**gradients, **{name: value for name, value in buffers.items() if value.is_floating_point()}}
        for name, value in found.items():
            if name not in fixed:
                fixed[name] = torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
        parts = [fixed[name] * value for name, value in found.items()]
        return torch.stack([part.sum() for part in parts]).sum(), sum(
            part.detach().abs().sum().item() for part in parts
        )

    def at(length: float) -> Tensor:
        parameters = {name: _leaf(_along(value, length, directions[name])) for name, value in near.items()}
        buffers = {name: value.clone() for name, value in state.buffers.items()}
        buffers |= {name: buffers[name] + length * directions[name] for name in step.followed_buffers.shapes}
        weights = ones + length * by_weight
        return measured(step.gradient(parameters, buffers, record, batches, weights), buffers)[0].detach()

    parameters = {name: _leaf(value) for name, value in near.items()}
    followed = {name: state.buffers[name].clone().requires_grad_() for name in step.followed_buffers.shapes}
    buffers = {name: value.clone() for name, value in {**state.buffers, **followed}.items()}
    weights = ones.clone().requires_grad_()
    total, size = measured(step.gradients(parameters, buffers, weights, record, batches), buffers)
    inputs = {**{name: value for name, value in parameters.items() if value.requires_grad}, **followed}
    found = grad_or_zeros(total, [weights, *inputs.values()]) if total.requires_grad else []
    taken = sum(
        float((part * direction).sum())
        for part, direction in zip(found, [by_weight, *(directions[name] for name in inputs)], strict=bool(found))
    )
    stride = STRIDES[attempt]
    return Slope.between(taken, at(-stride).item(), total.item(), at(stride).item(), stride, size)


def slope_of_state(
    step: TrainingStep, state: State, record: StepRecord, moved: Mapping[str, Tensor], attempt: int
) -> tuple[Slope, Tensor]:
    r"""``<u, J v>`` for the Jacobian ``J`` of ``s_{t+1} - s_t`` by ``s_t`` and weights, and ``<u, ds/dw> [sum B]``.

    Of any step, by its vector-Jacobian product; directions and arguments as above, the optimizers' state among them.

    Cost: four steps, and one in reverse.
    """
    random = torch.Generator().manual_seed(attempt)
    ones = floating_one(state.parameters.values()).new_ones(len(record.samples))
    by_weight = _direction(ones, random)
    tensors = _tensors(step, state)

    def away(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            # Of the size of each element: second moments stay positive, and what is 0 stays so.
            key: torch.randn(value.shape, generator=random, dtype=torch.float64).to(value) * value
            if key not in state.parameters
            else _direction(value, random, moved.get(key))
            for key, value in values.items()
        }

    nudged = away(tensors)
    near = {key: value + 1e-3 * nudged[key] for key, value in tensors.items()}
    directions = away(near)

    def placed(values: Mapping[str, Tensor]) -> State:
        return State(
            {name: values.get(name, value) for name, value in state.parameters.items()},
            {name: values.get(f"buffer {name}", value) for name, value in state.buffers.items()},
            {
                name: {key: values.get(f"{name}/{key}", value) for key, value in entry.items()}
                for name, entry in state.optimizer.items()
            },
        )

    def moves(length: float) -> dict[str, Tensor]:
        before = {key: value + length * directions[key] for key, value in near.items()}
        after = _tensors(step, step(placed(before), record, ones + length * by_weight))
        return {key: value - before[key] if key in before else value for key, value in after.items()}

    here = moves(0.0)
    fixed = {k: torch.randn(v.shape, generator=random, dtype=torch.float64).to(v) for k, v in here.items()}

    def total(values: Mapping[str, Tensor]) -> float:
        return sum(float((fixed[key] * value).sum()) for key, value in values.items())

    rows = {key: value.reshape(1, -1) for key, value in fixed.items()}
    adjoint = Adjoint(
        torch.cat([rows[name] for name in step.followed_parameters.shapes], dim=1),
        torch.cat([ones.new_zeros((1, 0)), *(rows[f"buffer {name}"] for name in step.followed_buffers.shapes)], dim=1),
        {key: value for key, value in rows.items() if "/" in key},
    )
    pulled, weight_rows = step.pull_back(placed(near), record, adjoint)
    found = dict(
        zip(step.followed_parameters.shapes, step.followed_parameters.split_rows(pulled.parameters), strict=True)
    )
    buffers = step.followed_buffers
    found |= {f"buffer {n}": v for n, v in zip(buffers.shapes, buffers.split_rows(pulled.buffers), strict=True)}
    found |= {key: value.view(1, *near[key].shape) for key, value in pulled.optimizer.items() if key in near}
    taken = float((weight_rows[0] * by_weight).sum())
    for key, direction in directions.items():
        if key in found:
            # Less what a state passes on unchanged, which would hide the rest.
            taken += float(((found[key][0] - fixed.get(key, torch.zeros_like(direction))) * direction).sum())
    size = sum(float((fixed[key] * near[key]).abs().sum()) for key in here if key in near)
    stride = STRIDES[attempt]
    slope = Slope.between(taken, total(moves(-stride)), total(here), total(moves(stride)), stride, size)
    return slope, weight_rows[0]


def _tensors(step: TrainingStep, state: State) -> dict[str, Tensor]:
    """What is followed of a state, by name: of the optimizers, ``name/key``."""
    parameters = {name: state.parameters[name] for name in step.followed_parameters.shapes}
    buffers = {f"buffer {name}": state.buffers[name] for name in step.followed_buffers.shapes}
    return {**parameters, **buffers, **{f"{name}/{key}": value for (name, key), value in slots_of(state).items()}}


def slope_of_query(
    ask: Callable[[Parameters, Parameters], Tensor], state: State, moved: Mapping[str, Tensor], attempt: int
) -> Slope:
    """The derivative of a query in a random direction, where training ``moved`` the parameters; as above."""
    random, stride = torch.Generator().manual_seed(attempt), STRIDES[attempt]
    near = {
        name: _along(value, 1e-3, _direction(value, random, moved.get(name)))
        for name, value in state.parameters.items()
    }
    directions = {name: _direction(value, random, moved.get(name)) for name, value in near.items()}
    parameters = {name: _leaf(value) for name, value in near.items()}
    value = ask(parameters, state.buffers)
    inputs = {name: value for name, value in parameters.items() if value.requires_grad}
    found = grad_or_zeros(value, list(inputs.values())) if value.requires_grad else []
    taken = sum(float((part * directions[name]).sum()) for name, part in zip(inputs, found, strict=bool(found)))

    def at(length: float) -> Tensor:
        moved_to = {name: _along(value, length, directions[name]) for name, value in near.items()}
        # Gradients stay enabled: a query may take some itself.
        return ask(moved_to, state.buffers).detach()

    return Slope.between(taken, at(-stride).item(), value.item(), at(stride).item(), stride, abs(value.item()))


def _along(value: Tensor, length: float, direction: Tensor) -> Tensor:
    return value + length * direction if value.is_floating_point() else value


def _leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_(value.is_floating_point())


def _direction(value: Tensor, random: torch.Generator, mask: Tensor | None = None) -> Tensor:
    """Random, of the size of ``value``."""
    if not value.is_floating_point() or not value.numel():
        return torch.zeros_like(value)
    size = max(float(value.square().mean().sqrt()), 1e-2)
    found = size * torch.randn(value.shape, generator=random, dtype=torch.float64).to(value)
    return found if mask is None else found * mask
