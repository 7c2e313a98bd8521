"""Modules whose own ``train()`` and ``eval()`` do more than set a flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, window_effect
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import SGD
from workloads import digits_workload

from dit_mlflow import TrajectoryRecorder, UnsupportedError, Window, leave_one_out, track, train
from dit_mlflow.methods import method

WINDOWS = [Window(0, 4), Window(4, 9)]
SOME = [0, 7, 13]


class Merged(nn.Linear):
    """A low-rank adapter that evaluation merges into the weights, as loralib does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(0.3 * torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        found = super().forward(inputs)
        return found if self.merged else found + inputs @ self.a.T @ self.b.T


class Unmerged(Merged):
    """The same, without merging."""

    train = nn.Module.train  # type: ignore[assignment]


class Factored(nn.Module):
    """Evaluates with a product that its ``eval()`` computes, on a change of mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(0.3 * torch.randn(6, 64)), nn.Parameter(0.3 * torch.randn(3, 6))
        self.product: Tensor | None = None

    def train(self, mode: bool = True) -> Factored:
        if mode == self.training:
            return self
        self.product = None if mode else self.b @ self.a
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.product is not None:
            return torch.tanh(linear(inputs, self.product))
        return torch.tanh(inputs @ self.a.T @ self.b.T)


class StillNormalised(nn.Module):
    """Keeps its normalisation in evaluation mode, as fine-tuning does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.last = nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def train(self, mode: bool = True) -> StillNormalised:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.inner(inputs))))


@pytest.mark.parametrize("model", [Factored, StillNormalised, lambda: nn.Sequential(Factored(), nn.Linear(3, 3))])
def test_own_methods_are_called_with_the_state_in_place(model: Any, tmp_path: Path) -> None:
    workload = digits_workload(model=model, optimizer=lambda net: SGD(net.parameters(), lr=0.2))
    trajectory = train(workload, tmp_path / "t")
    found = track(trajectory, workload, WINDOWS, dtype=torch.float64)
    exact = leave_one_out(trajectory, workload, WINDOWS, samples=SOME)
    for window in WINDOWS:
        expected = finite_difference(workload, trajectory, window, "local", SOME, 1e-5)
        assert np.abs(found.of(window)[SOME] - expected).max() < 1e-6 * np.abs(found.of(window)).max()
        removed = [window_effect(workload, trajectory, window, "local", j, 0.0) for j in SOME]
        np.testing.assert_allclose(exact.of(window)[SOME], removed, rtol=1e-6, atol=1e-12)


def test_static_methods_do_so_too(tmp_path: Path) -> None:
    """Against the same function without such a method."""

    class Plain(Factored):
        def train(self, mode: bool = True) -> Plain:
            nn.Module.train(self, mode)
            return self

    for name in ("grad_dot", "influence_function", "tracin_checkpoints"):
        found = []
        for model in (Factored, Plain):
            workload = digits_workload(model=model)
            trajectory = train(workload, tmp_path / f"{name}{model.__name__}")
            found.append(method(name)(trajectory, workload, [Window(0, 9)]).scores)
        np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5 * np.abs(found[1]).max())


def test_weights_that_depend_on_the_mode_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(Merged(64, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(UnsupportedError, match=r"'0\.weight' \(of a Merged\) is changed by eval\(\)"):
        TrajectoryRecorder(model, SGD(model.parameters(), lr=0.1), tmp_path / "t")
    trajectory = train(digits_workload(model=lambda: nn.Sequential(Unmerged(64, 3))), tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="changed by"):
        track(trajectory, digits_workload(model=lambda: nn.Sequential(Merged(64, 3))), WINDOWS)
