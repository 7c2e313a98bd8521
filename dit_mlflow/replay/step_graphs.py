"""The reverse mode of the standard step as graphs for ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

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
        gradient: the step's tensors -> ``g_t`` by name, then what the derivative needs of it; ``None`` = the
            optimizer's adjoint reads no gradient.
        derivative: the step's tensors, ``lambda_g``, ``lambda_b``, what it needs of the gradient -> derivatives by
            weights ``[A, sum B]``, parameters ``[A, N]`` and, if any are followed, buffers ``[A, M]``; then the changed
            buffers.
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

    reads = step.needs_optimizer_values or step.gradient.clips

    def whole(*values: Tensor) -> list[Tensor]:
        left, made = opened(values)
        gradients = [value.detach() for value in made.gradients.values()] if reads else []
        by_weight, by_theta, by_buffer = step.derivatives(made, state, record, batches)
        by_parameters = step.followed_parameters.join_rows(by_theta, made.rows)
        by_buffers = [step.followed_buffers.join_rows(by_buffer, made.rows)] if by_buffer else []
        return [*gradients, by_weight, by_parameters, *by_buffers, *(left[name].detach() for name in changed)]

    given = tensors_of_step(state, objective.weights, batches)
    inputs = [*given, *objective.by_gradient, *objective.by_statistic]
    before = RandomState.capture()
    graph = make_fx(whole, values=False)(*inputs)
    drawn = [
        node for node in graph.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    ]
    if drawn or before.used_since(RandomState.capture()) is not None:
        raise CannotCompileError("the forward pass draws random numbers")
    if not reads:
        return StepGraphs(names, changed, None, _compiled(graph))
    # What is written in place depends on more than its own inputs.
    pure = make_fx(torch.func.functionalize(graph, remove="mutations"), values=False)(*inputs)
    return StepGraphs(names, changed, *map(_compiled, _in_two(pure, len(given), len(names))))


def _in_two(graph: fx.GraphModule, inputs: int, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The first ``outputs``, which depend on the first ``inputs`` alone, then all that is known with these; and the
    other outputs, from all inputs and what the first part knows."""
    nodes = list(graph.graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    later = dict.fromkeys(given[inputs:])
    for node in nodes[:-1]:
        if not later.keys().isdisjoint(node.all_input_nodes):
            later[node] = None
    wanted = list(nodes[-1].args[0])
    used = dict.fromkeys([*(value for node in later for value in node.all_input_nodes), *wanted[outputs:]])
    kept = [node for node in used if node not in later and node not in given]
    first, second = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:-1]:
        if node not in later:
            copies[node] = first.node_copy(node, copies.__getitem__)
    first.output([copies[node] for node in [*wanted[:outputs], *kept]])
    copies = {node: second.placeholder(node.name) for node in [*given, *kept]}
    for node in later:
        if node not in given:
            copies[node] = second.node_copy(node, copies.__getitem__)
    second.output([copies[node] for node in wanted[outputs:]])
    return fx.GraphModule(graph, first), fx.GraphModule(graph, second)


def _compiled(graph: fx.GraphModule) -> Graph:
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
