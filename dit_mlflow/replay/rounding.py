"""Whether rounding alone explains that a replay misses a recorded state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord

NUDGES = 3
"""Number of replays with changed rounding."""

NUDGE = 4
"""Units in the last place by which parameters and the samples' losses are changed, up or down at random."""

MARGIN = 10
"""A miss of up to this many times the largest effect of the nudges counts as rounding."""


def missed_by_rounding(
    training_step: TrainingStep,
    records: Sequence[StepRecord],
    start: State,
    replayed: State,
    other: State,
    weights: Tensor | None = None,
) -> set[str]:
    """Names of the tensors in which ``replayed`` and ``other`` differ by no more than rounding may cause.

    Some training amplifies rounding without limit: a gradient that is 0 up to rounding (attention's key bias, a bias
    before BatchNorm) moves a parameter under Adam as far as any other, and its sign depends on the machine. So the
    steps are replayed :data:`NUDGES` times with parameters and losses changed in their last places. A miss is the root
    mean square over a tensor's elements, so that a few flipped signs do not decide; it counts as rounding up to
    :data:`MARGIN` times the largest effect of a nudge.

    Args:
        training_step: one step as a function.
        records: the steps from ``start`` to ``replayed``.
        start, replayed: a state, and the state that replay makes of it without nudges.
        other: the state that should equal ``replayed`` up to rounding.
        weights: of the samples of each step, in batch order; ``None`` = all 1.

    Raises:
        TrajectoryError: each replay gives another result, and that alone explains all misses.

    Cost: the steps, ``NUDGES + 1`` times.
    """
    generator = torch.Generator().manual_seed(0)
    effects = dict.fromkeys(_tensors(replayed), 0.0)
    for _ in range(NUDGES):
        for name, effect in _distances(_replay(training_step, records, start, weights, generator), replayed).items():
            effects[name] = max(effects[name], effect)
    excused = {name for name, miss in _distances(replayed, other).items() if miss <= MARGIN * effects[name]}
    if excused == effects.keys() and any(
        _distances(_replay(training_step, records, start, weights), replayed).values()
    ):
        raise TrajectoryError(
            f"replaying steps {records[0].index} to {records[-1].index} twice gives two results: something keeps a "
            "state that is not recorded. If data or model draw from a random generator of their own, draw from the "
            "global ones of torch, NumPy and random (or, if it is the data, record with store_batches=True); if the "
            "model or the loss keeps a counter or a hidden state, make it a buffer; if the optimizer does, keep it in "
            "its state, by parameter"
        )
    return excused


def _replay(
    training_step: TrainingStep,
    records: Sequence[StepRecord],
    start: State,
    weights: Tensor | None,
    nudges: torch.Generator | None = None,
) -> State:
    """The state after the steps, with parameters and losses nudged if ``nudges`` is given."""
    nudged = nudged_state(start, nudges)
    like = next(value for value in nudged.parameters.values() if value.is_floating_point())

    def nudged_weights(record: StepRecord) -> Tensor:
        return _nudged(like.new_ones(len(record.samples)) if weights is None else weights, nudges)

    return training_step.run(nudged, records, None if nudges is None and weights is None else nudged_weights)


def nudged_state(state: State, nudges: torch.Generator | None) -> State:
    """The state with its parameters changed in their last places."""
    parameters = {name: _nudged(value, nudges) for name, value in state.parameters.items()}
    return State(parameters, state.buffers, state.optimizer)


def _nudged(value: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None or not value.is_floating_point():
        return value
    signs = torch.randint(2, value.shape, generator=generator).to(value.device, value.dtype) * 2 - 1
    return value * (1 + NUDGE * torch.finfo(value.dtype).eps * signs)


def _distances(one: State, other: State) -> dict[str, float]:
    """Root mean square of the differences, by name; infinite for other shapes and NaN."""
    theirs = _tensors(other)
    return {name: _distance(value.detach(), theirs[name]) for name, value in _tensors(one).items()}


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    difference = one - other if one.is_complex() else one.double() - other.double()
    found = difference.abs().double().square().mean().sqrt().item() if one.numel() else 0.0
    return float("inf") if found != found else found


def _tensors(state: State) -> dict[str, Tensor]:
    return {**state.parameters, **state.buffers}
