"""Files written whole or not at all, and safetensors files read tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_mlflow.errors import TrajectoryError, UnsupportedError
from dit_mlflow.trajectory.manifest import SAFETENSORS_DTYPES, FileEntry, TensorLayout

_READ_BYTES = 2**20


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces ``path``, synced and in one step, when the body ends without error."""
    temporary = path.with_name(path.name + ".part")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        # safetensors writes files that nobody but the user can read.
        temporary.chmod(mode)
        _put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _put_in_place(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    if os.name == "nt":
        temporary.replace(path)
        return
    # Opened first: where no handle is left, nothing is replaced.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        temporary.replace(path)
        # The name is synced as well, so that a power cut does not leave a manifest of files that are not there.
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file, whole or not at all.

    Raises:
        UnsupportedError: a dtype that safetensors cannot hold.
        OSError: it could not be written.
    """
    with written_atomically(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        except (SafetensorError, KeyError) as error:
            for name, tensor in tensors.items():
                if str(tensor.dtype).removeprefix("torch.") in str(error):
                    # Only a state's tensors can have any dtype; their names begin with its step.
                    raise UnsupportedError(
                        f"{name.partition('/')[2]} has dtype {tensor.dtype}, which safetensors cannot hold; record a "
                        "model without it"
                    ) from error
            if isinstance(error, KeyError):
                raise
            raise OSError(str(error)) from error  # a full disk, for example
        digest, size = sha256(temporary), temporary.stat().st_size
    return FileEntry(sha256=digest, size=size)


class TensorFile:
    """An open safetensors file. The header is read at once, a tensor when it is asked for.

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
            return TensorLayout(shape=tuple(piece.get_shape()), dtype=SAFETENSORS_DTYPES[piece.get_dtype()])
        except (SafetensorError, KeyError, ValueError) as error:  # Of a shape beyond 63 bits, the last.
            raise TrajectoryError(f"{self.path}: {name!r} cannot be read: {error}") from error

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor."""
        try:
            # An open file returns the same memory twice.
            return self._file.get_tensor(name).clone()
        except (SafetensorError, RuntimeError) as error:
            raise TrajectoryError(f"{self.path}: {name!r} cannot be read: {error}") from error
