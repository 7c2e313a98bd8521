"""``removal="absent"``: samples that are not in their batches either, against plain training on smaller batches."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import validation_loss
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize
from torch.optim import SGD, AdamW
from torch.utils.data import Dataset
from workloads import SAMPLES, datasets, digits_model, digits_workload

from dit_mlflow import (
    Effort,
    InputError,
    Trajectory,
    TrajectoryRecorder,
    UnsupportedError,
    Window,
    Workload,
    leave_groups_out,
    leave_one_out,
    train,
)
from dit_mlflow.methods import method
from dit_mlflow.retraining import confirm, train_on_subsets

SOME = [0, 5, 11]


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    found = normalize(model(batch[0]), dim=1)
    other = normalize(model(batch[0].flip(1)), dim=1)
    return -log_softmax(found @ other.T / 0.5, dim=1).diagonal()


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def trained_without(
    workload: Workload, trajectory: Trajectory, absent: Collection[int], first: int, last: int, until: int
) -> float:
    """The query after plain float64 training on batches without the samples, each divided by its recorded size."""
    assert workload.optimizer is not None
    model = trajectory.checkpoint(0).load_into(workload.build_model()).double().train()
    optimizer = workload.optimizer(model)
    for t in range(until):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for indices in trajectory.step(t).indices:
            left = [int(i) for i in indices if not (first <= t < last and i in absent)]
            if left:
                inputs, targets = workload.batch(left)
                losses = workload.loss(model, (inputs.double(), targets))
                (losses.sum() / (len(indices) * workload.accumulate)).backward()
        optimizer.step()
    return validation_loss(workload, model.eval())


def effect(workload: Workload, trajectory: Trajectory, absent: Collection[int], window: Window, kind: str) -> float:
    def change(first: int, last: int, until: int) -> float:
        return trained_without(workload, trajectory, absent, first, last, until) - trained_without(
            workload, trajectory, (), 0, 0, until
        )

    if kind == "cumulative":
        return change(0, window.end, window.end) - change(0, window.start, window.start)
    return change(window.start, window.end, window.end if kind == "local" else trajectory.num_steps)


CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"loss": contrastive, "optimizer": lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9)},
    "batch statistics": {
        "model": normalised,
        "optimizer": lambda model: AdamW(model.parameters(), lr=0.02),
        "accumulate": 2,
    },
}


@pytest.mark.parametrize("kind", ["local", "final", "cumulative"])
@pytest.mark.parametrize("name", CASES)
def test_equals_training_on_the_smaller_batches(name: str, kind: Any, tmp_path: Path) -> None:
    workload = digits_workload(**CASES[name])
    trajectory = train(workload, tmp_path / "t")
    windows = [Window(0, 2), Window(1, trajectory.num_steps)]
    found = leave_one_out(trajectory, workload, windows, kind, samples=SOME, removal="absent")
    assert found.metadata["removal"] == "absent"
    assert found.coupled and found.absence
    for window in windows:
        expected = [effect(workload, trajectory, {j}, window, kind) for j in SOME]
        np.testing.assert_allclose(found.of(window)[SOME], expected, rtol=1e-7, atol=1e-12)


def test_is_another_question_than_weight_0_where_samples_are_coupled(tmp_path: Path) -> None:
    """Where they are not, it is the same one."""
    for loss, alike in ((contrastive, False), (None, True)):
        workload = digits_workload(**({"loss": loss} if loss else {}))
        trajectory = train(workload, tmp_path / str(alike))
        ask = partial(leave_one_out, trajectory, workload, [Window(0, 9)])
        by_weight, absent = ask(), ask(removal="absent")
        assert by_weight.metadata["removal"] == "weight"
        orders = spearmanr(by_weight.scores.ravel(), absent.scores.ravel()).statistic
        assert np.allclose(by_weight.scores, absent.scores, rtol=1e-7, atol=1e-12) == alike
        assert (orders > 0.999) == alike


def test_all_that_removes_samples_takes_it(tmp_path: Path) -> None:
    workload = digits_workload(loss=contrastive)
    trajectory = train(workload, tmp_path / "t")
    window = Window(0, 9)
    table = leave_groups_out(trajectory, workload, [window], {"some": SOME}, removal="absent")
    assert table["change"][0] == pytest.approx(effect(workload, trajectory, SOME, window, "local"), rel=1e-7)
    subsets = train_on_subsets(trajectory, workload, [window], subsets=3, dtype=torch.float64, removal="absent")
    for kept, change in zip(subsets.kept, subsets.changes[0, 0], strict=True):
        expected = effect(workload, trajectory, np.flatnonzero(~kept).tolist(), window, "local")
        assert change == pytest.approx(expected, rel=1e-7)
    every = leave_one_out(trajectory, workload, [window], removal="absent")
    top = confirm(every, trajectory, workload, 2, removal="absent")
    named = replace(method("leave_one_out"), removal="absent")(trajectory, workload, [window])
    for found in (top, named):
        assert found.absence
        looked_at = ~np.isnan(found.scores)
        np.testing.assert_allclose(found.scores[looked_at], every.scores[looked_at], rtol=1e-2)
    with pytest.raises(InputError, match="removal='gone'; expected 'weight'"):
        leave_one_out(trajectory, workload, [window], removal="gone")  # type: ignore[arg-type]


def test_a_step_left_without_samples_is_made_with_a_gradient_of_0(tmp_path: Path) -> None:
    """Momentum and weight decay go on."""
    workload = digits_workload(
        batch_size=1,
        epochs=1,
        optimizer=lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    )
    trajectory = train(workload, tmp_path / "t")
    window = Window(0, SAMPLES)
    found = leave_one_out(trajectory, workload, [window], samples=SOME, removal="absent")
    expected = [effect(workload, trajectory, {j}, window, "local") for j in SOME]
    np.testing.assert_allclose(found.of(window)[SOME], expected, rtol=1e-7, atol=1e-12)


def test_a_batch_that_becomes_too_small_is_named(tmp_path: Path) -> None:
    workload = digits_workload(model=normalised, batch_size=2, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    with pytest.raises(
        UnsupportedError, match=r"fails once samples \[5\] are taken out of its batches, which leaves 1"
    ):
        leave_one_out(trajectory, workload, [Window(0, 12)], samples=[5], removal="absent")


class Noisy(Dataset[Any]):
    """Each sample is drawn with noise."""

    def __init__(self) -> None:
        self.inner = datasets()[0]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.inner[index]
        return inputs + 0.1 * torch.randn(inputs.shape), target


@pytest.mark.parametrize("stored", [False, True])
def test_the_others_draw_what_they_drew(stored: bool, tmp_path: Path) -> None:
    """A loss without coupling: absent or of weight 0, what the others' augmentation drew is the same."""
    workload = digits_workload(train_set=Noisy(), epochs=1)
    torch.manual_seed(0)
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.5)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
    with TrajectoryRecorder(model, optimizer, tmp_path / "t", workload, store_batches=stored) as recorder:
        for batch in recorder.watch(loader):
            optimizer.zero_grad()
            workload.loss(model, batch).mean().backward()
            optimizer.step()
    trajectory = Trajectory.open(tmp_path / "t")
    ask = partial(leave_one_out, trajectory, workload, [Window(0, 3)])
    np.testing.assert_allclose(ask(removal="absent").scores, ask().scores, rtol=1e-7, atol=1e-12)


def test_finished_parts_of_one_removal_are_not_those_of_the_other(tmp_path: Path) -> None:
    workload = digits_workload(loss=contrastive, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    effort = Effort(folder=tmp_path / "parts")
    ask = partial(leave_one_out, trajectory, workload, [Window(0, 3)], samples=SOME, effort=effort)
    first, absent, again = ask(), ask(removal="absent"), ask()
    assert np.array_equal(first.scores, again.scores, equal_nan=True)
    assert not np.allclose(first.scores, absent.scores, equal_nan=True)
