"""Learn which samples a DataLoader hands out, without changing what the loop sees."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from dit_mlflow.errors import InputError
from dit_mlflow.trajectory.random_state import RandomState


@dataclass(frozen=True, eq=False)
class Drawn:
    """One batch that the loop was given."""

    indices: np.ndarray
    epoch: int
    random_state: RandomState
    batch: Any


class WatchedLoader:
    """Iterates like the loader it was made from, and reports each batch before the loop gets it.

    The batches come from a shallow copy of the loader whose (batch) sampler notes what it yields. Samplers are
    asked in the same order and number as without watching, workers start as they would, and no random number
    is drawn here. A loader in the main process fetches a batch after the random state is noted, so that
    augmentation can be replayed; worker processes have random states of their own.
    """

    def __init__(
        self, loader: DataLoader[Any], next_epoch: Callable[[], int], on_batch: Callable[[Drawn], None]
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise InputError(
                f"watch() was given a {type(loader).__name__}; expected a torch.utils.data.DataLoader, because "
                "the sample indices are read from its sampler"
            )
        if isinstance(loader.dataset, IterableDataset):
            raise InputError(
                f"watch() was given a loader over {type(loader.dataset).__name__}, an iterable dataset: its "
                "samples have no indices, so they cannot be drawn again; use a map-style dataset"
            )
        if loader.num_workers > 0 and not loader.in_order:
            raise InputError("watch() needs batches in the order of the sampler; use in_order=True")
        self._next_epoch = next_epoch
        self._on_batch = on_batch
        self._pending: deque[tuple[np.ndarray, RandomState | None]] = deque()
        self._loader = copy.copy(loader)
        sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        # DataLoader refuses to have its samplers set; the copy is ours.
        vars(self._loader)[sampler] = _NotingSampler(getattr(loader, sampler), self._note)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        epoch = self._next_epoch()
        self._pending.clear()
        for batch in self._loader:
            indices, state = self._pending.popleft()
            self._on_batch(Drawn(indices, epoch, state or RandomState.capture(), batch))
            yield batch

    def _note(self, drawn: Any) -> None:
        indices = np.atleast_1d(np.asarray(drawn, dtype=np.int64))
        in_main_process = self._loader.num_workers == 0
        self._pending.append((indices, RandomState.capture() if in_main_process else None))


class _NotingSampler:
    def __init__(self, sampler: Iterable[Any], note: Callable[[Any], None]) -> None:
        self._sampler = sampler
        self._note = note

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for drawn in self._sampler:
            self._note(drawn)
            yield drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)
