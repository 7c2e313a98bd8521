"""How much a Parquet file holds, known before pyarrow sees it.

A small file can unpack to any size: its footer says how large its columns are, but pyarrow goes by the headers of their
pages. Both are read here. Nor is pyarrow asked for the footer: what it gives of a column's metadata ends the process
for some files that are not as they should be (pyarrow 25: ``RowGroupMetaData.column``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from dit_mlflow.trajectory.thrift import read_struct

UNPACKED_BYTES = 2**24
"""A file may unpack to so much, …"""
EXPANSION = 1024
"""… and to so many times its own size (full batches in the same order at every step), …"""
MOST_BYTES = 2**30
"""… but never to more than this: the recorder writes files of about 16 MiB, and up to 256 MiB after a disk failed."""

_MAGIC = b"PAR1"
_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3
_HEADER_OF = {_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}
"""Field of a page's header with the header of its kind, which begins with the number of values."""


def count_rows(path: Path) -> int:
    """The rows of a Parquet file, which is one group of them and does not unpack to more memory than it should.

    Raises:
        ValueError: it does, or it is no such file.
        OSError: it cannot be read.

    Cost: reads the file once, without unpacking anything.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            groups = _footer(file, size)[4]
            rows, columns = groups[0][3], [chunk[3] for chunk in groups[0][1]]
            if len(groups) != 1 or rows < 0:
                raise ValueError(f"its rows are in {len(groups)} groups; expected one")
            total = sum(_unpacked(file, column, size) for column in columns)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError("its footer, or the header of a page, lacks what it must say") from error
    allowed = min(MOST_BYTES, UNPACKED_BYTES + EXPANSION * size)
    if total > allowed:
        raise ValueError(
            f"its {size} bytes would unpack to {total}, more than the {allowed} that a record of that size can need"
        )
    return int(rows)


def _footer(file: BinaryIO, size: int) -> Mapping[int, Any]:
    """The struct ``FileMetaData`` of the Parquet format."""
    if size < 12:
        raise ValueError("it is too short for a Parquet file")
    file.seek(size - 8)
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > size - 12:
        raise ValueError("it does not end like a Parquet file")
    file.seek(size - 8 - length)
    return read_struct(file.read(length))[0]


def _unpacked(file: BinaryIO, column: Mapping[int, Any], size: int) -> int:
    """Bytes that one column (a ``ColumnMetaData``) takes in memory: its pages, and 8 for each value."""
    announced, unpacked, length, start = column[5], column[6], column[7], column[9]
    if 0 < (dictionary := column.get(11, 0)) < start:
        start = dictionary
    if not 0 <= start <= start + length <= size:
        raise ValueError("a column lies outside the file")
    file.seek(start)
    found = values = 0
    for kind, page, count in _pages(file.read(length)):
        found += page
        if kind != _DICTIONARY:
            values += count
        elif count > page:
            raise ValueError("a dictionary has more entries than bytes")
    if values != announced or found > unpacked:
        raise ValueError("its pages are not what its footer says")
    return found + 8 * values


def _pages(content: bytes) -> Iterator[tuple[int, int, int]]:
    """For each page: its kind, bytes when unpacked, number of values."""
    position = 0
    while position < len(content):
        header, position = read_struct(content, position)
        kind, unpacked, packed = header[1], header[2], header[3]
        count = header[_HEADER_OF[kind]][1]
        if min(unpacked, packed, count) < 0:
            raise ValueError("a page has a negative size")
        yield kind, unpacked, count
        position += packed
