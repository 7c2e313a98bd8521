"""Tensors of states and batches in safetensors files, each under the step it belongs to: ``step/path``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.trajectory.manifest import FileEntry, TensorLayout, put_in_place, temporary_path
from dit_mlflow.trajectory.state import State

SHARD_BYTES = 256 * 2**20
"""Tensors of one file: it is no larger (but for its header), unless a single tensor is."""

SHARED_BYTES = 4096
"""Tensors smaller than this are stored at every checkpoint, changed or not."""

_SAMPLED = 1024
"""Elements that are compared before a whole tensor is."""

_READ_BYTES = 2**20

_DTYPES = {
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
    "BOOL": "bool",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
}
"""Names of dtypes in safetensors files, and ours."""


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file through a temporary one.

    Raises:
        UnsupportedError: a dtype that has no place in such a file.
        OSError: it could not be written; nothing is left of it.
    """
    temporary = temporary_path(path)
    try:
        _save(temporary, tensors)
        entry = FileEntry(sha256=sha256(temporary), size=temporary.stat().st_size)
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return entry


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # A disk that is full comes out as one of these as well.
        _raise_if_dtype(error, tensors)
        raise OSError(str(error)) from error
    except KeyError as error:
        _raise_if_dtype(error, tensors)
        raise


def _raise_if_dtype(error: Exception, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") in str(error):
            raise UnsupportedError(
                f"{name.partition('/')[2]} has dtype {tensor.dtype}, which safetensors cannot hold; record a model "
                "without it"
            ) from error


class Shard:
    """A safetensors file, opened. Its header is read, and no tensor before it is asked for.

    Raises:
        TrajectoryError: it is none, or its tensors are not named by step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._keys: dict[int, dict[str, None]] = {}
        try:
            self._file: Any = safe_open(path, framework="pt")
            for name in self._file.keys():  # noqa: SIM118  (not a dict)
                step, _, key = name.partition("/")
                if str(int(step)) != step:
                    raise ValueError(f"{name!r} does not begin with a step")
                self._keys.setdefault(int(step), {})[key] = None
        except (SafetensorError, OSError, ValueError) as error:
            raise TrajectoryError(f"{path} is not a readable shard: {error}") from error

    def keys(self, step: int) -> Collection[str]:
        """The paths of all tensors of a step."""
        return self._keys.get(step, {}).keys()

    def holds(self, step: int, key: str) -> bool:
        """Whether a tensor is here."""
        return key in self.keys(step)

    def layout(self, step: int, key: str) -> TensorLayout:
        """Shape and dtype of one tensor, by the header alone."""
        try:
            piece = self._file.get_slice(f"{step}/{key}")
            return TensorLayout(shape=tuple(piece.get_shape()), dtype=_DTYPES[piece.get_dtype()])
        except (SafetensorError, KeyError) as error:
            raise TrajectoryError(f"{self.path}: {key!r} of step {step} cannot be read: {error}") from error

    def tensor(self, step: int, key: str) -> Tensor:
        """A copy of one tensor."""
        try:
            # What an open shard hands out twice is the same memory.
            return self._file.get_tensor(f"{step}/{key}").clone()
        except (SafetensorError, RuntimeError) as error:
            raise TrajectoryError(f"{self.path}: {key!r} of step {step} cannot be read: {error}") from error


def packed(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors, in order, in groups of at most :data:`SHARD_BYTES`."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > SHARD_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    if group:
        yield group


class StoredOnce:
    """Knows which tensors of a state are the same as at an earlier checkpoint, and need not be stored again.

    Args:
        load: brings back a tensor from a checkpoint that has been written.

    A tensor is the same if all its bytes are. Trained ones are told apart by a few elements; others are read back and
    compared, so that no copy of what is frozen stays in memory.
    """

    def __init__(self, load: Callable[[int, str], Tensor]) -> None:
        self._load = load
        self._seen: dict[str, tuple[int, Tensor]] = {}
        self._noted: dict[str, tuple[int, Tensor]] = {}

    def home(self, step: int, key: str, value: Tensor, at_hand: Mapping[str, Tensor]) -> int:
        """The step under which ``value`` is stored: an earlier one, or ``step`` itself.

        ``at_hand``: tensors by ``step/key`` that are about to be written.
        """
        if value.nbytes < SHARED_BYTES:
            return step
        sample = _sample(value)
        seen = self._noted.get(key) or self._seen.get(key)
        if seen is not None and _same(seen[1], sample):
            at = f"{seen[0]}/{key}"
            before = at_hand[at] if at in at_hand else self._load(seen[0], key)
            if _same(before, value):
                return seen[0]
        self._noted[key] = (step, sample)
        return step

    def keep(self) -> None:
        """What was said since the last call has been written."""
        self._seen |= self._noted
        self._noted = {}

    def forget(self) -> None:
        """What was said since the last call has not been written."""
        self._noted = {}


def _sample(value: Tensor) -> Tensor:
    flat = value.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


def _same(one: Tensor, other: Tensor) -> bool:
    # Bytes, so that NaN is equal to itself and 0 is not equal to -0.
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def flatten(state: State) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
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
    return tensors, scalars


def unflatten(tensors: Mapping[str, Tensor], scalars: Mapping[str, Mapping[str, Any]]) -> State:
    """The inverse of :func:`flatten`."""
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


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()
