"""Against plain loops over the recorded presentations, one sample's loss at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import train_again
from torch import Tensor, nn
from workloads import digits_model, digits_workload

from dit_mlflow import Trajectory, Window, Workload, parameter_value, train
from dit_mlflow.methods import method, tracin
from dit_mlflow.methods.snapshot import Snapshot, snapshots
from dit_mlflow.methods.tracin import presented_norms
from dit_mlflow.replay.replay import Replay
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.workload import to_like

WINDOWS = [Window(0, 6), Window(2, 5)]


def layers(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}])


def uneven(batch: Any) -> Tensor:
    """Coefficients that are no mean, some 0."""
    return batch[1].double() / 10


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 2, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )


CASES: dict[str, dict[str, Any]] = {
    "learning rates by layer": {"optimizer": layers},
    "coefficients": {"coefficients": uneven},
    "micro-batches and a regularizer": {
        "accumulate": 2,
        "batch_size": 4,
        "regularizer": lambda model: 0.1 * sum(p.square().sum() for p in model.parameters()),
    },
    "convolutions": {"model": convolutions},
}


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))])


def expected_scores(workload: Workload, trajectory: Trajectory, rates: list[float], window: Window) -> np.ndarray:
    """``eta c_j <grad l_j, grad q> / |grad l_j|``, presentation by presentation, in float64."""
    scores = np.zeros(workload.num_samples)
    for t in range(window.start, window.end):
        model = train_again(workload, trajectory, lambda step, i: 1.0, t)
        inputs, targets = workload.validation_set.tensors  # type: ignore[attr-defined]
        query = gradient(model, workload.loss(model, [inputs.double(), targets]).mean())
        rate = torch.cat([torch.full((p.numel(),), r) for p, r in zip(model.parameters(), rates, strict=True)])
        for indices in trajectory.step(t).indices:
            factors = workload.batch_coefficients(workload.batch(indices), len(indices)).tolist()
            for sample, factor in zip(indices.tolist(), factors, strict=True):
                batch = to_like(workload.batch([sample]), torch.device("cpu"), torch.float64)
                own = gradient(model, workload.loss(model, batch)[0])
                scores[sample] += factor * float(own / own.norm() @ (rate * query))
    return scores


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_the_sum_of_directions_over_recorded_presentations(case: str, tmp_path: Any) -> None:
    workload = digits_workload(**{"epochs": 2, **CASES[case]})
    trajectory = train(workload, tmp_path / "t")
    found = method("tracin_renormalized")(trajectory, workload, WINDOWS)
    assert found.kind == "none"
    rates = [0.5, 0.5, 0.1, 0.1] if "optimizer" in CASES[case] else [0.5] * 4
    for k, window in enumerate(WINDOWS):
        expected = expected_scores(workload, trajectory, rates, window)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(found.of(k), expected, rtol=1e-3, atol=1e-6)


def scaled(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy times a factor that is drawn for each presentation, over four orders of magnitude."""
    inputs, targets = batch
    losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
    return losses * 10 ** (-4 * torch.rand_like(losses)) if model.training else losses


def test_what_a_presentation_draws_counts_for_its_direction_alone(tmp_path: Any) -> None:
    """In one step, scores are those of the loss without the factor, which ``tracin`` follows."""
    workload, plain = digits_workload(loss=scaled), digits_workload()
    trajectory = train(workload, tmp_path / "t")
    step = trajectory.step(0)
    replay = trajectory.replay(workload)
    ((_, snapshot),) = snapshots(replay, [0])
    model = trajectory.checkpoint(0).load_into(workload.build_model())
    norms = [float(gradient(model, plain.loss(model, plain.batch([i]))[0]).norm()) for i in step.samples]
    factors = presented_norms(replay, step, snapshot) / norms
    assert factors.max() / factors.min() > 10
    query = parameter_value("2.bias", 1)
    raw, even = (
        method(name)(trajectory, workload, [Window(0, 1)], queries=[query]).of(0)[step.samples]
        for name in ("tracin", "tracin_renormalized")
    )
    directions = [gradient(model, plain.loss(model, plain.batch([i]))[0]) for i in step.samples]
    at = sum(p.numel() for p in model.parameters()) - 2
    own = np.array([0.5 / 8 * float(g[at]) for g in directions])
    np.testing.assert_allclose(even, own / norms, rtol=1e-4)
    np.testing.assert_allclose(raw, own * factors, rtol=1e-4)


def test_a_presentation_without_gradient_adds_nothing(tmp_path: Any) -> None:
    def masked(model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(model(inputs), targets, reduction="none") * (targets > 0)

    workload = digits_workload(loss=masked, model=digits_model)
    scores = method("tracin_renormalized")(train(workload, tmp_path / "t"), workload).of(0)
    zero = workload.train_set.tensors[1].numpy() == 0  # type: ignore[attr-defined]
    assert zero.any()
    assert (scores[zero] == 0).all()
    assert (scores[~zero] != 0).all()


def test_a_direction_that_cannot_be_had_is_not_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gradients 0 and NaN, the first alone adds 0."""
    workload = digits_workload(epochs=1)
    trajectory = train(workload, tmp_path / "t")
    expected = method("tracin_renormalized")(trajectory, workload).of(0)
    first, second = trajectory.step(1).samples[:2]
    expected[[first, second]] = 0, np.nan

    def lengths(replay: Replay, step: StepRecord, snapshot: Snapshot) -> np.ndarray:
        found = presented_norms(replay, step, snapshot)
        found[step.samples == first] = 0
        found[step.samples == second] = np.nan
        return found

    monkeypatch.setattr(tracin, "presented_norms", lengths)
    np.testing.assert_array_equal(method("tracin_renormalized")(trajectory, workload).of(0), expected)
