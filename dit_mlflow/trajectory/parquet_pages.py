"""How much a Parquet file holds, by its pages' own headers: known before anything in it is unpacked.

A file's footer says how large its columns are, but the reader goes by the headers of their pages, and a small file can
have pages that unpack to any size. Headers are Thrift structs in the compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

UNPACKED_BYTES = 2**24
"""A file may unpack to so much, …"""
EXPANSION = 1024
"""… and to so many times its own size (full batches in the same order at every step), …"""
MOST_BYTES = 2**30
"""… but never to more than this: the recorder writes files of about 16 MiB, and up to 256 MiB after a disk failed."""

_DICTIONARY_PAGE = 2


def check_size(path: Path, metadata: Any) -> None:
    """Refuse a file that would unpack to more memory than a record of its size can need.

    Args:
        path: of the file.
        metadata: its ``pyarrow.parquet.FileMetaData``.

    Raises:
        ValueError: it would, or footer and pages contradict each other.

    Cost: reads the file once.
    """
    size = path.stat().st_size
    allowed = min(MOST_BYTES, UNPACKED_BYTES + EXPANSION * size)
    total = 0
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                total += _unpacked(file, metadata.row_group(group).column(column), size)
    if total > allowed:
        raise ValueError(
            f"its {size} bytes would unpack to {total}, more than the {allowed} that a record of that size can need"
        )


def _unpacked(file: BinaryIO, chunk: Any, size: int) -> int:
    """Bytes that one column takes in memory: its pages, and 8 for each value."""
    start, length = chunk.data_page_offset, chunk.total_compressed_size
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        start = min(start, chunk.dictionary_page_offset)
    if not (0 <= start <= start + length <= size):
        raise ValueError("a column lies outside the file")
    file.seek(start)
    found = values = 0
    for kind, unpacked, count in _pages(file.read(length)):
        found += unpacked
        if kind != _DICTIONARY_PAGE:
            values += count
        elif count > unpacked:
            raise ValueError("a dictionary has more entries than bytes")
    if values != chunk.num_values or found > chunk.total_uncompressed_size:
        raise ValueError("its pages are not what its footer says")
    return found + 8 * values


def _pages(content: bytes) -> Iterator[tuple[int, int, int]]:
    """For each page: its kind, bytes when unpacked, number of values."""
    position = 0
    while position < len(content):
        try:
            header, position = _struct(content, position)
            kind, unpacked, packed = header[1], header[2], header[3]
            # The headers of data pages (version 1 and 2) and of dictionaries begin with the number of values.
            count = next(header[field][1] for field in (5, 8, 7) if field in header)
            if min(unpacked, packed, count) < 0:
                raise ValueError("a negative size")
        except (IndexError, KeyError, ValueError, TypeError, StopIteration, RecursionError) as error:
            raise ValueError("it has a page without a readable header") from error
        yield kind, unpacked, count
        position += packed


def _struct(content: bytes, position: int) -> tuple[dict[int, Any], int]:
    """A Thrift struct by field number, without its strings, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = content[position]
        position += 1
        if head == 0:
            return fields, position
        if head >> 4:
            number += head >> 4
        else:
            number, position = _integer(content, position)
        fields[number], position = _value(content, position, head & 15)


def _value(content: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, position
    if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
        return _integer(content, position)
    if kind == 8:  # bytes
        length, position = _unsigned(content, position)
        return None, position + length
    if kind == 12:
        return _struct(content, position)
    raise ValueError(f"Thrift type {kind} has no place in a page's header")


def _integer(content: bytes, position: int) -> tuple[int, int]:
    value, position = _unsigned(content, position)
    return (value >> 1) ^ -(value & 1), position


def _unsigned(content: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number of more than 64 bits")
