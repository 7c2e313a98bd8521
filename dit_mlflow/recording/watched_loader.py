"""Learn which samples a DataLoader hands out, without changing what the loop sees."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from dit_mlflow.errors import InputError
from dit_mlflow.torch_internals import set_sampler
from dit_mlflow.workload.random_state import RandomState

Indices = np.ndarray | tuple[int, ...]
Notes = deque[tuple[Indices, RandomState | None]]
"""Indices that a sampler has yielded, and the loader has not yet handed out."""


class Drawn(NamedTuple):
    """One batch that the loop was given.

    Attributes:
        indices: sample indices.
        epoch: number of the pass over the data.
        random_state: that before it was drawn.
        batch: as the loader made it.
        drawn: the random state after it was drawn; ``None`` = the present one.
        coefficients: ``c_i``, if they do not come from the workload.
    """

    indices: Indices
    epoch: int
    random_state: RandomState
    batch: Any
    drawn: RandomState | None = None
    coefficients: np.ndarray | None = None


class WatchedLoader:
    """Iterates like the loader it was made from, and reports each batch before the loop gets it.

    The batches come from a shallow copy of the loader whose (batch) sampler notes what it yields. Samplers are asked in
    the same order and number as without watching, and no random number is drawn here. Without worker processes, the
    random state is noted before a batch is fetched, so that augmentation can be replayed; workers have their own.

    Args:
        loader: over a map-style dataset.
        next_epoch: called when an iteration begins; returns its number.
        on_batch: called with each batch before the loop gets it.
        on_end: called with the random state at the end of an iteration, early or not.

    Raises:
        InputError: ``loader`` does not know its samples by index.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        next_epoch: Callable[[], int],
        on_batch: Callable[[Drawn], None],
        on_end: Callable[[RandomState], None],
    ) -> None:
        check_loader(loader)
        self._next_epoch = next_epoch
        self._on_batch, self._on_end = on_batch, on_end
        self._loader = copy.copy(loader)
        sampler: Literal["sampler", "batch_sampler"] = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._sampler = NotingSampler(getattr(loader, sampler), in_main_process=loader.num_workers == 0)
        set_sampler(self._loader, sampler, self._sampler)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        return self._reporting(batches, self._sampler.latest, self._next_epoch())

    def _reporting(self, batches: Iterator[Any], noted: Notes, epoch: int) -> Iterator[Any]:
        try:
            for batch in batches:
                indices, state = noted.popleft()
                self._on_batch(Drawn(indices, epoch, state or RandomState.capture(), batch))
                yield batch
        finally:
            self._on_end(RandomState.capture())


class NotingSampler:
    """Yields what ``sampler`` yields, and notes it before: in ``latest``, new for every iteration."""

    def __init__(self, sampler: Iterable[Any], in_main_process: bool) -> None:
        self._sampler = sampler
        self._in_main_process = in_main_process
        self.latest: Notes = deque()

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.latest = deque()
        return self._noting(self.latest)

    def _noting(self, notes: Notes) -> Iterator[Any]:
        for drawn in self._sampler:
            notes.append((_indices(drawn), RandomState.capture() if self._in_main_process else None))
            yield drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def check_loader(loader: Any) -> None:
    """Raise :class:`InputError` if the loader's samples cannot be known by index."""
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"the training loader is a {type(loader).__name__}; expected a torch.utils.data.DataLoader, because the "
            "sample indices are read from its sampler"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise InputError(
            f"the training loader is over {type(loader.dataset).__name__}, an iterable dataset: its samples have no "
            "indices, so they cannot be drawn again; use a map-style dataset"
        )
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise InputError("recording needs batches in the order of the sampler; use in_order=True")


def _indices(drawn: Any) -> Indices:
    # For what most samplers yield, a tuple is ten times as fast as an array.
    if type(drawn) is list and drawn and type(drawn[0]) is int:
        return tuple(drawn)
    return np.atleast_1d(np.asarray(drawn, dtype=np.int64))
