"""Rounding, which is another one on every machine, is told from another training, whatever training makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference
from plain_loop import record
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam
from workloads import digits_workload, sample_losses

from dit_mlflow import TrajectoryError, Window, Workload, parameter_value, track, train
from dit_mlflow.replay import Trajectory
from dit_mlflow.replay.dynamics import Dynamics
from dit_mlflow.replay.loss_step import LossStep
from dit_mlflow.replay.replay import refuse_what_diverged
from dit_mlflow.trajectory import REPLAY_TOLERANCE, State
from dit_mlflow.trajectory.state import drifts

ELSEWHERE = False
"""Whether sums are taken in the other order, as on another machine."""


def rounded(one: Tensor, other: Tensor) -> Tensor:
    return one.flip(-1) @ other.flip(-2) if ELSEWHERE else one @ other


class Attention(nn.Module):
    """Rows of an image attend to each other. The gradient of the key's bias is 0 but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.reshape(-1, 8, 8)
        found = rounded(self.query(rows), self.key(rows).mT) / 6**0.5
        return self.head(torch.tanh(rounded(found.softmax(-1), self.value(rows))).mean(1))


class Normalised(nn.Module):
    """The gradient of a bias before BatchNorm is 0 but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(64, 6)), nn.Parameter(torch.zeros(6))
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(rounded(images, self.weight) + self.bias)))


def adam_workload(model: type[nn.Module], **changes: Any) -> Workload:
    settings = {"model": model, "optimizer": lambda model: Adam(model.parameters(), lr=0.01)}
    return digits_workload(**(settings | changes))


@pytest.fixture(params=[Attention, Normalised])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda: monkeypatch.setattr(f"{__name__}.ELSEWHERE", True)


def miss_of(trajectory: Trajectory, workload: Workload, name: str) -> float:
    """How far a replay misses a parameter at the end of the first step."""
    replayed = LossStep(Dynamics(workload, trajectory.manifest))(trajectory.checkpoint(0), trajectory.step(0))
    return drifts(replayed, trajectory.checkpoint(1), trajectory.checkpoint(0))[name]


def test_what_moves_by_rounding_alone_is_not_held_against_a_replay(
    tmp_path: Path, model: Any, elsewhere: Any, caplog: pytest.LogCaptureFixture
) -> None:
    workload = adam_workload(model)
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.verify(workload).max_drift == 0
    asked = [parameter_value("head.bias", 0)]
    expected = track(trajectory, workload, [Window(0, 3)], queries=asked).scores
    elsewhere()
    name = "key.bias" if model is Attention else "bias"
    assert miss_of(trajectory, workload, name) > 0.1, (
        "another order of summation moves this bias by as much as training"
    )
    caplog.set_level("INFO", "dit_mlflow")
    assert 0 < trajectory.verify(workload).max_drift <= REPLAY_TOLERANCE
    assert f"rounding alone moves ['{name}']" in caplog.text
    scores = track(trajectory, workload, [Window(0, 3)], queries=asked).scores
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("there", [False, True])
def test_another_loss_is_not_put_down_to_rounding(tmp_path: Path, model: Any, elsewhere: Any, there: bool) -> None:
    trajectory = train(adam_workload(model), tmp_path / "t")
    if there:
        elsewhere()

    def smoothed(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return cross_entropy(model(inputs), targets, reduction="none", label_smoothing=0.05)

    with pytest.raises(TrajectoryError, match=r"up to step [14] misses .* training moved '(head|key)\.weight'"):
        trajectory.verify(adam_workload(model, loss=smoothed))


def test_windows_up_to_a_divergence_can_be_asked_for(tmp_path: Path) -> None:
    def unstable(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) ** 4).sum(1) + sample_losses(model, batch)

    def optimizer(model: nn.Module) -> SGD:
        return SGD(model.parameters(), lr=20.0)

    torch.manual_seed(0)
    made = Normalised()
    trajectory = record(tmp_path / "t", made, optimizer(made), loss=unstable, checkpoint_every=1)
    workload = digits_workload(model=Normalised, loss=unstable, optimizer=optimizer)
    assert not trajectory.checkpoint(trajectory.num_steps).parameters["head.bias"].isfinite().all()
    assert trajectory.verify(workload).max_drift == 0, "the same numbers, and no number in the same places"
    samples = trajectory.step(0).samples[:3].tolist()
    expected = finite_difference(workload, trajectory, Window(0, 1), "local", samples, 1e-7)
    found = track(trajectory, workload, windows=[Window(0, 1)], dtype=torch.float64).of(0)[samples]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_replay_that_parts_where_training_diverged_says_so() -> None:
    nan = float("nan")
    recorded, finite = State({"w": torch.tensor([nan, nan])}), State({"w": torch.tensor([1.0, 1.0])})
    with pytest.raises(TrajectoryError, match=r"between step 3 and step 5: 'w' is no longer .* windows up to step 3"):
        refuse_what_diverged(3, 5, State({"w": torch.tensor([1.0, nan])}), recorded)
    refuse_what_diverged(3, 5, finite, recorded)
    refuse_what_diverged(3, 5, recorded, finite)


def test_what_is_not_a_number_in_both_is_no_distance() -> None:
    def state(*values: float) -> State:
        return State({"w": torch.tensor(values)})

    nan, inf = float("nan"), float("inf")
    assert drifts(state(nan, inf, 1.0), state(nan, inf, 1.0), state(0.0, 0.0, 0.0)) == {"w": 0.0}
    assert drifts(state(nan, 1.0), state(1.0, 1.0), state(0.0, 0.0)) == {"w": inf}
    assert drifts(state(inf, 1.0), state(-inf, 1.0), state(0.0, 0.0)) == {"w": inf}
