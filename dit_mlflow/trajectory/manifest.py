"""``manifest.json``: what a trajectory consists of. Read as untrusted input, written atomically."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticSerializationError

from dit_mlflow.errors import TrajectoryError, WorkloadError
from dit_mlflow.trajectory.untrusted import MOST_VALUES, first_fault, open_regular, parse_json, values_in
from dit_mlflow.workload.batches import most_common
from dit_mlflow.workload.projects import WorkloadReference

FILE_NAME = "manifest.json"

FORMAT: Literal[3] = 3
"""Number of the format in docs/format.md, the only one that is written and read."""

LARGEST = 64 * 2**20
"""Bytes of a manifest at most; one of a million steps takes a few MiB."""

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Names of dtypes in safetensors files, and in a manifest."""

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SAFETENSORS_DTYPES.values()}
"""The dtypes of stored tensors, by the name in a manifest."""


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name) or name == FILE_NAME:
        raise ValueError(f"{name!r} is not a plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Need = Callable[[bool, str], None]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class TensorLayout(_Part):
    """Shape and dtype (``"float32"``) of a parameter or buffer."""

    shape: tuple[Count, ...]
    dtype: str


class OptimizerLayout(_Part):
    """Class name in ``torch.optim``, its defaults, and the parameter names of each group."""

    name: str
    defaults: dict[str, Any]
    groups: tuple[tuple[str, ...], ...]


class ModelLayout(_Part):
    """The model's class (for messages only) and its tensors by name."""

    name: str
    parameters: dict[str, TensorLayout]
    buffers: dict[str, TensorLayout]

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes: the floating one of most elements of its parameters."""
        return most_common((DTYPES[layout.dtype], prod(layout.shape)) for layout in self.parameters.values())


class StepsFile(_Part):
    """The file of the steps ``start … stop - 1``, or of their batches."""

    file: FileName
    start: Count
    stop: Count


class CheckpointEntry(_Part):
    """Where ``s_step`` is stored.

    ``files`` hold its tensors, but for those that ``unchanged`` names, by the step of the earlier checkpoint that holds
    them; ``scalars`` are the optimizer's plain numbers by parameter name.
    """

    step: Count
    files: tuple[FileName, ...]
    unchanged: dict[Count, tuple[str, ...]] = Field(default_factory=dict)
    scalars: dict[str, dict[str, int | float | bool | None]] = Field(default_factory=dict)


class FileEntry(_Part):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Count


class Manifest(_Part):
    """Everything needed to open a trajectory; see the classes of its fields.

    ``batches``: where each step's batches are stored, if they are: tensors ``step/micro-batch/place``, the places in
    the order of :func:`dit_mlflow.workload.workload.tensors_of`.
    """

    format: Literal[3] = FORMAT
    complete: bool
    num_steps: Count
    num_samples: Count | None
    epoch_ends: tuple[Count, ...]
    model: ModelLayout
    optimizer: OptimizerLayout
    steps: tuple[StepsFile, ...]
    checkpoints: tuple[CheckpointEntry, ...]
    batches: tuple[StepsFile, ...] | None = None
    files: dict[FileName, FileEntry]
    workload: WorkloadReference | None
    dataset: str | None
    versions: dict[str, str]
    threads: int

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read and check ``directory/manifest.json``.

        Raises:
            TrajectoryError: the file is missing, is not a manifest, or contradicts itself.
        """
        path = directory / FILE_NAME
        if not path.is_file():
            raise TrajectoryError(
                f"no trajectory in {directory}: {FILE_NAME} is missing; give a folder written by "
                "TrajectoryRecorder or train()"
            )
        if path.is_symlink() and path.resolve().parent != directory.resolve():
            raise TrajectoryError(f"{path} is a link that leaves the folder; put a copy of the file in its place")
        try:
            with open_regular(path) as file:
                size, content = os.fstat(file.fileno()).st_size, file.read(LARGEST + 1)
        except OSError as error:
            raise TrajectoryError(f"{path} cannot be read: {error}") from error
        if len(content) > LARGEST:
            raise TrajectoryError(f"{path} is not a trajectory manifest: {size} bytes, expected {LARGEST} at most")
        try:
            _check_format(path, parse_json(content))
            manifest = cls.model_validate_json(content)
        except ValidationError as error:
            raise TrajectoryError(f"{path} is not a trajectory manifest: {first_fault(error)}") from None
        except ValueError as error:
            raise TrajectoryError(f"{path} is not a trajectory manifest: {error}") from error
        manifest._check(path)
        return manifest

    def encode(self) -> bytes:
        """The content of ``manifest.json``.

        Raises:
            WorkloadError: settings that JSON cannot hold.
            TrajectoryError: it would be too large to be read again.
        """
        try:
            content = self.model_dump(mode="json")
            text = json.dumps(content, indent=1)
            if r"\ud" in text:  # Halves of surrogate pairs are refused here, rather than when the record is read.
                json.dumps(content, ensure_ascii=False).encode()
        except (PydanticSerializationError, TypeError, ValueError) as error:
            raise WorkloadError(
                f"a setting of the workload or the optimizer cannot be stored as JSON: {error}; use numbers, strings, "
                "lists and dicts as settings"
            ) from error
        encoded = text.encode()
        values = values_in(encoded)
        if len(encoded) > LARGEST or values > MOST_VALUES:
            raise TrajectoryError(
                f"{FILE_NAME} would take {len(encoded)} bytes for {values} values, of {len(self.checkpoints)} stored "
                f"states of {len(self.model.parameters)} parameters; {LARGEST} bytes and {MOST_VALUES} values are read "
                "at most. Store fewer states: a larger checkpoint_every"
            )
        return encoded

    def until(self, step: int) -> Manifest:
        """The manifest of the training up to the checkpoint at ``step``."""

        def cut(parts: tuple[StepsFile, ...]) -> tuple[StepsFile, ...]:
            kept = [part for part in parts if part.start < step]
            return tuple(part.model_copy(update={"stop": min(part.stop, step)}) for part in kept)

        left = self.model_copy(
            update={
                "complete": False,
                "num_steps": step,
                "epoch_ends": (*(end for end in self.epoch_ends if end < step), *([step] if step else [])),
                "steps": cut(self.steps),
                "checkpoints": tuple(entry for entry in self.checkpoints if entry.step <= step),
                "batches": None if self.batches is None else cut(self.batches),
            }
        )
        used = left._used()
        return left.model_copy(update={"files": {name: entry for name, entry in self.files.items() if name in used}})

    def _used(self) -> set[str]:
        """The names of all files that steps, checkpoints and batches are in."""
        parts = (*self.steps, *(self.batches or ()))
        return {part.file for part in parts} | {name for entry in self.checkpoints for name in entry.files}

    def digest(self) -> str:
        """SHA-256 over the hashes of all files: the same trajectory has the same digest anywhere."""
        listing = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(self.files.items()))
        return hashlib.sha256(listing.encode()).hexdigest()

    def _check(self, path: Path) -> None:
        def need(condition: bool, problem: str) -> None:
            if not condition:
                raise TrajectoryError(f"{path} contradicts itself: {problem}")

        self._check_steps(need)
        self._check_checkpoints(need)
        self._check_layouts(need)
        need(self._used() <= set(self.files), "a file is used but not listed")

    def _check_steps(self, need: Need) -> None:
        for what, parts in (("steps", self.steps), ("batches", self.batches)):
            stop = 0
            for part in parts or ():
                need(part.start == stop < part.stop, f"{what} {part.start} … {part.stop} after step {stop}")
                stop = part.stop
            complete = parts is None or stop == self.num_steps
            need(complete, f"{what} until step {stop} are stored, {self.num_steps} are announced")
        ends = (0, *self.epoch_ends)
        need(all(a < b for a, b in pairwise(ends)), "epoch_ends do not increase")
        need(ends[-1] == self.num_steps, f"the last epoch ends at step {ends[-1]} of {self.num_steps}")
        need(self.num_steps == 0 or bool(self.num_samples), "there are steps, but no samples")

    def _check_checkpoints(self, need: Need) -> None:
        at = [entry.step for entry in self.checkpoints]
        need(at == sorted(set(at)), "checkpoints are not in order")
        need(at[:1] == [0] and at[-1] <= self.num_steps, "checkpoints must start at step 0 and end by the last")
        held = {name for group in self.optimizer.groups for name in group}
        earlier: set[int] = set()
        for entry in self.checkpoints:
            need(entry.unchanged.keys() <= earlier, f"checkpoint {entry.step} refers to one that is not before it")
            earlier.add(entry.step)
            need(entry.scalars.keys() <= held, f"checkpoint {entry.step} has numbers of no trained parameter")
            numbers = [value for scalars in entry.scalars.values() for value in scalars.values()]
            need(all(isinstance(value, float) or abs(value or 0) < 2**63 for value in numbers), "a number is too large")

    def _check_layouts(self, need: Need) -> None:
        need(bool(self.model.parameters), "the model has no parameters")
        for name, layout in (*self.model.parameters.items(), *self.model.buffers.items()):
            need(layout.dtype in DTYPES, f"{name!r} has the unknown dtype {layout.dtype!r}")
        held = [name for group in self.optimizer.groups for name in group]
        need(bool(held), "the optimizer holds no parameters")
        need(set(held) <= set(self.model.parameters), "the optimizer holds parameters the model lacks")
        need(len(held) == len(set(held)), "a parameter is in two groups")


def _check_format(path: Path, content: Any) -> None:
    """Raise :class:`TrajectoryError` for another format's manifest, :class:`ValueError` for what is none."""
    number = content.get("format") if isinstance(content, dict) else None
    if number == FORMAT:
        return
    if type(number) is not int:
        raise ValueError(f"it has no format number; {FORMAT} is expected")
    versions = content.get("versions")
    writer = versions.get("dit-mlflow") if isinstance(versions, dict) else None
    raise TrajectoryError(
        f"{path} has format {number!s:.20}, and this version of dit-mlflow reads format {FORMAT} alone: record the "
        f"training again, or open it with the version that wrote it, {writer!r:.40}"
    )


def library_versions() -> dict[str, str]:
    """The versions on which a bit-for-bit replay depends."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("dit-mlflow", "numpy", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
