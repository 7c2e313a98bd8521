"""Write a file whole or not at all, and know its content again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_READ_BYTES = 2**20


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A path to write to in place of ``path``, which gets the file when the body ends, synced to disk and in one step.

    Where the body fails, ``path`` is as it was before.
    """
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
    temporary.replace(path)
    if os.name != "nt":
        # The name is synced as well, so that a power cut does not leave a manifest of files that are not there.
        folder = os.open(path.parent, os.O_RDONLY)
        try:
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
