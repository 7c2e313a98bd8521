"""NaN and infinity are named with step and samples; they never fill a table, and never have a rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, train_again, window_effect
from plain_loop import record, whole
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from workloads import datasets, digits_model, digits_workload

from dit_mlflow import (
    InputError,
    Query,
    TrainingError,
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    UnsupportedError,
    Window,
    expected_influence,
    leave_one_out,
    track,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.methods.knn_shapley import KnnShapley


class Scaled(nn.Module):
    """Features over their standard deviation, which is 0 where all inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 6, bias=False), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.inner(inputs)
        return self.outer(found / (found.std(1, keepdim=True) + 1e-3))


def with_sample(data: TensorDataset, index: int, value: float) -> TensorDataset:
    inputs, targets = (tensor.clone() for tensor in data.tensors)
    inputs[index] = value
    return TensorDataset(inputs, targets)


def test_a_second_derivative_that_is_not_finite_is_named(tmp_path: Path) -> None:
    train_set = with_sample(datasets()[0], 5, 0.0)
    workload = digits_workload(
        model=Scaled, train_set=train_set, optimizer=lambda net: SGD(net.parameters(), lr=0.05), epochs=1
    )
    trajectory = train(workload, tmp_path / "t", order_seed=3)
    (at,) = (t for t in range(trajectory.num_steps) if 5 in trajectory.step(t).samples)
    assert at < trajectory.num_steps - 1
    with pytest.raises(UnsupportedError, match=f"step {at}: the second derivative .* for sample 5, .*leave_one_out"):
        track(trajectory, workload, whole(trajectory))
    with pytest.raises(UnsupportedError, match="Hessian of the training loss is not finite"):
        method("influence_function")(trajectory, workload, whole(trajectory))
    # Of the samples' gradients, TracIn loses one.
    ranked = method("tracin")(trajectory, workload, whole(trajectory))
    assert ranked.metadata["not_finite"] == np.flatnonzero(np.isnan(ranked.of(0))).tolist() == [5]
    with pytest.raises(UnsupportedError, match=r"training sample 5 .*not finite"):
        method("grad_dot")(trajectory, workload, whole(trajectory))
    # What is said to go, goes, and is right.
    later = Window(at + 1, trajectory.num_steps)
    some = [int(j) for j in trajectory.step(at + 1).samples[:3]]
    found = track(trajectory, workload, [later], dtype=torch.float64).of(0)[some]
    np.testing.assert_allclose(found, finite_difference(workload, trajectory, later, "local", some, 1e-4), rtol=1e-5)
    exact = leave_one_out(trajectory, workload, whole(trajectory), samples=[5]).of(0)[5]
    expected = window_effect(workload, trajectory, whole(trajectory)[0], "local", 5, 0.0)
    np.testing.assert_allclose(exact, expected, rtol=1e-6)


def test_training_that_diverges_is_said_while_and_after_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))
    with caplog.at_level(logging.WARNING):
        trajectory = record(tmp_path / "t", model, SGD(model.parameters(), lr=1e30), epochs=3)
    (said,) = (entry.message for entry in caplog.records if "not finite" in entry.message)
    after = next(t for t in range(1, 9) if not finite(trajectory, model, t))
    samples = ", ".join(map(str, trajectory.step(after - 1).samples))
    assert said.startswith(f"step {after - 1} (its batch: samples {samples}) made parameter")
    workload = digits_workload(model=model)
    for ask in (track, leave_one_out, method("influence_function")):
        with pytest.raises(TrajectoryError, match=r"diverged: parameter .* is not finite at step"):
            ask(trajectory, workload, whole(trajectory))
    with pytest.raises(InputError, match=r"nan at step 1, because of samples .* training that diverges"):
        method("tracin")(trajectory, workload, whole(trajectory))


def finite(trajectory: Any, model: nn.Module, t: int) -> bool:
    (state,) = trajectory.states(digits_workload(model=model), t, t)
    return all(bool(value.isfinite().all()) for value in state.parameters.values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite_are_named(value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workload = digits_workload(train_set=with_sample(datasets()[0], 5, value))
    with pytest.raises(TrainingError, match=r"the loss is nan at step \d+ \(epoch 0\), by sample 5; "):
        train(workload, tmp_path / "own")
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        caplog.at_level(logging.WARNING),
        TrajectoryRecorder(model, optimizer, tmp_path / "loop", checkpoint_every=0) as recorder,
    ):
        for batch in recorder.watch(DataLoader(workload.train_set, 8)):
            optimizer.zero_grad()
            loss = workload.loss(model, batch).mean()
            loss.backward()
            optimizer.step()
            recorder.log(loss)
    (said,) = (entry.message for entry in caplog.records if "finite" in entry.message)
    assert "step 0 (its batch: samples 0, 1, 2, 3, 4, 5, 6, 7)" in said
    assert "The data of sample 5 are not finite either" in said


def test_validation_data_that_are_not_finite_are_named(tmp_path: Path) -> None:
    workload = digits_workload(validation_set=with_sample(datasets()[1], 3, np.nan))
    trajectory = train(workload, tmp_path / "t")
    for ask in (track, leave_one_out, expected_influence, method("influence_function")):
        with pytest.raises(
            InputError, match=r"'mean_validation_loss' is nan at step .*, because of sample 3 of its data"
        ):
            ask(trajectory, workload, whole(trajectory))
    for ask in (KnnShapley(), KnnShapley(features="inputs")):
        with pytest.raises(UnsupportedError, match="features of validation sample 3 are not finite"):
            ask(trajectory, workload)


@pytest.mark.parametrize("name", ["aum", "forgetting_events", "representer_points", "trak", "knn_shapley"])
def test_methods_that_take_no_loss_give_no_rank_among_nan(name: str, tmp_path: Path) -> None:
    """Coefficients become NaN at one sample, and the model with them."""

    def coefficients(batch: Any) -> Tensor:
        (inputs, _), (sample, _) = batch, datasets()[0][17]
        return torch.where((inputs == sample).all(dim=1), torch.nan, 1 / len(inputs))

    workload = digits_workload(coefficients=coefficients)
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for _ in range(3):
            for batch in recorder.watch(DataLoader(workload.train_set, 8)):
                optimizer.zero_grad()
                (coefficients(batch) * workload.loss(model, batch)).sum().backward()
                optimizer.step()
    trajectory = Trajectory.open(tmp_path / "t")
    refused = (TrajectoryError, "diverged") if name != "trak" else (UnsupportedError, "coefficients of sample 17")
    with pytest.raises(refused[0], match=refused[1]):
        method(name)(trajectory, workload)


def test_removals_without_a_finite_value_have_no_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)

    def value(net: Any) -> Tensor:
        return net[2].bias[0]

    some = [0, 3, 5, 8, 11]
    effects = np.array(
        [window_effect(workload, trajectory, window, "local", j, 0.0, lambda net: value(net).item()) for j in some]
    )
    recorded = float(value(train_again(workload, trajectory, lambda t, i: 1.0, window.end)).detach())
    middle = np.sort(effects[effects < 0])[:2].mean()
    root = Query("root", lambda net: (value(net) - (recorded + middle)).sqrt())
    lost = [j for j, effect in zip(some, effects, strict=True) if effect < middle]
    assert len(lost) == 1
    with caplog.at_level(logging.WARNING):
        found = leave_one_out(trajectory, workload, [window], queries=[root], samples=some)
    assert found.metadata["not_finite"] == lost
    assert f"not finite for sample {lost[0]}" in caplog.text
    expected = np.sqrt(np.where(effects < middle, np.nan, effects - middle)) - np.sqrt(-middle)
    np.testing.assert_allclose(found.of(0)[some], expected, rtol=1e-5)
    assert set(found.top(24)["sample_index"]) == set(some) - set(lost)
