"""In another dtype than the recorded one, models and losses that make tensors of their own still run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import digits_workload

from dit_mlflow import TrajectoryError, Window, Workload, leave_one_out, track, train


class Recurrent(nn.Module):
    """Reads an image row by row, from a first state that it makes itself."""

    def __init__(self, state: torch.dtype | None = None) -> None:
        super().__init__()
        self.state = state
        self.reader, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.zeros(1, len(images), 6, dtype=self.state or images.dtype)
        return self.head(self.reader(images.reshape(-1, 8, 8), first)[1][0])


class Projected(nn.Module):
    """Multiplies by a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = torch.linspace(-1, 1, 64 * 6).reshape(64, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(images @ self.basis.to(images.dtype)))


class ProjectedByConstant(Projected):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(images @ self.basis))


class TwoNames(nn.Module):
    """One buffer is known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, 6), nn.Linear(6, 3)
        scale = torch.tensor(0.5)
        self.register_buffer("scale", scale)
        self.register_buffer("slope", scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale * self.inner(images)) * self.slope)


class OneName(TwoNames):
    def __init__(self) -> None:
        super().__init__()
        self.slope = self.scale.clone()


CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


def weighted(model: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], CLASS_WEIGHTS, reduction="none")


def careful(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return cross_entropy(logits, batch[1], CLASS_WEIGHTS.to(logits.dtype), reduction="none")


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class weights": ({"loss": weighted}, {"loss": careful}),
    "first state": ({"model": lambda: Recurrent(torch.float32)}, {"model": Recurrent}),
    "buffer of two names": ({"model": TwoNames}, {"model": OneName}),
    "constant": ({"model": ProjectedByConstant}, {"model": Projected}),
}


# torch cannot batch recurrent layers.
@pytest.mark.parametrize(
    ("case", "batched"), [("class weights", True), ("constant", True), *((case, False) for case in CASES)]
)
def test_tensors_of_the_recorded_dtype_are_cast(
    tmp_path: Path, case: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_mlflow.retraining.counterfactuals.Retraining._prefer_side_by_side", lambda *_: batched)
    found = []
    for changes in CASES[case]:
        workload = digits_workload(**changes)
        trajectory = train(workload, tmp_path / str(len(found)))
        windows = [Window(0, trajectory.num_steps)]
        exact = leave_one_out(trajectory, workload, windows, samples=[1, 7]).of(0)[[1, 7]]
        found.append((track(trajectory, workload, windows, dtype=torch.float64).scores, exact))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_what_cannot_be_cast_is_told_with_the_dtype(tmp_path: Path) -> None:
    def narrow(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        if logits.dtype != torch.float32:
            raise TypeError("float32 wanted")
        return cross_entropy(logits, batch[1], reduction="none")

    workload: Workload = digits_workload(loss=narrow)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(TrajectoryError, match=r"float32 wanted. This is computed in torch.float64 .*dtype=None"):
        track(trajectory, workload, [Window(0, 2)], dtype=torch.float64)
