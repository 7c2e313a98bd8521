"""Rows of the per-sample loss: those of other samples are refused, coupled ones are said and right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import finite_difference, window_effect
from plain_loop import record, whole
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD
from torch.utils.data import Dataset, TensorDataset, default_collate
from workloads import SAMPLES, datasets, digits_model, digits_workload, sample_losses

from dit_mlflow import WorkloadError, leave_one_out, track, train
from dit_mlflow.methods import method
from dit_mlflow.replay.loss_rows import samples_are_coupled

SOME = [0, 5, 11]


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def zeros() -> nn.Module:
    model = nn.Linear(64, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    found = normalize(model(batch[0]), dim=1)
    other = normalize(model(batch[0].flip(1)), dim=1)
    return -log_softmax(found @ other.T / 0.5, dim=1).diagonal()


def mixed(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    order = torch.randperm(len(inputs))
    logits = model(0.3 * inputs + 0.7 * inputs[order])
    every = [cross_entropy(logits, of, reduction="none") for of in (targets, targets[order])]
    return 0.3 * every[0] + 0.7 * every[1]


def next_as_negative(model: nn.Module, batch: Any) -> Tensor:
    found = model(batch[0])
    return sample_losses(model, batch) + 0.1 * (found * found.roll(-1, 0)).sum(1)


ORDERS = {"flipped": lambda rows: rows.flip(0), "rolled": lambda rows: rows.roll(1), "sorted": lambda x: x.sort()[0]}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (digits_model, sample_losses),
        (zeros, sample_losses),
        (normalised, sample_losses),
        (dropping, sample_losses),
        (digits_model, contrastive),
    ],
)
def test_rows_of_other_samples_are_refused(model: Any, loss: Any, order: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = model()
    trajectory = record(tmp_path / "t", trained, SGD(trained.parameters(), lr=0.1), loss=loss)
    wrong = digits_workload(model=trained, loss=lambda net, batch: ORDERS[order](loss(net, batch)))
    assert trajectory.verify(wrong).max_drift <= 1e-3
    for ask in (track, leave_one_out, method("tracin"), method("influence_function")):
        with pytest.raises(WorkloadError, match="rows that belong to other samples"):
            ask(trajectory, wrong, whole(trajectory))


class Counting(nn.Module):
    """Knows how many steps of training there were."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = digits_model()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.steps.add_(1)
        return self.layers(inputs)


def swapped(net: nn.Module, batch: Any) -> Tensor:
    rows = sample_losses(net, batch)
    return torch.cat([rows[:2], rows[2:4].flip(0), rows[4:]])


def flipped_if(asked: Any) -> Any:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        rows = sample_losses(net, batch)
        return rows.flip(0) if asked(net, rows) else rows

    return loss


@pytest.mark.parametrize(
    "loss",
    [
        swapped,
        flipped_if(lambda net, rows: not net.training),
        flipped_if(lambda net, rows: net.steps > 12),
        flipped_if(lambda net, rows: len(rows) == 4),
        flipped_if(lambda net, rows: len(rows) > 10),
    ],
    ids=[
        "two rows",
        "in evaluation mode",
        "later",
        "of the last and smaller batch",
        "of larger batches than training's",
    ],
)
def test_rows_are_looked_at_wherever_a_loss_is_asked(loss: Any, tmp_path: Path) -> None:
    right = digits_workload(model=Counting, batch_size=10, epochs=5)
    trajectory = train(right, tmp_path / "t")
    assert not trajectory.couples_samples(right)
    with pytest.raises(WorkloadError, match="rows that belong to other samples"):
        method("grad_dot")(trajectory, digits_workload(model=Counting, loss=loss), whole(trajectory))


def test_rows_of_other_samples_are_refused_in_training(tmp_path: Path) -> None:
    wrong = digits_workload(loss=lambda net, batch: sample_losses(net, batch).flip(0))
    with pytest.raises(WorkloadError, match="place 0 of its batch, row 7 changes, and row 0 does not"):
        train(wrong, tmp_path / "t")


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (normalised, sample_losses),
        (dropping, sample_losses),
        (digits_model, contrastive),
        (digits_model, mixed),
        (digits_model, next_as_negative),
    ],
)
def test_a_loss_that_couples_samples_is_said_and_right(model: Any, loss: Any, tmp_path: Path) -> None:
    workload = digits_workload(model=model, loss=loss, optimizer=lambda net: SGD(net.parameters(), lr=0.1), epochs=1)
    trajectory = train(workload, tmp_path / "t")
    windows = whole(trajectory)
    found = track(trajectory, workload, windows, dtype=torch.float64)
    assert found.coupled
    assert leave_one_out(trajectory, workload, windows, samples=SOME).coupled
    if loss is not mixed and model is not dropping:  # The oracle draws other masks.
        expected = finite_difference(workload, trajectory, windows[0], "local", SOME, 1e-4)
        np.testing.assert_allclose(found.of(0)[SOME], expected, rtol=1e-5, atol=1e-9)
        exact = leave_one_out(trajectory, workload, windows, samples=SOME).of(0)[SOME]
        truth = [window_effect(workload, trajectory, windows[0], "local", j, 0.0) for j in SOME]
        np.testing.assert_allclose(exact, truth, rtol=1e-6, atol=1e-12)


def test_coupling_that_begins_later_is_said(tmp_path: Path) -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        plain = sample_losses(net, batch)
        return contrastive(net, batch) if net.training and net.steps > 6 else plain

    workload = digits_workload(model=Counting, loss=loss, optimizer=lambda net: SGD(net.parameters(), lr=0.1))
    trajectory = train(workload, tmp_path / "t")
    assert track(trajectory, workload, whole(trajectory)).coupled


def hardest(net: nn.Module, batch: Any) -> Tensor:
    """Of half the samples, those of the largest losses."""
    rows = sample_losses(net, batch)
    return rows * (rows >= rows.median())


def test_rows_of_samples_that_are_left_out_for_others_are_their_own(tmp_path: Path) -> None:
    workload = digits_workload(loss=hardest)
    trajectory = train(workload, tmp_path / "t")
    assert track(trajectory, workload, whole(trajectory)).coupled


def test_rows_that_cannot_be_looked_at_are_not_said_to_be_coupled(tmp_path: Path) -> None:
    def apart(model: nn.Module, batch: Any) -> Tensor:
        if len(batch[0].unique(dim=0)) < len(batch[0]):
            raise ValueError("a sample is there twice")
        return sample_losses(model, batch)

    workload = digits_workload(loss=apart, epochs=1)
    trajectory = train(workload, tmp_path / "t")
    assert not track(trajectory, workload, whole(trajectory)).coupled


class Lines(Dataset[Any]):
    """Rows of various lengths, padded to the longest of a batch."""

    def __init__(self) -> None:
        self.whole = datasets()[0]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        inputs, targets = self.whole[index]
        return inputs[: 20 + index], int(targets)


def padded(items: list[Any]) -> list[Tensor]:
    return [pad_sequence([item[0] for item in items], batch_first=True), torch.tensor([item[1] for item in items])]


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs[:, :, None]).mean(1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": zeros},
        {"model": lambda: nn.Sequential(nn.Linear(64, 6), nn.Dropout(0.3), nn.Linear(6, 3))},
        {"model": lambda: normalised().eval(), "loss": lambda net, batch: sample_losses(net.eval(), batch)},
        {"train_set": Lines(), "validation_set": Lines(), "collate_fn": padded, "model": Mean},
        {"train_set": TensorDataset(torch.ones(SAMPLES, 64), torch.ones(SAMPLES).long())},
        {"batch_size": 1},
        {"batch_size": 2},
        {"batch_size": 3},
    ],
)
def test_a_loss_of_single_samples_is_taken(changes: dict[str, Any], tmp_path: Path) -> None:
    workload = digits_workload(epochs=1, **changes)
    trajectory = train(workload, tmp_path / "t")
    assert not track(trajectory, workload, whole(trajectory)).coupled


def test_looking_costs_a_few_forward_passes_once(tmp_path: Path) -> None:
    workload = digits_workload()
    trajectory = train(workload, tmp_path / "t")
    calls = []

    def counting(net: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return sample_losses(net, batch)

    counted = digits_workload(loss=counting)
    assert not trajectory.couples_samples(counted)
    assert len(calls) <= 30
    assert not trajectory.couples_samples(counted)
    assert len(calls) <= 30


def test_the_check_copies_samples_and_not_the_data_set_that_they_are_views_of(tmp_path: Path) -> None:
    """A copy of a view by ``copy.deepcopy`` has all of the storage: 256 of them took 256 times the data set."""
    sizes = []

    def joined(items: list[tuple[Tensor, Tensor]]) -> Any:
        sizes.append(max(tensor.untyped_storage().nbytes() for item in items for tensor in item))
        return default_collate(items)

    inputs, _ = datasets()[0].tensors
    workload = digits_workload(collate_fn=joined)
    trajectory = train(workload, tmp_path / "t")
    assert max(sizes) >= inputs.nbytes, "the loader's samples are views"
    sizes.clear()
    assert not samples_are_coupled(trajectory, workload)
    assert max(sizes) == inputs[0].nbytes


class Counted(Dataset[Any]):
    """Notes what is fetched."""

    def __init__(self, samples: Dataset[Any]) -> None:
        self.samples = samples
        self.fetched: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.fetched.append(index)
        return self.samples[index]


@pytest.mark.parametrize("slow", [False, True])
def test_no_sample_is_fetched_twice_and_few_are_where_that_takes_long(
    slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow:
        monkeypatch.setattr("dit_mlflow.replay.loss_rows.SECONDS", 0.0)
    workload = digits_workload(epochs=1, optimizer=lambda model: SGD(model.parameters(), lr=0.1))
    trajectory = train(workload, tmp_path / "t")
    samples = Counted(workload.train_set)
    assert not samples_are_coupled(trajectory, replace(workload, train_set=samples))
    own = {*trajectory.step(0).samples, *trajectory.step(trajectory.num_steps - 1).samples}
    assert len(samples.fetched) == len(set(samples.fetched))
    assert own <= set(samples.fetched)
    assert (own == set(samples.fetched)) == slow
