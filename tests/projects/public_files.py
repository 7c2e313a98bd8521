"""Small files in the public formats, written byte by byte, and the real ones if they are at hand."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest


def real(name: str) -> str:
    """A file or folder of real data: ``DIT_DATA``, or ``shared/data`` beside the repository; skips without."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    path = Path(os.environ.get("DIT_DATA") or beside) / name
    if not path.exists():
        message = f"{path} is not there; DIT_DATA names the folder of the data sets"
        if os.environ.get("DIT_REQUIRE_SERVERS") == "1":
            pytest.fail(f"{message}; DIT_REQUIRE_SERVERS=1 forbids to skip")
        pytest.skip(message)
    return str(path)


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(path: Path, array: np.ndarray, compress: bool = False) -> None:
    if compress:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    else:
        path.write_bytes(idx_bytes(array))


def write_image_files(
    folder: Path, prefixes: tuple[str, str], labels: tuple[np.ndarray, np.ndarray], compress: bool = False
) -> list[np.ndarray]:
    """The four files of MNIST or a relative, with random images; returns the images of the two parts."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (prefix, found) in enumerate(zip(prefixes, labels, strict=True)):
        images = np.random.default_rng(number).integers(0, 256, size=(len(found), 28, 28), dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte", images, compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", found, compress)
        written.append(images)
    return written


def write_cifar(folder: Path, rows: int = 20) -> dict[str, np.ndarray]:
    """The six files of CIFAR-10's binary version; returns label and 3,072 pixels of each row."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    written = {}
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        data = generator.integers(0, 256, size=(rows, 3073), dtype=np.uint8)
        data[:, 0] = np.arange(rows) % 10
        (folder / name).write_bytes(data.tobytes())
        written[name] = data
    return written


PERSON = (
    "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, 2174, 0, 40, Cuba"
)


def person(**changes: str) -> str:
    """A row of adult.data without its label; names with an underscore for a hyphen."""
    names = (
        "age workclass fnlwgt education education_num marital_status occupation relationship race sex capital_gain "
        "capital_loss hours_per_week native_country"
    )
    values = dict(zip(names.split(), PERSON.split(", "), strict=True))
    assert changes.keys() <= values.keys()
    return ", ".join((values | changes).values())


def write_adult(folder: Path, training: list[str], test: list[str]) -> None:
    """Rows with their labels, as in the archive: an odd first line and full stops in adult.test, an empty last line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adult.data").write_text("".join(f"{row}\n" for row in training) + "\n")
    (folder / "adult.test").write_text("|1x3 Cross validator\n" + "".join(f"{row}.\n" for row in test) + "\n")


def write_archive(path: Path, files: Mapping[str, bytes], odd: list[tarfile.TarInfo] | None = None) -> None:
    """A tar.gz of these files, after members without content."""
    with tarfile.open(path, "w:gz") as archive:
        for member in odd or []:
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


PC, MAC = "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"


def posts(each: int = 20) -> dict[str, bytes]:
    """Short posts of two groups and a third one, numbered so that order of number is not order of text."""
    generator = np.random.default_rng(0)
    found = {}
    for group in (PC, MAC, "sci.space"):
        for part in ("train", "test"):
            for number in range(each):
                own = [f"{group[-12:].replace('.', '')}{word}" for word in generator.integers(20, size=4)]
                common = [f"common{word}" for word in generator.integers(20, size=4)]
                found[f"20news-bydate-{part}/{group}/{number + 9}"] = " ".join(["the", *own, *common, part]).encode()
    return found
