"""The reverse mode of the standard step as graphs for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_mlflow.replay.dynamics import MicroBatch
from dit_mlflow.replay.loss_step import LossStep, Objective
from dit_mlflow.torch_internals import make_fx, version
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload.batches import tensors_of, with_tensors
from dit_mlflow.workload.random_state import RandomState

BACKEND = "inductor"
"""Of ``torch.compile``."""


Graph = Callable[..., Sequence[Tensor]]


class CannotCompileError(Exception):
    """Why a step stays eager."""


@dataclass(frozen=True, eq=False)
class StepGraphs:
    """What is compiled of a kind of step.

    Attributes:
        names: the parameters that have a gradient, in the order of ``g_t``.
        changed: the buffers that the forward passes change.
        gradient: the step's tensors -> ``g_t`` by name; ``None`` = the optimizer's adjoint reads no gradient.
        derivative: the step's tensors, ``lambda_g``, ``lambda_b`` -> derivatives by weights ``[A, sum B]``, parameters
            ``[A, N]`` and, if any are followed, buffers ``[A, M]``; then the changed buffers.
    """

    names: list[str]
    changed: list[str]
    gradient: Graph | None
    derivative: Graph


def graphs_of(
    step: LossStep, objective: Objective, state: State, record: StepRecord, batches: list[MicroBatch]
) -> StepGraphs:
    """The step of ``objective`` in graphs, which take what :func:`tensors_of_step` gives.

    Args:
        step: to be traced; what its model keeps of a trace has no values.
        objective: of the eager step, for names and shapes.

    Raises:
        CannotCompileError: the step draws random numbers, or changes its batch; the tracer has errors of its own.
    """
    if not objective.gradients:
        raise CannotCompileError("no parameter has a gradient")
    names, changed = list(objective.gradients), list[str]()
    # Without a state to restore, what the forward pass draws from Python's generators shows.
    alike = [replace(micro, random_state=None) for micro in batches]

    def opened(values: Sequence[Tensor]) -> tuple[dict[str, Tensor], Objective]:
        parameters, buffers, rest = _split(values, [len(state.parameters), len(state.buffers)])
        theta, moving, left = step.tensors(
            dict(zip(sorted(state.parameters), parameters, strict=True)),
            dict(zip(sorted(state.buffers), buffers, strict=True)),
        )
        weights = rest[0].detach().requires_grad_()
        micros, rest = _filled(alike, rest[1:])
        before, given = {name: (value, version(value)) for name, value in left.items()}, list(map(version, values))
        gradients = step.gradients(theta, left, weights, record, micros)
        if given != list(map(version, values)):
            raise CannotCompileError("the loss changes its batch")
        changed[:] = [name for name, (copy, of) in before.items() if left[name] is not copy or version(copy) != of]
        by_gradient, by_statistic, _ = _split(rest, [len(names), len(moving)])
        held = {name: theta[name] for name in step.followed_parameters.shapes}
        statistics = [left[name] for name in moving]
        followed = list(moving.values())
        return left, Objective(
            {name: gradients[name] for name in names},
            *(statistics, weights, held, followed, by_gradient, by_statistic, objective.rows),
        )

    def gradient(*values: Tensor) -> list[Tensor]:
        _, made = opened(values)
        return [value.detach() for value in made.gradients.values()]

    def derivative(*values: Tensor) -> list[Tensor]:
        left, made = opened(values)
        by_weight, by_theta, by_buffer = step.derivatives(made, state, record, batches)
        by_parameters = step.followed_parameters.join_rows(by_theta, made.rows)
        by_buffers = [step.followed_buffers.join_rows(by_buffer, made.rows)] if by_buffer else []
        return [by_weight, by_parameters, *by_buffers, *(left[name].detach() for name in changed)]

    given = tensors_of_step(state, objective.weights, batches)
    reads = step.needs_optimizer_values or step.gradient.clips
    return StepGraphs(
        names,
        changed,
        _compiled(gradient, given) if reads else None,
        _compiled(derivative, [*given, *objective.by_gradient, *objective.by_statistic]),
    )


def _compiled(function: Callable[..., list[Tensor]], values: Sequence[Tensor]) -> Graph:
    """``function`` compiled, for values of these shapes; raises :class:`CannotCompileError` if it draws numbers."""
    before = RandomState.capture()
    graph = make_fx(function, values=False)(*(value.detach() for value in values))
    drawn = [
        node for node in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    if drawn or before.used_since(RandomState.capture()) is not None:
        raise CannotCompileError("the forward pass draws random numbers")
    made: Graph = torch.compile(graph.forward, fullgraph=True, dynamic=False, backend=BACKEND)
    return made


def tensors_of_step(state: State, weights: Tensor, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """What a step depends on: parameters and buffers by name, the samples' weights, coefficients and batches."""
    # Stored and replayed states may hold them in different orders.
    of_state = [value for part in (state.parameters, state.buffers) for _, value in sorted(part.items())]
    coefficients = [micro.coefficients for micro in batches]
    of_batches = [tensor for micro in batches for tensor in tensors_of(micro.batch)]
    return [*of_state, weights.detach(), *coefficients, *of_batches]


def _filled(batches: Sequence[MicroBatch], values: Sequence[Tensor]) -> tuple[list[MicroBatch], Sequence[Tensor]]:
    """The micro-batches with the first of ``values``, in the order of :func:`tensors_of_step`, and the others."""
    coefficients, rest = values[: len(batches)], values[len(batches) :]
    made = []
    for micro, own in zip(batches, coefficients, strict=True):
        size = len(tensors_of(micro.batch))
        made.append(replace(micro, batch=with_tensors(micro.batch, rest[:size]), coefficients=own))
        rest = rest[size:]
    return made, rest


def _split(values: Sequence[Tensor], sizes: Sequence[int]) -> list[Sequence[Tensor]]:
    """Parts of these sizes, and the rest."""
    parts = []
    for size in sizes:
        parts.append(values[:size])
        values = values[size:]
    return [*parts, values]
