"""Values as text inside an HTML page: JSON that cannot break out of its element, and how many bytes it takes."""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from itertools import accumulate, takewhile
from typing import Any

import numpy as np

from dit_mlflow.told import encodable

_LARGEST = 6
"""Most bytes of a character: an escape such as ``\\u003c``."""


def json_in_html(value: Any) -> str:
    """JSON for a ``<script type="application/json">``: no character in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def embedded_bytes(value: Any) -> int:
    """Bytes of ``value`` in the page."""
    return len(json_in_html(value).encode())


def within(text: str, most: int) -> str:
    """``text`` that UTF-8 can hold, in at most ``most`` bytes of the page, quotes apart; if cut, with an ellipsis.

    Markup and control characters take up to six bytes each, so that fewer of them have room.
    """
    kept = encodable(text, max(1, most))
    if _LARGEST * len(kept) <= most or embedded_bytes(kept) - 2 <= most:
        return kept
    room = most - _bytes_of("…")
    whole = sum(1 for _ in takewhile(lambda used: used <= room, accumulate(map(_bytes_of, kept))))
    return f"{kept[:whole]}…"


@lru_cache(maxsize=10_000)
def _bytes_of(character: str) -> int:
    return embedded_bytes(character) - 2


def floats_of(values: np.ndarray) -> str:
    """Base64 of little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()


def bits_of(values: np.ndarray) -> str:
    """Base64 of booleans, eight in a byte, the first in the highest bit."""
    return base64.b64encode(np.packbits(values.ravel()).tobytes()).decode()


def base64_bytes(size: float) -> float:
    """Bytes of base64 for ``size`` bytes."""
    return 4 * size / 3
