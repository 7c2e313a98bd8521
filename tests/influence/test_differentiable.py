"""Models whose parts torch does not differentiate twice as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, window_effect
from plain_loop import record, whole
from torch import Tensor, nn
from torch.nn.functional import batch_norm, embedding_bag, instance_norm
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD, Adagrad
from workloads import digits_workload, sample_losses

from dit_mlflow import Query, UnsupportedError, Window, leave_one_out, track, train
from dit_mlflow.methods import method
from dit_mlflow.replay.double_backward import embedding_bag as bags
from dit_mlflow.replay.double_backward import weight_norm as written_out
from dit_mlflow.replay.running_statistics import DifferentiableStatistics


def normalised(dim: int | None) -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(64, 6), dim=dim), nn.Tanh(), weight_norm(nn.Linear(6, 3), dim=dim))


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_differentiated_twice(tmp_path: Path, dim: int | None) -> None:
    workload = digits_workload(model=lambda: normalised(dim))
    trajectory = train(workload, tmp_path / "t")
    scores = track(trajectory, workload, whole(trajectory), dtype=torch.float64).of(0)
    samples = [0, 5, 11]
    exact = finite_difference(workload, trajectory, whole(trajectory)[0], "local", samples, 1e-5)
    assert np.abs(scores[samples] - exact).max() < 1e-6 * np.abs(scores).max()


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm_written_out_is_that_of_torch(dim: int) -> None:
    v = torch.randn(4, 3, 5, dtype=torch.float64)
    shape = [1 if dim == -1 or axis != dim else size for axis, size in enumerate(v.shape)]
    g = torch.rand(shape, dtype=torch.float64)
    if dim in (0, 2, -1):
        torch.testing.assert_close(written_out(v, g, dim), torch._weight_norm(v, g, dim))
    torch.testing.assert_close(
        written_out(v, torch.ones_like(g), dim).square().sum(), torch.tensor(float(max(shape))).double()
    )


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings_written_out_are_those_of_torch(mode: str, padding: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=random, dtype=torch.float64)
    rows = torch.randint(7, (5, 3), generator=random)
    rows[0] = 3 if padding == 3 else 6
    shares = torch.rand(5, 3, generator=random, dtype=torch.float64) if mode == "sum" else None
    settings: Any = {"mode": mode, "padding_idx": padding}
    torch.testing.assert_close(
        bags(rows, weight, per_sample_weights=shares, **settings),
        embedding_bag(rows, weight, per_sample_weights=shares, **settings),
    )
    offsets = torch.tensor([0, 2, 2, 9])
    for last in (False, True):
        given = torch.cat([offsets, torch.tensor([15])]) if last else offsets
        torch.testing.assert_close(
            bags(rows.flatten(), weight, given, include_last_offset=last, **settings),
            embedding_bag(rows.flatten(), weight, given, include_last_offset=last, **settings),
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings_are_differentiated_twice(tmp_path: Path, mode: str) -> None:
    workload = digits_workload(
        model=lambda: nn.Sequential(nn.EmbeddingBag(17, 4, mode=mode), nn.Tanh(), nn.Linear(4, 3)), loss=of_pixels
    )
    trajectory = train(workload, tmp_path / "t")
    scores = track(trajectory, workload, whole(trajectory), dtype=torch.float64).of(0)
    samples = [0, 5, 11]
    exact = finite_difference(workload, trajectory, whole(trajectory)[0], "local", samples, 1e-5)
    assert np.abs(scores[samples] - exact).max() < 1e-6 * np.abs(scores).max()


@pytest.mark.parametrize(
    ("norm", "settings"),
    [
        (batch_norm, {}),
        (batch_norm, {"training": True}),
        (batch_norm, {"training": True, "momentum": 0.3, "eps": 0.2}),
        (instance_norm, {}),
        (instance_norm, {"use_input_stats": False}),
        (instance_norm, {"momentum": 0.3, "eps": 0.2}),
    ],
)
def test_running_statistics_written_out_are_those_of_torch(norm: Any, settings: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 3, 4, generator=random, dtype=torch.float64)
    mean, variance, weight, bias = torch.rand(4, 3, generator=random, dtype=torch.float64)
    own, followed = (
        [value.clone().requires_grad_(grad).clone() for value in (mean, variance)] for grad in (False, True)
    )
    expected = norm(inputs, *own, weight, bias, **settings)
    with DifferentiableStatistics():
        found = norm(inputs, *followed, weight, bias, **settings)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(followed, own)
    assert all(value.requires_grad for value in followed)


@pytest.mark.parametrize("kind", ["local", "cumulative"])
def test_group_norm_takes_several_adjoints(tmp_path: Path, kind: Any) -> None:
    """torch differentiates it twice, but not for rows side by side."""
    workload = digits_workload(
        model=lambda: nn.Sequential(nn.Linear(64, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3))
    )
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 5), Window(2, 9)]
    found = track(trajectory, workload, windows, kind, dtype=torch.float64)
    for window in windows:
        exact = finite_difference(workload, trajectory, window, kind, [0, 5], 1e-5)
        assert np.abs(found.of(window)[[0, 5]] - exact).max() < 1e-6 * np.abs(found.of(window)).max()


def slopes(model: nn.Module, batch: Any) -> Tensor:
    """With a gradient of its own, also where it is asked as a query."""
    inputs = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).logsumexp(dim=1).sum(), inputs, create_graph=True)
    return sample_losses(model, batch) + 0.1 * slope.square().sum(dim=1)


def test_a_loss_with_a_gradient_of_its_own(tmp_path: Path) -> None:
    workload = digits_workload(loss=slopes)
    trajectory = train(workload, tmp_path / "t")
    scores = track(trajectory, workload, whole(trajectory), dtype=torch.float64).of(0)
    samples = [0, 5, 11]
    exact = finite_difference(workload, trajectory, whole(trajectory)[0], "local", samples, 1e-5)
    assert np.abs(scores[samples] - exact).max() < 1e-6 * np.abs(scores).max()


def of_pixels(model: nn.Module, batch: Any) -> Tensor:
    return sample_losses(model, ((16 * batch[0]).long(), batch[1]))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: SGD(model.parameters(), lr=0.1),
        lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda model: Adagrad(model.parameters(), lr=0.05),
    ],
    ids=["SGD", "momentum", "Adagrad"],
)
def test_sparse_gradients_have_the_scores_of_dense_ones(tmp_path: Path, optimizer: Any) -> None:
    found = []
    for sparse in (False, True):

        def model(sparse: bool = sparse) -> nn.Module:
            return nn.Sequential(nn.Embedding(17, 3, sparse=sparse), nn.Flatten(), nn.Linear(192, 3))

        workload = digits_workload(model=model, optimizer=optimizer, loss=of_pixels)
        trajectory = train(workload, tmp_path / str(sparse))
        assert trajectory.verify(workload).max_drift < 1e-4
        found.append(track(trajectory, workload, whole(trajectory), dtype=torch.float64).of(0))
    dense, sparse_ = found
    assert np.abs(sparse_ - dense).max() < 1e-4 * np.abs(dense).max()


def test_gradients_scaled_by_frequency_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(17, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(UnsupportedError, match=r"0 is an Embedding\(scale_grad_by_freq=True\)"):
        record(tmp_path / "t", model, SGD(model.parameters(), lr=0.1), loss=of_pixels)


def test_a_loss_with_a_gradient_of_its_own_is_evaluated_and_retrained(tmp_path: Path) -> None:
    """Where no graph is kept, it still takes its gradient."""
    workload = digits_workload(loss=slopes)
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)
    removed = leave_one_out(trajectory, workload, [window], samples=[0, 5]).of(0)[[0, 5]]
    expected = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in (0, 5)]
    np.testing.assert_allclose(removed, expected, rtol=1e-7)
    inputs, targets = workload.train_set.tensors  # type: ignore[attr-defined]
    model = trajectory.checkpoint(trajectory.num_steps).load_into(workload.build_model()).eval()
    own = slopes(model, (inputs, targets)).detach().numpy()
    np.testing.assert_allclose(-method("loss")(trajectory, workload).of(0), own, rtol=1e-4)
    assert np.isfinite(method("grad_norm")(trajectory, workload).scores).all()


def test_a_query_with_a_gradient_of_its_own_is_asked_of_trainings_side_by_side(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    (window,) = whole(trajectory)
    inputs, targets = workload.validation_set.tensors  # type: ignore[attr-defined]

    def steepness(model: nn.Module) -> Tensor:
        return slopes(model, (inputs.to(next(model.parameters()).dtype), targets)).mean()

    query = Query("steepness", steepness)
    removed = leave_one_out(trajectory, workload, [window], queries=[query]).of(0)[[0, 5]]
    expected = [
        window_effect(workload, trajectory, window, "local", j, 0.0, lambda model: float(steepness(model).detach()))
        for j in (0, 5)
    ]
    np.testing.assert_allclose(removed, expected, rtol=1e-7)
