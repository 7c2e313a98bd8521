"""Append to a trajectory folder, segment by segment."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.trajectory.manifest import (
    FILE_NAME,
    CheckpointEntry,
    FileEntry,
    Manifest,
    ModelLayout,
    OptimizerLayout,
    StepsFile,
    WorkloadReference,
    library_versions,
    put_in_place,
    temporary_path,
    write_atomically,
)
from dit_mlflow.trajectory.state import State
from dit_mlflow.trajectory.step import StepFields, to_table

FLUSH_BYTES = 16 * 2**20
"""Segments are held back until their checkpoints reach this size, so that files are few and large, …"""
FLUSH_SECONDS = 10.0
"""… or until this long after the last file was written, so that a crash loses little."""


class TrajectoryWriter:
    """Writes one trajectory; not for several processes at once.

    A segment is the steps between two checkpoints. Segments, and the steps of an unfinished one, are gathered into one
    checkpoint shard and one ``steps-NNNNN.parquet``; the manifest is replaced after both are on disk, so that at any
    moment the folder holds a trajectory that opens.
    """

    def __init__(
        self,
        directory: Path,
        model: ModelLayout,
        optimizer: OptimizerLayout,
        workload: WorkloadReference | None,
    ) -> None:
        if (directory / FILE_NAME).exists():
            raise TrajectoryError(
                f"{directory} already holds a trajectory; record into a new folder (nothing was overwritten)"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.dataset: str | None = None
        self.num_samples: int | None = None
        self._model, self._optimizer, self._workload = model, optimizer, workload
        self._steps: list[StepsFile] = []
        self._checkpoints: list[CheckpointEntry] = []
        self._files: dict[str, FileEntry] = {}
        self._epochs: list[int] = []
        self._rows: list[StepFields] = []
        self._states: dict[int, State] = {}
        self._batches: dict[int, Sequence[Sequence[Tensor]]] = {}
        self._batch_files: list[StepsFile] = []
        self._held_back = 0
        self._versions = library_versions()
        self._last_flush = time.monotonic()

    def add_step(self, step: StepFields, batches: Sequence[Sequence[Tensor]] = ()) -> None:
        """Keep the record of the next step, and the tensors of its micro-batches if they are to be stored."""
        if batches:
            self._batches[len(self._epochs)] = batches
            self._held_back += sum(tensor.nbytes for batch in batches for tensor in batch)
        self._rows.append(step)
        self._epochs.append(step["epoch"])
        self._flush_if_due()

    def add_checkpoint(self, step: int, state: State) -> None:
        """Keep ``s_step`` (the caller gives it away); written when the segments held back are large or old."""
        self._states[step] = state
        self._held_back += state.nbytes
        self._flush_if_due()

    def flush(self, complete: bool = False) -> None:
        """Write what is held back, then the manifest."""
        number = len(self._files)
        if self._states:
            self._write_checkpoints(f"checkpoints-{number:05d}.safetensors")
        if self._batches:
            self._write_batches(f"batches-{number:05d}.safetensors")
        if self._rows:
            self._write_steps(f"steps-{number:05d}.parquet")
        self._held_back = 0
        self._manifest(complete).write(self.directory)
        self._last_flush = time.monotonic()

    def _flush_if_due(self) -> None:
        if self._held_back >= FLUSH_BYTES or time.monotonic() - self._last_flush >= FLUSH_SECONDS:
            self.flush()

    def _write_checkpoints(self, name: str) -> None:
        tensors: dict[str, Tensor] = {}
        for step, state in self._states.items():
            stored, scalars = _flatten(state)
            tensors |= {f"{step}/{key}": value for key, value in stored.items()}
            self._checkpoints.append(CheckpointEntry(step=step, file=name, scalars=scalars))
        self._files[name] = _write_tensors(self.directory / name, tensors)
        self._states = {}

    def _write_batches(self, name: str) -> None:
        tensors = {
            f"{step}/{position}/{place}": tensor.contiguous()
            for step, batches in self._batches.items()
            for position, batch in enumerate(batches)
            for place, tensor in enumerate(batch)
        }
        self._files[name] = _write_tensors(self.directory / name, tensors)
        first, last = min(self._batches), max(self._batches)
        self._batch_files.append(StepsFile(file=name, start=first, stop=last + 1))
        self._batches = {}

    def _write_steps(self, name: str) -> None:
        sink = io.BytesIO()
        pq.write_table(to_table(self._rows), sink, compression="zstd")
        self._files[name] = write_atomically(self.directory / name, sink.getvalue())
        start = self._rows[0]["index"]
        self._steps.append(StepsFile(file=name, start=start, stop=start + len(self._rows)))
        self._rows = []

    def _manifest(self, complete: bool) -> Manifest:
        epochs = self._epochs
        ends = [t for t in range(1, len(epochs)) if epochs[t] != epochs[t - 1]]
        return Manifest(
            complete=complete,
            num_steps=len(epochs),
            num_samples=self.num_samples,
            epoch_ends=(*ends, len(epochs)) if epochs else (),
            model=self._model,
            optimizer=self._optimizer,
            steps=tuple(self._steps),
            checkpoints=tuple(self._checkpoints),
            batches=tuple(self._batch_files) or None,
            files=self._files,
            workload=self._workload,
            dataset=self.dataset,
            versions=self._versions,
            threads=torch.get_num_threads(),
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """A safetensors file; raises :class:`UnsupportedError` for a dtype that has no place in one."""
    temporary = temporary_path(path)
    try:
        save_file(dict(tensors), temporary)
    except (KeyError, SafetensorError) as error:
        dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        name = next((name for name, dtype in dtypes.items() if dtype.removeprefix("torch.") in str(error)), None)
        what = f"{name.partition('/')[2]} has dtype {dtypes[name]}" if name else str(error)
        raise UnsupportedError(f"{what}, which safetensors cannot hold; record a model without it") from error
    content = temporary.read_bytes()
    put_in_place(temporary, path)
    return FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))


def _flatten(state: State) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors by ``parameters/<name>``, ``buffers/<name>``, ``optimizer/<key>/<name>``; other numbers apart."""
    tensors = {f"parameters/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"buffers/{name}": value for name, value in state.buffers.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for name, entry in state.optimizer.items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}/{name}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    return {key: value.contiguous() for key, value in tensors.items()}, scalars


def unflatten(tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]) -> State:
    """The inverse of how a checkpoint is stored."""
    state = State({}, {}, {name: dict(entry) for name, entry in scalars.items()})
    for path, value in tensors.items():
        kind, _, name = path.partition("/")
        if kind == "parameters":
            state.parameters[name] = value
        elif kind == "buffers":
            state.buffers[name] = value
        else:
            key, _, owner = name.partition("/")
            state.optimizer.setdefault(owner, {})[key] = value
    return state
