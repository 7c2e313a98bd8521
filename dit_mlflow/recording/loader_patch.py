"""Record which samples a DataLoader returns when a trainer iterates it itself."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from torch.utils.data import DataLoader

from dit_mlflow.recording.watched_loader import Indices, LatestNotes, Notes, check_loader, noting
from dit_mlflow.torch_internals import set_sampler
from dit_mlflow.workload.random_state import RandomState


class Handed(NamedTuple):
    """One batch that a loader returned to a trainer, which may fetch it ahead of its use.

    Attributes:
        indices: sample indices.
        iteration: number of the pass over the loader.
        batch: as the loader made it; ``None`` = not seen.
        before: the random state before it was drawn; ``None`` = drawn in a worker process, or not seen.
        after: the random state when it was returned.
        goes_on: the pass began in an earlier training, which this one resumes.
    """

    indices: Indices
    iteration: int
    batch: Any
    before: RandomState | None
    after: RandomState
    goes_on: bool = False


class LoaderPatch:
    """Queues the batches that a loader returns; whoever iterates the loader sees no difference.

    The loader's (batch) sampler and class are replaced by recording ones until :meth:`remove`. Samplers are called in
    the same order and number as without, and no random number is drawn here.

    Args:
        loader: over a map-style dataset.
        on_gone: called with the number of a pass when its iterator is deleted, exhausted or not.

    Raises:
        InputError: ``loader`` does not know its samples by index.

    Cost: two captures of the random state per batch; batches stay in memory until they are taken.
    """

    def __init__(self, loader: DataLoader[Any], on_gone: Callable[[int], None]) -> None:
        check_loader(loader)
        self.loader = loader
        self._on_gone = on_gone
        self._queue: deque[Handed] = deque()
        self._iteration = -1
        self._skipped_in: Notes | None = None
        self._name: Literal["sampler", "batch_sampler"] = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._class, self._original = type(loader), getattr(loader, self._name)
        self.sampler = noting(self._original, loader)
        set_sampler(loader, self._name, self.sampler)
        loader.__class__ = _patched(self._class, self)

    def remove(self) -> None:
        """Restore the loader."""
        set_sampler(self.loader, self._name, self._original)
        self.loader.__class__ = self._class
        self._queue.clear()

    def take(self) -> Handed | None:
        """The oldest batch returned and not yet taken; ``None`` if there is none."""
        return self._queue.popleft() if self._queue else None

    def take_noted(self, skipped: int) -> Handed | None:
        """As :meth:`take`, for another loader over the same samplers that skips the first ``skipped`` batches."""
        notes = self.sampler.latest
        if notes is not self._skipped_in:
            self._skipped_in = notes
            for _ in range(min(skipped, len(notes))):
                notes.popleft()
        if not notes:
            return None
        return Handed(notes.popleft()[0], self._iteration, None, None, RandomState.capture(), goes_on=True)

    def iterate(self, begin: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        notes = LatestNotes(self.sampler, self.loader)
        batches = begin()
        notes.begun()
        self._iteration += 1
        self._queue = deque()
        pass_ = _Pass(batches, notes, self._queue, self._iteration)
        weakref.finalize(pass_, self._on_gone, self._iteration).atexit = False
        return pass_


class _Pass:
    """An iterator that is deleted when nobody holds it; a generator's frame would end with its last batch."""

    def __init__(self, batches: Iterator[Any], notes: LatestNotes, queue: deque[Handed], iteration: int) -> None:
        self._batches, self._notes, self._queue, self._iteration = batches, notes, queue, iteration

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        indices, before = self._notes.take()
        self._queue.append(Handed(indices, self._iteration, batch, before, RandomState.capture()))
        return batch


def _patched(cls: type[DataLoader[Any]], patch: LoaderPatch) -> type[DataLoader[Any]]:
    """``cls`` whose iterations go through ``patch``."""

    class Patched(cls):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Any]:
            # Now, not at the first batch: the loader draws its seed and starts its workers here.
            return patch.iterate(super().__iter__)

    Patched.__name__ = Patched.__qualname__ = cls.__name__
    return Patched
