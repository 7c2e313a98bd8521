"""The files of a data set: where they are, and MNIST's IDX format (big-endian sizes, then bytes; gzip or not)."""

from __future__ import annotations

import gzip
import importlib
import math
import os
import struct
import zlib
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from types import ModuleType

import numpy as np

from dit_mlflow.errors import WorkloadError
from dit_mlflow.examples.splits import Labelled


def folder_of(data_dir: str, expected: str) -> Path:
    """``data_dir`` as an absolute path that exists.

    Raises:
        WorkloadError: it does not exist; the message says what was ``expected`` there.
    """
    path = Path(data_dir).expanduser().resolve()
    if not path.exists():
        raise WorkloadError(f"data_dir={data_dir!r}: there is no {path}; expected {expected}")
    return path


def no_larger(path: Path, most: int) -> Path:
    """``path``, whose file has ``most`` bytes or less: a record may name a folder with a file of a terabyte.

    Raises:
        WorkloadError: it is larger.
    """
    if (size := path.stat().st_size) > most:
        raise WorkloadError(f"{path} has {size} bytes; expected {most} at most")
    return path


def download_folder() -> Path:
    """The folder of downloads: ``dit-mlflow-data`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-mlflow-data"


def torchvision(expected: str) -> ModuleType:
    """``torchvision.datasets``, which downloads.

    Raises:
        WorkloadError: it is not installed; the message says what is ``expected`` in ``data_dir`` instead.
    """
    try:
        return importlib.import_module("torchvision.datasets")
    # A torchvision built for another torch fails with RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise WorkloadError(
            f"without data_dir, the data is downloaded through torchvision, which cannot be imported ({error}); "
            f"give data_dir: {expected}"
        ) from error


IDX_BYTES = 2**30
"""Bytes of data that a file may claim; the largest public one (EMNIST by class) has 0.55 times 10^9."""

UNSIGNED_BYTES = 8


def labelled_images(folder: Path, images: str, labels: str, shape: Sequence[int], classes: range) -> Labelled:
    """Images, flattened, and their labels from two IDX files in ``folder``.

    Args:
        folder: where they are.
        images, labels: the files' names; with ``.gz`` if that is what is there.
        shape: ``[height, width]`` of an image.
        classes: what a label may be.

    Raises:
        WorkloadError: a file is missing or damaged, or the two do not belong together.
    """
    pixels, found = read_idx(_path(folder, images), shape), read_idx(_path(folder, labels), ())
    if len(pixels) != len(found):
        raise WorkloadError(f"{folder}: {images} has {len(pixels)} images, {labels} has {len(found)} labels")
    outside = ~np.isin(found, classes)
    if outside.any():
        raise WorkloadError(
            f"{folder / labels}: label {found[outside][0]} of image {outside.argmax()} is not one of "
            f"{classes.start} … {classes.stop - 1}"
        )
    return Labelled(pixels.reshape(len(pixels), -1), found.astype(np.int64))


def read_idx(path: Path, shape: Sequence[int]) -> np.ndarray:
    """The unsigned bytes of an IDX file, ``[items, *shape]``.

    Raises:
        WorkloadError: it is not such a file, or its length is not the one it states.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _content(file, path, shape)
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"{path} cannot be read: {error}") from error


def _content(file: gzip.GzipFile | BufferedReader, path: Path, shape: Sequence[int]) -> np.ndarray:
    axes = 1 + len(shape)
    header = file.read(4 * (1 + axes))
    if header[:4] != bytes((0, 0, UNSIGNED_BYTES, axes)) or len(header) < 4 * (1 + axes):
        raise WorkloadError(
            f"{path} is not an IDX file of unsigned bytes with {axes} axes: it begins with {header[:4].hex(' ')}"
        )
    count, *found = struct.unpack(f">{axes}I", header[4:])
    if found != list(shape):
        raise WorkloadError(f"{path} holds items of {found}; expected {list(shape)}")
    size = count * math.prod(shape)
    if size > IDX_BYTES:
        raise WorkloadError(f"{path} says that it holds {count} items of {found}, more than {IDX_BYTES} bytes")
    data = file.read(size + 1)
    if len(data) != size:
        state = "ends too early" if len(data) < size else "goes on after its last item"
        raise WorkloadError(f"{path} {state}: it says that it holds {count} items of {found}; download it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(count, *shape)


def _path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise WorkloadError(f"data_dir: there is no {name} or {name}.gz in {folder}")
