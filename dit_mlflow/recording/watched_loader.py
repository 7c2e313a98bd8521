"""Record which samples a DataLoader returns, without changing what the loop gets."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from dit_mlflow.errors import InputError
from dit_mlflow.torch_internals import exchange_sampler, set_sampler
from dit_mlflow.workload.random_state import RandomState

Indices = np.ndarray | tuple[int, ...]
Notes = deque[tuple[Indices, RandomState | None]]
"""Indices that a sampler has yielded for batches that the loader has not yet returned."""


class Drawn(NamedTuple):
    """One batch that the loop got.

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

    The batches come from a shallow copy of the loader whose (batch) sampler records what it yields. Samplers are called
    in the same order and number as without watching, and no random number is drawn here. Without worker processes, the
    random state before a batch is fetched is recorded, so that augmentation can be replayed; workers have their own.

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
        # A loader with a state of its own must itself advance, since others may ask it for its state.
        self._stateful = _is_stateful(loader)
        self._loader = loader if self._stateful else copy.copy(loader)
        self._name: Literal["sampler", "batch_sampler"] = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._original = getattr(loader, self._name)
        self._sampler = noting(self._original, loader)
        if not self._stateful:
            set_sampler(self._loader, self._name, self._sampler)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        notes = LatestNotes(self._sampler, self._loader)
        if self._stateful:
            exchange_sampler(self._loader, self._name, self._sampler)
        batches = iter(self._loader)
        notes.begun()
        return self._reporting(batches, notes, self._next_epoch())

    def _reporting(self, batches: Iterator[Any], notes: LatestNotes, epoch: int) -> Iterator[Any]:
        try:
            for batch in batches:
                self._give_back_sampler()
                indices, state = notes.take()
                self._on_batch(Drawn(indices, epoch, state or RandomState.capture(), batch))
                yield batch
        finally:
            self._give_back_sampler()
            self._on_end(RandomState.capture())

    def _give_back_sampler(self) -> None:
        """Put the loader's own sampler back once the iterator has ours, which must not enter the loader's state."""
        if self._stateful:
            exchange_sampler(self._loader, self._name, self._original)


class LatestNotes:
    """The notes of one pass over a loader.

    Args:
        sampler: about to be iterated; a loader whose ``__iter__`` is a generator does so at its first batch.
        loader: the loader that is iterated.

    Raises:
        InputError: the loader is resumed in a way that hides its samples.
    """

    def __init__(self, sampler: NotingSampler, loader: DataLoader[Any]) -> None:
        resumed = getattr(loader, "next_iter_state", None) is not None
        every = getattr(loader, "snapshot_every_n_steps", 1)
        if resumed and not sampler.in_main_process and every != 1:
            raise InputError(
                f"a {type(loader).__name__} with workers and snapshot_every_n_steps={every} "
                "fetches batches again when it is resumed, so the samples of its batches are not known; use "
                "snapshot_every_n_steps=1"
            )
        self._sampler, self._before = sampler, sampler.latest
        self._resumes = sampler.in_main_process and _is_stateful(loader)
        self._kind = type(loader).__name__
        self._notes: Notes | None = None

    def begun(self) -> None:
        """Call it when the loader has been asked for an iterator."""
        if self._sampler.latest is not self._before:
            self._notes = self._sampler.latest

    def take(self) -> tuple[Indices, RandomState | None]:
        """The indices of the batch that was returned, and the random state before it.

        Raises:
            InputError: the samples of the batch are not known.
        """
        if self._notes is None:
            self.begun()
        if not self._notes:
            raise InputError(
                "the loader handed out a batch whose indices its sampler did not yield: its iterator was made before "
                "it was watched (state_dict() makes one), or it makes batches by itself. Watch it first, and record "
                "with a plain torch.utils.data.DataLoader where that does not help"
            )
        while self._resumes and len(self._notes) > 1:
            # A resumed loader asks its sampler for the batches that it skips.
            self._notes.popleft()
        self._resumes = False
        if self._sampler.in_main_process and len(self._notes) > 1:
            raise InputError(
                f"the __iter__ of {self._kind} asked for {len(self._notes)} batches and returned one, so its samples "
                "are not known: it skips batches, or fetches them ahead. Record with a loader that returns each batch "
                "that it asks for"
            )
        return self._notes.popleft()


def noting(sampler: Iterable[Any], loader: DataLoader[Any]) -> NotingSampler:
    """A :class:`NotingSampler` for a loader, with a state if ``sampler`` has one."""
    kind = StatefulNotingSampler if _is_stateful(sampler) else NotingSampler
    return kind(sampler, loader.num_workers == 0, len(loader.dataset))  # type: ignore[arg-type]


class NotingSampler:
    """Yields what ``sampler`` yields, and first records it in ``latest``, a new queue for every iteration."""

    def __init__(self, sampler: Iterable[Any], in_main_process: bool, size: int) -> None:
        self._sampler, self._size = sampler, size
        self.in_main_process = in_main_process
        self.latest: Notes = deque()

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        self.latest = deque()
        drawing = iter(self._sampler)
        kind = _StatefulNotingIterator if _is_stateful(drawing) else _NotingIterator
        return kind(drawing, self.latest, self.in_main_process, self._size)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_sampler"], name)


class _NotingIterator:
    def __init__(self, drawing: Iterator[Any], notes: Notes, in_main_process: bool, size: int) -> None:
        self._drawing, self._notes, self._in_main_process, self._size = drawing, notes, in_main_process, size

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        drawn = next(self._drawing)
        self._notes.append((_indices(drawn, self._size), RandomState.capture() if self._in_main_process else None))
        return drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_drawing"], name)


class _State:
    """Passes the wrapped object's state on by methods of the class, where protocols look for them."""

    def state_dict(self) -> Any:
        return self._noted().state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._noted().load_state_dict(state)

    def _noted(self) -> Any:
        return vars(self).get("_drawing", vars(self).get("_sampler"))


class StatefulNotingSampler(_State, NotingSampler):
    """Of a sampler with a state."""


class _StatefulNotingIterator(_State, _NotingIterator):
    pass


def _is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


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
    if not hasattr(loader.dataset, "__len__"):
        raise InputError(
            f"the training loader is over a {type(loader.dataset).__name__} without __len__; give it one, the number "
            "of samples, because samples are known by their index"
        )
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise InputError("recording needs batches in the order of the sampler; use in_order=True")


def _indices(drawn: Any, size: int) -> Indices:
    """Of one batch.

    Raises:
        InputError: they are not numbers of samples.
    """
    # For what most samplers yield, a tuple is ten times as fast as an array.
    if type(drawn) is list and drawn and type(drawn[0]) is int:
        found: Indices = tuple(drawn)
        right = all(type(index) is int for index in found) and 0 <= min(found) <= max(found) < size
    else:
        try:
            found = np.atleast_1d(np.asarray(drawn))
        except (TypeError, ValueError, RuntimeError):  # Lists of unequal length; tensors that need a gradient.
            found = np.array([])
        right = found.ndim == 1 and found.dtype.kind in "iu" and len(found) > 0
        right = right and bool(0 <= found.min() <= found.max() < size)
    if not right:
        text = repr(drawn)
        raise InputError(
            f"the sampler yielded {text[:60]}{'…' * (len(text) > 60)} for a batch; expected one or more indices "
            f"of samples, whole numbers within 0 … {size - 1}. Let the dataset take such an index alone, and look up "
            "by it keys or whatever else the sampler adds"
        )
    return found if isinstance(found, tuple) else found.astype(np.int64)
