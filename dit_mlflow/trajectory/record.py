"""Read a record: steps, checkpoints, and stored batches."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from typing_extensions import Self

from dit_mlflow.errors import InputError, TrajectoryError, checked_path
from dit_mlflow.progress import progress_over
from dit_mlflow.trajectory.checkpoint_layout import check_layouts
from dit_mlflow.trajectory.manifest import FILE_NAME, CheckpointEntry, FileEntry, Manifest, StepsFile
from dit_mlflow.trajectory.shards import Shard, unflatten
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepRecord
from dit_mlflow.trajectory.steps_file import read_steps
from dit_mlflow.trajectory.tensor_file import sha256

Fetch = Callable[[str, FileEntry], Path]
"""``(name, entry) -> path`` of a file with the entry's size and hash."""


class Record:
    """A recorded training on disk. Open one with :meth:`open`; nothing is held in memory until asked for.

    Attributes:
        directory: the folder.
        manifest: its contents, checked.
    """

    def __init__(self, directory: Path, manifest: Manifest, fetch: Fetch | None = None) -> None:
        self.directory = directory
        self.manifest = manifest
        self._fetch = fetch
        self._verified: set[str] = set()
        self._read_steps = lru_cache(maxsize=8)(self._read_steps_part)
        self._open_shard = lru_cache(maxsize=4)(Shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.directory, self.manifest, self._fetch)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        steps = f"{self.num_steps} step{'s' * (self.num_steps != 1)}"
        return f"<{type(self).__name__} of {steps}, {self.num_samples} samples, {state}, in {self.directory}>"

    @classmethod
    def open(cls, directory: str | Path, fetch: Fetch | None = None) -> Self:
        """Open a folder written by :class:`dit_mlflow.TrajectoryRecorder` or :func:`dit_mlflow.train`.

        Checks the manifest and the sizes of the files; a file's hash is checked when it is first read.

        Args:
            directory: the folder.
            fetch: gets a file when it is about to be read, for a folder that holds the manifest alone.

        Raises:
            TrajectoryError: there is no trajectory, or it is damaged.
        """
        folder = checked_path(directory).absolute()
        record = cls(folder, Manifest.read(folder), fetch)
        if fetch is not None:
            return record
        for name, entry in record.manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise TrajectoryError(f"{path} is missing; restore it from the run's artifacts")
            if path.is_symlink() and path.resolve().parent != folder.resolve():
                raise TrajectoryError(f"{path} is a link that leaves the folder; put a copy of the file in its place")
            if path.stat().st_size != entry.size:
                raise TrajectoryError(
                    f"{path} is damaged: {path.stat().st_size} bytes, recorded {entry.size}; "
                    "restore it from the run's artifacts or record again"
                )
        return record

    @property
    def num_steps(self) -> int:
        """Number of recorded steps ``T``."""
        return self.manifest.num_steps

    @property
    def num_samples(self) -> int | None:
        """Number of training samples ``n``; ``None`` if no batch was drawn."""
        return self.manifest.num_samples

    @property
    def complete(self) -> bool:
        """Whether the recording ended as it should."""
        return self.manifest.complete

    @property
    def epoch_ends(self) -> tuple[int, ...]:
        """For each epoch, the step after its last one."""
        return self.manifest.epoch_ends

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """Steps whose state is stored."""
        return tuple(self._checkpoints)

    def step(self, t: int) -> StepRecord:
        """The record of step ``t``, ``0 <= t < num_steps``."""
        part = self._part(self.manifest.steps, t)
        return self._read_steps(part)[t - part.start]

    def checkpoint(self, t: int) -> State:
        """The stored state ``s_t``; ``t`` is one of :attr:`checkpoint_steps`."""
        if t not in self._checkpoints:
            raise InputError(f"the state of step {t} is not stored; those of {self.checkpoint_steps} are")
        entry = self._checkpoints[t]
        places = self._checked_places(entry)
        return unflatten({key: shard.tensor(home, key) for key, (shard, home) in places.items()}, entry.scalars)

    def _checked_places(self, entry: CheckpointEntry) -> dict[str, tuple[Shard, int]]:
        """:meth:`_places`, after a check that shapes and dtypes are the manifest's."""
        places = self._places(entry)
        found = {key: (shard.path, shard.layout(home, key)) for key, (shard, home) in places.items()}
        check_layouts(found, entry.scalars, self.manifest, entry.step)
        return places

    def _places(self, entry: CheckpointEntry) -> dict[str, tuple[Shard, int]]:
        """The file of each tensor of a state, by path, and the step that it is stored under."""
        places: dict[str, tuple[Shard, int]] = {}
        for name in entry.files:
            shard = self._shard(name)
            for key in shard.keys(entry.step):
                if key in places:
                    raise TrajectoryError(f"{shard.path}: {key!r} of step {entry.step} is in another file as well")
                places[key] = shard, entry.step
        for home, keys in entry.unchanged.items():
            shards = [self._shard(name) for name in self._checkpoints[home].files]
            for key in keys:
                holding = [shard for shard in shards if shard.holds(home, key)]
                if len(holding) != 1 or key in places:
                    raise TrajectoryError(
                        f"{self.directory}: {key!r} of step {entry.step} is to be found with step {home}, where it is "
                        "not, or is there twice"
                    )
                places[key] = holding[0], home
        return places

    def batches(self, t: int) -> list[list[Tensor]] | None:
        """The stored tensors of step ``t``'s micro-batches; ``None`` if batches were not stored."""
        if self.manifest.batches is None:
            return None
        shard = self._shard(self._part(self.manifest.batches, t).file)
        return [[shard.tensor(t, key) for key in keys] for keys in self._batch_keys(shard, t)]

    def _batch_keys(self, shard: Shard, t: int) -> list[list[str]]:
        """The paths of the tensors of each micro-batch of a step, after a check that their layouts can be read."""
        found: list[list[str]] = []
        for position in range(len(self.step(t).indices)):
            keys: list[str] = []
            while shard.holds(t, key := f"{position}/{len(keys)}"):
                shard.layout(t, key)
                keys.append(key)
            found.append(keys)
        if sum(map(len, found)) != len(shard.keys(t)):
            raise TrajectoryError(
                f"{shard.path}: the tensors of step {t} are not numbered by its {len(found)} micro-batches and their "
                "places in them"
            )
        return found

    def _part(self, parts: Sequence[StepsFile], t: int) -> StepsFile:
        if not 0 <= t < self.num_steps:
            raise InputError(f"step {t} was asked; the trajectory has {self.num_steps} (0 … {self.num_steps - 1})")
        return parts[bisect_right(parts, t, key=lambda part: part.start) - 1]

    def _shard(self, name: str) -> Shard:
        return self._open_shard(self._checked(name))

    def check_record(self) -> None:
        """Check every file's hash, and all that can be checked without a workload.

        Epochs must end where the manifest says, and checkpoints and batches must hold the tensors that belong to them.

        Raises:
            TrajectoryError: naming the first thing that does not hold.

        Cost: reads all files.
        """
        for name in progress_over(list(self.manifest.files), "files", "file"):
            self._checked(name)
        epochs = [step.epoch for part in self.manifest.steps for step in self._read_steps(part)]
        ends = [t for t, (one, other) in enumerate(pairwise([*epochs, None]), start=1) if one != other]
        if tuple(ends) != self.epoch_ends:
            raise TrajectoryError(
                f"{self.directory}: the manifest's epochs end at {self.epoch_ends}, those of the steps at {tuple(ends)}"
            )
        for entry in self.manifest.checkpoints:
            self._checked_places(entry)
        for part in self.manifest.batches or ():
            shard = self._shard(part.file)
            for t in range(part.start, part.stop):
                self._batch_keys(shard, t)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder with all files of the trajectory: its own, or a temporary one into which they are fetched."""
        if self._fetch is None:
            yield self.directory
            return
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for name in self.manifest.files:
                shutil.copyfile(self._checked(name), folder / name)
            shutil.copyfile(self.directory / FILE_NAME, folder / FILE_NAME)
            yield folder

    @cached_property
    def _checkpoints(self) -> dict[int, CheckpointEntry]:
        return {entry.step: entry for entry in self.manifest.checkpoints}

    def _read_steps_part(self, part: StepsFile) -> list[StepRecord]:
        return read_steps(self._checked(part.file), part, self.manifest)

    def _checked(self, name: str) -> Path:
        if self._fetch is not None:
            return self._fetch(name, self.manifest.files[name])
        path = self.directory / name
        if name not in self._verified:
            entry = self.manifest.files[name]
            digest = sha256(path)
            if digest != entry.sha256:
                raise TrajectoryError(
                    f"{path} is damaged: SHA-256 {digest[:12]}…, recorded {entry.sha256[:12]}…; restore it "
                    "from the run's artifacts or record again"
                )
            self._verified.add(name)
        return path
