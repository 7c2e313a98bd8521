"""A step against differences of itself, at weights other than 1; steps written by hand, from record to scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again, validation_loss
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from workloads import SAMPLES, digits_workload

from dit_mlflow import (
    Window,
    train,
)
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import courses, sweeps
from dit_mlflow.influence.query import mean_validation_loss
from dit_mlflow.replay.adjoint import Adjoint
from dit_mlflow.replay.training_step import SampleWeights, TrainingStep
from dit_mlflow.trajectory import State
from dit_mlflow.trajectory.state import COUNTERS


def hidden(*layers: nn.Module) -> Any:
    return lambda: nn.Sequential(nn.Linear(64, 6), *layers, nn.Tanh(), nn.Linear(6, 3))


CASES: dict[str, dict[str, Any]] = {
    "sgd, momentum": {"optimizer": lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9, dampening=0.2)},
    "sgd, nesterov, weight decay": {
        "optimizer": lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01)
    },
    "adam": {"optimizer": lambda model: Adam(model.parameters(), lr=0.02, eps=1e-4)},
    "adamw": {"optimizer": lambda model: AdamW(model.parameters(), lr=0.02, weight_decay=0.1, eps=1e-4)},
    "rmsprop": {"optimizer": lambda model: RMSprop(model.parameters(), lr=0.01, momentum=0.5, eps=1e-4)},
    "clipped by norm": {
        "optimizer": lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9),
        "clip_grad_norm": 0.05,
    },
    "clipped by value": {
        "optimizer": lambda model: Adam(model.parameters(), lr=0.02, eps=1e-4),
        "clip_grad_value": 0.005,
    },
    "clipped with a layer that the optimizer does not hold": {
        "optimizer": lambda model: SGD(model[2].parameters(), lr=0.2, momentum=0.9),
        "clip_grad_norm": 0.05,
    },
    "BatchNorm": {"model": hidden(nn.BatchNorm1d(6)), "optimizer": lambda model: SGD(model.parameters(), 0.2, 0.9)},
    "two micro-batches, a regularizer": {
        "batch_size": 5,
        "accumulate": 2,
        "regularizer": lambda model: 0.1 * sum(p.pow(4).sum() for p in model.parameters()),
    },
    "dropout": {"model": hidden(nn.Dropout(0.4)), "optimizer": lambda model: AdamW(model.parameters(), 0.02, eps=1e-4)},
    "learning rate that falls": {
        "optimizer": lambda model: SGD(model.parameters(), lr=0.4, momentum=0.9),
        "scheduler": lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (1 + t)),
    },
    "all of these": {
        "model": hidden(nn.BatchNorm1d(6), nn.Dropout(0.2)),
        "optimizer": lambda model: AdamW(model.parameters(), lr=0.02, eps=1e-4),
        "scheduler": lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (1 + t)),
        "batch_size": 6,
        "accumulate": 2,
        "clip_grad_norm": 0.05,
        "clip_grad_value": 0.02,
        "regularizer": lambda model: 0.01 * sum(p.square().sum() for p in model.parameters()),
    },
}


def followed(step: TrainingStep, state: State) -> dict[str, Tensor]:
    """The parts of a state that adjoints have, flat, as they stand there."""
    parts = {
        "parameters": [state.parameters[name] for name in step.followed_parameters.shapes],
        "buffers": [state.buffers[name] for name in step.followed_buffers.shapes],
    }
    for name in step.followed_parameters.shapes:
        for key, value in state.optimizer.get(name, {}).items():
            if key not in COUNTERS:
                parts.setdefault(key, []).append(value)
    return {part: torch.cat([torch.zeros(0).double(), *map(torch.flatten, values)]) for part, values in parts.items()}


def moved(step: TrainingStep, state: State, part: str, by: Tensor) -> State:
    """The state with one of those parts moved."""
    other = state.copy()
    names, parts = step.followed_parameters.shapes, {"parameters": other.parameters}
    if part == "buffers":
        names, parts = step.followed_buffers.shapes, {"buffers": other.buffers}
    tensors = [parts[part][name] if part in parts else other.optimizer[name][part] for name in names]
    for value, move in zip(tensors, by.split([value.numel() for value in tensors]), strict=True):
        value += move.view(value.shape)
    return other


def random_weights(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("t", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_pulled_back_adjoint_matches_differences_of_the_step(name: str, t: int, tmp_path: Path) -> None:
    """``<lambda, step(s, w)>`` along one random direction of each part of the state, and of the weights."""
    workload = digits_workload(epochs=1, **CASES[name]) if name.startswith("two") else digits_workload(**CASES[name])
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload, torch.float64)
    step, record = replay.training_step, trajectory.step(t)
    state = next(replay.forward(t, t))
    generator = torch.Generator().manual_seed(1)
    weights = random_weights(len(record.samples))
    cotangents = {
        part: torch.randn(2, len(value), generator=generator).double()
        for part, value in followed(step, step(state, record, weights)).items()
    }
    slots = {part: value.clone() for part, value in cotangents.items() if part not in ("parameters", "buffers")}
    adjoint = Adjoint(cotangents["parameters"].clone(), cotangents["buffers"].clone(), slots)
    before, by_weight = step.pull_back(state, record, adjoint, weights)

    def products(state: State, weights: Tensor) -> Tensor:
        after = followed(step, step(state, record, weights))
        return sum((cotangents[part] @ value for part, value in after.items()), torch.zeros(2).double())

    found = {"parameters": before.parameters, "buffers": before.buffers, **before.optimizer}
    size = 1e-6
    for part, value in followed(step, state).items():
        # In proportion, so that second moments stay positive; of what is 0, not at all.
        direction = torch.randn(len(value), generator=generator).double() * (value if "sq" in part else 1)
        ends = [products(moved(step, state, part, sign * size * direction), weights) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * size)
        torch.testing.assert_close(found[part] @ direction, expected, rtol=1e-6, atol=1e-8)
    direction = torch.randn(len(weights), generator=generator).double()
    ends = [products(state, weights + sign * size * direction) for sign in (1, -1)]
    torch.testing.assert_close(by_weight @ direction, (ends[0] - ends[1]) / (2 * size), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("copies", [None, 3])
@pytest.mark.parametrize("name", ["BatchNorm", "all of these"])
def test_a_step_leaves_its_arguments_alone(name: str, copies: int | None, tmp_path: Path) -> None:
    workload = digits_workload(**CASES[name])
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload)
    step, record = replay.training_step, trajectory.step(1)
    state = next(replay.forward(1, 1))
    weights = random_weights(len(record.samples)).float()
    if copies is not None:
        state, weights = state.side_by_side(copies).copy(), weights.repeat(copies, 1)
    given, given_weights = state.copy(), weights.clone()
    after = step(state, record, weights)
    assert same(state, given)
    assert torch.equal(weights, given_weights)
    assert not same(after, state)
    assert same(step(state, record, weights), after), "the same again"
    spare = state.copy()
    assert same(step(state, record, weights, over=spare), after)
    assert same(step(state, record, weights, over=state), after)
    assert same(state, State({**after.parameters}, {**after.buffers}, after.optimizer)), "written over, as allowed"


def same(one: State, other: State) -> bool:
    """Bit for bit."""
    pairs = [(one.parameters, other.parameters), (one.buffers, other.buffers)]
    pairs += [(one.optimizer[name], other.optimizer[name]) for name in one.optimizer]
    return one.optimizer.keys() == other.optimizer.keys() and all(
        a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        for a, b in pairs
    )


@pytest.mark.parametrize("name", ["adamw", "all of these"])
def test_copies_side_by_side_are_trainings_of_their_own(name: str, tmp_path: Path) -> None:
    workload = digits_workload(**CASES[name])
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload, torch.float64)
    step, state = replay.training_step, next(replay.forward(1, 1))
    weights = torch.stack([random_weights(SAMPLES, seed) for seed in range(3)])
    records = [trajectory.step(t) for t in (1, 2, 3)]
    together = step.run(state.side_by_side(3), records, SampleWeights(weights, 1, 3))
    for k, row in enumerate(weights):
        alone = step.run(state, records, SampleWeights(row, 1, 3))
        for key, value in {**alone.parameters, **alone.buffers}.items():
            found = {**together.parameters, **together.buffers}[key][k]
            torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


def test_the_memory_of_any_step_is_bounded_from_above(tmp_path: Path) -> None:
    """What a step of any kind is taken to keep, against what autograd is told to keep of a standard one."""
    workload = digits_workload(**CASES["all of these"])
    trajectory = train(workload, tmp_path / "t")
    step, state, record = trajectory.replay(workload).training_step, trajectory.checkpoint(1), trajectory.step(1)
    assert 1 < TrainingStep.bytes_kept(step, state, record) / step.bytes_kept(state, record) < 20


def weight_in(weights: Tensor, first: int, last: int) -> Callable[[int, int], float]:
    return lambda t, i: float(weights[i]) if first <= t < last else 1.0


def test_a_replay_under_weights_is_the_training_under_weights(tmp_path: Path) -> None:
    """Forwards, and backwards within little memory."""
    workload = digits_workload(**CASES["all of these"] | {"model": hidden(nn.BatchNorm1d(6))}, epochs=9)
    trajectory = train(workload, tmp_path / "t")
    replay = trajectory.replay(workload, torch.float64)
    weights = random_weights(SAMPLES)
    of = SampleWeights(weights, 3, 9)
    states = list(replay.forward(3, 14, of))
    assert same(states[0], next(replay.forward(3, 3))), "it sets out from the recorded state"
    for t in (3, 4, 9, 14):
        model = train_again(workload, trajectory, weight_in(weights, 3, 9), t)
        for key, value in model.named_parameters():
            torch.testing.assert_close(states[t - 3].parameters[key], value.detach(), rtol=1e-9, atol=1e-11)
    for budget in (None, 4 * states[1].nbytes):
        walked = [(t, state.copy()) for t, state in replay.backward(3, 14, budget, weights=of)]
        assert [t for t, _ in walked] == list(range(14, 2, -1))
        assert all(same(state, states[t - 3]) for t, state in walked)


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
@pytest.mark.parametrize("name", ["sgd, nesterov, weight decay", "adamw", "all of these"])
def test_a_sweep_under_weights_matches_differences_there(name: str, kind: Any, tmp_path: Path) -> None:
    """``-dq / dw_j`` at random weights in the window (``cumulative``: from the start), of whole trainings."""
    workload = digits_workload(**CASES[name] | {"model": hidden(nn.BatchNorm1d(6))})
    trajectory = train(workload, tmp_path / "t")
    window, total = Window(2, 5), trajectory.num_steps
    first = 0 if kind == "cumulative" else window.start
    until = total if kind == "final" else window.end
    weights = random_weights(SAMPLES)
    planned = sweeps(courses(kind, [window], total))
    replay = trajectory.replay(workload, torch.float64)
    of = SampleWeights(weights, first, window.end)
    (found,) = Engine(replay).run([mean_validation_loss(workload)], planned, 1, of)[0]

    def value(sample: int, by: float) -> float:
        changed = weights.clone()
        changed[sample] += by
        weight_of = weight_in(changed, first, window.end)
        after = validation_loss(workload, train_again(workload, trajectory, weight_of, until))
        if kind != "cumulative":
            return after
        return after - validation_loss(workload, train_again(workload, trajectory, weight_of, window.start))

    samples = range(0, SAMPLES, 5)
    expected = np.array([value(j, -1e-5) - value(j, 1e-5) for j in samples]) / 2e-5
    assert np.abs(found[list(samples)] - expected).max() < 1e-6 * np.abs(expected).max()
