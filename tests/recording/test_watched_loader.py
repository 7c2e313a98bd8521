"""The samples of every batch are known, and the loop sees what it would have seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)
from workloads import SAMPLES, datasets, digits_model, digits_workload

from dit_mlflow import (
    InputError,
    Trajectory,
    TrajectoryRecorder,
)


class Indexed(Dataset[Any]):
    """Samples that say who they are."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return datasets()[0][index][0], torch.tensor(index)


class OddFirst(BatchSampler):
    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        yield [1, 3, 5, 7]
        yield [0, 2]
        yield [4, 4, 6]


LOADERS: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 8},
    "shuffled": {"batch_size": 8, "shuffle": True},
    "last batch dropped": {"batch_size": 7, "shuffle": True, "drop_last": True},
    "sampler with replacement": {"batch_size": 8, "sampler": WeightedRandomSampler([1.0] * SAMPLES, 16)},
    "batch sampler": {"batch_sampler": OddFirst()},
    "no batching": {"batch_size": None, "shuffle": True},
    "two workers": {"batch_size": 8, "shuffle": True, "num_workers": 2},
    "persistent workers": {"batch_size": 8, "shuffle": True, "num_workers": 1, "persistent_workers": True},
}


@pytest.mark.parametrize("name", LOADERS)
def test_watch_knows_the_samples_and_the_loop_sees_the_same(name: str, tmp_path: Path) -> None:
    def run(directory: Path | None) -> tuple[list[list[int]], torch.Tensor]:
        torch.manual_seed(5)
        model = nn.Linear(64, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        loader = DataLoader(Indexed(), **LOADERS[name])
        recorder = TrajectoryRecorder(model, optimizer, directory) if directory else None
        if recorder:
            recorder.__enter__()
        seen = []
        for _ in range(2):
            for inputs, indices in recorder.watch(loader) if recorder else loader:
                optimizer.zero_grad()
                model(inputs).mean().backward()
                optimizer.step()
                seen.append(np.atleast_1d(indices.numpy()).tolist())
        if recorder:
            recorder.__exit__(None, None, None)
        return seen, torch.get_rng_state()

    plain, plain_random = run(None)
    watched, watched_random = run(tmp_path / "t")
    assert watched == plain
    assert torch.equal(watched_random, plain_random)
    trajectory = Trajectory.open(tmp_path / "t")
    assert [trajectory.step(t).samples.tolist() for t in range(trajectory.num_steps)] == plain
    assert trajectory.num_samples == SAMPLES
    assert trajectory.epoch_ends == (len(plain) // 2, len(plain))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(64), 0


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream(), batch_size=2), "iterable dataset"),
        ([torch.zeros(2)], "expected a torch.utils.data.DataLoader"),
        (DataLoader(TensorDataset(torch.zeros(3, 64))), "3 samples; the workload's train_set has 24"),
    ],
)
def test_loaders_without_known_samples_are_refused(loader: Any, message: str, tmp_path: Path) -> None:
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(InputError, match=message),
        TrajectoryRecorder(model, optimizer, tmp_path / "t", digits_workload()) as recorder,
    ):
        recorder.watch(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_two_iterations_over_one_loader_at_a_time(workers: int, tmp_path: Path) -> None:
    model = nn.Linear(64, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    loader = DataLoader(Indexed(), batch_size=8, shuffle=True, num_workers=workers)
    seen = []
    with TrajectoryRecorder(model, optimizer, tmp_path / "t") as recorder:
        for (first, one), (second, two) in zip(recorder.watch(loader), recorder.watch(loader), strict=True):
            (model(first).mean() + model(second).mean()).backward()
            optimizer.step()
            seen.append([one.tolist(), two.tolist()])
    trajectory = Trajectory.open(tmp_path / "t")
    assert [[part.tolist() for part in trajectory.step(t).indices] for t in range(3)] == seen


class Moving(DataLoader[Any]):
    """Its ``__iter__`` is a generator: the sampler is asked at the first batch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield [part.clone() for part in batch]


class Resumable(DataLoader[Any]):
    """Knows how far it is, and goes on from there, as torchdata's StatefulDataLoader does."""

    begin = done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        begin, self.begin = self.begin, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= begin:
                self.done = number + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["done"]


class Ahead(DataLoader[Any]):
    """Fetches one batch ahead."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        held = next(batches)
        for batch in batches:
            yield held
            held = batch
        yield held


def recorded(loader: DataLoader[Any], folder: Path, stop: int | None = None, epochs: int = 1) -> list[list[int]]:
    """Trains on samples that say who they are; returns those that the loop saw, and holds the record to it."""
    model = digits_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[list[int]] = []
    with TrajectoryRecorder(model, optimizer, folder) as recorder:
        for _ in range(epochs):
            for inputs, who in recorder.watch(loader):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
                seen.append(who.tolist())
                if len(seen) == stop:
                    break
    trajectory = Trajectory.open(folder)
    assert [trajectory.step(t).samples.tolist() for t in range(trajectory.num_steps)] == seen
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_whose_iter_is_a_generator(workers: int, tmp_path: Path) -> None:
    def make() -> Moving:
        order = torch.Generator().manual_seed(3)
        return Moving(Indexed(), 8, shuffle=True, generator=order, num_workers=workers)

    loader = make()
    expected = [batch[1].tolist() for _ in range(2) for batch in loader]
    assert recorded(make(), tmp_path / "t", epochs=2) == expected


def test_a_loader_that_fetches_ahead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="__iter__ of Ahead asked for 2 batches and returned one"):
        recorded(Ahead(Indexed(), 8), tmp_path / "t")


def stateful_loaders() -> list[Any]:
    loaders: list[Any] = [Resumable]
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found]
    except ImportError:
        return loaders
    return [*loaders, StatefulDataLoader]


@pytest.mark.parametrize("kind", stateful_loaders())
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_with_a_state_is_resumed_where_it_was(kind: Any, shuffle: bool, tmp_path: Path) -> None:
    def make() -> Any:
        return kind(Indexed(), 5, shuffle=shuffle, generator=torch.Generator().manual_seed(3))

    whole = [batch[1].tolist() for batch in make()]
    first = make()
    assert recorded(first, tmp_path / "first", stop=2) == whole[:2]
    state = first.state_dict()
    unwatched, watched = make(), make()
    unwatched.load_state_dict(state)
    watched.load_state_dict(state)
    assert [batch[1].tolist() for batch in unwatched] == whole[2:]
    assert recorded(watched, tmp_path / "watched") == whole[2:]


@pytest.mark.parametrize(
    "sampler",
    [
        [-1, 0, 1],
        [0, SAMPLES],
        ["s0", "s1"],
        ["0", "1"],
        [(0, 1), (1, 2)],
        [0.0, 1.0],
        [True, False],
        [0, "1"],
        [0, [1, 2]],
        [{0, 1}],
        [2**63, 10**30],
        [torch.tensor(1.0, requires_grad=True)],
        [None, slice(0, 1)],
    ],
)
def test_what_is_no_index_is_refused_at_its_step(sampler: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"the sampler yielded .* expected one or more indices .* 0 … {SAMPLES - 1}"):
        recorded(DataLoader(Indexed(), batch_size=8, sampler=sampler), tmp_path / "t")


def test_empty_batches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the sampler yielded \[\] for a batch"):
        recorded(DataLoader(Indexed(), batch_sampler=[[]], collate_fn=list), tmp_path / "t")
