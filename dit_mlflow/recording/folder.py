"""The files of a trajectory folder; a segment is appended completely or not at all."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dit_mlflow.errors import InputError, TrajectoryError
from dit_mlflow.trajectory.manifest import FILE_NAME, CheckpointEntry, FileEntry, Manifest, StepsFile
from dit_mlflow.trajectory.shards import Shard, StoredOnce, flatten, packed
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step_record import StepFields
from dit_mlflow.trajectory.steps_file import steps_tensors
from dit_mlflow.trajectory.tensor_file import write_tensors, written_atomically

CLAIM = ".recording"
"""Name of a file that exists in a folder while a recorder begins there."""


class Written(NamedTuple):
    """Files that are on disk: the new ones, and the content of the manifest that lists them."""

    names: list[str]
    manifest: bytes


@dataclass
class Segment:
    """The content of the next files; ``nbytes`` is about its size in memory."""

    first_step: int
    rows: list[StepFields] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    batches: dict[int, Sequence[Sequence[Tensor]]] = field(default_factory=dict)
    nbytes: int = 0

    def followed_by(self, later: Segment) -> Segment:
        return Segment(
            self.first_step,
            self.rows + later.rows,
            self.states | later.states,
            self.batches | later.batches,
            self.nbytes + later.nbytes,
        )

    def split(self, steps: int) -> tuple[Segment, Segment]:
        """The first ``steps`` steps with the states that they lead to, and the rest."""
        at = self.first_step + steps
        first = Segment(
            self.first_step,
            self.rows[:steps],
            {step: state for step, state in self.states.items() if step <= at},
            {step: batch for step, batch in self.batches.items() if step < at},
        )
        rest = Segment(
            at,
            self.rows[steps:],
            {step: state for step, state in self.states.items() if step > at},
            {step: batch for step, batch in self.batches.items() if step >= at},
        )
        each = (self.nbytes - self._tensor_bytes()) // max(len(self.rows), 1)
        for part in (first, rest):
            part.nbytes = part._tensor_bytes() + each * len(part.rows)
        return first, rest

    def _tensor_bytes(self) -> int:
        stored = (tensor for batches in self.batches.values() for batch in batches for tensor in batch)
        return sum(state.nbytes for state in self.states.values()) + sum(tensor.nbytes for tensor in stored)


def check_new(directory: Path) -> None:
    """Raise :class:`TrajectoryError` if the folder already holds a trajectory, :class:`InputError` if it is none."""
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise InputError(f"{directory} is no folder; expected the path of a new one, for a trajectory")
    if (directory / FILE_NAME).exists():
        raise TrajectoryError(
            f"{directory} already holds a trajectory (nothing was overwritten); record into a new folder, or go on "
            "with it by resume=True"
        )


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Inside it, no other recorder begins in the folder. A claim ends with its process, if that is killed.

    Raises:
        TrajectoryError: another one does, or has begun.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / CLAIM
    # Without locks, the file itself is the claim.
    flags = os.O_CREAT | os.O_RDWR | (os.O_EXCL if sys.platform == "win32" else 0)
    try:
        claim = os.open(path, flags)
        _lock(claim)
    except (FileExistsError, BlockingIOError) as error:
        raise TrajectoryError(
            f"another recorder begins in {directory}; record into a folder of its own. If none does (it was killed), "
            f"remove {path}"
        ) from error
    try:
        check_new(directory)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(claim)


def _lock(descriptor: int) -> None:
    """Raise ``BlockingIOError`` if another one holds the file; of file systems without locks, none is asked."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            pass


class TrajectoryFolder:
    """A trajectory on disk, as it grows.

    Args:
        directory: of the trajectory; created if missing.
        manifest: of a trajectory without steps.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._number = 0
        self._content = b""
        self._open_shard = lru_cache(maxsize=4)(Shard)
        self._once = StoredOnce(self._load)

    def resume(self, begun: Manifest, step: int) -> None:
        """Go on with a trajectory from its checkpoint at ``step``."""
        for left_over in self.directory.glob("*.part"):
            left_over.unlink()
        # Numbers continue, so that the old manifest's files stay until a new manifest is in place.
        numbers = (int(found[1]) for name in begun.files if (found := re.search(r"(\d+)\.", name)))
        self._number = 1 + max(numbers, default=-1)
        self.manifest = begun.until(step)
        self._content = self._on_disk()

    def append(self, segment: Segment, facts: Mapping[str, Any]) -> Written:
        """Write a segment's files, then the manifest that lists them.

        Args:
            segment: the next steps.
            facts: the manifest's other fields afterwards.

        Raises:
            UnsupportedError: a tensor that cannot be stored.
            OSError: the folder cannot be written, or is gone; its trajectory is unchanged.
            TrajectoryError: another recorder has written there in the meantime.
        """
        self._check_own()
        files: dict[str, FileEntry] = {}
        content = b""
        old = self.manifest
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            checkpoints = self._write_checkpoints(segment, files)
            batches = self._write_batches(segment, files)
            steps = self._write_steps(segment, files)
            manifest = old.model_copy(
                update={
                    **facts,
                    "files": {**old.files, **files},
                    "checkpoints": (*old.checkpoints, *checkpoints),
                    "steps": (*old.steps, *steps),
                    "batches": (*(old.batches or ()), *batches) or None,
                }
            )
            content = manifest.encode()
            with written_atomically(self.directory / FILE_NAME) as temporary:
                temporary.write_bytes(content)
        except BaseException as error:
            # The sync of the folder's names comes last: where it alone fails, everything is in place.
            in_place = False
            with suppress(OSError):
                in_place = isinstance(error, OSError) and content != b"" and self._on_disk() == content
            if not in_place:
                self._once.forget()
                # No manifest lists them, and a full disk has better use for their space.
                for name in files:
                    with suppress(OSError):
                        (self.directory / name).unlink(missing_ok=True)
                raise
        self._once.keep()
        self.manifest, self._content = manifest, content
        self._number += len(files)
        return Written(list(files), content)

    def _check_own(self) -> None:
        """Raise an error if the manifest on disk is not the one that was written last."""
        found = self._on_disk()
        if found == self._content:
            return
        if not found:
            raise FileNotFoundError(f"{FILE_NAME}, which was written before, is gone: the folder was removed or moved")
        raise TrajectoryError(
            "another recorder writes there too; its trajectory is left as it is. Record into a folder of its own"
        )

    def _on_disk(self) -> bytes:
        """The manifest that is there; empty if there is none."""
        try:
            return (self.directory / FILE_NAME).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def _write_checkpoints(self, segment: Segment, files: dict[str, FileEntry]) -> list[CheckpointEntry]:
        stored: dict[str, Tensor] = {}
        scalars: dict[int, dict[str, dict[str, Any]]] = {}
        unchanged: dict[int, dict[int, list[str]]] = {step: {} for step in segment.states}
        held_by: dict[int, list[str]] = {step: [] for step in segment.states}
        for step, state in segment.states.items():
            tensors, scalars[step] = flatten(state)
            for key, value in tensors.items():
                home = self._once.home(step, key, value, stored)
                if home == step:
                    stored[f"{step}/{key}"] = value
                else:
                    unchanged[step].setdefault(home, []).append(key)
        for keys in packed({key: value.nbytes for key, value in stored.items()}):
            name = self._name(files, "checkpoints-{:05d}.safetensors")
            files[name] = write_tensors(self.directory / name, {key: stored[key] for key in keys})
            for step in dict.fromkeys(int(key.partition("/")[0]) for key in keys):
                held_by[step].append(name)
        return [
            CheckpointEntry(
                step=step,
                files=tuple(held_by[step]),
                unchanged={home: tuple(keys) for home, keys in unchanged[step].items()},
                scalars=scalars[step],
            )
            for step in segment.states
        ]

    def _write_batches(self, segment: Segment, files: dict[str, FileEntry]) -> list[StepsFile]:
        parts = []
        sizes = {step: sum(x.nbytes for batch in batches for x in batch) for step, batches in segment.batches.items()}
        for group in packed(sizes):
            name = self._name(files, "batches-{:05d}.safetensors")
            tensors = {
                f"{step}/{position}/{place}": tensor
                for step in group
                for position, batch in enumerate(segment.batches[step])
                for place, tensor in enumerate(batch)
            }
            files[name] = write_tensors(self.directory / name, tensors)
            parts.append(StepsFile(file=name, start=group[0], stop=group[-1] + 1))
        return parts

    def _write_steps(self, segment: Segment, files: dict[str, FileEntry]) -> list[StepsFile]:
        if not segment.rows:
            return []
        name = self._name(files, "steps-{:05d}.safetensors")
        files[name] = write_tensors(self.directory / name, steps_tensors(segment.rows))
        start = segment.first_step
        return [StepsFile(file=name, start=start, stop=start + len(segment.rows))]

    def _name(self, files: dict[str, FileEntry], pattern: str) -> str:
        return pattern.format(self._number + len(files))

    def _load(self, step: int, key: str) -> Tensor:
        """A tensor that was written with the checkpoint at ``step``."""
        entry = next(entry for entry in reversed(self.manifest.checkpoints) if entry.step == step)
        shards = [self._open_shard(self.directory / name) for name in entry.files]
        return next(shard.tensor(step, key) for shard in shards if shard.holds(step, key))
