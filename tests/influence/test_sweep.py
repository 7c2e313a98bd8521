"""The sweep against finite differences through whole trainings, and against closed forms."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, quadratic_influence
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset
from workloads import digits_workload

from dit_mlflow import Query, Window, Workload, parse_windows, track, train

KINDS = ("local", "final", "cumulative")

OPTIMIZERS: dict[str, Any] = {
    "sgd": partial(SGD, lr=0.5),
    "sgd weight decay": partial(SGD, lr=0.5, weight_decay=0.05),
    "sgd momentum": partial(SGD, lr=0.2, momentum=0.9),
    "sgd dampening": partial(SGD, lr=0.2, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "sgd nesterov": partial(SGD, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd maximize": partial(SGD, lr=0.05, momentum=0.5, maximize=True),
    "adam": partial(Adam, lr=0.02),
    "adam weight decay": partial(Adam, lr=0.02, weight_decay=0.05, betas=(0.8, 0.95), eps=1e-6),
    "adam amsgrad": partial(Adam, lr=0.02, amsgrad=True),
    "adamw": partial(AdamW, lr=0.02, weight_decay=0.1),
    "adamw amsgrad": partial(AdamW, lr=0.02, weight_decay=0.1, amsgrad=True),
    "nadam": partial(NAdam, lr=0.02),
    "nadam weight decay": partial(NAdam, lr=0.02, weight_decay=0.05, momentum_decay=0.01),
    "nadam decoupled": partial(NAdam, lr=0.02, weight_decay=0.05, decoupled_weight_decay=True),
    "radam": partial(RAdam, lr=0.02, betas=(0.9, 0.99)),
    "radam decoupled": partial(RAdam, lr=0.02, weight_decay=0.05, decoupled_weight_decay=True),
    "adamax": partial(Adamax, lr=0.02),
    "adamax weight decay": partial(Adamax, lr=0.02, weight_decay=0.05),
    "adagrad": partial(Adagrad, lr=0.05),
    "adagrad decays": partial(Adagrad, lr=0.05, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.1),
    "adadelta": partial(Adadelta, lr=1.0),
    "adadelta weight decay": partial(Adadelta, lr=1.0, rho=0.8, weight_decay=0.05),
    "rmsprop": partial(RMSprop, lr=0.01),
    "rmsprop momentum": partial(RMSprop, lr=0.01, momentum=0.8, weight_decay=0.05),
    "rmsprop centered": partial(RMSprop, lr=0.01, centered=True, momentum=0.5),
    "asgd": partial(ASGD, lr=0.5),
    "asgd decays": partial(ASGD, lr=0.5, lambd=0.05, alpha=0.5, t0=3, weight_decay=0.05),
}


if "decoupled_weight_decay" in signature(Adam).parameters:
    # Not in torch 2.6.
    decoupled = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    OPTIMIZERS["adam maximize decoupled"] = partial(Adam, lr=0.005, maximize=True, **decoupled)  # type: ignore[arg-type]


def with_optimizer(name: str) -> Any:
    return lambda model: OPTIMIZERS[name](model.parameters())


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest error over largest expected score."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("step", [1e-5, 1e-6])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_match_finite_differences(name: str, step: float, tmp_path: Any) -> None:
    workload = digits_workload(optimizer=with_optimizer(name))
    trajectory = train(workload, tmp_path / "t")
    whole = Window(0, trajectory.num_steps)
    samples = range(0, workload.num_samples, 3)
    found = track(trajectory, workload, [whole], dtype=torch.float64).of(0)[list(samples)]
    expected = finite_difference(workload, trajectory, whole, "local", samples, step)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sgd", "sgd momentum", "adamw"])
def test_window_kinds_match_finite_differences(kind: Any, name: str, tmp_path: Any) -> None:
    """At the bounds of training and beside them."""
    workload = digits_workload(optimizer=with_optimizer(name), epochs=2)
    trajectory = train(workload, tmp_path / "t")
    assert trajectory.num_steps == 6
    windows = [Window(0, 1), Window(1, 2), Window(1, 6), Window(2, 5), Window(5, 6)]
    samples = range(0, workload.num_samples, 5)
    found = track(trajectory, workload, windows, kind, dtype=torch.float64)
    for window in windows:
        expected = finite_difference(workload, trajectory, window, kind, samples, 1e-5)
        np.testing.assert_allclose(found.of(window)[list(samples)], expected, rtol=1e-6, atol=1e-10)


def test_float32_agrees_with_float64(tmp_path: Any) -> None:
    """Rounding of the record and of the sweep: parts in 1e-5 on nine steps."""
    workload = digits_workload(optimizer=with_optimizer("adam"))
    trajectory = train(workload, tmp_path / "t")
    windows = parse_windows("3", trajectory)
    single = track(trajectory, workload, windows)
    double = track(trajectory, workload, windows, dtype=torch.float64)
    assert relative_error(single.scores, double.scores) < 1e-4


def test_adam_with_inputs_that_are_always_zero(tmp_path: Any) -> None:
    """The blank pixels of the digits leave ``v = 0``: there the step has no derivative, and needs none."""
    workload = digits_workload(optimizer=with_optimizer("adam"))
    trajectory = train(workload, tmp_path / "t")
    moments = trajectory.checkpoint(trajectory.num_steps).optimizer["0.weight"]["exp_avg_sq"]
    assert (moments == 0).any()
    samples = range(0, workload.num_samples, 5)
    found = track(trajectory, workload, parse_windows("3", trajectory), dtype=torch.float64)
    for window in found.windows:
        expected = finite_difference(workload, trajectory, window, "local", samples, 1e-5)
        assert relative_error(found.of(window)[list(samples)], expected) < 1e-6


class Quadratic(nn.Module):
    def __init__(self, start: np.ndarray) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.from_numpy(start))

    def forward(self, hessian: Tensor, linear: Tensor) -> Tensor:
        return 0.5 * torch.einsum("d,bde,e->b", self.theta, hessian, self.theta) - linear @ self.theta


def quadratic(seed: int) -> tuple[Workload, np.ndarray, np.ndarray, np.ndarray]:
    """Symmetric indefinite Hessians that do not commute."""
    random = np.random.default_rng(seed)
    hessians = random.standard_normal((10, 4, 4))
    hessians = hessians + hessians.transpose(0, 2, 1)
    assert min(np.linalg.eigvalsh(hessian)[0] for hessian in hessians) < 0
    linear, start = random.standard_normal((10, 4)), random.standard_normal(4)
    data = TensorDataset(torch.from_numpy(hessians), torch.from_numpy(linear))
    workload = Workload(
        model=Quadratic(start),
        loss=lambda model, batch: model(*batch),
        train_set=data,
        validation_set=data,
        optimizer=lambda model: SGD(model.parameters(), lr=0.05),
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda t: 1 / (1 + 0.1 * t)),
        batch_size=3,
        epochs=3,
    )
    return workload, hessians, linear, start


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_on_indefinite_quadratics(seed: int, kind: Any, tmp_path: Any) -> None:
    workload, hessians, linear, start = quadratic(seed)
    trajectory = train(workload, tmp_path / "t")
    total = trajectory.num_steps
    steps = [trajectory.step(t) for t in range(total)]
    direction = np.arange(1.0, 5.0)
    query = Query("direction", lambda model: torch.from_numpy(direction) @ model.theta)
    window = Window(5, 9)
    found = track(trajectory, workload, [window], kind, [query]).of(0)

    def closed_form(absent: Window, until: int) -> np.ndarray:
        batches, rates = [s.samples for s in steps], [s.hyperparameters[0]["lr"] for s in steps]
        return quadratic_influence(hessians, linear, start, batches, rates, direction, absent, until)

    expected = {
        "local": lambda: closed_form(window, window.end),
        "final": lambda: closed_form(window, total),
        "cumulative": lambda: closed_form(Window(0, 9), 9) - closed_form(Window(0, 5), 5),
    }[kind]()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["final", "cumulative"])
def test_windows_that_partition_training_add_up_to_the_whole_run(kind: Any, tmp_path: Any) -> None:
    """Several adjoints with shares of both signs on one side, a single ``local`` one on the other."""
    workload = digits_workload(optimizer=with_optimizer("sgd nesterov"))
    trajectory = train(workload, tmp_path / "t")
    parts = track(trajectory, workload, parse_windows("4", trajectory), kind, dtype=torch.float64)
    whole = track(trajectory, workload, [Window(0, trajectory.num_steps)], "local", dtype=torch.float64)
    np.testing.assert_allclose(parts.scores.sum(axis=0), whole.scores[0], rtol=1e-9, atol=1e-12)


def test_kinds_agree_on_the_whole_run(tmp_path: Any) -> None:
    workload = digits_workload(optimizer=with_optimizer("adamw"))
    trajectory = train(workload, tmp_path / "t")
    whole = [Window(0, trajectory.num_steps)]
    local, final, cumulative = (track(trajectory, workload, whole, kind).scores for kind in KINDS)
    np.testing.assert_array_equal(local, final)
    np.testing.assert_array_equal(local, cumulative)


def test_sample_absent_from_a_late_window_still_has_cumulative_influence(tmp_path: Any) -> None:
    workload = digits_workload(epochs=2)
    trajectory = train(workload, tmp_path / "t")
    window = Window(5, 6)
    met = set(trajectory.step(5).samples.tolist())
    missed = [i for i in range(workload.num_samples) if i not in met]
    assert (track(trajectory, workload, [window], "local").of(0)[missed] == 0).all()
    assert (track(trajectory, workload, [window], "cumulative").of(0)[missed] != 0).all()


def test_many_queries_and_windows_in_one_sweep_equal_one_at_a_time(tmp_path: Any) -> None:
    workload = digits_workload(optimizer=with_optimizer("adam"))
    trajectory = train(workload, tmp_path / "t")

    def weight(row: int, model: nn.Module) -> Tensor:
        return model[2].weight[row].square().sum()  # type: ignore[index]

    queries = [Query(f"row {row}", partial(weight, row)) for row in range(3)]
    windows = [Window(0, 3), Window(2, 9), Window(3, 6), Window(8, 9)]
    for kind in KINDS:
        together = track(trajectory, workload, windows, kind, queries, dtype=torch.float64)
        assert together.queries == ("row 0", "row 1", "row 2")
        for window in windows:
            for query in queries:
                alone = track(trajectory, workload, [window], kind, [query], dtype=torch.float64)
                expected = alone.of(window, query.name)
                np.testing.assert_allclose(together.of(window, query.name), expected, rtol=1e-9, atol=1e-14)


def test_convolutions_give_the_same_for_one_and_many_queries(tmp_path: Any) -> None:
    """The loop over rows that convolutions take must equal single sweeps."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(72, 3))

    workload = digits_workload(model=model)
    trajectory = train(workload, tmp_path / "t")
    windows = parse_windows("3", trajectory)
    together = track(trajectory, workload, windows, "cumulative", dtype=torch.float64)
    samples = range(0, workload.num_samples, 6)
    for window in windows:
        expected = finite_difference(workload, trajectory, window, "cumulative", samples, 1e-5)
        assert relative_error(together.of(window)[list(samples)], expected) < 1e-6


def test_the_callers_model_and_random_stream_are_left_alone(tmp_path: Any) -> None:
    model = digits_workload().build_model()
    workload = digits_workload(model=model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    trajectory = train(workload, tmp_path / "t")
    track(trajectory, workload, [Window(0, 9)])
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
