"""Read a recorded trajectory: its steps, its checkpoints, and every state between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dit_mlflow.errors import TrajectoryError
from dit_mlflow.trajectory.manifest import FILE_NAME, CheckpointEntry, FileEntry, Manifest
from dit_mlflow.trajectory.shards import Shard, sha256, unflatten
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step import SCHEMA, Step
from dit_mlflow.trajectory.workload import Workload

if TYPE_CHECKING:
    from dit_mlflow.trajectory.replay import Replay

Fetch = Callable[[str, FileEntry], Path]
"""Gives the path of a file whose content has the size and the hash of its entry."""


@dataclass(frozen=True)
class Verification:
    """What :meth:`Trajectory.verify` found.

    Attributes:
        drift: for each checkpoint after the first, the replay's relative drift against it; 0 = bit for bit.
    """

    drift: dict[int, float]

    @property
    def max_drift(self) -> float:
        """The largest drift of any segment; 0 means that the whole run replays bit for bit."""
        return max(self.drift.values(), default=0.0)


class Trajectory:
    """A training trajectory on disk. Open one with :meth:`open`; nothing is held in memory until asked for.

    Attributes:
        directory: the folder.
        manifest: its contents, checked.
    """

    def __init__(self, directory: Path, manifest: Manifest, fetch: Fetch | None = None) -> None:
        self.directory = directory
        self.manifest = manifest
        self._fetch = fetch
        self._verified: set[str] = set()
        self._read_steps = lru_cache(maxsize=8)(self._read_steps_file)
        self._open_shard = lru_cache(maxsize=4)(Shard)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        return f"<Trajectory of {self.num_steps} steps, {self.num_samples} samples, {state}, in {self.directory}>"

    @classmethod
    def open(cls, directory: str | Path, fetch: Fetch | None = None) -> Trajectory:
        """Open a folder written by :class:`TrajectoryRecorder` or :func:`train`.

        Checks the manifest and the sizes of the files; a file's hash is checked when it is first read.

        Args:
            directory: the folder.
            fetch: where the other files are, if the folder holds the manifest alone: asked with a file's name and
                entry whenever it is about to be read, it returns the path of a file with that size and hash.

        Raises:
            TrajectoryError: there is no trajectory, or it is damaged.
        """
        folder = Path(directory)
        trajectory = cls(folder, Manifest.read(folder), fetch)
        if fetch is not None:
            return trajectory
        for name, entry in trajectory.manifest.files.items():
            path = folder / name
            if not path.is_file():
                raise TrajectoryError(f"{path} is missing; restore it from the run's artifacts")
            if path.stat().st_size != entry.size:
                raise TrajectoryError(
                    f"{path} is damaged: {path.stat().st_size} bytes, recorded {entry.size}; "
                    "restore it from the run's artifacts or record again"
                )
        return trajectory

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

    def step(self, t: int) -> Step:
        """The record of step ``t``, ``0 <= t < num_steps``."""
        part = next(part for part in self.manifest.steps if part.start <= t < part.stop)
        return self._read_steps(part.file)[t - part.start]

    def checkpoint(self, t: int) -> State:
        """The stored state ``s_t``; ``t`` is one of :attr:`checkpoint_steps`."""
        entry = self._checkpoints[t]
        tensors: dict[str, Tensor] = {}
        for name in entry.files:
            tensors |= self._shard(name).tensors(t)
        for home, keys in entry.unchanged.items():
            for name in self._checkpoints[home].files:
                shard = self._shard(name)
                tensors |= {key: shard.tensor(home, key) for key in keys if shard.holds(home, key)}
        state = unflatten(tensors, entry.scalars)
        for name, layout in self.manifest.model.parameters.items():
            if name not in state.parameters or tuple(state.parameters[name].shape) != layout.shape:
                raise TrajectoryError(f"{self.directory}, step {t}: parameter {name!r} is missing or has another shape")
        return state

    def batches(self, t: int) -> list[list[Tensor]] | None:
        """The stored tensors of step ``t``'s micro-batches; ``None`` if batches were not stored."""
        if self.manifest.batches is None:
            return None
        part = next(part for part in self.manifest.batches if part.start <= t < part.stop)
        tensors = self._shard(part.file).tensors(t)
        batches: list[list[Tensor]] = [[] for _ in self.step(t).indices]
        for key in sorted(tensors, key=lambda key: tuple(map(int, key.split("/")))):
            batches[int(key.partition("/")[0])].append(tensors[key])
        return batches

    def _shard(self, name: str) -> Shard:
        return self._open_shard(self._checked(name))

    def states(self, workload: Workload, a: int, b: int, dtype: torch.dtype | None = None) -> Iterator[State]:
        """Yield ``s_a, …, s_b`` (both ends included), rebuilt by replay from the checkpoint before ``a``.

        In the recorded dtype the replay continues from each checkpoint it meets, and the difference to it is
        held against :data:`REPLAY_TOLERANCE`; with ``dtype`` it runs from ``s_0`` without re-anchoring.

        Raises:
            InputError: not ``0 <= a <= b <= num_steps``.
            TrajectoryError: the replay does not meet a checkpoint, or the workload is another one.

        Cost: one training step per state, and up to ``2 sqrt(T)`` steps before the first.
        """
        yield from self.replay(workload, dtype).forward(a, b)

    def replay(self, workload: Workload, dtype: torch.dtype | None = None) -> Replay:
        """The machinery behind :meth:`states`, for callers that walk the trajectory more than once."""
        from dit_mlflow.trajectory.replay import Replay

        return Replay(self, workload, dtype)

    def verify(self, workload: Workload) -> Verification:
        """Check every file's hash, that steps follow each other, and the replay against every checkpoint.

        Raises:
            TrajectoryError: naming the first thing that does not hold.

        Cost: one training, without its evaluation.
        """
        for name in self.manifest.files:
            self._checked(name)
        for t in range(self.num_steps):
            if self.step(t).index != t:
                raise TrajectoryError(f"{self.directory}: the record of step {t} says {self.step(t).index}")
        replay = self.replay(workload)
        for _ in replay.forward(0, self.num_steps):
            pass
        return Verification(dict(replay.drift))

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder that holds all files of the trajectory: its own, or a temporary one into which they are fetched."""
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

    def _read_steps_file(self, name: str) -> list[Step]:
        path = self._checked(name)
        try:
            table = pq.read_table(path, schema=SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise TrajectoryError(f"{path} is not a readable record of steps: {error}") from error
        return [Step.from_row(row) for row in table.to_pylist()]

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
