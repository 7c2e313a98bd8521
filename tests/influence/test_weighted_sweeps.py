"""Draws side by side against the same draws one after the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from workloads import SAMPLES, datasets, digits_workload
from workloads import sample_losses as digit_losses

from dit_mlflow import Query, Window, Workload, expected_influence, parse_windows, sample_losses, train
from dit_mlflow.influence.engine import Engine
from dit_mlflow.influence.kind import Course
from dit_mlflow.influence.query import mean_validation_loss
from dit_mlflow.influence.weighted_sweeps import WeightedSweeps
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.side_by_side import SideBySide

WINDOWS = [Window(0, 3), Window(2, 7)]
OPTIMIZERS: dict[str, Any] = {
    "nesterov": partial(SGD, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": partial(AdamW, lr=0.02, eps=1e-5),
    "amsgrad": partial(AdamW, lr=0.02, eps=1e-5, amsgrad=True),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.5, centered=True, eps=1e-4),
    "adagrad": partial(Adagrad, lr=0.1),
}


def of(name: str, **changes: Any) -> Workload:
    return digits_workload(optimizer=lambda model: OPTIMIZERS[name](model.parameters()), **changes)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def convolution() -> nn.Module:
    parts = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *parts)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].requires_grad_(False)
    return model


def groups(model: nn.Module) -> SGD:
    return SGD([{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}], lr=0.1, momentum=0.5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), nn.Linear(64, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(inputs.view(-1, 8, 8)).flatten(1))


def penalty(model: nn.Module) -> torch.Tensor:
    return 0.01 * sum(parameter.square().sum() for parameter in model.parameters())


def own_step(model: nn.Module, optimizers: Any, batch: Any, weights: torch.Tensor) -> None:
    """Two optimizers, clipping, an average of the parameters that pulls at them."""
    model.zero_grad()
    (weights * digit_losses(model, batch)).mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    for optimizer in optimizers.values():
        optimizer.step()
    with torch.no_grad():
        model[2].weight.lerp_(model[0].weight.mean(), 0.1)


def own_step_that_branches(model: nn.Module, optimizers: Any, batch: Any, weights: torch.Tensor) -> None:
    losses = weights * digit_losses(model, batch)
    model.zero_grad()
    (losses * (1 if losses.mean() > 1 else 0.5)).mean().backward()
    for optimizer in optimizers.values():
        optimizer.step()


def two(model: Any) -> dict[str, Any]:
    return {"first": AdamW(model[0].parameters(), lr=0.02), "rest": SGD(model[2].parameters(), lr=0.1, momentum=0.9)}


WORKLOADS: dict[str, Any] = {
    **{name: partial(of, name, clip_grad_norm=0.3) for name in OPTIMIZERS},
    "clipped values": partial(of, "nesterov", clip_grad_value=0.02),
    "micro-batches": partial(of, "nesterov", accumulate=2, batch_size=5, regularizer=penalty),
    "batch norm": partial(of, "nesterov", model=batch_norm),
    "convolution": partial(of, "nesterov", model=convolution),
    "frozen layer": partial(of, "adamw", model=frozen),
    "param groups": partial(digits_workload, optimizer=groups),
    "attention": partial(of, "nesterov", model=Attention),
    "a step of one's own": partial(digits_workload, step=own_step, optimizer=two),
}


def prefer(side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the choice away from the stop-watch."""
    monkeypatch.setattr(WeightedSweeps, "_preferred", lambda *arguments: side_by_side)


def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trainings each walk made side by side, from now on."""
    found: list[int] = []
    run = Engine.run

    def noted(self: Engine, *arguments: Any) -> np.ndarray:
        found.append(1 if len(arguments) < 5 else arguments[4].copies)
        return run(self, *arguments)

    monkeypatch.setattr(Engine, "run", noted)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "a step of one's own" else ()) for name in WORKLOADS]
)
def test_side_by_side_is_one_after_the_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two queries, of which one has a row of its own for each training; to rounding."""
    workload = WORKLOADS[name]()
    trajectory = train(workload, tmp_path / "t")
    queries = [mean_validation_loss(workload), *sample_losses(workload, [3])]
    asked = (trajectory, workload, [w for w in WINDOWS if w.end <= trajectory.num_steps], "local", queries)
    found = {}
    for together in (False, True):
        prefer(together, monkeypatch)
        walks = made(monkeypatch)
        found[together] = expected_influence(*asked, draws=4, dtype=torch.float64)
        assert set(walks) == ({4} if together else {1})
    scale = np.abs(found[False].scores).max()
    np.testing.assert_allclose(found[True].scores, found[False].scores, atol=1e-12 * scale, rtol=1e-9)
    assert found[True].metadata["draws_left_out"] == found[False].metadata["draws_left_out"]


@pytest.mark.parametrize("kind", ["final", "cumulative"])
def test_of_every_kind(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = of("adamw")
    trajectory = train(workload, tmp_path / "t")
    found = {}
    for together in (False, True):
        prefer(together, monkeypatch)
        found[together] = expected_influence(trajectory, workload, WINDOWS, kind, draws=4, dtype=torch.float64).scores
    np.testing.assert_allclose(found[True], found[False], atol=1e-12 * np.abs(found[False]).max(), rtol=1e-9)


def compared(
    trajectory: Trajectory, workload: Workload, dtype: torch.dtype | None = torch.float64
) -> tuple[float, float] | None:
    """What the stop-watch says of three draws on the whole run."""
    engine = Engine(trajectory.replay(workload, dtype))
    course = Course(0, trajectory.num_steps, ((trajectory.num_steps, 0, 1),))
    queries = [mean_validation_loss(workload)]
    engine.choose(0, trajectory.num_steps)
    return WeightedSweeps(engine).compared(queries, course, torch.rand(3, SAMPLES, dtype=torch.float64))


def test_steps_that_are_the_same_are_timed(tmp_path: Path) -> None:
    workload = of("adamw", model=batch_norm)
    seconds = compared(train(workload, tmp_path / "t"), workload)
    assert seconds is not None
    assert min(seconds) > 0


def test_what_rounding_alone_moves_is_the_same(tmp_path: Path) -> None:
    """At Adam's first step with a tiny ``eps``, rounding moves the derivative by half of its length, in float32."""
    workload = digits_workload(
        optimizer=lambda model: AdamW(model.parameters(), lr=0.01, eps=1e-12),
        model=lambda: nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3)),
    )
    assert compared(train(workload, tmp_path / "t"), workload, None) is not None


class Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + 1
        return self.inner(inputs)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = self.inner(inputs)
        return found * 2 if found.detach().sum() > 0 else found


@pytest.mark.parametrize(
    "changes",
    [
        {"model": Assigns},
        {"model": Reads},
        pytest.param({"step": own_step_that_branches, "optimizer": two}, marks=pytest.mark.slow),
    ],
)
def test_what_vmap_cannot_run_is_run_one_by_one(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workload = digits_workload(**changes)
    trajectory = train(workload, tmp_path / "t")
    assert compared(trajectory, workload) is None
    walks = made(monkeypatch)
    found = expected_influence(trajectory, workload, WINDOWS, draws=2)
    assert set(walks) == {1}
    assert np.isfinite(found.scores).all()


def test_other_random_draws_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ``vmap`` gave each training draws of its own."""
    workload = digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))
    )
    trajectory = train(workload, tmp_path / "t")
    vmap = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda f, **settings: vmap(f, **settings | {"randomness": "different"}))
    assert compared(trajectory, workload) is None


class Breaks(nn.Module):
    """Cannot run side by side on the batches of fewer samples, which end an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = self.inner(inputs)
        return found * float(found.detach().abs().max() > 0) if len(inputs) < 10 else found


def test_a_step_that_goes_another_way_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = digits_workload(model=Breaks, batch_size=10)
    trajectory = train(workload, tmp_path / "t")
    alone, found = {}, {}
    prefer(False, monkeypatch)
    alone = expected_influence(trajectory, workload, WINDOWS, draws=4).scores
    prefer(True, monkeypatch)
    walks = made(monkeypatch)
    found = expected_influence(trajectory, workload, WINDOWS, draws=4).scores
    assert walks.count(4) == 1
    np.testing.assert_array_equal(found, alone)


def test_as_many_run_at_once_as_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = of("nesterov")
    trajectory = train(workload, tmp_path / "t")
    state = trajectory.checkpoint(trajectory.num_steps).nbytes
    prefer(True, monkeypatch)
    windows = parse_windows("1", trajectory)
    whole = expected_influence(trajectory, workload, windows, draws=8, dtype=torch.float64).scores
    walks = made(monkeypatch)
    # In float64, nine steps of three trainings.
    budget = 2 * state * 11 * 3
    found = expected_influence(trajectory, workload, windows, draws=8, dtype=torch.float64, memory_budget=budget).scores
    assert walks == [3, 3, 2]
    np.testing.assert_allclose(found, whole, rtol=1e-9, atol=1e-12 * np.abs(whole).max())
    walks.clear()
    expected_influence(trajectory, workload, windows, draws=4, dtype=torch.float64, memory_budget=2 * state * 11)
    assert walks == [1] * 4


def test_a_query_that_takes_a_gradient_is_asked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = datasets()[1].tensors[0]

    def steepness(model: nn.Module) -> torch.Tensor:
        at = inputs.to(next(model.parameters())).requires_grad_()
        (slope,) = torch.autograd.grad(model(at).sum(), at, create_graph=True)
        return slope.square().mean()

    workload = of("nesterov")
    trajectory = train(workload, tmp_path / "t")
    asked = (trajectory, workload, WINDOWS, "local", [Query("steepness", steepness)])
    found = {}
    for together in (False, True):
        prefer(together, monkeypatch)
        found[together] = expected_influence(*asked, draws=2, dtype=torch.float64).scores
    np.testing.assert_allclose(found[True], found[False], atol=1e-12 * np.abs(found[False]).max(), rtol=1e-9)


def test_the_sum_of_a_query_is_over_the_trainings(tmp_path: Path) -> None:
    workload = digits_workload()
    replay = train(workload, tmp_path / "t").replay(workload)
    state = replay.checkpoint(9).side_by_side(3)
    step, query = SideBySide(replay.dynamics, 3), mean_validation_loss(workload)
    one = replay.training_step.ask(replay.checkpoint(9).parameters, {}, query)
    torch.testing.assert_close(step.ask(state.parameters, {}, query), 3 * one)
