"""Opens and parses files that anyone may have written, in bounded memory and time."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

MOST_FAULTS = 10_000
"""Faults of a document at most of which the first is named."""

MOST_VALUES = 4_000_000
"""Values in a JSON document at most: each takes up to a hundred bytes of memory, whatever it takes in the file."""


def open_regular(path: Path) -> BinaryIO:
    """The opened file; raises ``OSError`` for a device or a pipe, which may have no end, before anything is read."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def parse_json(content: bytes) -> Any:
    """Parse JSON in UTF-8.

    Raises:
        ValueError: it is none, an object has a key twice, or there are more than :data:`MOST_VALUES` values.
    """
    if values_in(content) > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values")
    try:
        return json.loads(content.decode(), object_pairs_hook=_once_each)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def values_in(content: bytes) -> int:
    """At least as many as the values in a JSON document."""
    return sum(map(content.count, (b",", b"[", b"{")))


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one with a repeated key is refused, because parsers read it differently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} is there twice")
    return found


def first_fault(error: ValidationError) -> str:
    """Where the first fault is, and which; of very many, which take long to list, only how many."""
    if (count := error.error_count()) > MOST_FAULTS:
        return f"{count} values are not what is expected in their places"
    first = error.errors(include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole file'}: {first['msg']}"
