"""The mirrored step against one made by hand, and against its first order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from workloads import digits_workload

from dit_mlflow import (
    InputError,
    Query,
    Trajectory,
    UnsupportedError,
    Window,
    Workload,
    mean_validation_loss,
    sample_losses,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.methods.mirrored_influence import MirroredInfluence

WINDOWS = [Window(0, 4), Window(4, 9), Window(2, 9)]


def groups(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}])


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)


@pytest.fixture
def workload() -> Workload:
    return digits_workload(optimizer=groups, scheduler=halving)


@pytest.fixture
def trajectory(workload: Workload, tmp_path: Any) -> Trajectory:
    return train(workload, tmp_path / "t")


def training_losses(workload: Workload, model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return workload.loss(model, workload.batch(range(24))).double().numpy()


@pytest.mark.parametrize("ascent", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_it_is_the_change_after_steps_made_by_pytorch(
    steps: int, ascent: bool, workload: Workload, trajectory: Trajectory
) -> None:
    chosen = [2, 11]
    queries = sample_losses(workload, chosen)
    found = MirroredInfluence(steps=steps, ascent=ascent)(trajectory, workload, WINDOWS, queries=queries)
    for k, (window, factor) in enumerate(zip(WINDOWS, (1, 0.5, 1), strict=True)):
        for row, sample in enumerate(chosen):
            *_, state = trajectory.replay(workload).forward(0, window.end)
            model = state.load_into(workload.build_model())
            before = training_losses(workload, model)
            optimizer = groups(model)  # type: ignore[arg-type]
            for group in optimizer.param_groups:
                group.update(lr=group["lr"] * factor, maximize=ascent)
            for _ in range(steps):
                optimizer.zero_grad()
                workload.loss(model, workload.collate(workload.validation_set, [sample])).sum().backward()
                optimizer.step()
            fall = before - training_losses(workload, model)
            np.testing.assert_allclose(found.scores[k, row], -fall if ascent else fall, rtol=1e-3, atol=1e-6)


def test_a_short_step_is_the_similarity_of_gradients(workload: Workload, trajectory: Trajectory) -> None:
    there, back = (MirroredInfluence(lr=0.02, ascent=way)(trajectory, workload, WINDOWS) for way in (False, True))
    expected = method("grad_dot")(trajectory, workload, WINDOWS).scores
    found = (there.scores + back.scores) / 2 / 0.02
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())


def test_steps_that_cannot_be_made_are_refused(workload: Workload, trajectory: Trajectory, tmp_path: Any) -> None:
    with pytest.raises(InputError, match="steps=0, lr=None; expected 1 step or more"):
        MirroredInfluence(steps=0)
    with pytest.raises(InputError, match=r"lr=-1\.0; expected"):
        MirroredInfluence(lr=-1.0)
    with pytest.raises(UnsupportedError, match=r"losses that are not finite. Give MirroredInfluence\(lr="):
        steep = Query("steep", lambda model: 1e6 * mean_validation_loss(workload)(model))
        MirroredInfluence(lr=1e38)(trajectory, workload, queries=[steep])
    still = digits_workload(epochs=1, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0))
    with pytest.raises(UnsupportedError, match="learning rate is 0 in all of steps 0 to 3"):
        MirroredInfluence()(train(still, tmp_path / "still"), still)
