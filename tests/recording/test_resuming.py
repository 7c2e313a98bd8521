"""Training that is resumed from the loop's own checkpoint continues the same trajectory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from workloads import datasets, digits_workload, sample_losses

from dit_mlflow import InputError, Trajectory, TrajectoryError, TrajectoryRecorder, Window, track


def make(width: int = 6, optimizer: Callable[..., Optimizer] = Adam) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3))
    return model, optimizer(model.parameters(), lr=0.05)


def run_epochs(
    folder: Path,
    epochs: range,
    saved: Path,
    resume: bool | Trajectory = False,
    load: bool = True,
    dies_after: int | None = None,
    **options: Any,
) -> Trajectory:
    """A loop of the usual kind: it saves itself after each epoch, and may die some steps after the last one."""
    model, optimizer = make()
    if saved.is_file() and load:
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    try:
        with TrajectoryRecorder(model, optimizer, folder, resume=resume, **options) as recorder:
            for epoch in epochs:
                torch.manual_seed(epoch)  # As loops do that are to be resumed.
                loader = DataLoader(datasets()[0], batch_size=8, shuffle=True)
                for number, batch in enumerate(recorder.watch(loader)):
                    if epoch == epochs[-1] and number == dies_after:
                        raise RuntimeError("killed")
                    optimizer.zero_grad()
                    sample_losses(model, batch).mean().backward()
                    optimizer.step()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
                recorder.checkpoint()
    except RuntimeError:
        pass
    return Trajectory.open(folder)


def workload() -> Any:
    return digits_workload(model=lambda: make()[0], optimizer=None)


def test_resumed_training_is_the_same_trajectory_as_one_that_was_never_broken_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run_epochs(tmp_path / "whole", range(5), tmp_path / "whole.pt")
    broken = run_epochs(tmp_path / "t", range(3), tmp_path / "t.pt", dies_after=2)
    assert (broken.num_steps, broken.complete) == (8, False)
    with caplog.at_level(logging.WARNING, logger="dit_mlflow"):
        resumed = run_epochs(tmp_path / "t", range(2, 5), tmp_path / "t.pt", resume=True)
    assert "training goes on from step 6; the 2 steps recorded after it are left out" in caplog.text
    assert (resumed.num_steps, resumed.complete) == (15, True)
    assert resumed.epoch_ends == whole.epoch_ends
    assert resumed.verify(workload()).max_drift == 0.0
    for t in range(15):
        np.testing.assert_array_equal(resumed.step(t).samples, whole.step(t).samples)
        assert resumed.step(t).epoch == whole.step(t).epoch
    windows = [Window(0, 15), Window(4, 9)]
    ours, theirs = (track(one, workload(), windows, dtype=torch.float64) for one in (resumed, whole))
    assert np.abs(theirs.scores).max() > 0
    np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_resumed_several_times_and_into_another_folder(tmp_path: Path) -> None:
    for epoch in range(3):
        trajectory = run_epochs(tmp_path / "t", range(epoch, epoch + 1), tmp_path / "t.pt", resume=True)
    assert trajectory.num_steps == 9
    assert trajectory.verify(workload()).max_drift == 0.0
    # Files of the old folder are elsewhere: the new one holds what is new, and the manifest of all.
    run_epochs_elsewhere = tmp_path / "elsewhere"
    with pytest.raises(TrajectoryError, match="is missing"):
        run_epochs(run_epochs_elsewhere, range(3, 4), tmp_path / "t.pt", resume=trajectory)
    for name in trajectory.manifest.files:
        (tmp_path / "t" / name).rename(run_epochs_elsewhere / name)
    assert Trajectory.open(run_epochs_elsewhere).verify(workload()).max_drift == 0.0
    assert Trajectory.open(run_epochs_elsewhere).num_steps == 12


def test_stored_batches_are_continued(tmp_path: Path) -> None:
    run_epochs(tmp_path / "t", range(2), tmp_path / "t.pt", store_batches=True, dies_after=1)
    resumed = run_epochs(tmp_path / "t", range(1, 3), tmp_path / "t.pt", resume=True, store_batches=True)
    assert resumed.num_steps == 9
    stored = resumed.batches(5)
    assert stored is not None
    expected = datasets()[0][torch.as_tensor(resumed.step(5).samples)]
    assert torch.equal(stored[0][0], expected[0])
    with pytest.raises(InputError, match=r"store_batches=False, but the trajectory .* with True"):
        run_epochs(tmp_path / "t", range(3, 4), tmp_path / "t.pt", resume=True)


def test_what_does_not_continue_the_trajectory_is_named(tmp_path: Path) -> None:
    run_epochs(tmp_path / "t", range(2), tmp_path / "t.pt")
    state = torch.load(tmp_path / "t.pt")

    def refused(model: nn.Module, optimizer: Optimizer, message: str) -> None:
        before = (tmp_path / "t" / "manifest.json").read_bytes()
        with (
            pytest.raises(TrajectoryError, match=message),
            TrajectoryRecorder(model, optimizer, tmp_path / "t", resume=True),
        ):
            raise AssertionError("training was reached")
        assert (tmp_path / "t" / "manifest.json").read_bytes() == before

    refused(*make(width=5), "of a Sequential with other parameters")
    refused(*make(optimizer=SGD), "trained with Adam in 1 parameter groups, this is SGD")
    model, optimizer = make()
    model.load_state_dict(state["model"])
    refused(model, optimizer, "where it was at step 6, but the optimizer's state is not; load it too")
    nn.init.zeros_(model[0].weight)
    refused(model, optimizer, r"at none of its 5 stored states \(the last is at step 6\)")
    with pytest.raises(TrajectoryError, match="already holds a trajectory"):
        TrajectoryRecorder(model, optimizer, tmp_path / "t")


def test_a_run_that_diverged_goes_on_where_it_is(tmp_path: Path) -> None:
    def begin(resume: bool) -> tuple[nn.Module, TrajectoryRecorder]:
        model, optimizer = make()
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        return model, TrajectoryRecorder(model, optimizer, tmp_path / "t", resume=resume)

    with begin(resume=False)[1]:
        pass
    with begin(resume=True)[1]:
        pass
    assert Trajectory.open(tmp_path / "t").complete


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    run_epochs(tmp_path / "t", range(1), tmp_path / "t.pt")
    model, optimizer = make()
    inputs, targets = datasets()[0].tensors
    for other, message in (
        (TensorDataset(inputs[:9], targets[:9]), r"another dataset .*\(9 samples, 24 recorded\)"),
        (TensorDataset(inputs, targets.flip(0)), "another dataset"),
    ):
        with (
            pytest.raises(InputError, match=message),
            TrajectoryRecorder(model, optimizer, tmp_path / "t", resume=True) as recorder,
        ):
            recorder.watch(DataLoader(other))
