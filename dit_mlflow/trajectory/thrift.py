"""Read structs in Thrift's compact protocol, which Parquet's footers and page headers are written in."""

from __future__ import annotations

from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BYTES, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)


def read_struct(content: bytes, position: int = 0) -> tuple[dict[int, Any], int]:
    """A struct by field number, and where it ends. Structs in it are dicts, lists are lists, texts are bytes.

    Raises:
        ValueError: there is none.

    Cost: no more memory than a small multiple of the bytes that are read.
    """
    try:
        return _struct(content, position)
    except (IndexError, RecursionError) as error:
        raise ValueError("a struct without an end") from error


def _struct(content: bytes, position: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while (head := content[position]) != 0:
        position += 1
        if head >> 4:
            number += head >> 4
        else:
            number, position = _integer(content, position)
        kind = head & 15
        if kind in (_TRUE, _FALSE):
            fields[number] = kind == _TRUE
        else:
            fields[number], position = _value(content, position, kind)
    return fields, position + 1


def _value(content: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _integer(content, position)
    if kind in (_TRUE, _FALSE, _BYTE):
        return content[position], position + 1
    if kind == _DOUBLE:
        return None, position + 8
    if kind == _BYTES:
        length, position = _unsigned(content, position)
        return content[position : position + length], position + length
    if kind in (_LIST, _SET):
        return _list(content, position)
    if kind == _STRUCT:
        return _struct(content, position)
    raise ValueError(f"Thrift type {kind} has no place here")


def _list(content: bytes, position: int) -> tuple[list[Any], int]:
    head = content[position]
    length, position = head >> 4, position + 1
    if length == 15:
        length, position = _unsigned(content, position)
    # An element takes a byte at least.
    if length > len(content) - position:
        raise ValueError("a list of more elements than there are bytes")
    elements = []
    for _ in range(length):
        element, position = _value(content, position, head & 15)
        elements.append(element)
    return elements, position


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
