"""What rounding alone does to the states of a stretch of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.replay.training_step import TrainingStep
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord

NUDGES = 3
"""Times that a stretch is replayed with other rounding."""

NUDGE = 4
"""Units in the last place by which weights and the samples' losses are changed, up or down at random."""

MARGIN = 10
"""How many times the effect of nudges a miss may be and still be put down to rounding."""


def missed_by_rounding(
    training_step: TrainingStep, records: Sequence[StepRecord], start: State, replayed: State, other: State
) -> set[str]:
    """Names of the tensors by which ``replayed`` and ``other`` differ by no more than what rounding alone may do.

    Some training amplifies rounding without limit: a gradient that is 0 but for rounding (attention's key bias, a bias
    before BatchNorm) moves a parameter under Adam as far as any other, in a direction that each machine rounds for
    itself. So the stretch is replayed :data:`NUDGES` times with parameters and losses changed in their last places; a
    miss (root mean square over a tensor's elements, which single signs that flip do not decide) is put down to rounding
    up to :data:`MARGIN` times the largest effect that this had.

    Args:
        training_step: how a step is made.
        records: the steps from ``start`` to ``replayed``.
        replayed: what replay, without any nudge, makes of ``start``.
        other: what should be the same but for rounding.

    Raises:
        TrajectoryError: the stretch comes out otherwise each time, and that alone explains all that was missed.

    Cost: the stretch, ``NUDGES + 1`` times.
    """
    generator = torch.Generator().manual_seed(0)
    effects = dict.fromkeys(_tensors(replayed), 0.0)
    for _ in range(NUDGES):
        for name, effect in _distances(_replay(training_step, records, start, generator), replayed).items():
            effects[name] = max(effects[name], effect)
    excused = {name for name, miss in _distances(replayed, other).items() if miss <= MARGIN * effects[name]}
    if excused == effects.keys() and any(_distances(_replay(training_step, records, start), replayed).values()):
        raise TrajectoryError(
            f"replaying steps {records[0].index} to {records[-1].index} twice gives two results: data or model draw "
            "from a random generator of their own, whose state is not recorded. Draw from the global ones of torch, "
            "NumPy and random; or, if it is the data, record with store_batches=True"
        )
    return excused


def _replay(
    training_step: TrainingStep,
    records: Sequence[StepRecord],
    start: State,
    nudges: torch.Generator | None = None,
) -> State:
    """Where the steps lead, with parameters and losses nudged, if there are nudges."""
    parameters = {name: _nudged(value, nudges) for name, value in start.parameters.items()}
    like = next(value for value in parameters.values() if value.is_floating_point())

    def weights(record: StepRecord) -> Tensor:
        return _nudged(like.new_ones(len(record.samples)), nudges)

    nudged = State(parameters, start.buffers, start.optimizer)
    return training_step.run(nudged, records, None if nudges is None else weights)


def _nudged(value: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None or not value.is_floating_point():
        return value
    signs = torch.randint(2, value.shape, generator=generator).to(value.device, value.dtype) * 2 - 1
    return value * (1 + NUDGE * torch.finfo(value.dtype).eps * signs)


def _distances(one: State, other: State) -> dict[str, float]:
    """Root mean square of the differences, by name; infinite if there is no saying."""
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
