"""Data that cannot be drawn again: batches stored with the trajectory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset
from workloads import datasets, digits_workload

from dit_mlflow import (
    InputError,
    Trajectory,
    TrajectoryError,
    TrajectoryRecorder,
    Window,
    Workload,
    leave_one_out,
    track,
)
from dit_mlflow.workload.batches import tensors_of, to_like


class Augmented(Dataset[Any]):
    """Noise from a generator of its own, which goes on from draw to draw."""

    def __init__(self) -> None:
        self.data = datasets()[0]
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        noise = torch.from_numpy(self.generator.standard_normal(64)).float()
        return {"image": image + 0.1 * noise, "labels": label}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Works in place on its batch."""
    labels = batch.pop("labels")
    return cross_entropy(model(batch["image"].mul_(2)), labels, reduction="none")


def record(directory: Path, workers: int = 0, **settings: Any) -> tuple[Trajectory, list[Tensor], dict[str, Tensor]]:
    """A loop with the images that it saw and the parameters it ended with."""
    torch.manual_seed(0)
    net, seen = model(), []
    optimizer = SGD(net.parameters(), lr=0.2, momentum=0.5)
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers)
    with TrajectoryRecorder(net, optimizer, directory, **settings) as recorder:
        for _ in range(2):
            for batch in recorder.watch(loader):
                seen.append(batch["image"].clone())
                optimizer.zero_grad()
                losses(net, batch).mean().backward()
                optimizer.step()
    return Trajectory.open(directory), seen, {name: value.detach() for name, value in net.named_parameters()}


def workload() -> Workload:
    data = Augmented()
    return digits_workload(model=model, loss=losses, train_set=data, validation_set=data, optimizer=None)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_drawn_again_is_replayed_from_the_store(workers: int, tmp_path: Path) -> None:
    trajectory, seen, final = record(tmp_path / "t", workers, store_batches=True)
    for t, images in enumerate(seen):
        ((image, _),) = trajectory.batches(t) or ()
        assert torch.equal(image, images)
    assert trajectory.verify(workload()).max_drift == 0
    last = trajectory.checkpoint(trajectory.num_steps).parameters
    assert all(torch.equal(last[name], value) for name, value in final.items())
    stored = sum(entry.size for name, entry in trajectory.manifest.files.items() if name.startswith("batches"))
    assert 1 < stored / sum(8 * (64 * 4 + 8) for _ in seen) < 1.2


def test_recording_them_changes_nothing(tmp_path: Path) -> None:
    _, _, stored = record(tmp_path / "a", store_batches=True, workload=workload())
    trajectory, _, plain = record(tmp_path / "b")
    assert all(torch.equal(stored[name], value) for name, value in plain.items())
    assert trajectory.batches(0) is None
    with pytest.raises(TrajectoryError, match=r"a random generator of their own, .* store_batches=True"):
        trajectory.verify(workload())


def test_ground_truth_and_sweep_use_the_stored_batches(tmp_path: Path) -> None:
    """Against plain retraining on the images that the loop saw, with the masks that dropout drew."""
    trajectory, seen, _ = record(tmp_path / "t", store_batches=True)
    probe = datasets()[1]
    job = Workload(model=model, loss=losses, train_set=Augmented(), validation_set=Fixed(probe))
    start, end = 0, trajectory.num_steps

    def retrained(sample: int, weight: float) -> float:
        net = trajectory.checkpoint(start).load_into(model()).double().train()
        optimizer = SGD(net.parameters(), lr=0.2, momentum=0.5)
        for t in range(start, end):
            step = trajectory.step(t)
            weights = torch.tensor([weight if i == sample else 1.0 for i in step.samples], dtype=torch.float64)
            assert step.random_states[0] is not None
            step.random_states[0].restore()
            labels = torch.stack([datasets()[0][int(i)][1] for i in step.samples])
            optimizer.zero_grad()
            (weights * losses(net, {"image": seen[t].double(), "labels": labels})).mean().backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            return float(losses(net, {"image": probe.tensors[0].double(), "labels": probe.tensors[1]}).mean())

    samples = [0, 5, 11]
    exact = leave_one_out(trajectory, job, [Window(start, end)], samples=samples).of(0)[samples]
    expected = [retrained(j, 0.0) - retrained(j, 1.0) for j in samples]
    np.testing.assert_allclose(exact, expected, rtol=1e-8, atol=1e-12)
    found = track(trajectory, job, [Window(start, end)], dtype=torch.float64).of(0)[samples]
    differences = [(retrained(j, 1 - 1e-5) - retrained(j, 1 + 1e-5)) / 2e-5 for j in samples]
    assert np.abs(found - differences).max() < 1e-6 * np.abs(differences).max()


class Fixed(Dataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.data[index]
        return {"image": image, "labels": label}


def as_arrays(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([np.asarray(sample[key]) for sample in samples]) for key in ("image", "labels")}


def array_losses(model: nn.Module, batch: dict[str, np.ndarray]) -> Tensor:
    return losses(model, {key: torch.from_numpy(value) for key, value in batch.items()})


def test_batches_of_arrays_are_stored_as_tensors_are(tmp_path: Path) -> None:
    trajectory, _, final = record(tmp_path / "a", store_batches=True)
    torch.manual_seed(0)
    net = model()
    optimizer = SGD(net.parameters(), lr=0.2, momentum=0.5)
    loader = DataLoader(Augmented(), batch_size=8, shuffle=True, collate_fn=as_arrays)
    with TrajectoryRecorder(net, optimizer, tmp_path / "b", store_batches=True) as recorder:
        for _ in range(2):
            for batch in recorder.watch(loader):
                optimizer.zero_grad()
                array_losses(net, batch).mean().backward()
                optimizer.step()
    arrays = Trajectory.open(tmp_path / "b")
    assert all(torch.equal(final[name], value) for name, value in net.named_parameters())
    tensor_job = Workload(model=model, loss=losses, train_set=Augmented(), validation_set=Fixed(datasets()[1]))
    job = replace(tensor_job, loss=array_losses, collate_fn=as_arrays)
    assert arrays.verify(job).max_drift == 0
    whole = [Window(0, trajectory.num_steps)]
    found, expected = (
        track(recorded, described, whole, dtype=torch.float64).of(0)
        for recorded, described in [(arrays, job), (trajectory, tensor_job)]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [">f4", "longdouble", "datetime64[s]", "U3"])
def test_arrays_that_torch_does_not_know_are_left_as_they_are(dtype: str) -> None:
    batch = {"x": torch.ones(2), "other": np.zeros(2, dtype)}
    assert len(tensors_of(batch)) == 1
    moved = to_like(batch, torch.device("cpu"), torch.float64)["other"]
    assert moved.dtype == batch["other"].dtype and not np.shares_memory(moved, batch["other"])
    np.testing.assert_array_equal(moved, batch["other"])


def test_a_batch_without_tensors_is_refused_when_it_is_drawn(tmp_path: Path) -> None:
    net = model()
    loader = DataLoader(Augmented(), batch_size=8, collate_fn=repr)
    with (
        pytest.raises(InputError, match="no tensor in a batch, which is a str; give the loader a collate_fn"),
        TrajectoryRecorder(net, SGD(net.parameters(), lr=0.1), tmp_path / "t", store_batches=True) as recorder,
    ):
        next(iter(recorder.watch(loader)))


def test_a_batch_with_other_parts_is_refused(tmp_path: Path) -> None:
    trajectory, _, _ = record(tmp_path / "t", store_batches=True)
    with pytest.raises(TrajectoryError, match="a stored batch has 2 tensors; the workload's have 1"):
        trajectory.verify(digits_workload(model=model, train_set=OnlyImages(), optimizer=None))


class OnlyImages(Augmented):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)["image"]
