"""Influence functions by LiSSA, Arnoldi and DataInf, against dense matrices and conjugate gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from workloads import datasets, digits_model, digits_workload

from dit_mlflow import InputError, Trajectory, UnsupportedError, Workload, parameter_value, sample_losses, train
from dit_mlflow.methods.fisher import InfluenceFunctionDatainf
from dit_mlflow.methods.hessian import Curvature, by_parameter
from dit_mlflow.methods.krylov import krylov_spaces
from dit_mlflow.methods.newton_step import InfluenceFunction, InfluenceFunctionArnoldi, InfluenceFunctionLissa
from dit_mlflow.methods.snapshot import snapshots


def double(dataset: TensorDataset) -> TensorDataset:
    inputs, targets = dataset.tensors
    return TensorDataset(inputs.double(), targets)


def workload_in_double(**changes: Any) -> Workload:
    """With an L2 term, so that the Hessian is not singular."""
    train_set, validation_set = map(double, datasets())
    settings: dict[str, Any] = {
        "model": lambda: digits_model().double(),
        "train_set": train_set,
        "validation_set": validation_set,
        "regularizer": lambda model: 0.02 * sum(p.square().sum() for p in model.parameters()),
    }
    return digits_workload(**(settings | changes))


@pytest.fixture
def workload() -> Workload:
    return workload_in_double()


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Any) -> Trajectory:
    return train(workload, tmp_path / "t")


def dense(workload: Workload, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hessian of the training loss ``[P, P]``, gradients of the samples ``[n, P]`` and of the mean validation loss."""
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
    names, values = zip(*model.named_parameters(), strict=True)
    flat = torch.cat([value.detach().flatten() for value in values])

    def losses(flat: torch.Tensor, data: Any) -> torch.Tensor:
        parts = flat.split([value.numel() for value in values])
        given = {n: p.reshape(v.shape) for n, p, v in zip(names, parts, values, strict=True)}
        outputs = torch.func.functional_call(model, given, (data.tensors[0],))
        return nn.functional.cross_entropy(outputs, data.tensors[1], reduction="none")

    def objective(flat: torch.Tensor) -> torch.Tensor:
        return losses(flat, workload.train_set).mean() + 0.02 * flat.square().sum()

    hessian = torch.autograd.functional.hessian(objective, flat)
    own = torch.autograd.functional.jacobian(lambda flat: losses(flat, workload.train_set), flat)
    query = torch.autograd.functional.jacobian(lambda flat: losses(flat, workload.validation_set).mean(), flat)
    return hessian.numpy(), own.numpy(), query.numpy()


def test_the_whole_krylov_space_has_the_eigenvalues_of_the_hessian(workload: Workload, trajectory: Trajectory) -> None:
    hessian, *_ = dense(workload, trajectory)
    ((_, snapshot),) = snapshots(trajectory.replay(workload), [trajectory.num_steps])
    start = np.random.default_rng(0).standard_normal(len(hessian))
    curvature = Curvature(snapshot, np.full(workload.num_samples, 1 / workload.num_samples))
    np.testing.assert_allclose(curvature.product(start), hessian @ start, rtol=1e-9, atol=1e-12)
    *_, space = krylov_spaces(curvature.product, start, 10**6)
    basis = np.stack(space.vectors)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-12)
    found, expected = space.eigen[0], np.linalg.eigvalsh(hessian)
    assert np.abs(found[:, None] - expected).min(axis=1).max() < 1e-9
    assert np.abs(found[:, None] - expected).min(axis=0).max() < 1e-9
    exponential = space.first(lambda values: np.exp(-values)) @ basis * np.linalg.norm(start)
    values, vectors = np.linalg.eigh(hessian)
    np.testing.assert_allclose(exponential, vectors @ (np.exp(-values) * (vectors.T @ start)), atol=1e-9)
    assert set(by_parameter(snapshot, start[None])) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(
    "method",
    [
        InfluenceFunction(tolerance=1e-10),
        InfluenceFunctionLissa(tolerance=1e-9, depth=20000),
        InfluenceFunctionArnoldi(iterations=500, rank=500),
    ],
)
def test_three_ways_to_the_same_newton_step(method: Any, workload: Workload, trajectory: Trajectory) -> None:
    hessian, own, query = dense(workload, trajectory)
    found = method(trajectory, workload)
    damped = hessian + found.metadata["damping"] * np.eye(len(hessian))
    expected = own @ np.linalg.solve(damped, query) / len(own)
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())
    # A Krylov space has one vector of an eigenspace; here, all that no training sample has a gradient in is one.
    assert found.metadata["residual"] < 1e-6 or isinstance(method, InfluenceFunctionArnoldi)
    assert found.metadata["damping"] == InfluenceFunction()(trajectory, workload).metadata["damping"]


def test_lissa_with_batches_of_its_own_comes_near(workload: Workload, trajectory: Trajectory) -> None:
    hessian, own, query = dense(workload, trajectory)
    expected = own @ np.linalg.solve(hessian + np.eye(len(hessian)), query) / len(own)

    def error(repeats: int, seed: int) -> float:
        settings: dict[str, Any] = {"damping": 1.0, "attempts": 1, "batch_size": 12, "depth": 30, "noise": 0.9}
        found = InfluenceFunctionLissa(**settings, repeats=repeats, seed=seed)(trajectory, workload)
        return float(np.linalg.norm(found.of(0) - expected) / np.linalg.norm(expected))

    once, often = (np.mean([error(repeats, seed) for seed in range(3)]) for repeats in (1, 6))
    assert often < 0.8 * once < 0.1
    assert error(1, 0) == error(1, 0)


def test_arnoldi_keeps_the_eigenvectors_of_largest_size(workload: Workload, trajectory: Trajectory) -> None:
    hessian, own, query = dense(workload, trajectory)
    found = InfluenceFunctionArnoldi(damping=1.0, iterations=300, rank=5)(trajectory, workload)
    assert found.metadata["damping"] == 1.0
    values, vectors = np.linalg.eigh(hessian)
    kept = np.argsort(-np.abs(values))[:5]
    inverse = vectors[:, kept] @ np.diag(1 / (values[kept] + 1)) @ vectors[:, kept].T
    expected = own @ inverse @ query / len(own)
    np.testing.assert_allclose(found.of(0), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("method", [InfluenceFunctionLissa, InfluenceFunctionArnoldi])
def test_queries_are_answered_one_like_many(method: Any, workload: Workload, trajectory: Trajectory) -> None:
    queries = sample_losses(workload, [0, 5])
    solver = method(damping=1.0)
    both = solver(trajectory, workload, queries=queries).scores[0]
    for row, query in zip(both, queries, strict=True):
        np.testing.assert_allclose(solver(trajectory, workload, queries=[query]).of(0), row, rtol=1e-9)


@pytest.mark.parametrize("method", [InfluenceFunctionLissa, InfluenceFunctionArnoldi])
def test_negative_curvature_raises_the_damping_or_is_refused(method: Any, tmp_path: Any) -> None:
    workload = workload_in_double(regularizer=lambda model: -0.5 * sum(p.square().sum() for p in model.parameters()))
    trajectory = train(workload, tmp_path / "t")
    found = method(damping=0.2)(trajectory, workload)
    assert found.metadata["damping"] == 2.0
    with pytest.raises(UnsupportedError, match=r"cannot be inverted with a damping up to 0\.2"):
        method(damping=0.2, attempts=1)(trajectory, workload)


def test_arnoldi_refuses_a_hessian_that_is_zero(tmp_path: Any) -> None:
    """Where others return NaN: a loss that is linear in the parameters."""
    workload = digits_workload(model=lambda: nn.Linear(64, 3), loss=lambda model, batch: model(batch[0]).sum(dim=1))
    with pytest.raises(UnsupportedError, match="Hessian of the final model is 0"):
        InfluenceFunctionArnoldi()(train(workload, tmp_path / "t"), workload)


@pytest.mark.parametrize("iterations", [3, 500])
def test_arnoldi_stops_where_the_space_is_exhausted(iterations: int, tmp_path: Any) -> None:
    """Two distinct eigenvalues: the space has two dimensions, and the third vector would be 0 / 0."""
    inputs = torch.eye(4, dtype=torch.float64)
    data = TensorDataset(inputs, torch.linspace(-1, 1, 4, dtype=torch.float64))
    scales = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)

    def squares(model: nn.Module, batch: Any) -> torch.Tensor:
        outputs = model(batch[0])[:, 0]
        return (batch[0] @ scales) * (outputs - batch[1]) ** 2

    workload = digits_workload(
        model=lambda: nn.Linear(4, 1, bias=False).double(), loss=squares, train_set=data, validation_set=data,
        batch_size=4,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    )  # fmt: skip
    trajectory = train(workload, tmp_path / "t")
    ((_, snapshot),) = snapshots(trajectory.replay(workload), [trajectory.num_steps])
    curvature = Curvature(snapshot, np.full(workload.num_samples, 1 / workload.num_samples))
    space = list(krylov_spaces(curvature.product, np.arange(1.0, 5.0), iterations))
    assert len(space) == 2
    np.testing.assert_allclose(space[-1].eigen[0], [0.5, 1.5], rtol=1e-9)
    # Each eigenspace is met in one direction, the vector's own part in it.
    found = InfluenceFunctionArnoldi(iterations=iterations)(trajectory, workload)
    weights = trajectory.checkpoint(trajectory.num_steps).parameters["weight"][0]
    gradients = 2 * scales.numpy() * (weights - data.tensors[1]).numpy()
    start = np.random.default_rng(0).standard_normal(4)
    inverse = np.zeros((4, 4))
    for value in (0.5, 1.5):
        part = np.where(scales.numpy() / 2 == value, start, 0)
        inverse += np.outer(part, part) / (part @ part) / (value + found.metadata["damping"])
    np.testing.assert_allclose(found.of(0), gradients * (inverse @ gradients) / 16, rtol=1e-9)


def test_datainf_is_the_mean_of_dense_inverses(tmp_path: Any) -> None:
    workload = workload_in_double(regularizer=None)
    trajectory = train(workload, tmp_path / "t")
    queries = sample_losses(workload, [3, 9])
    found = InfluenceFunctionDatainf(damping=0.2)(trajectory, workload, queries=queries)
    _, own, _ = dense(workload, trajectory)
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
    for row, sample in zip(found.scores[0], (3, 9), strict=True):
        value = queries[(3, 9).index(sample)](model)
        query = torch.cat([part.flatten() for part in torch.autograd.grad(value, list(model.parameters()))]).numpy()
        expected = np.zeros(24)
        for layer in (slice(0, 390), slice(390, 411)):
            part = own[:, layer]
            damping = 0.2 * np.trace(part.T @ part / 24) / part.shape[1]
            identity = np.eye(part.shape[1])
            inverse = np.mean([np.linalg.inv(np.outer(g, g) + damping * identity) for g in part], axis=0)
            expected += part @ inverse @ query[layer] / 24
        np.testing.assert_allclose(row, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())


def test_datainf_is_exact_where_all_samples_pull_alike(tmp_path: Any) -> None:
    """One gradient, one rank: mean and inverse may be swapped, and it is the damped inverse of the Fisher matrix."""
    inputs, targets = datasets()[0].tensors
    data = TensorDataset(inputs[:1].double().repeat(6, 1), targets[:1].repeat(6))
    workload = workload_in_double(train_set=data, model=lambda: nn.Linear(64, 3).double(), regularizer=None)
    trajectory = train(workload, tmp_path / "t")
    own, query = dense_linear(workload, trajectory)
    found = InfluenceFunctionDatainf()(trajectory, workload)
    fisher = own.T @ own / 6
    damped = fisher + 0.1 * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    np.testing.assert_allclose(found.of(0), own @ np.linalg.solve(damped, query) / 6, rtol=1e-6)


def dense_linear(workload: Workload, trajectory: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of softmax regression, written out."""
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model())

    def gradients(data: Any) -> np.ndarray:
        inputs, targets = data.tensors
        wrong = (model(inputs).softmax(dim=1) - nn.functional.one_hot(targets, 3)).detach()
        return torch.cat([(wrong[:, :, None] * inputs[:, None]).flatten(1), wrong], dim=1).numpy()

    return gradients(workload.train_set), gradients(workload.validation_set).mean(axis=0)


def test_datainf_says_where_it_does_not_apply(workload: Workload, trajectory: Trajectory, tmp_path: Any) -> None:
    with pytest.raises(UnsupportedError, match="regularizer is of no sample"):
        InfluenceFunctionDatainf()(trajectory, workload)
    plain = workload_in_double(regularizer=None)
    with pytest.raises(UnsupportedError, match=r"layer '0' trains 390 parameters; .* at most largest_layer=100,"):
        InfluenceFunctionDatainf(largest_layer=100)(train(plain, tmp_path / "p"), plain)
    with pytest.raises(InputError, match="damping=0"):
        InfluenceFunctionDatainf(damping=0)


@pytest.mark.parametrize("method", [InfluenceFunction, InfluenceFunctionLissa, InfluenceFunctionArnoldi])
def test_a_loss_without_second_derivative_is_refused_not_nan(method: Any, tmp_path: Any) -> None:
    """``|z|^1.5`` at the logit 0 that no training moves."""
    workload = digits_workload(model=zeros, loss=lambda model, batch: model(batch[0])[:, 0].abs().pow(1.5))
    queries = [parameter_value("weight", 0, 20)]
    with pytest.raises(UnsupportedError, match="is not finite"):
        method()(train(workload, tmp_path / "t"), workload, queries=queries)


def zeros() -> nn.Module:
    model = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model
