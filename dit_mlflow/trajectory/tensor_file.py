"""Safetensors files: written whole or not at all, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.trajectory.atomic_file import sha256, written_atomically
from dit_mlflow.trajectory.manifest import FileEntry, TensorLayout

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file, whole or not at all.

    Raises:
        UnsupportedError: a dtype that has no place in such a file.
        OSError: it could not be written.
    """
    with written_atomically(path) as temporary:
        _save(temporary, tensors)
        digest, size = sha256(temporary), temporary.stat().st_size
    return FileEntry(sha256=digest, size=size)


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
            # Only a state's tensors can be of any dtype; their names begin with its step.
            raise UnsupportedError(
                f"{name.partition('/')[2]} has dtype {tensor.dtype}, which safetensors cannot hold; record a model "
                "without it"
            ) from error


class TensorFile:
    """A safetensors file, opened. Its header is read, and no tensor before it is asked for.

    Attributes:
        path: of the file.
        names: of its tensors.

    Raises:
        TrajectoryError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise TrajectoryError(f"{path} is not a readable safetensors file: {error}") from error
        self.names: Sequence[str] = self._file.keys()

    def layout(self, name: str) -> TensorLayout:
        """Shape and dtype of one tensor, by the header alone."""
        try:
            piece = self._file.get_slice(name)
            return TensorLayout(shape=tuple(piece.get_shape()), dtype=_DTYPES[piece.get_dtype()])
        except (SafetensorError, KeyError) as error:
            raise TrajectoryError(f"{self.path}: {name!r} cannot be read: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor."""
        try:
            # What an open file hands out twice is the same memory.
            return self._file.get_tensor(name).clone()
        except (SafetensorError, RuntimeError) as error:
            raise TrajectoryError(f"{self.path}: {name!r} cannot be read: {error}") from error
