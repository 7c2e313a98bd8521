"""Data value embeddings against the embeddings themselves, and the sweep where gradients say all of curvature."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, train_again
from torch import nn
from workloads import digits_workload

from dit_mlflow import Trajectory, UnsupportedError, Window, Workload, parse_windows, sample_losses, track, train
from dit_mlflow.methods import method
from dit_mlflow.methods.dvemb import Dvemb

RATE = 0.5


def embeddings(workload: Workload, trajectory: Trajectory, until: int) -> dict[tuple[int, int], torch.Tensor]:
    """By step and sample, ``[P]``, carried forward through every later step with dense matrices."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for t in range(until):
        model = train_again(workload, trajectory, lambda step, i: 1.0, t)
        inputs, targets = workload.batch(trajectory.step(t).samples)
        losses = workload.loss(model, (inputs.double(), targets))
        own = torch.stack([flat(loss, model) for loss in losses])
        matrix = torch.eye(own.shape[1], dtype=torch.float64) - RATE * own.T @ own / len(own)
        found = {key: matrix @ value for key, value in found.items()}
        for sample, gradient in zip(trajectory.step(t).samples, own, strict=True):
            found[t, int(sample)] = RATE / len(own) * gradient
    return found


def flat(value: torch.Tensor, model: nn.Module) -> torch.Tensor:
    parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize(("kind", "until"), [("final", 9), ("local", 7)])
def test_it_is_the_inner_product_with_every_steps_embedding(kind: str, until: int, tmp_path: Any) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    window = Window(2, 7)
    model = train_again(workload, trajectory, lambda step, i: 1.0, until)
    queries = sample_losses(workload, [0, 5])
    found = Dvemb(dtype=torch.float64)(trajectory, workload, [window], kind, queries)
    for row, query in zip(found.scores[0], queries, strict=True):
        gradient = flat(query(model), model)
        expected = np.zeros(24)
        for (t, sample), value in embeddings(workload, trajectory, until).items():
            expected[sample] += float(gradient @ value) if t in window else 0.0
        np.testing.assert_allclose(row, expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())


class Share(nn.Module):
    """A positive linear function of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight


def surprise(model: nn.Module, batch: Any) -> torch.Tensor:
    """``-log`` of it: the Hessian is the gradient's outer product."""
    return -torch.log(model(batch[0]))


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1),
        lambda model: torch.optim.Adam(model.parameters(), lr=0.02),
    ],
)
def test_it_is_the_sweep_where_the_hessian_is_made_of_gradients(optimizer: Any, kind: str, tmp_path: Any) -> None:
    workload = digits_workload(
        model=Share,
        loss=surprise,
        optimizer=optimizer,
        regularizer=lambda model: 0.01 * model.weight.pow(4).sum(),
        coefficients=lambda batch: torch.where(batch[1] == 0, 0.0, 0.2),
        clip_grad_norm=0.9,
        accumulate=2,
        batch_size=4,
    )
    trajectory = train(workload, tmp_path / "t")
    windows = parse_windows("2", trajectory)
    queries = sample_losses(workload, [2, 7])
    expected = track(trajectory, workload, windows, kind, queries, dtype=torch.float64).scores  # type: ignore[arg-type]
    found = Dvemb(dtype=torch.float64)(trajectory, workload, windows, kind, queries).scores
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    assert np.abs(method("tracin")(trajectory, workload, windows, queries=queries).scores - expected).max() > 1e-3


def test_embeddings_that_overflow_are_refused(tmp_path: Any) -> None:
    """Steps so large that ``1 - eta G`` drives them apart, where the Hessians of the sweep do not."""
    workload = digits_workload(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=5.0), epochs=20)
    trajectory = train(workload, tmp_path / "t")
    samples = [0, 9, 17]
    window = Window(0, trajectory.num_steps)
    expected = finite_difference(workload, trajectory, window, "local", samples, 1e-9)
    found = track(trajectory, workload, [window], dtype=torch.float64).of(0)[samples]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(UnsupportedError, match=r"overflow.*Use dit"):
        Dvemb()(trajectory, workload)
